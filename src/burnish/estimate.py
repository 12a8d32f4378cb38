"""What a step costs on a rank of a layout: bytes by part at its fullest moments, and seconds on stated hardware.

Arithmetic on plain numbers: what the modules keep for their backward comes from `parallel/trace.py`, what a layout
makes of it stands here. It builds no model and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from burnish.config import ParallelConfig, PrecisionConfig, Recipe
from burnish.parallel.degrees import Degrees
from burnish.parallel.stages import num_chunks, parts_of

if TYPE_CHECKING:
    from burnish.parallel.trace import Footprint, Pass

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "int8": 1}
INT8_BLOCK = 256
"""Values that share one fp32 scale in int8 states."""
STRETCH = {"cpu": 2**17, "cuda": 2**22}
"""Values that a narrow optimizer updates at a time (train/optim.py)."""
STRETCH_BYTES = {"int8": 56, "bf16": 40}
"""What it needs for each of them beside weights, gradients and states, by the states' type; measured."""
PARTS = ("weights", "compute weights", "gradients", "optimizer", "activations", "lm head", "communication")


@dataclass(frozen=True, slots=True)
class Values:
    """Parameters of a part of a rank's model: what data ranks share, and experts, which fewer ranks share."""

    dense: int
    experts: int = 0

    def __add__(self, other: Values) -> Values:
        return Values(self.dense + other.dense, self.experts + other.experts)

    @property
    def total(self) -> int:
        return self.dense + self.experts

    def shard(self, degrees: Degrees) -> float:
        """Of these, what one rank holds at all times."""
        return self.dense / (degrees.dp_shard * degrees.cp) + self.experts / degrees.expert_dp


@dataclass(frozen=True, slots=True)
class Content:
    """All parameters of a part of a model and the trained ones among them."""

    all: Values
    trained: Values

    def __add__(self, other: Content) -> Content:
        return Content(self.all + other.all, self.trained + other.trained)

    @property
    def frozen(self) -> Values:
        return Values(self.all.dense - self.trained.dense, self.all.experts - self.trained.experts)


NOTHING = Content(Values(0), Values(0))


@dataclass(frozen=True)
class RankModel:
    """A rank's part of the model after tensor and expert parallelism: every block, and what stands around them."""

    blocks: tuple[Content, ...]
    embedding: Content
    head: Content
    """The last norm, and the head where it is no embedding."""
    is_tied: bool
    largest: int
    """Values of the largest parameter in a block."""
    footprint: Footprint


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of one value."""

    master: float
    compute: float
    reduce: float
    gradient: float
    frozen: float
    states: float
    stretch: float
    """Of each value that a narrow optimizer has in hand; 0 for one that updates in place."""

    @classmethod
    def of(cls, recipe: Recipe) -> Sizes:
        precision: PrecisionConfig = recipe.precision
        master, reduce = BYTES[precision.master], BYTES[precision.reduce]
        moments = 0 if recipe.optim.name == "sgd" else 2
        scale = 4 / INT8_BLOCK if precision.states == "int8" else 0
        is_narrow = master == 2 or (moments > 0 and precision.states != precision.master)
        states = moments * (BYTES[precision.states] + scale)
        stretch = STRETCH_BYTES.get(precision.states, STRETCH_BYTES["bf16"]) if is_narrow else 0
        compute = BYTES[precision.compute]
        # Adapters' base is never updated, so it needs no master beside what it computes in.
        frozen = compute if recipe.lora is not None else master
        return cls(master, compute, reduce, max(master, reduce), frozen, states, stretch)


@dataclass(frozen=True)
class RankMemory:
    """The fullest moments of a rank, bytes by part."""

    role: str
    layers: int
    forward_backward: Mapping[str, float]
    optimizer_step: Mapping[str, float]
    moment: str
    """Where in forward and backward the peak is."""
    host: float = 0.0
    """In the host's memory, where `parallel.offload` puts it."""

    @property
    def peak(self) -> float:
        return max(sum(self.forward_backward.values()), sum(self.optimizer_step.values()))


@dataclass(frozen=True)
class _Moment:
    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Layout:
    """How a step lies over ranks; `num_micro_batches` are those of one data rank."""

    parallel: ParallelConfig
    degrees: Degrees
    sizes: Sizes
    num_micro_batches: int
    device: str = "cuda"
    exchange: float = 0.0
    """Buffers of context, tensor and expert parallelism in a block, bytes."""

    @property
    def is_cast(self) -> bool:
        """Whether one process copies its weights into the compute type for a step."""
        return not self.is_sharded and self.sizes.compute != self.sizes.master

    @property
    def is_sharded(self) -> bool:
        """Whether weights are gathered and cast by FSDP2, as on any number of ranks but one."""
        return self.degrees.world > 1

    def in_flight(self, rank: int) -> int:
        """Forward passes of a part that a pipeline rank keeps at most before it runs the backward of one.

        1F1B: arXiv 2104.04473, section 2.2; interleaved: the warm-up of torch's schedules; zero-bubble V: arXiv
        2401.10241 (as much as 1F1B's first rank on all).
        """
        pp, chunks, micro = self.degrees.pp, num_chunks(self.parallel), self.num_micro_batches
        match self.parallel.pp_schedule:
            case _ if pp == 1:
                return 1
            case "gpipe":
                return micro
            case "1f1b":
                return min(micro, pp - rank)
            case "zbv_zero_bubble":
                return min(2 * micro, 2 * pp)
            case _:
                return min(micro * chunks, (chunks - 1) * pp + 2 * (pp - 1 - rank) + 1)


def rank_memory(model: RankModel, layout: Layout, parts: Sequence[range], pipeline_rank: int) -> RankMemory:
    """The memory of the ranks at `pipeline_rank`; `parts` are the layers of every part of the pipeline."""
    return _Rank(model, layout, parts, pipeline_rank).memory()


@dataclass
class _Rank:
    model: RankModel
    layout: Layout
    parts: Sequence[range]
    rank: int
    own: list[int] = field(init=False)

    def __post_init__(self) -> None:
        pp = self.layout.degrees.pp
        self.own = list(parts_of(self.rank, self.layout.parallel)) if pp > 1 else [0]

    def memory(self) -> RankMemory:
        rounds = (True,) if self.layout.num_micro_batches == 1 else (True, False)
        moments = [moment for part in self.own for first in rounds for moment in self._moments(part, first)]
        fullest = max(moments, key=lambda moment: moment.total)
        step = self._always() | {"gradients": self._gradients(self._content(self.own), whole=False)}
        step["optimizer"] += self.layout.sizes.stretch * min(STRETCH[self.layout.device], self.model.largest)
        resident, host = self._offloaded(fullest.parts), 0.0
        if self.layout.parallel.offload != "none":
            host = sum(fullest.parts.values()) - sum(resident.values())
            step = self._offloaded(step)
        pp = self.layout.degrees.pp
        name = "every rank" if pp == 1 else f"pipeline rank {self.rank}"
        layers = sum(len(self.parts[part]) for part in self.own)
        return RankMemory(name, layers, resident, step, fullest.name, host)

    def _offloaded(self, parts: Mapping[str, float]) -> dict[str, float]:
        """What stays on the device of `parts`."""
        offload = self.layout.parallel.offload
        gone = {"none": (), "optimizer": ("optimizer",)}.get(offload, ("weights", "gradients", "optimizer"))
        return {name: value for name, value in parts.items() if name not in gone}

    def _content(self, parts: Sequence[int]) -> Content:
        content = NOTHING
        for part in parts:
            for layer in self.parts[part]:
                content = content + self.model.blocks[layer]
        return content + self._shell(parts)

    def _shell(self, parts: Sequence[int]) -> Content:
        content = NOTHING
        has_head = len(self.parts) - 1 in parts
        if 0 in parts or (has_head and self.model.is_tied):
            content = content + self.model.embedding
        return content + self.model.head if has_head else content

    def _always(self) -> dict[str, float]:
        """What is held from one step to the next."""
        sizes, degrees, content = self.layout.sizes, self.layout.degrees, self._content(self.own)
        weights = content.trained.shard(degrees) * sizes.master + content.frozen.shard(degrees) * sizes.frozen
        return {"weights": weights, "optimizer": content.trained.shard(degrees) * sizes.states}

    def _gradients(self, content: Content, whole: bool) -> float:
        """Of all micro-batches until now."""
        sizes, trained = self.layout.sizes, content.trained
        if not self.layout.is_sharded:
            return trained.total * sizes.gradient
        return trained.total * sizes.reduce if whole else trained.shard(self.layout.degrees) * sizes.master

    @property
    def _keeps_whole_gradients(self) -> bool:
        """Whether gradients are reduced once a step, and whole until then (parallel/fsdp.py)."""
        parallel, sizes = self.layout.parallel, self.layout.sizes
        return (
            self.layout.is_sharded
            and self.layout.num_micro_batches > 1
            and (parallel.zero == 1 or sizes.master < sizes.reduce)
        )

    def _moments(self, part: int, first: bool) -> Iterator[_Moment]:
        """The moments of one micro-batch in one part, of which one may be the fullest."""
        footprint = self.model.footprint
        layers = self.parts[part]
        # Copies of the weights leave their gradients to the masters, so that each backward is a first one.
        fresh = first or self.layout.is_sharded or self.layout.is_cast
        blocks = footprint.blocks if fresh else footprint.later_blocks
        shell = footprint.shell if fresh else footprint.later_shell
        always, sizes = self._always(), self.layout.sizes
        whole = self._keeps_whole_gradients
        held = 0.0 if first else self._gradients(self._content(self.own), whole)
        others = self._in_flight(blocks, shell.hidden)
        is_first, is_last = part == 0, part == len(self.parts) - 1
        # FSDP2 lets go of what it reduced last when it reduces again.
        last = 0.0 if first or whole or not self.layout.is_sharded else self._shell([part]).trained.total * sizes.reduce
        kept = [0.0]
        for layer in layers:
            kept.append(kept[-1] + blocks[layer].kept)

        def moment(name: str, activations: float, number: int, ahead: int, gradients: float, **more: float) -> _Moment:
            gathered, moving = self._weights(part, number, ahead)
            parts = {
                **always,
                "compute weights": gathered,
                "gradients": held + gradients,
                "activations": activations + others,
                "communication": moving + more.get("communication", 0.0) + self.layout.exchange,
                "lm head": more.get("head", 0.0),
            }
            return _Moment(name, parts)

        before = shell.before if is_first else shell.hidden
        for number, layer in enumerate(layers):
            activations = before + kept[number] + blocks[layer].forward - shell.hidden
            yield moment("a forward", activations, number, 1, 0.0, communication=last)
        if is_last:
            head = shell.head - shell.before
            yield moment("the lm head", shell.before + kept[-1], len(layers) - 1, 0, 0.0, head=head, communication=last)
        after = shell.after if is_last else shell.hidden
        made = 0.0  # but for the shell's own, which `after` and `end` count
        for number, layer in reversed(list(enumerate(layers))):
            content = self.model.blocks[layer]
            reducing = self._reducing(layers, number + 1) if number + 1 < len(layers) else last
            activations = after + kept[number] + blocks[layer].backward - shell.hidden
            yield moment("a backward", activations, number, -1, made, communication=reducing)
            if self.layout.is_sharded:
                activations = after + kept[number] + content.trained.total * sizes.compute
                reducing = self._reducing(layers, number)
                yield moment("a reduction", activations, number, -1, made, communication=reducing)
            if self.layout.is_cast:
                # Autograd casts gradients to the masters' type after all else, in the order of the parameters' making.
                made += content.trained.total * sizes.compute
            elif first:
                made += self._gradients(content, whole)
        if is_first:
            reducing = self._reducing(layers, 0)
            yield moment("the embedding's backward", shell.end, -1, 0, made, communication=reducing)
        if self.layout.is_sharded and (is_first or is_last):
            trained = self._shell([part]).trained
            buffers = trained.total * sizes.reduce + trained.shard(self.layout.degrees) * sizes.reduce
            reduction = moment("the embedding's reduction", trained.total * sizes.compute, -1, 0, made)
            reduction.parts["communication"] += 0.0 if whole else buffers
            reduction.parts["compute weights"] -= self._shell(self.own).all.total * sizes.compute
            yield reduction
        if self.layout.is_cast:
            yield moment("the cast of gradients", 0.0, -1, 0, self._cast(first))

    def _cast(self, first: bool) -> float:
        """Gradients at most while those of the compute type become those of the masters', beside all earlier ones."""
        sizes, content, shell = self.layout.sizes, self._content(self.own), self._shell(self.own)
        if first:
            return content.trained.total * sizes.gradient + self.model.embedding.trained.total * sizes.compute
        return max(
            content.trained.total * sizes.compute + self.model.largest * sizes.gradient,
            shell.trained.total * (sizes.compute + sizes.gradient),
        )

    def _in_flight(self, blocks: Sequence[Pass], hidden: float) -> float:
        """What other micro-batches keep on this rank meanwhile."""
        others = self.layout.in_flight(self.rank) - 1
        if self.layout.degrees.pp == 1 or not others:
            return 0.0
        kept = sum(blocks[layer].kept for part in self.own for layer in self.parts[part]) / len(self.own)
        return others * (kept + 2 * hidden)

    def _weights(self, part: int, number: int, ahead: int) -> tuple[float, float]:
        """Weights of the compute type while layer `number` of `part` runs, and buffers of those that come."""
        sizes = self.layout.sizes
        if not self.layout.is_sharded:
            return (self._content(self.own).all.total * sizes.compute if self.layout.is_cast else 0.0), 0.0
        layers = self.parts[part]
        root = self._shell(self.own).all.total
        unit = [self.model.blocks[layer].all.total for layer in layers]
        here = unit[number] if 0 <= number < len(unit) else 0
        coming = unit[number + ahead] if 0 <= number + ahead < len(unit) and ahead else 0
        zero = self.layout.parallel.zero
        if zero == 3:
            # Forward copies what was gathered out of a buffer that lives until the next is there.
            buffer = here if ahead == 1 else coming
            return (root + here) * sizes.compute, buffer * sizes.compute
        stays = sum(self.model.blocks[layer].all.total for own in self.own for layer in self.parts[own])
        return (root + stays) * sizes.compute, (here * sizes.compute if ahead == 1 else 0.0)

    def _reducing(self, layers: range, number: int) -> float:
        """The buffer from which the gradients of layer `number` are reduced."""
        if not self.layout.is_sharded or not 0 <= number < len(layers) or self._keeps_whole_gradients:
            return 0.0
        return self.model.blocks[layers[number]].trained.total * self.layout.sizes.reduce


GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """A device and what joins it to others; one direction of a link, per second."""

    name: str
    flops: float
    """Peak of dense bf16 matrix products with fp32 accumulation."""
    bandwidth: float
    """Bytes to and from its memory."""
    memory: float
    """Bytes that a process can allocate."""
    link: float
    """Bytes to the devices of its node."""
    network: float
    """Bytes to other nodes."""


HARDWARE = {
    "A100": Hardware("A100 SXM 80 GB", 312e12, 2.039e12, 79 * GIB, 300e9, 25e9),
    "H100": Hardware("H100 SXM", 989e12, 3.35e12, 79 * GIB, 450e9, 50e9),
    "H200": Hardware("H200 SXM", 989e12, 4.8e12, 139 * GIB, 450e9, 50e9),
    "B200": Hardware("B200", 2250e12, 8.0e12, 178 * GIB, 900e9, 50e9),
}
"""NVIDIA's data sheets of A100, H100 and H200 (SXM) and HGX B200, and of DGX for the network (one HDR or NDR port a
device). They give links for both directions together, and memory as 80, 80, 141 and 180 GB."""


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says; all of it may be overridden."""

    efficiency: float = 0.5
    """Share of the peak that forward and backward reach between them on one device that waits for nobody."""
    transfer: float = 0.75
    """Share of a link's or a memory's bandwidth that is reached."""
    fill: float = 0.92
    """Share of a device's memory that a plan may fill: fragments and libraries take the rest."""
    devices_per_node: int = 8


@dataclass(frozen=True)
class Work:
    """What a step does, whatever the layout."""

    flops: Mapping[str, float]
    """Of the model, forward and backward, by part: body, attention, lm head."""
    micro_tokens: int
    """Of the fullest micro-batch of a data rank."""
    num_packs: int
    """Micro-batches of a step, over all data ranks."""
    hidden_size: int
    num_layers: int
    num_sparse_layers: int
    top_k: int
    kv_size: int
    """Values of keys and values of a token in a layer."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part. Parts add up to `total`; what runs beside computing is counted where it lasts
    longer."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def recompute_flops(work: Work, recompute: str) -> float:
    """What recomputation repeats: the forward of every block, a third of its FLOPs; products are kept by selective."""
    return (work.flops["body"] + work.flops["attention"]) / 3 if recompute == "full" else 0.0


def bubble(layout: Layout) -> float:
    """Time of a step's micro-batches in a pipeline against time without waiting.

    (p - 1) / m for GPipe and 1F1B, that over the parts of a rank where they interleave (arXiv 2104.04473, section 2.2),
    a third of it with weight gradients deferred (ZB-H1, arXiv 2401.10241).
    """
    pp, micro = layout.degrees.pp, layout.num_micro_batches
    share = (pp - 1) / micro / num_chunks(layout.parallel)
    return 1 + (share / 3 if "zero_bubble" in layout.parallel.pp_schedule else share)


def step_time(
    model: RankModel,
    layout: Layout,
    parts: Sequence[range],
    work: Work,
    recompute: str,
    hardware: Hardware,
    assumptions: Assumptions,
) -> StepTime:
    """Seconds of a step: a roofline of computing, memory and links, with what cannot overlap added up."""
    degrees, sizes, parallel = layout.degrees, layout.sizes, layout.parallel
    rate = hardware.flops * assumptions.efficiency

    def link(inner: int, size: int) -> float:
        """Bytes a second among `size` ranks, neighbours of which are `inner` ranks apart."""
        crosses = inner * size > assumptions.devices_per_node
        return (hardware.network if crosses else hardware.link) * assumptions.transfer

    micro = layout.num_micro_batches
    # Ranks wait for the one with most micro-batches.
    uneven = micro * degrees.data_ranks / work.num_packs
    flops = (sum(work.flops.values()) + recompute_flops(work, recompute)) * uneven
    computing = flops / degrees.world / rate
    layers = work.num_layers / degrees.pp
    tokens = work.micro_tokens / degrees.cp
    hidden = tokens * work.hidden_size * sizes.compute
    again = 1.5 if recompute == "full" else 1.0

    tensor = 8 * again * layers * hidden * (degrees.tp - 1) / degrees.tp / link(1, degrees.tp)
    ring_bytes = 3 * again * layers * tokens * work.kv_size / degrees.tp * sizes.compute * (degrees.cp - 1)
    if parallel.cp_kind == "all_to_all":
        ring_bytes = 8 * again * layers * hidden / degrees.tp * (degrees.cp - 1) / degrees.cp
    context = ring_bytes / link(degrees.tp, degrees.cp)
    sparse = work.num_sparse_layers / degrees.pp
    own_tokens = tokens / (1 if degrees.etp > 1 else degrees.tp)
    sent = own_tokens * work.top_k * work.hidden_size * sizes.compute * (degrees.ep - 1) / degrees.ep
    experts = 4 * again * sparse * sent / link(degrees.etp, degrees.ep)
    stage = 2 * num_chunks(parallel) * hidden / degrees.tp / link(degrees.world // degrees.pp, degrees.pp)
    stage = stage if degrees.pp > 1 else 0.0

    computing, tensor, experts = (part * bubble(layout) for part in (computing, tensor * micro, experts * micro))
    exposed = context * micro if parallel.cp_kind == "all_to_all" else max(0.0, context * micro - computing)
    held = max((_Rank(model, layout, parts, rank) for rank in range(degrees.pp)), key=_held)
    sharing = _sharing(held, layout, link)
    always = held._always()
    moved = 2 * sum(always.values()) + held._gradients(held._content(held.own), whole=False)
    host = 50e9 if parallel.offload != "none" else hardware.bandwidth
    return StepTime(
        {
            "computing": computing,
            "tensor parallel": tensor,
            "context parallel": exposed,
            "expert parallel": experts,
            "pipeline": stage * micro,
            "data parallel": max(0.0, sharing - computing),
            "optimizer": moved / (host * assumptions.transfer),
        }
    )


def _held(rank: _Rank) -> float:
    return rank._content(rank.own).all.total


def _sharing(rank: _Rank, layout: Layout, link: Any) -> float:
    """Seconds in which weights are gathered and gradients reduced, which run beside computing."""
    degrees, sizes, micro = layout.degrees, layout.sizes, layout.num_micro_batches
    content, size = rank._content(rank.own), degrees.dp_shard * degrees.cp
    zero = layout.parallel.zero
    gathers = {3: 2 * micro, 2: 1, 1: 1}[zero]
    reduces = micro if zero > 1 and not rank._keeps_whole_gradients else 1
    rate = link(degrees.tp, size)
    share = (size - 1) / size
    moved = gathers * content.all.total * sizes.compute + reduces * content.trained.total * sizes.reduce
    replicas = degrees.dp_replicate
    summed = 2 * content.trained.shard(degrees) * sizes.reduce * (replicas - 1) / replicas * reduces
    return moved * share / rate + summed / link(degrees.tp * size, replicas)
