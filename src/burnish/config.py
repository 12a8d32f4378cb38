"""The recipe's keys: strict, frozen models with the type, default and meaning of each. Imports no torch.

Validators check and never write; values that follow from others are properties of whoever uses them. How a recipe is
read, and what is said of a faulty one, is `recipe.py`'s.
"""

from __future__ import annotations

import difflib
import math
import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

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


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

# Where a validator takes more than the field holds, or less, it tells the JSON schema what a recipe may write.
Every = Annotated[
    int | float | Literal["epoch"] | None,
    BeforeValidator(_every, json_schema_input_type=Positive | Fraction | Literal["epoch"] | None),
]
"""A cadence: steps, a fraction of the run, `epoch` or null for never."""


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
    """Whose modules run: ours (Llama, Qwen2, Qwen3, Qwen3-MoE, GLM-4.7-Flash, DeepSeek-V3), or transformers'."""
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """Attention kernel: sdpa runs one call a document; varlen needs CUDA and bf16 compute, and auto takes it there."""
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


_WrittenSources = str | SourceConfig | list[str | SourceConfig]

SourceEntry = Annotated[SourceConfig, BeforeValidator(_source)]
Sources = Annotated[tuple[SourceEntry, ...], BeforeValidator(_sources, json_schema_input_type=_WrittenSources)]
HeldOut = Annotated[float | Sources, BeforeValidator(_validation, json_schema_input_type=Fraction | _WrittenSources)]


class LastTurns(Section):
    last_n: Positive
    """Train the last n assistant turns."""


class Roles(Section):
    roles: Annotated[tuple[str, ...], Field(min_length=1)]
    """Train every message of these roles."""


_ROLES = ("system", "developer", "user", "assistant", "tool")


def _train_on(value: Any) -> Any:
    # Told apart here, because a union complains once for each of its members.
    if isinstance(value, dict) and set(value) == {"last_n"}:
        if isinstance(value["last_n"], int) and not isinstance(value["last_n"], bool) and value["last_n"] >= 1:
            return LastTurns(last_n=value["last_n"])
        raise ValueError("last_n must be a number of turns, 1 or more")
    if isinstance(value, dict) and set(value) == {"roles"}:
        roles = value["roles"]
        if isinstance(roles, list) and roles and all(isinstance(role, str) for role in roles):
            unknown = next((role for role in roles if role not in _ROLES), None)
            if unknown is not None:
                near = difflib.get_close_matches(unknown, _ROLES, 1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"no message has the role {unknown!r}; {hint}the roles are {', '.join(_ROLES)}")
            return Roles(roles=tuple(roles))
        raise ValueError("roles must be a list of names, such as {roles: [user, assistant]}")
    if value in ("assistant", "last", "all") or isinstance(value, LastTurns | Roles):
        return value
    near = difflib.get_close_matches(value, ("assistant", "last", "all"), 1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"must be assistant, last, all, {{last_n: 2}} or {{roles: [user, assistant]}}{hint}")


_TrainOn = Literal["assistant", "last", "all"] | LastTurns | Roles
TrainOn = Annotated[_TrainOn, BeforeValidator(_train_on, json_schema_input_type=_TrainOn)]


def _day(value: str | None) -> str | None:
    if value is not None and (len(value) != 10 or not _is_day(value)):
        raise ValueError("must be a day as YYYY-MM-DD, such as 2026-01-31")
    return value


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


class DataConfig(Section):
    train: Sources = ()
    """Training sources; a bare path stands for {path: ...}."""
    validation: HeldOut = ()
    """Held-out sources, or the fraction of training rows to hold out."""
    max_length: Positive | None = None
    """Longest row, tokens; null leaves the model's maximum and the micro-batch budget."""
    over_long: Literal["error", "drop", "truncate"] = "error"
    """A row longer than the least of data.max_length, the model's maximum and the budget: stop, drop or cut it."""
    truncate_side: Literal["right", "left", "turns"] = "right"
    """What a cut removes: right the end, left the beginning behind the system turn, turns whole turns from the end."""
    train_on: TrainOn = "assistant"
    """What is trained of a chat: assistant | last | {last_n: 2} | all | {roles: [...]}; message weights go on top."""
    train_reasoning: bool = True
    """Whether the reasoning of trained turns is trained, with the marks that the template puts around it."""
    train_tool_calls: bool = True
    """Whether the tool calls of trained turns are trained, with the marks that the template puts around them."""
    turn_per_sample: bool = False
    """Each trained turn is a sample of its own, under exactly the prompt that inference would give it."""
    open_turns: Literal["report", "close", "error"] = "report"
    """A turn that no stop token ends: train it so and count it, end the last one as the template would, or stop."""
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
    date: Annotated[str | None, AfterValidator(_day)] = None
    """The day that templates which print today's date see (YYYY-MM-DD); null is that of the first start, saved."""
    chat_template: str | None = None
    """File of a Jinja chat template that replaces the tokenizer's; exported with the model."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments for the template, such as {enable_thinking: false}; a row's own win."""
    renderer: str | None = None
    """A function that writes prompts in place of a chat template: deepseek_v32, or the dotted path of your own."""

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> DataConfig:
        if self.renderer is not None and self.chat_template is not None:
            raise ValueError(
                f"data.renderer={self.renderer} and data.chat_template={self.chat_template} both write the prompts; "
                "set one of them to null"
            )
        of_turns = {
            name: getattr(self, name)
            for name in ("turn_per_sample", "train_reasoning", "train_tool_calls", "open_turns")
            if getattr(self, name) != type(self).model_fields[name].default
        }
        if self.train_on == "all" and of_turns:
            name, value = next(iter(of_turns.items()))
            raise ValueError(
                f"data.{name}={str(value).lower()} is about the turns of assistants, and data.train_on=all trains "
                f"whole texts; remove it, or set data.train_on to assistant"
            )
        if self.turn_per_sample and isinstance(self.train_on, Roles) and self.train_on.roles != ("assistant",):
            raise ValueError(
                f"data.turn_per_sample=true makes samples of assistants' turns, and data.train_on trains "
                f"{', '.join(self.train_on.roles)}; set data.train_on to assistant, or data.turn_per_sample to false"
            )
        return self


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
    def _nothing_in_vain(self) -> OptimConfig:
        if self.schedule == "constant" and self.min_lr > 0:
            raise ValueError(
                f"optim.min_lr={self.min_lr:g} has no effect with optim.schedule=constant; "
                "remove it or take another schedule"
            )
        if self.schedule != "wsd" and self.decay_ratio != type(self).model_fields["decay_ratio"].default:
            raise ValueError(
                f"optim.decay_ratio={self.decay_ratio:g} has no effect with optim.schedule={self.schedule}; "
                "remove it or take wsd"
            )
        return self

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
    """Gradients as they are added up over micro-batches and ranks; fp64 needs master fp64."""

    @model_validator(mode="after")
    def _master_holds_compute(self) -> PrecisionConfig:
        order = ("bf16", "fp32", "fp64")
        if order.index(self.master) < order.index(self.compute):
            raise ValueError(
                f"precision.master={self.master} is coarser than precision.compute={self.compute}; "
                f"set precision.master to {self.compute} or precision.compute to {self.master}"
            )
        if self.reduce == "fp64" and self.master != "fp64":
            raise ValueError(
                f"precision.reduce=fp64 needs precision.master=fp64, and it is {self.master}; set both to fp64"
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
    recompute_every: Positive = 1
    """Of how many blocks in a row one is recomputed; 1 takes every block."""
    offload_activations: bool = False
    """What blocks keep for backward lies in the host's memory until then."""
    router_aux_loss: NonNegative = 0.0
    """Weight of the load-balancing loss of experts, computed in each document (arXiv 2101.03961, 2412.19437)."""
    router_z_loss: NonNegative = 0.0
    """Weight of the routers' z-loss (arXiv 2202.08906)."""
    router_bias_rate: NonNegative = 0.0
    """Step by which sigmoid routers' choice is corrected toward an even load after every update (arXiv 2408.15664)."""
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
    step: Annotated[int, Field(ge=0)] | None = None
    """Go on from the checkpoint of this step; null takes the newest that is whole."""
    resume: str = "auto"
    """auto goes on from the folder's newest checkpoint, `never` wants a folder without any, a path names one."""
    export: Literal["end", "save", "never"] = "end"
    """Write a Hugging Face folder at the end, at every save, or never."""
    export_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Data type of exported weights."""
    allow_changes: bool = False
    """Resume although the recipe or the data changed in a way that alters results."""


class LoraConfig(Section):
    rank: Positive = 16
    """Inner size of every adapter (LoRA, arXiv 2106.09685)."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """Adapters are scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    kind: Literal["lora", "dora"] = "lora"
    """dora also trains the length of every row of an adapted weight (arXiv 2402.09353)."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Layers that get an adapter, by the ends of their names, [q_proj, v_proj]; all-linear: those of every block."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside the adapters, by the ends of their names: [embed_tokens]."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """The first factor: uniform within 1 / sqrt(inputs), or normal with deviation 1 / rank; the second is zero."""
    dropout: NonNegative = 0.0
    """Must be 0: what dropout keeps would depend on how packs and layers lie on ranks."""
    path: str | None = None
    """Folder of an adapter in peft's format to go on from."""
    merge: bool = False
    """Export whole weights with the adapters added in, instead of a folder with the adapters alone."""

    @model_validator(mode="after")
    def _possible(self) -> LoraConfig:
        if self.dropout > 0:
            raise ValueError(
                f"lora.dropout={self.dropout:g}: what it keeps would depend on the layout, so adapters train without; "
                "set it to 0, and lower optim.lr or raise optim.weight_decay against overfitting"
            )
        return self


def _stage(value: Any) -> Any:
    if isinstance(value, bool):  # which is the number 1 to a Literal
        raise ValueError("must be 1, 2 or 3")
    return value


class ParallelConfig(Section):
    dp_replicate: Positive = 1
    """Copies of the dp_shard group, each with the whole model and batches of its own (HSDP)."""
    dp_shard: Positive | Literal["auto"] = "auto"
    """Data-parallel ranks over which the model is cut as `zero` says; auto takes the ranks that are left."""
    zero: Annotated[Literal[1, 2, 3], BeforeValidator(_stage, json_schema_input_type=Literal[1, 2, 3])] = 3
    """ZeRO's stage (arXiv 1910.02054), what is cut over dp_shard ranks: 1 optimizer, 2 gradients too, 3 weights too."""
    offload: Literal["none", "optimizer", "parameters", "nvme"] = "none"
    """What lies in the host's memory: the optimizer's states, which are updated there, or every shard as well."""
    tp: Positive = 1
    """Tensor-parallel ranks: heads, MLP columns and the vocabulary (arXiv 1909.08053)."""
    sequence_parallel: bool | None = None
    """Norms and residuals are cut over tp ranks by tokens (arXiv 2205.05198); null does it where tp is above 1."""
    cp: Positive = 1
    """Context-parallel ranks: each pack is cut by tokens."""
    cp_kind: Literal["ring", "all_to_all"] = "ring"
    """ring: keys and values go round, zigzag (arXiv 2310.01889); all_to_all: tokens for heads (arXiv 2309.14509)."""
    pp: Positive = 1
    """Pipeline stages."""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"] = "1f1b"
    """Order of a pipeline's forward and backward passes."""
    pp_chunks: Positive | None = None
    """Parts of the model on one pipeline rank; null takes 2 for interleaved and zbv schedules, else 1."""
    pp_first_layers: Positive | None = None
    """Layers of the first part; null cuts by cost."""
    pp_last_layers: Positive | None = None
    """Layers of the last part; null cuts by cost."""
    ep: Positive = 1
    """Ranks over which experts are cut, out of the dp_shard x cp x tp that there are; ep x etp divides these."""
    etp: Positive = 1
    """Tensor-parallel ranks of an expert: 1 or tp."""

    @model_validator(mode="after")
    def _possible(self) -> ParallelConfig:
        if self.offload == "nvme":
            raise ValueError(
                "parallel.offload=nvme: shards are not written to disks; set it to parameters, which holds them and "
                "the optimizer in the host's memory"
            )
        if self.etp not in (1, self.tp):
            raise ValueError(f"parallel.etp={self.etp} is neither 1 nor parallel.tp={self.tp}; set it to one of them")
        return self


def _devices(value: Any) -> Any:
    """The numbers that a device mapping writes: lists and ranges, joined by +. It is parsed, never evaluated."""
    rule = "must be a list of device numbers such as [0, 1, 2, 3], or `list(range(0, 4))`, or such joined by +"
    numbers = list(value) if isinstance(value, list | tuple) else None
    if isinstance(value, str):
        numbers = []
        for term in value.split("+"):
            one = re.fullmatch(r"\s*(?:list\(\s*range\(([^()]*)\)\s*\)|range\(([^()]*)\)|\[([^\[\]]*)\])\s*", term)
            if one is None:
                raise ValueError(f"{rule}; {term.strip()!r} is neither")
            inner = next(group for group in one.groups() if group is not None)
            parts = [part.strip() for part in inner.split(",")] if inner.strip() else []
            if not all(re.fullmatch(r"-?[0-9]{1,6}", part) for part in parts):
                raise ValueError(f"{rule}; {inner.strip()!r} holds more than whole numbers")
            terms = [int(part) for part in parts]
            if one[3] is not None:
                numbers += terms
            elif 1 <= len(terms) <= 3 and (len(terms) < 3 or terms[2] != 0):
                numbers += range(*terms)
            else:
                raise ValueError(f"{rule}; a range has a start, an end and a step that is not 0")
    if value is None:
        return None
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError(f"{rule}, each 0 or more and at least one")
    if len(set(numbers)) < len(numbers):
        twice = next(n for n in numbers if numbers.count(n) > 1)
        raise ValueError(f"device {twice} is named twice, and a device holds one rank; name each once")
    return tuple(numbers)


DeviceMapping = Annotated[
    tuple[int, ...] | None, BeforeValidator(_devices, json_schema_input_type=list[int] | str | None)
]


class ClusterConfig(Section):
    address: str | None = None
    """Null starts Ray on this host, for this run alone; `auto` or HOST:PORT joins a Ray cluster."""
    num_nodes: Positive = 1
    """Hosts to run on."""
    devices_per_node: Positive | Literal["auto"] = "auto"
    """Ranks on each host; auto takes its CUDA devices, or 1 on a CPU."""
    device_mapping: DeviceMapping = None
    """The devices to use, one rank each, counted host by host: [0, 1, 2, 3] or "list(range(0, 4))"; null takes all."""
    env: dict[str, str | int | float] = {}
    """Environment variables of every rank's process."""
    wait: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600
    """Longest wait for hosts and devices at the start, seconds."""
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1800
    """Longest time a call of the ranks, with the collectives in it, may take, seconds; then it counts as hung."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often a run that lost a process or host is started again from its last checkpoint."""
    restart_wait: NonNegative = 60
    """Longest wait at a restart for a lost host to come back, seconds; then the run goes on with those left."""
    grace: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30
    """Longest time after SIGTERM for finishing the step and saving, seconds; then all is ended as it is."""
    object_store_memory: Annotated[int, Field(ge=80_000_000)] = 200_000_000
    """Shared memory for batches on their way in a Ray that is started here, bytes."""

    @model_validator(mode="after")
    def _possible(self) -> ClusterConfig:
        if self.address is not None and "://" in self.address:
            raise ValueError(
                f"cluster.address={self.address} goes through a proxy, and ranks talk to the driver directly; start "
                "the run on a host of the cluster and set it to auto or HOST:PORT"
            )
        if self.address not in (None, "auto") and not re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):\d+", self.address):
            raise ValueError(
                f"cluster.address={self.address} is no address of a Ray cluster; set it to auto or HOST:PORT, such as "
                "10.0.0.1:6379"
            )
        if self.address is None and self.num_nodes > 1:
            raise ValueError(
                f"cluster.num_nodes={self.num_nodes} needs a cluster, and cluster.address=null starts Ray on this host "
                "alone; set cluster.address to auto or HOST:PORT"
            )
        if self.device_mapping is not None and self.devices_per_node != "auto":
            most = self.num_nodes * self.devices_per_node
            if max(self.device_mapping) >= most:
                raise ValueError(
                    f"cluster.device_mapping names device {max(self.device_mapping)}, and cluster.num_nodes="
                    f"{self.num_nodes} x cluster.devices_per_node={self.devices_per_node} are devices 0 to {most - 1}; "
                    "name some of those"
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
    """Least severity written to the console and to logs/rank-N.log of every rank."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl; wandb needs the extra of that name."""


_MANNERS = (
    ("parallel.sequence_parallel", "parallel.tp", 1),
    ("parallel.cp_kind", "parallel.cp", 1),
    ("parallel.pp_schedule", "parallel.pp", 1),
    ("parallel.pp_chunks", "parallel.pp", 1),
    ("parallel.pp_first_layers", "parallel.pp", 1),
    ("parallel.pp_last_layers", "parallel.pp", 1),
    ("train.recompute_every", "train.recompute", "none"),
    ("cluster.restart_wait", "cluster.max_restarts", 0),
)
"""Keys that say how another does its work, that other, and its value without work."""


class Recipe(Section):
    model: ModelConfig
    """The model to start from."""
    lora: LoraConfig | None = None
    """Adapters to train in place of the model's own weights; null trains those."""
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
    """Layout over ranks, of which each is a process with a device: docs/layouts.md."""
    cluster: ClusterConfig = ClusterConfig()
    """Processes: hosts, devices, and what happens when one is lost."""
    run: RunConfig = RunConfig()
    """Folder, seed, device and logging."""

    @property
    def idle_keys(self) -> list[str]:
        """A sentence for each key that says how something is done which the recipe does not do.

        They change no result, and a layout is tried elsewhere by overriding its degrees alone: so this is for a
        warning, where a key that would change results and cannot is refused.
        """
        sentences: list[str] = []
        for key, other, nothing in _MANNERS:
            (section, name), (neighbour, work) = key.split("."), other.split(".")
            value, default = (
                getattr(of, name) for of in (getattr(self, section), Recipe.model_fields[section].default)
            )
            if value not in (default, False) and getattr(getattr(self, neighbour), work) == nothing:
                shown = str(value).lower()
                sentences.append(f"{key}={shown} has no effect with {other}={nothing}; remove it or set {other}")
        return sentences

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if self.lora is not None and self.model.freeze:
            raise ValueError(
                f"model.freeze={', '.join(self.model.freeze)}: with lora all but the adapters is frozen already; "
                "remove it, or lora"
            )
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
        if self.optim.name == "sgd" and self.precision.states in ("bf16", "int8"):
            raise ValueError(
                f"precision.states={self.precision.states} has no effect with optim.name=sgd, which keeps no states; "
                "remove it or take adamw"
            )
        evaluated, trained = self.evaluate.tokens_per_micro_batch, self.batch.tokens_per_micro_batch
        if evaluated is not None and evaluated < trained:
            raise ValueError(
                f"evaluate.tokens_per_micro_batch={evaluated} is less than batch.tokens_per_micro_batch={trained}, to "
                f"which rows may be long; set it to {trained} or more, or null"
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
