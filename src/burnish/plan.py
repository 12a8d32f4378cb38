"""`burnish plan`: what a recipe needs and how long it takes, without any device.

Arguments in, tables or JSON and an exit status out. It builds the model on meta, reads a sample of the rows, and
searches layouts; `estimate.py` knows what a layout costs, `observe.plan_terminal` draws.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from burnish.config import ParallelConfig, Recipe, RecipeError
from burnish.data.chat import caught
from burnish.data.pack import first_fit
from burnish.data.prepare import StreamedRow
from burnish.data.rows import Rows
from burnish.estimate import (
    BYTES,
    GIB,
    HARDWARE,
    Assumptions,
    Content,
    Hardware,
    Layout,
    RankMemory,
    RankModel,
    Sizes,
    StepTime,
    Values,
    Work,
    rank_memory,
    recompute_flops,
    step_time,
)
from burnish.files import write_whole
from burnish.model import zoo
from burnish.model.base import CausalLM, UnsupportedModel, expert_share, model_shape
from burnish.model.hf_io import find_folder, read_config
from burnish.observe.flops import ModelShape, step_flops
from burnish.observe.plan_terminal import Section, draw
from burnish.observe.units import count_text, duration_text
from burnish.parallel.checks import check_layout
from burnish.parallel.degrees import Degrees
from burnish.parallel.divisible import check_tensor_parallel
from burnish.parallel.stages import cut_model, num_micro_batches
from burnish.parallel.trace import Micro, cut, planned_attention, trace
from burnish.parts import InspectedSource, Parts
from burnish.recipe import read_recipe
from burnish.train.optim import DTYPES
from burnish.train.trainer import freeze_parameters
from burnish.types import RowError, UserError

SAMPLED_ROWS = 1_000
DRAWS = 4
"""Steps that are drawn from the sampled rows to see how they pack."""
SHOWN_LAYOUTS = 10
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Request:
    """The arguments of `burnish plan`."""

    recipe: str
    overrides: Sequence[str] = ()
    hardware: str | None = None
    peak: float | None = None
    bandwidth: float | None = None
    memory: float | None = None
    link: float | None = None
    network: float | None = None
    devices: int | None = None
    devices_per_node: int = 8
    efficiency: float = 0.5
    tokens_per_row: int | None = None
    rows: int | None = None
    fit: bool = False
    json: str | None = None


def plan(request: Request) -> int:
    """Show what the request asks for; the exit status is 0, or 3 where it does not fit in the memory stated.

    Raises UserError where the recipe, the model, the rows or the layout cannot be used, before anything is shown.
    """
    planner = Planner(request, read_recipe(request.recipe, request.overrides))
    found = planner.fit() if request.fit else planner.plan()
    if request.json == "-":
        print(json.dumps(found.tree, indent=2))
        return found.status
    if request.json is not None:
        try:
            write_whole(Path(request.json).resolve(), json.dumps(found.tree, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json={request.json} cannot be written: {error.strerror}; name another file") from None
    draw(sys.stdout, found.title, found.facts, found.sections)
    return found.status


@dataclass(frozen=True)
class Found:
    """What a plan says: as tables, and as JSON."""

    title: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    tree: dict[str, Any]

    @property
    def status(self) -> int:
        return 3 if any(section.is_bad for section in self.sections) else 0


# --- the model ---


def read_model_config(recipe: Recipe) -> dict[str, Any]:
    """The config.json of the recipe's model, a folder, a file or of the hub's cache. Raises UserError without one."""
    model = recipe.model
    place = model.init if model.init is not None else str(model.path)
    source = Path(place).expanduser()
    if not source.exists():
        if model.init is not None:
            raise UserError(f"model.init={place}: no such file; give a config.json or its folder")
        source = find_folder(place, model.revision)
    return zoo.complete(read_config(source))


def build_on_meta(config: dict[str, Any], recipe: Recipe, device: Literal["cpu", "cuda"]) -> CausalLM:
    """The recipe's model with what is frozen and adapted, in the compute type and without values."""
    compute = DTYPES[recipe.precision.compute]
    attention = planned_attention(recipe.model.attention, device, compute)
    asked = recipe.model.implementation
    try:
        model = None if asked == "transformers" else zoo.build(config, attention.kernel, dtype=compute, device="meta")
    except UnsupportedModel:
        zoo.choose_implementation(asked, config)  # says why native modules cannot be had, if they must
        model = None
    if model is None:
        from transformers import AutoConfig, AutoModelForCausalLM  # seconds

        from burnish.model.hf_model import HFModel

        remote = recipe.model.trust_remote_code
        described = AutoConfig.for_model(**config)
        with torch.device("meta"):
            inner = AutoModelForCausalLM.from_config(described, dtype=compute, trust_remote_code=remote)
        model = HFModel(inner, attention)
    if recipe.lora is not None:
        from burnish.model.lora import inject

        inject(model, recipe.lora, compute)
    freeze_parameters(model, recipe.model.freeze)
    return model


def rank_models(
    config: dict[str, Any],
    recipe: Recipe,
    degrees: Degrees,
    micro: Micro,
    device: Literal["cpu", "cuda"],
    modes: Sequence[str] = (),
) -> dict[str, RankModel]:
    """What one rank of `degrees` holds of the model, and keeps of a micro-batch in each mode of recomputation, or in
    the recipe's alone.
    """
    model = build_on_meta(config, recipe, device)
    cut(model, degrees.tp, recipe.parallel.sequence_parallel is not False, degrees.ep, degrees.etp)
    blocks = model.blocks()
    inside = {parameter for block in blocks for parameter in block.parameters()}
    around = [(name, p) for name, p in model.named_parameters() if p not in inside]
    model_of = partial(
        RankModel,
        blocks=tuple(_content(block.named_parameters()) for block in blocks),
        embedding=_content((name, p) for name, p in around if _is_embedding(name)),
        head=_content((name, p) for name, p in around if not _is_embedding(name)),
        is_tied=_is_tied(model),
        largest=max(p.numel() for block in blocks for p in block.parameters()),
    )
    footprints = trace(model, micro.part(degrees.cp, degrees.tp), device, modes or (recipe.train.recompute,))
    return {mode: model_of(footprint=footprint) for mode, footprint in footprints.items()}


def _content(parameters: Iterable[tuple[str, nn.Parameter]]) -> Content:
    values = {True: [0, 0], False: [0, 0]}
    for name, parameter in parameters:
        values[parameter.requires_grad][".experts." in name] += parameter.numel()
    trained, frozen = Values(*values[True]), Values(*values[False])
    return Content(trained + frozen, trained)


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "wpe"))


def _is_tied(model: CausalLM) -> bool:
    head = model.head().weight_VD
    return any(parameter is head for name, parameter in model.named_parameters() if _is_embedding(name))


@dataclass(frozen=True)
class Counts:
    """Parameters by part, exact. `active` are those that a token meets."""

    parts: dict[str, int]
    total: int
    trained: int
    active: int


def count_parameters(model: CausalLM) -> Counts:
    """Every parameter once: a tied head is the embedding."""
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[_part_of(name)] += parameter.numel()
    share = expert_share(model.config)
    return Counts(
        parts={name: parts[name] for name in PART_NAMES if parts[name]},
        total=parts.total(),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        active=parts.total() - round(parts["experts"] * (1 - share)),
    )


PART_NAMES = ("embedding", "attention", "MLP", "experts", "shared experts", "router", "norms", "head", "adapters")


def _part_of(name: str) -> str:
    if "lora_" in name:
        return "adapters"
    if _is_embedding(name):
        return "embedding"
    if "norm" in name or "ln_" in name:
        return "norms"
    if "shared_expert" in name:
        return "shared experts"
    if ".experts." in name:
        return "experts"
    if ".gate." in name or ".router." in name:
        return "router"
    if "attn" in name or "attention" in name:
        return "attention"
    return "head" if "lm_head" in name or "embed_out" in name else "MLP"


# --- the rows ---


@dataclass(frozen=True)
class RowSample:
    """Lengths and trained tokens of sampled rows; `num_rows` are all training rows, None where that is not known."""

    lengths: tuple[int, ...]
    trained: tuple[int, ...]
    num_rows: int | None
    source: str
    left_out: int = 0
    """Sampled rows of which there is no sample."""

    @property
    def mean(self) -> float:
        return sum(self.lengths) / len(self.lengths)


def sample_rows(recipe: Recipe, request: Request) -> RowSample:
    """Rows as they will be trained, or as `--tokens-per-row` states them. Raises UserError where there are none."""
    if request.tokens_per_row is not None:
        if request.tokens_per_row > recipe.batch.tokens_per_micro_batch:
            raise RecipeError(
                f"--tokens-per-row={request.tokens_per_row} is more than batch.tokens_per_micro_batch="
                f"{recipe.batch.tokens_per_micro_batch}; raise that, or state fewer"
            )
        length = request.tokens_per_row
        text = f"{length:,} tokens each, all trained, as --tokens-per-row says"
        return RowSample((length,), (max(1, length - 1),), request.rows, text)
    try:
        return _read_sample(recipe, request)
    except UserError as error:
        raise type(error)(f"{error}; or plan without rows: --tokens-per-row N, with --rows N") from None


def _read_sample(recipe: Recipe, request: Request) -> RowSample:
    parts = Parts(recipe)
    sources = [source for source in parts.sources if source.split == "train"]
    sizes = [source.num_rows for source in sources]
    known = sum(size for size in sizes if size is not None)
    lengths, trained, left_out = [], [], 0
    for number, source in enumerate(sources):
        size = sizes[number]
        quota = SAMPLED_ROWS // len(sources) if size is None else math.ceil(SAMPLED_ROWS * size / known)
        for row in _spread(source, number, quota):
            rows = caught(parts.preparer.parts, row)
            made = [] if isinstance(rows, RowError) else parts.tokenizer.encode_batch(rows, parts.selection)
            fitted = [e if isinstance(e, RowError) else caught(parts.preparer.fit, e) for e in made]
            whole = [encoded for encoded in fitted if not isinstance(encoded, RowError)]
            left_out += not whole
            lengths += [len(encoded.tokens) for encoded in whole]
            trained += [int(np.count_nonzero(encoded.loss_weights)) for encoded in whole]
    if not sum(trained):
        raise UserError("no sampled row of data.train has a token to train; `burnish inspect` says why")
    share = recipe.data.validation if isinstance(recipe.data.validation, float) else 0.0
    num_rows = None if None in sizes else round(known * (1 - share))
    text = f"{len(lengths):,} sampled" + (f" of {num_rows:,}" if num_rows is not None else " of a stream")
    return RowSample(tuple(lengths), tuple(trained), num_rows, text, left_out)


def _spread(source: InspectedSource, number: int, quota: int) -> Iterator[StreamedRow]:
    """Rows from all over a source, or the first ones of a stream."""
    if not isinstance(source.rows, Rows):
        yield from source.read(number, quota)
        return
    for index in np.linspace(0, len(source.rows) - 1, min(quota, len(source.rows))).round().astype(int).tolist():
        yield StreamedRow(number, index, source.rows.where(index), caught(source.rows.__getitem__, index))


@dataclass(frozen=True)
class Steps:
    """A typical step, and how many there are; None where rows end nowhere known."""

    num_samples: float
    num_tokens: float
    num_trained: float
    num_packs: int
    micro: Micro
    """The fullest micro-batch seen."""
    lengths: tuple[int, ...]
    total: int | None


def draw_steps(recipe: Recipe, rows: RowSample) -> Steps:
    """Steps of rows drawn from the sample, cut as training cuts them."""
    unit, size = recipe.batch.size
    count = size if unit == "samples" else max(1, int(size / rows.mean))
    generator = np.random.default_rng(recipe.run.seed)
    lengths_N, trained_N = np.array(rows.lengths), np.array(rows.trained)
    draws, packs = [], []
    for _ in range(DRAWS):
        picked = generator.integers(0, len(lengths_N), count)
        bins = first_fit(lengths_N[picked].tolist(), recipe.batch.tokens_per_micro_batch)
        draws.append((picked, bins))
        packs.append(len(bins))
    picked, fullest = max(
        ((picked, chosen) for picked, bins in draws for chosen in bins), key=lambda p: lengths_N[p[0][p[1]]].sum()
    )
    chosen = picked[fullest]
    total = recipe.train.steps
    if total is None and rows.num_rows is not None:
        kept = rows.num_rows * len(rows.lengths) / (len(rows.lengths) + rows.left_out)
        total = max(1, math.ceil(kept * recipe.train.epochs / count - 1e-6))
    first = draws[0][0]
    return Steps(
        num_samples=count,
        num_tokens=count * rows.mean,
        num_trained=count * sum(rows.trained) / len(rows.trained),
        num_packs=math.ceil(sum(packs) / DRAWS),
        micro=Micro(tuple(lengths_N[chosen].tolist()), int(trained_N[chosen].sum())),
        lengths=tuple(lengths_N[first].tolist()),
        total=total,
    )


# --- layouts ---


@dataclass(frozen=True)
class Estimate:
    """What one layout costs."""

    recipe: Recipe
    layout: Layout
    memories: Sequence[RankMemory]
    time: StepTime | None

    @property
    def peak(self) -> float:
        return max(memory.peak for memory in self.memories)


@dataclass
class Planner:
    """The recipe's model and rows, and the estimates of layouts for them."""

    request: Request
    recipe: Recipe
    _models: dict[tuple[Any, ...], dict[str, RankModel]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hardware = requested_hardware(self.request)
        self.config = read_model_config(self.recipe)
        self.origin = zoo.choose_implementation(self.recipe.model.implementation, self.config)
        self.model = build_on_meta(self.config, self.recipe, self.device)
        self.counts = count_parameters(self.model)
        self.degrees = Degrees.of(self.recipe.parallel, self._world())
        self.check(self.recipe.parallel, self.degrees)

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Whose kernels are planned for."""
        return "cpu" if self.recipe.run.device == "cpu" else "cuda"

    def _world(self) -> int:
        parallel, cluster = self.recipe.parallel, self.recipe.cluster
        if self.request.devices is not None:
            return self.request.devices
        if cluster.device_mapping is not None:
            return len(cluster.device_mapping)
        if cluster.devices_per_node != "auto":
            return cluster.num_nodes * cluster.devices_per_node
        shards = 1 if parallel.dp_shard == "auto" else parallel.dp_shard
        return parallel.dp_replicate * shards * parallel.cp * parallel.tp * parallel.pp

    def check(self, parallel: ParallelConfig, degrees: Degrees) -> None:
        """Raises RecipeError for a layout that the model cannot have."""
        recipe = self.recipe.model_copy(update={"parallel": parallel})
        check_layout(self.model, recipe, degrees, self.device, *self.origin)

    @property
    def num_experts(self) -> int:
        sizes = (self.model.config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
        return next((size for size in sizes if size), 1)

    @cached_property
    def shape(self) -> ModelShape:
        return model_shape(self.model)

    @cached_property
    def rows(self) -> RowSample:
        return sample_rows(self.recipe, self.request)

    @cached_property
    def steps(self) -> Steps:
        return draw_steps(self.recipe, self.rows)

    @cached_property
    def flops(self) -> dict[str, float]:
        """Of one step, by part."""
        steps, shape = self.steps, self.shape
        body = 6.0 * shape.body_parameters * steps.num_tokens
        head = 6.0 * shape.head_parameters * steps.num_trained
        drawn = step_flops(shape, steps.lengths, 0)
        attention = drawn - 6.0 * shape.body_parameters * sum(steps.lengths)
        return {"body": body, "attention": attention, "lm head": head}

    @cached_property
    def work(self) -> Work:
        config, blocks = self.model.config, self.model.blocks()
        sparse = sum(any(".experts." in name for name, _ in block.named_parameters()) for block in blocks)
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        return Work(
            flops=self.flops,
            micro_tokens=self.steps.micro.num_tokens,
            num_packs=self.steps.num_packs,
            hidden_size=config["hidden_size"],
            num_layers=len(blocks),
            num_sparse_layers=sparse,
            top_k=config.get("num_experts_per_tok") or 0,
            kv_size=2 * heads * self.shape.head_dim,
        )

    @cached_property
    def layer_costs(self) -> list[float]:
        """Of each block the parameters that a token meets."""
        share = expert_share(self.model.config)
        values = [_content(block.named_parameters()).all for block in self.model.blocks()]
        return [block.dense + block.experts * share for block in values]

    def stages(self, parallel: ParallelConfig) -> list[range]:
        """The layers of every part of the pipeline."""
        if parallel.pp == 1:
            return [range(len(self.layer_costs))]
        head = float(self.model.head().weight_VD.numel())
        return [part.layers for part in cut_model(parallel, self.layer_costs, 0.0, head)]

    def estimate(self, recipe: Recipe, degrees: Degrees) -> Estimate:
        """Memory and time of `recipe` laid out by `degrees`."""
        parallel, steps = recipe.parallel, self.steps
        key = (degrees.tp, degrees.cp, degrees.ep, degrees.etp, parallel.sequence_parallel)
        if key not in self._models:
            modes = RECOMPUTE if self.request.fit else (recipe.train.recompute,)
            self._models[key] = rank_models(self.config, recipe, degrees, steps.micro, self.device, modes)
        model = self._models[key][recipe.train.recompute]
        micro = num_micro_batches(parallel, -(-steps.num_packs // degrees.data_ranks))
        layout = Layout(parallel, degrees, Sizes.of(recipe), micro, self.device, self._exchange(recipe, degrees))
        parts = self.stages(parallel)
        memories = [rank_memory(model, layout, parts, rank) for rank in range(degrees.pp)]
        time = None
        if self.hardware is not None:
            assumptions = self.assumptions
            time = step_time(model, layout, parts, self.work, recipe.train.recompute, self.hardware, assumptions)
        return Estimate(recipe, layout, memories, time)

    @property
    def assumptions(self) -> Assumptions:
        return Assumptions(efficiency=self.request.efficiency, devices_per_node=self.request.devices_per_node)

    def _exchange(self, recipe: Recipe, degrees: Degrees) -> float:
        """Buffers of what ranks exchange within a block."""
        compute, work = BYTES[recipe.precision.compute], self.work
        tokens = -(-self.steps.micro.num_tokens // degrees.cp)
        buffers = 0.0
        if degrees.cp > 1:  # keys and values that come while others are computed, and their gradients in fp32
            buffers += tokens * work.kv_size / degrees.tp * (2 * compute + 4)
        if degrees.ep > 1:  # rows sent and received
            buffers += 2 * tokens / degrees.tp * work.top_k * work.hidden_size * compute
        if degrees.pp > 1:  # hidden states and gradients on their way
            buffers += 2 * tokens / degrees.tp * work.hidden_size * compute
        return buffers

    # --- what is said ---

    @property
    def limit(self) -> float | None:
        """Bytes that a rank may fill; None where no memory is stated."""
        if self.request.memory is None and (self.hardware is None or not self.hardware.memory):
            return None
        stated = self.hardware.memory if self.request.memory is None and self.hardware else 0.0
        return (self.request.memory * GIB if self.request.memory else stated) * self.assumptions.fill

    def plan(self) -> Found:
        """The recipe's own layout."""
        estimate = self.estimate(self.recipe, self.degrees)
        sections = [self._parameters(), self._step(estimate), self._memory(estimate), self._disk()]
        if estimate.time is not None:
            sections.append(self._time(estimate))
        return Found(f"plan of {self.request.recipe}", self._facts(estimate), sections, self._tree(estimate))

    def fit(self) -> Found:
        """The layouts of the stated devices that fit, by time."""
        if self.hardware is None or self.limit is None:
            raise RecipeError(
                f"--fit ranks layouts by time and memory; give --hardware {', '.join(HARDWARE)}, or --peak TFLOPS with "
                "--bandwidth GB/s and --memory GiB"
            )
        fitting, dropped = search(self)
        best = fitting[:SHOWN_LAYOUTS]
        sections = [self._parameters(), _layouts(best, len(fitting), self.limit), _dropped(dropped)]
        facts = self._facts(None)
        tree = {
            **self._model_tree(),
            "layouts": [self._estimate_tree(estimate) for estimate in fitting],
            "dropped": dict(dropped),
        }
        if best:
            sections += [self._memory(best[0]), self._time(best[0]), _to_paste(best[0])]
        return Found(f"layouts of {self.request.recipe} on {self.degrees.world} devices", facts, sections, tree)

    def _facts(self, estimate: Estimate | None) -> list[tuple[str, str]]:
        recipe, counts = self.recipe, self.counts
        active = f", {count_text(counts.active)} active" if counts.active < counts.total else ""
        facts = [
            ("model", f"{zoo.architecture_of(self.config)}, {count_text(counts.total)} parameters{active}"),
            ("rows", self.rows.source),
        ]
        if self.rows.left_out:
            facts.append(("left out", f"{self.rows.left_out:,} sampled rows give no sample; see `burnish inspect`"))
        if estimate is not None:
            facts.append(("layout", layout_text(recipe, self.degrees)))
        facts.append(("precision", precision_text(recipe)))
        if self.hardware is not None:
            facts.append(("hardware", f"{self.degrees.world} x {self.hardware.name}"))
        return facts

    def _parameters(self) -> Section:
        counts = self.counts
        rows = [(name, f"{number:,}", f"{number / counts.total:.1%}") for name, number in counts.parts.items()]
        rows.append(("all", f"{counts.total:,}", ""))
        if counts.active < counts.total:
            rows.append(("active for a token", f"{counts.active:,}", f"{counts.active / counts.total:.1%}"))
        if counts.trained < counts.total:
            rows.append(("trained", f"{counts.trained:,}", f"{counts.trained / counts.total:.1%}"))
        notes = ("the head is the embedding",) if _is_tied(self.model) else ()
        return Section("parameters", ("", "number", "share"), rows, notes)

    def _step(self, estimate: Estimate) -> Section:
        steps, total = self.steps, sum(self.flops.values())
        again = recompute_flops(self.work, self.recipe.train.recompute)
        rows = [
            ("samples", f"{steps.num_samples:,.0f}"),
            ("tokens", f"{steps.num_tokens:,.0f}"),
            ("of these trained", f"{steps.num_trained:,.0f}"),
            ("micro-batches of a data rank", f"{estimate.layout.num_micro_batches:,}"),
            ("tokens of the fullest", f"{steps.micro.num_tokens:,} in {len(steps.micro.lengths):,} documents"),
            *((f"FLOPs, {name}", f"{flops_text(flops)} ({flops / total:.1%})") for name, flops in self.flops.items()),
            ("FLOPs in all", flops_text(total) + (f" + {flops_text(again)} for recomputing" if again else "")),
        ]
        if steps.total is None:
            return Section("a step", ("", ""), rows, ("how many steps there are is not known: give --rows N",))
        rows.append(("steps", f"{steps.total:,}"))
        rows.append(("tokens of the run", count_text(steps.total * steps.num_tokens)))
        return Section("a step", ("", ""), rows)

    def _memory(self, estimate: Estimate) -> Section:
        shown = _shown(estimate.memories)
        parts = [name for name in shown[0].forward_backward if any(m.forward_backward[name] for m in shown)]
        rows = [(name, *(gib(memory.forward_backward.get(name, 0.0)) for memory in shown)) for name in parts]
        rows.append(("forward and backward", *(gib(sum(m.forward_backward.values())) for m in shown)))
        rows.append(("optimizer step", *(gib(sum(m.optimizer_step.values())) for m in shown)))
        if any(memory.host for memory in shown):
            rows.append(("in the host's memory", *(gib(memory.host) for memory in shown)))
        fullest = max(estimate.memories, key=lambda memory: memory.peak)
        notes = [f"fullest in {fullest.moment}" if _is_forward(fullest) else "fullest in the optimizer's step"]
        if self.limit is not None:
            fits = fullest.peak <= self.limit
            text = f"{'fits' if fits else 'does not fit'} in {gib(self.limit)} GiB"
            notes.append(f"{text} ({self.assumptions.fill:.0%} of {gib(self.limit / self.assumptions.fill)})")
        columns = ("GiB", *(f"{m.role}, {m.layers} layers" if len(shown) > 1 else m.role for m in shown))
        return Section("memory of a rank", columns, rows, tuple(notes), self._is_short(estimate))

    def _is_short(self, estimate: Estimate) -> bool:
        return self.limit is not None and estimate.peak > self.limit

    def _disk(self) -> Section:
        size = checkpoint_bytes(self.counts, self.recipe)
        exported = self.counts.total * (4 if self.recipe.checkpoint.export_dtype == "fp32" else 2)
        rows = [("a checkpoint", gib(size)), ("an export", gib(exported))]
        keep = self.recipe.checkpoint.keep
        notes = (f"{keep} checkpoints are kept, and one more while it is written",) if keep is not None else ()
        return Section("on disk", ("GiB", ""), rows, notes)

    def _time(self, estimate: Estimate) -> Section:
        time, hardware, assumptions = estimate.time, self.hardware, self.assumptions
        assert time is not None
        assert hardware is not None
        rows = [(name, seconds_text(seconds)) for name, seconds in time.parts.items() if seconds > 0]
        speed = self.steps.num_tokens / time.total
        rows.append(("a step", seconds_text(time.total)))
        rows.append(("tokens a second", f"{count_text(speed)} ({count_text(speed / self.degrees.world)} a device)"))
        rows.append(("MFU", f"{self._utilisation(time):.1%}"))
        if self.steps.total is not None:
            rows.append(("the run", duration_text(time.total * self.steps.total)))
        notes = (
            f"assumed: {assumptions.efficiency:.0%} of {hardware.flops / 1e12:,.0f} TFLOP/s while computing "
            f"(--efficiency), {assumptions.transfer:.0%} of {hardware.bandwidth / 1e9:,.0f} GB/s of memory, "
            f"{hardware.link / 1e9:,.0f} GB/s to devices of the node (--link) and {hardware.network / 1e9:,.0f} GB/s "
            f"to others (--network), {assumptions.devices_per_node} devices a node (--devices-per-node); gathering and "
            "reducing of data ranks beside computing, all other communication in front of it",
        )
        return Section("time", ("", ""), rows, notes)

    def _utilisation(self, time: StepTime) -> float:
        assert self.hardware is not None
        return sum(self.flops.values()) / time.total / self.degrees.world / self.hardware.flops

    def _model_tree(self) -> dict[str, Any]:
        counts, steps = self.counts, self.steps
        return {
            "recipe": self.request.recipe,
            "architecture": zoo.architecture_of(self.config),
            "parameters": {"parts": counts.parts} | {n: getattr(counts, n) for n in ("total", "trained", "active")},
            "step": {
                "samples": steps.num_samples,
                "tokens": steps.num_tokens,
                "trained_tokens": steps.num_trained,
                "micro_batches": steps.num_packs,
                "fullest_micro_batch_tokens": steps.micro.num_tokens,
                "flops": self.flops,
            },
            "steps": steps.total,
            "checkpoint_bytes": round(checkpoint_bytes(counts, self.recipe)),
        }

    def _tree(self, estimate: Estimate) -> dict[str, Any]:
        return {**self._model_tree(), **self._estimate_tree(estimate)}

    def _estimate_tree(self, estimate: Estimate) -> dict[str, Any]:
        time = estimate.time
        memories = [
            {
                "role": memory.role,
                "layers": memory.layers,
                "forward_backward": {name: round(value) for name, value in memory.forward_backward.items()},
                "optimizer_step": {name: round(value) for name, value in memory.optimizer_step.items()},
                "peak": round(memory.peak),
                "host": round(memory.host),
            }
            for memory in estimate.memories
        ]
        return {
            "layout": layout_keys(estimate),
            "memory_bytes": memories,
            "fits": None if self.limit is None else not self._is_short(estimate),
            "seconds": None if time is None else {**time.parts, "step": time.total},
            "mfu": None if time is None else self._utilisation(time),
        }


def checkpoint_bytes(counts: Counts, recipe: Recipe) -> float:
    """Masters, or a frozen base as it is held, and the optimizer's states."""
    sizes = Sizes.of(recipe)
    return counts.trained * (sizes.master + sizes.states) + (counts.total - counts.trained) * sizes.frozen


def requested_hardware(request: Request) -> Hardware | None:
    """The hardware of a request; None where none is stated. Raises RecipeError for one that is not known."""
    if request.hardware is not None:
        named = HARDWARE.get(request.hardware.upper())
        if named is None:
            raise RecipeError(
                f"--hardware={request.hardware} is not known; take {', '.join(HARDWARE)}, or state --peak TFLOPS with "
                "--bandwidth GB/s and --memory GiB"
            )
    elif request.peak is None:
        return None
    elif request.bandwidth is None:
        raise RecipeError(f"--peak={request.peak:g} needs --bandwidth, the device's memory bandwidth in GB/s")
    else:
        like = HARDWARE["H100"]
        named = replace(like, name=f"a device of {request.peak:g} TFLOP/s", memory=0.0)
    stated = {
        "flops": (request.peak, 1e12),
        "bandwidth": (request.bandwidth, 1e9),
        "memory": (request.memory, GIB),
        "link": (request.link, 1e9),
        "network": (request.network, 1e9),
    }
    return replace(named, **{name: value * unit for name, (value, unit) in stated.items() if value is not None})


# --- the search ---


def search(planner: Planner) -> tuple[list[Estimate], Counter[str]]:
    """All layouts of the planner's devices that fit, fastest first, and how many others were dropped for what."""
    dropped: Counter[str] = Counter()
    fitting: list[Estimate] = []
    limit = planner.limit
    assert limit is not None
    for parallel in candidates(planner):
        degrees = Degrees.of(parallel, planner.degrees.world)
        reason = _obstacle(planner, parallel, degrees)
        if reason is not None:
            dropped[reason] += 1
            continue
        for recompute in RECOMPUTE:
            train = planner.recipe.train.model_copy(update={"recompute": recompute})
            recipe = planner.recipe.model_copy(update={"parallel": parallel, "train": train})
            estimate = planner.estimate(recipe, degrees)
            if estimate.peak > limit:
                dropped[f"needs more than {gib(limit)} GiB on a rank"] += 1
            else:
                fitting.append(estimate)
    return sorted(fitting, key=_rank), dropped


def _rank(estimate: Estimate) -> tuple[float, ...]:
    """By time to three digits; of equals the one with more room, and that with fewer kinds of parallelism."""
    assert estimate.time is not None
    degrees = estimate.layout.degrees
    return float(f"{estimate.time.total:.3g}"), degrees.tp * degrees.cp * degrees.pp * degrees.ep, estimate.peak


def candidates(planner: Planner) -> Iterator[ParallelConfig]:
    """Layouts of the planner's devices, possible or not; offload and schedule stay the recipe's."""
    world, per_node = planner.degrees.world, planner.request.devices_per_node
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    nodes = world // per_node if world % per_node == 0 else 1
    experts = [n for n in divisors if planner.num_experts % n == 0]
    for pp in divisors:
        for tp in (n for n in divisors if n <= per_node):
            for cp in (n for n in divisors if n <= per_node):
                for replicate in sorted({1, nodes}):
                    if world % (pp * tp * cp * replicate):
                        continue
                    inner = world // pp // replicate
                    for ep in (n for n in experts if inner % n == 0):
                        for zero in (1, 2, 3) if inner // tp > 1 else (3,):
                            keys = {"pp": pp, "tp": tp, "cp": cp, "dp_replicate": replicate, "ep": ep, "zero": zero}
                            yield planner.recipe.parallel.model_copy(update={**keys, "dp_shard": "auto", "etp": 1})


def _obstacle(planner: Planner, parallel: ParallelConfig, degrees: Degrees) -> str | None:
    """Why a layout cannot be, in words that are alike for alike layouts."""
    checks: tuple[tuple[str, Callable[[], object]], ...] = (
        ("tp does not divide heads or columns", lambda: check_tensor_parallel(planner.model.config, degrees.tp)),
        ("more pipeline parts than layers", lambda: planner.stages(parallel)),
        ("the model cannot be computed so", lambda: planner.check(parallel, degrees)),
    )
    for reason, check in checks:
        try:
            check()
        except RecipeError:
            return reason
    if degrees.data_ranks > planner.steps.num_packs:
        return "more data ranks than micro-batches in a step"
    return None


# --- words ---


def layout_keys(estimate: Estimate) -> dict[str, Any]:
    """The recipe's keys of a layout."""
    degrees, recipe = estimate.layout.degrees, estimate.recipe
    names = ("dp_replicate", "dp_shard", "tp", "cp", "pp", "ep", "etp")
    keys = {f"parallel.{name}": getattr(degrees, name) for name in names}
    keys |= {"parallel.zero": recipe.parallel.zero, "parallel.offload": recipe.parallel.offload}
    return keys | {"train.recompute": recipe.train.recompute}


def layout_text(recipe: Recipe, degrees: Degrees) -> str:
    """Degrees above 1, and what else makes a layout."""
    if degrees.world == 1:
        return f"one process, recompute {recipe.train.recompute}"
    names = ("dp_replicate", "dp_shard", "tp", "cp", "pp", "ep", "etp")
    words = [f"{name} {getattr(degrees, name)}" for name in names if getattr(degrees, name) > 1]
    if degrees.dp_shard * degrees.cp > 1:
        words.append(f"zero {recipe.parallel.zero}")
    if degrees.pp > 1:
        words.append(recipe.parallel.pp_schedule)
    if recipe.parallel.offload != "none":
        words.append(f"offload {recipe.parallel.offload}")
    return f"{degrees.world} ranks: {', '.join(words)}, recompute {recipe.train.recompute}"


def precision_text(recipe: Recipe) -> str:
    precision = recipe.precision
    states = f", states {precision.states}" if recipe.optim.name == "adamw" else ""
    return f"compute {precision.compute}, masters {precision.master}{states}"


def gib(size: float) -> str:
    """Bytes in GiB, in three digits or three decimals."""
    value = size / GIB
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{decimals}f}"


def flops_text(flops: float) -> str:
    return f"{flops:.2e}"


def seconds_text(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _is_forward(memory: RankMemory) -> bool:
    return sum(memory.forward_backward.values()) >= sum(memory.optimizer_step.values())


def _shown(memories: Sequence[RankMemory]) -> list[RankMemory]:
    """First, middle and last of a pipeline."""
    if len(memories) <= 3:
        return list(memories)
    return [memories[0], memories[len(memories) // 2], memories[-1]]


def _layouts(best: Sequence[Estimate], number: int, limit: float) -> Section:
    names = ("dp_replicate", "dp_shard", "zero", "tp", "cp", "pp", "ep", "recompute")
    rows = []
    for estimate in best:
        assert estimate.time is not None
        keys = layout_keys(estimate)
        values = [keys.get(f"parallel.{name}", keys["train.recompute"]) for name in names]
        rows.append((*map(str, values), gib(estimate.peak), seconds_text(estimate.time.total)))
    columns = (*(name.replace("dp_replicate", "replicate").replace("dp_shard", "shard") for name in names), "GiB")
    notes = [f"{len(best)} of {number} layouts that fit in {gib(limit)} GiB"] if best else []
    if not best:
        notes = [
            "no layout fits; take more devices, a smaller batch.tokens_per_micro_batch, narrower states, or offload"
        ]
    # A column that says the same everywhere says nothing, but for the two that are always wanted.
    return _without_ones(Section("layouts, fastest first", (*columns, "a step"), rows, tuple(notes), not best))


def _without_ones(section: Section) -> Section:
    """Without the degrees that are 1 in all rows."""
    kept = [
        column
        for column, name in enumerate(section.columns)
        if name in ("shard", "zero", "recompute", "GiB", "a step") or any(row[column] != "1" for row in section.rows)
    ]
    rows = [tuple(row[column] for column in kept) for row in section.rows]
    return replace(section, columns=tuple(section.columns[column] for column in kept), rows=rows)


def _dropped(dropped: Counter[str]) -> Section:
    rows = [(reason, f"{number:,}") for reason, number in dropped.most_common()]
    return Section("dropped", ("reason", "layouts"), rows)


def _to_paste(estimate: Estimate) -> Section:
    keys = layout_keys(estimate)
    recompute = keys.pop("train.recompute")
    defaults = ParallelConfig()
    changed = {name.partition(".")[2]: value for name, value in keys.items()}
    lines = [f"  {name}: {value}" for name, value in changed.items() if value != getattr(defaults, name)]
    text = (("parallel:", *lines) if lines else ("parallel: {}",)) + (f"train: {{recompute: {recompute}}}",)
    return Section("for the recipe", (), (), text, is_code=True)
