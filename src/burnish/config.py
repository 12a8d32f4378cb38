"""The recipe: strict, frozen models, read from YAML plus `a.b=c` overrides. Imports no torch.

The same fields give `burnish sft --help`, `burnish schema` and every error message. Validators check and never write;
values that follow from others are properties of whoever uses them.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from burnish.types import UserError


class RecipeError(UserError):
    """A recipe that cannot be run as it is written."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def _every(value: Any) -> Any:
    if value is None or value == "epoch":
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and ((isinstance(value, int) and value >= 1) or (isinstance(value, float) and 0 < value < 1)):
        return value
    raise ValueError("must be a number of steps (1 or more), a fraction of the run between 0 and 1, `epoch` or null")


Every = Annotated[int | float | Literal["epoch"] | None, BeforeValidator(_every)]
"""A cadence: steps, a fraction of the run, `epoch` or null for never."""

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ModelConfig(Section):
    path: str | None = None
    """Folder or hub id of a Hugging Face checkpoint to start from."""
    init: str | None = None
    """A config.json (or its folder): start from random weights of that shape instead of `path`."""
    revision: str = "main"
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null takes the model's own."""
    implementation: Literal["auto", "native", "transformers"] = "auto"
    """Whose modules run: native for Llama, Qwen2 and Qwen3, those of transformers for others; auto prefers native."""
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """Attention kernel: varlen needs CUDA, sdpa runs one call a document; auto takes varlen on CUDA."""
    trust_remote_code: bool = False
    """Run code that a checkpoint brings along (transformers implementation only)."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, as shell patterns of their names: `model.embed_tokens.*`."""

    @model_validator(mode="after")
    def _one_start(self) -> ModelConfig:
        if (self.path is None) == (self.init is None):
            given = "neither is set" if self.path is None else f"both are set ({self.path}, {self.init})"
            raise ValueError(
                f"exactly one of model.path and model.init says where weights come from, and {given}; "
                "set model.path to a folder or hub id, or model.init to a config.json"
            )
        if self.init is not None and self.tokenizer is None and self.init.endswith(".json"):
            raise ValueError(f"model.init={self.init} brings no tokenizer; set model.tokenizer to a tokenizer folder")
        return self


class SourceConfig(Section):
    path: str
    """A .jsonl, .json or .parquet file, a folder or glob of them, a `datasets` folder or hub name; @[a:b] slices."""
    name: str | None = None
    """The name in metrics and messages; null takes the file's."""
    format: Literal["auto", "messages", "prompt", "instruction", "sharegpt", "text", "tokens"] = "auto"
    """Shape of the rows: messages, prompt/completion, instruction fields, ShareGPT, plain text, pre-tokenised ids."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Share of the mixture; null means all rows once an epoch."""
    slice: str | None = None
    """Rows to keep, as `a:b` with Python's meaning (negative counts from the end)."""
    split: str = "train"
    """Split of a hub or `datasets` source."""
    config: str | None = None
    """Configuration (subset) of a hub source."""
    streaming: bool = False
    """Read rows as they come and never index them; needs train.steps."""
    prompt_key: str = "instruction"
    """Column of the instruction, or of the prompt where the row has prompt and completion."""
    query_key: str | None = None
    """Column appended to the instruction after a newline."""
    response_key: str = "output"
    """Column of the answer to an instruction."""
    system_key: str | None = None
    """Column of the system turn of an instruction row."""
    messages_key: str = "messages"
    """Column of the chat messages."""
    tools_key: str = "tools"
    """Column of the tool schemas: a list, or JSON text of one."""
    label_key: str | None = None
    """Column kept as the sample's label."""
    metadata_key: str = "metadata"
    """Column kept as the sample's metadata."""


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _sources(value: Any) -> Any:
    # Strict models take a tuple alone once a validator of ours has touched the JSON.
    return (value,) if isinstance(value, str | dict) else tuple(value) if isinstance(value, list) else value


def _validation(value: Any) -> Any:
    if isinstance(value, int | float):
        if not isinstance(value, bool) and 0 < value < 1:
            return value
        raise ValueError(
            "as a number it is the fraction of training rows to hold out, between 0 and 1; "
            "set 0.01, or a list of sources"
        )
    return _sources(value)


SourceEntry = Annotated[SourceConfig, BeforeValidator(_source)]
Sources = Annotated[tuple[SourceEntry, ...], BeforeValidator(_sources)]


class LastTurns(Section):
    last_n: Positive
    """Train the last n assistant turns."""


class Roles(Section):
    roles: Annotated[tuple[str, ...], Field(min_length=1)]
    """Train every message of these roles."""


TrainOn = Literal["assistant", "last", "all"] | LastTurns | Roles


class DataConfig(Section):
    train: Sources = ()
    """Training sources; a bare path stands for {path: ...}."""
    validation: Annotated[float | Sources, BeforeValidator(_validation)] = ()
    """Held-out sources, or the fraction of training rows to hold out."""
    max_length: Positive | None = None
    """Longest row, tokens; null leaves the model's maximum and the micro-batch budget."""
    over_long: Literal["error", "drop", "truncate"] = "error"
    """A row longer than the least of data.max_length, the model's maximum and the budget: stop, drop or cut it."""
    truncate_side: Literal["right", "left", "turns"] = "right"
    """What a cut removes: right the end, left the beginning behind the system turn, turns whole turns from the end."""
    train_on: TrainOn = "assistant"
    """What is trained of a chat: assistant | last | {last_n: 2} | all | {roles: [...]}; message weights go on top."""
    bad_rows: Literal["error", "drop"] = "error"
    """What happens to a row that cannot be read or has nothing to train."""
    shuffle: bool = True
    """A new order every epoch, a function of run.seed and the epoch alone."""
    prepare: Literal["ahead", "first"] = "ahead"
    """Tokenise ahead of training, or every row before step 1."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that tokenise; 0 does it in the main process, auto takes all cores but one, at most 8."""
    cache: str | None = None
    """Folder that keeps tokenised rows between runs, by content, template, tokenizer and code; null keeps none."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    """The day that templates which print today's date see (YYYY-MM-DD); null is that of the first start, saved."""
    chat_template: str | None = None
    """File of a Jinja chat template that replaces the tokenizer's; exported with the model."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments for the template, such as {enable_thinking: false}; a row's own win."""


class BatchConfig(Section):
    samples: Positive | None = 128
    """Samples an optimizer step."""
    tokens: Positive | None = None
    """Tokens an optimizer step, at most (one sample at least); set samples to null for it."""
    tokens_per_micro_batch: Positive = 16384
    """Token budget of one data rank's micro-batch, never exceeded."""
    packing: Literal["auto", "require", "off"] = "auto"
    """auto packs where the start-up probe proves that documents cannot see each other; require insists on it."""

    @model_validator(mode="after")
    def _one_size(self) -> BatchConfig:
        if self.tokens is not None and self.samples is not None:
            if "samples" in self.model_fields_set:
                raise ValueError(
                    f"batch.samples={self.samples} and batch.tokens={self.tokens} both set the batch size; "
                    "set one of them to null"
                )
        elif self.tokens is None and self.samples is None:
            raise ValueError("batch.samples=null and batch.tokens=null leave no batch size; set one of them")
        return self

    @property
    def size(self) -> tuple[Literal["samples", "tokens"], int]:
        """The unit that counts and how many make a step; `tokens` wins over the default of `samples`."""
        if self.tokens is not None:
            return "tokens", self.tokens
        assert self.samples is not None
        return "samples", self.samples


class OptimConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    """Optimizer; sgd is plain, without momentum."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay, times the learning rate."""
    no_decay: tuple[str, ...] | None = None
    """Parameters without weight decay, as shell patterns; null means those with fewer than two dimensions."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null clips nothing."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """Learning rate after warm-up; wsd is warm-up, stable, decay."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of linear, cosine and wsd, and the floor of inverse_sqrt."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the run that warms up linearly from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Warm-up in steps; wins over warmup_ratio."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the run in which wsd decays, at the end."""

    @model_validator(mode="after")
    def _min_below_peak(self) -> OptimConfig:
        if self.min_lr > self.lr:
            raise ValueError(
                f"optim.min_lr={self.min_lr:g} is above the peak optim.lr={self.lr:g}; set it to {self.lr:g} or less"
            )
        return self


class PrecisionConfig(Section):
    compute: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Forward and backward."""
    master: Literal["fp32", "bf16", "fp64"] = "fp32"
    """The weights that the optimizer updates."""
    states: Literal["fp32", "bf16", "int8", "fp64"] = "fp32"
    """The optimizer's moments; bf16 rounds stochastically, int8 is block-wise with a dynamic code."""
    reduce: Literal["fp32", "fp64"] = "fp32"
    """Gradients as they are added up over micro-batches and ranks."""

    @model_validator(mode="after")
    def _master_holds_compute(self) -> PrecisionConfig:
        order = ("bf16", "fp32", "fp64")
        if order.index(self.master) < order.index(self.compute):
            raise ValueError(
                f"precision.master={self.master} is coarser than precision.compute={self.compute}; "
                f"set precision.master to {self.compute} or precision.compute to {self.master}"
            )
        return self


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1
    """Passes over the weightless sources; a fraction ends within one."""
    steps: Positive | None = None
    """Optimizer steps; wins over epochs."""
    loss: Literal["token", "sample"] = "token"
    """Mean over all trained tokens of a step, or over samples of each one's mean."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in backward: none, all but matrix products and attention, or whole blocks."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of each block; auto does it on CUDA."""
    neftune_alpha: NonNegative | None = None
    """NEFTune: uniform noise on the embeddings, scaled by alpha / sqrt(length * hidden size) (arXiv 2310.05914)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability mass spread evenly over the vocabulary."""
    z_loss: NonNegative = 0.0
    """Weight of log(Z)^2, which keeps logits from drifting (arXiv 2204.02311)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """After a step whose loss or gradient is not finite (the weights never take it): stop, or go on without it."""
    memory_check: bool = True
    """Before step 1 run a full micro-batch at the longest known row and throw its gradients away."""


class EarlyStopping(Section):
    patience: Positive
    """Evaluations without a better held-out loss before the run ends."""
    min_delta: NonNegative = 0.0
    """The least fall in held-out loss that counts as better."""


class EvaluateConfig(Section):
    every: Every = 100
    """Evaluate the held-out rows: steps, a fraction of the run, `epoch` or null."""
    at_start: bool = True
    """Evaluate before step 1."""
    tokens_per_micro_batch: Positive | None = None
    """Token budget in evaluation; null takes batch.tokens_per_micro_batch."""
    prompts: tuple[str, ...] = ()
    """Prompts to answer at every evaluation, greedily."""
    max_new_tokens: Positive = 128
    """Longest of these answers, tokens."""
    early_stopping: EarlyStopping | None = None
    """End the run when the held-out loss stops falling: {patience: 3}."""


class CheckpointConfig(Section):
    every: Every = 100
    """Save: steps, a fraction of the run, `epoch` or null; the end is always saved."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Also save when this much time has passed since the last save, seconds."""
    keep: Positive | None = 2
    """Checkpoints to keep; null keeps all."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest held-out loss, and export that one."""
    resume: str = "auto"
    """auto goes on from the folder's newest checkpoint, `never` wants an empty folder, a path names a checkpoint."""
    export: Literal["end", "save", "never"] = "end"
    """Write a Hugging Face folder at the end, at every save, or never."""
    export_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Data type of exported weights."""
    allow_changes: bool = False
    """Resume although the recipe or the data changed in a way that alters results."""


class ParallelConfig(Section):
    dp_replicate: Positive = 1
    """Data-parallel replicas."""
    dp_shard: Positive = 1
    """Data-parallel ranks that share one copy of weights, gradients and optimizer."""
    tp: Positive = 1
    """Tensor-parallel ranks."""
    cp: Positive = 1
    """Context-parallel ranks."""
    pp: Positive = 1
    """Pipeline stages."""
    ep: Positive = 1
    """Expert-parallel ranks."""

    @model_validator(mode="after")
    def _one_process(self) -> ParallelConfig:
        for name in type(self).model_fields:
            if getattr(self, name) > 1:
                raise ValueError(
                    f"parallel.{name}={getattr(self, name)}: this version trains on one process; "
                    f"set parallel.{name} to 1"
                )
        return self


class RunConfig(Section):
    dir: str = "runs/my-run"
    """The run folder: checkpoints, metrics, logs, report, export."""
    name: str | None = None
    """The run's name in trackers and the model card; null takes the folder's."""
    seed: int = 42
    """Seed of everything random: order, initial weights, noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA where there is a device."""
    deterministic: bool = False
    """Deterministic kernels only, for bit-identical runs on CUDA; the CPU is deterministic as it is."""
    log_every: Positive = 1
    """Steps between metrics lines; values stay on the device until then."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity written to logs/rank-0.log and the console."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl; wandb needs the extra of that name."""


class Recipe(Section):
    model: ModelConfig
    """The model to start from."""
    data: DataConfig
    """Rows, and what of them is trained."""
    batch: BatchConfig = BatchConfig()
    """Size of a step and of a micro-batch."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    precision: PrecisionConfig = PrecisionConfig()
    """Data types."""
    train: TrainConfig = TrainConfig()
    """Length of the run, loss and memory."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Held-out loss and sample answers."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving, resuming and export."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over processes."""
    run: RunConfig = RunConfig()
    """Folder, seed, device and logging."""

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        streams = [s for s in self.data.train if s.streaming]
        if streams and self.train.steps is None:
            raise ValueError(
                f"data.train source {streams[0].path} is streamed, so an epoch has no known end; set train.steps"
            )
        if streams and isinstance(self.data.validation, float):
            raise ValueError(
                f"data.validation={self.data.validation} cannot be split from the streamed source {streams[0].path}; "
                "name validation files instead"
            )
        if self.data.prepare == "first" and streams:
            raise ValueError(
                f"data.prepare=first needs rows that end, and {streams[0].path} is streamed; set data.prepare to ahead"
            )
        weights = [s.weight for s in self.data.train if s.weight is not None]
        if weights and len(weights) == len(self.data.train) and self.train.steps is None:
            raise ValueError(
                "every source of data.train has a weight, so the mixture has no end; "
                "set train.steps, or weight: null on the source whose rows make an epoch"
            )
        if weights and len(weights) < len(self.data.train) and math.fsum(weights) >= 1:
            raise ValueError(
                f"data.train weights sum to {math.fsum(weights):g}; beside a source without weight "
                "they are shares of the mixture and must sum to less than 1"
            )
        if streams and any(s.weight is None for s in self.data.train) and len(self.data.train) > 1:
            raise ValueError(
                f"data.train mixes the stream {streams[0].path} with other sources; give every source a weight"
            )
        needs_validation = [
            name
            for name, asked in (
                ("checkpoint.keep_best", self.checkpoint.keep_best),
                ("evaluate.early_stopping", self.evaluate.early_stopping),
            )
            if asked
        ]
        if needs_validation and (not self.data.validation or self.evaluate.every is None):
            raise ValueError(f"{needs_validation[0]} needs a held-out loss; set data.validation and evaluate.every")
        return self


class _Loader(yaml.SafeLoader):
    """YAML as recipes are written: 1e-5 is a number, `no` and dates are text, a key given twice is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] in ("null", "int", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?((\d[\d_]*\.[\d_]*|\.\d+)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML by the rules of `_Loader`. Raises RecipeError with `origin` and the place of the fault."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


def apply_override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `tree` with one `a.b=value` set; list items are numbers: `data.train.0.path=x`. The value is YAML.

    Raises RecipeError where the text is no override or the path leads through a value.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override {override!r} is not of the form a.b=value, such as optim.lr=2e-5")
    value = parse_yaml(text, f"override {override!r}")

    def set_at(node: Any, keys: Sequence[str], done: str) -> Any:
        if not keys:
            return value
        key, rest = keys[0], keys[1:]
        here = f"{done}.{key}".lstrip(".")
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise RecipeError(
                    f"override {override!r}: {done} has {len(node)} items; {key!r} must be 0 to {len(node) - 1}"
                )
            return [set_at(item, rest, here) if i == int(key) else item for i, item in enumerate(node)]
        if node is None:
            node = {}
        if isinstance(node, str) and rest == () and key != "path":
            node = {"path": node}
        if not isinstance(node, dict):
            raise RecipeError(f"override {override!r}: {done}={node!r} has no keys below it")
        return {**node, key: set_at(node.get(key), rest, here)}

    return set_at(tree, tuple(path.split(".")), "")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with `a.b=c` overrides applied.

    Raises RecipeError: one message that names key, value, rule and remedy of every fault.
    """
    file = Path(path)
    if not file.is_file():
        raise RecipeError(
            f"recipe {file} does not exist; give the path of a YAML file, such as examples/quickstart.yaml"
        )
    tree = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if tree is not None and not isinstance(tree, dict):
        raise RecipeError(
            f"recipe {file} is a {type(tree).__name__}; it must be a mapping with the keys "
            + ", ".join(Recipe.model_fields)
        )
    return recipe_from_dict(tree or {}, overrides)


def recipe_from_dict(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a plain mapping, as `read_recipe` reads it. Raises RecipeError."""
    for override in overrides:
        tree = apply_override(tree, override)
    return validate(Recipe, tree)


SectionType = typing.TypeVar("SectionType", bound=Section)


def validate(section: type[SectionType], tree: Any) -> SectionType:
    """`tree` as `section`; strict, but a list serves where a tuple is meant. Raises RecipeError."""
    try:
        return section.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        faults = _faults(section, error)
        lines = (
            faults
            if len(faults) == 1
            else [f"{len(faults)} faults in the recipe:", *(f"  {fault}" for fault in faults)]
        )
        raise RecipeError("\n".join(lines)) from None
    except TypeError as error:
        raise RecipeError(f"recipe: {error}; use plain YAML values") from None


def _faults(section: type[Section], error: ValidationError) -> list[str]:
    # A union reports the complaints of each of its members; those of the deepest place are the ones to show.
    by_place: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False):
        keys = _place(section, fault["loc"])
        by_place.setdefault(".".join(keys), []).append(_fault(section, keys, fault))
    deepest = [p for p in by_place if not any(other.startswith(f"{p}.") for other in by_place)]
    return [" or ".join(dict.fromkeys(by_place[place])) for place in deepest]


def _place(section: type[Section], loc: tuple[int | str, ...]) -> list[str]:
    """The path as the user wrote it: pydantic adds the names of union members to it."""
    keys: list[str] = []
    node: Any = section
    for part in loc:
        if isinstance(part, int):
            keys.append(str(part))
            continue
        members = _sections(node)
        owner = next((m for m in members if part in m.model_fields), None)
        if owner is not None:
            node = owner.model_fields[part].annotation
            keys.append(part)
        elif (
            part == loc[-1]
            and not re.search(r"[\[\]()]|^(int|float|str|bool|constrained|tuple|literal|function)", part)
            and not any(part == m.__name__ for m in members)
        ):
            keys.append(part)
    return keys


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for arg in typing.get_args(annotation) for s in _sections(arg)]


def _fault(section: type[Section], keys: list[str], fault: Any) -> str:
    name = ".".join(keys) or "recipe"
    value = json.dumps(fault["input"], ensure_ascii=False, default=str)
    shown = value if len(value) <= 80 else value[:77] + "..."
    if fault["type"] == "extra_forbidden":
        known = sorted(path for path, _, _ in fields(section))
        siblings = [k for k in known if k.rpartition(".")[0] == _schema_path(keys[:-1])]
        near = difflib.get_close_matches(keys[-1], [k.rpartition(".")[2] for k in siblings], 1, 0.6)
        if near:
            return f"{name}={shown}: no such key; did you mean {'.'.join([*keys[:-1], near[0]])}?"
        elsewhere = [k for k in known if k.rpartition(".")[2] == keys[-1]]
        if elsewhere:
            return f"{name}={shown}: no such key; did you mean {elsewhere[0]}?"
        return f"{name}={shown}: no such key; the keys here are {', '.join(k.rpartition('.')[2] for k in siblings)}"
    if fault["type"] == "missing":
        return f"{name}: missing; {_doc(section, keys)}"
    if fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
        return (
            message if re.match(r"[a-z_]+\.[a-z_]+|exactly one|every source", message) else f"{name}={shown}: {message}"
        )
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{name}={shown}: {message.replace('input should be', 'must be')}"


def _schema_path(keys: Sequence[str]) -> str:
    return ".".join(k for k in keys if not k.isdigit())


def _doc(section: type[Section], keys: Sequence[str]) -> str:
    wanted = _schema_path(keys)
    return next((field.description or "" for path, field, _ in fields(section) if path == wanted), "")


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted path, pydantic field, type as text) of every key below `section`, depth first, sections included."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field, type_text(field.annotation)
        for nested in _sections(field.annotation):
            yield from fields(nested, f"{path}.")


def type_text(annotation: Any) -> str:
    """A field's type as a user would say it: `int | null`, `error | drop`, `[section, ...]`."""
    if annotation is None or annotation is type(None):
        return "null"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_text(args[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_text(a) for a in args))
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin is tuple:
        return f"[{type_text(args[0])}, ...]" if args[-1] is Ellipsis else f"[{', '.join(type_text(a) for a in args)}]"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "{" + ", ".join(annotation.model_fields) + "}" if len(annotation.model_fields) == 1 else "section"
    if origin is dict:
        return "mapping"
    return {"str": "text", "bool": "true | false"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def help_text() -> str:
    """Every key with its type, default and meaning, for `burnish sft --help`."""
    lines: list[str] = []
    for path, field, kind in fields(Recipe):
        depth = path.count(".")
        name = path.rpartition(".")[2]
        if depth == 0:
            lines += ["", f"{name}:  {field.description}"]
        elif path.startswith("data.validation."):
            continue
        else:
            default = "" if field.is_required() else f" = {json.dumps(field.default, default=list)}"
            lines += [f"{'  ' * depth}{name}: {kind}{default}", f"{'  ' * depth}    {field.description}"]
    return "\n".join(lines).lstrip("\n")


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "burnish recipe",
    }


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `read_recipe` reads back to an equal one."""
    return yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False, allow_unicode=True)
