"""Bytes that a rank of a layout holds, by part, at the fullest moments of a step.

Arithmetic on plain numbers: what the modules keep for their backward comes from `parallel/trace.py`, what a layout
makes of it stands here. It builds no model and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from burnish.config import ParallelConfig, PrecisionConfig, Recipe
from burnish.parallel.degrees import Degrees
from burnish.parallel.stages import num_chunks, parts_of, splits_backward

if TYPE_CHECKING:
    from burnish.parallel.trace import Footprint, Pass

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "int8": 1}
INT8_BLOCK = 256
"""Values that share one fp32 scale in int8 states."""
STRETCH = {"cpu": 2**17, "cuda": 2**22}
"""Values that a narrow optimizer updates at a time (train/optim.py)."""
STRETCH_BYTES = {"int8": 56, "bf16": 40}
"""What it needs for each of them beside weights, gradients and states, by the states' type; measured."""
GIB = 2**30
HEAD, OPTIMIZER = "the lm head", "the optimizer's step"


@dataclass(frozen=True, slots=True)
class Values:
    """Parameters of a part of a rank's model: what data ranks share, and experts, which fewer ranks share."""

    dense: int
    experts: int = 0

    def __add__(self, other: Values) -> Values:
        return Values(self.dense + other.dense, self.experts + other.experts)

    def __sub__(self, other: Values) -> Values:
        return Values(self.dense - other.dense, self.experts - other.experts)

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

    def __sub__(self, other: Content) -> Content:
        return Content(self.all - other.all, self.trained - other.trained)

    @property
    def frozen(self) -> Values:
        return self.all - self.trained


NOTHING = Content(Values(0), Values(0))


def total(contents: Iterable[Content]) -> Content:
    return sum(contents, NOTHING)


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
    footprints: Mapping[str, Footprint]
    """By mode of recomputation, and `none` where some blocks are not recomputed."""

    def layers(self, part: range) -> Content:
        """All blocks of a part of the pipeline."""
        return self._until[part.stop] - self._until[part.start]

    @cached_property
    def _until(self) -> list[Content]:
        return list(accumulate(self.blocks, initial=NOTHING))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of one value."""

    master: float
    compute: float
    reduce: float
    gradient: float
    frozen: float
    moments: int
    """Of AdamW for each value that is trained."""
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
        return cls(master, compute, reduce, max(master, reduce), frozen, moments, states, stretch)


@dataclass(frozen=True)
class Moment:
    """What is held at one, bytes by part: on the device, and of that which offloading moves in the host's memory."""

    name: str
    device: Mapping[str, float]
    host: Mapping[str, float] = field(default_factory=dict)

    @property
    def on_device(self) -> float:
        return sum(self.device.values())

    @property
    def on_host(self) -> float:
        return sum(self.host.values())


@dataclass(frozen=True)
class RankMemory:
    """The fullest moments of a rank."""

    role: str
    layers: int
    forward_backward: Moment
    optimizer_step: Moment

    @property
    def fullest(self) -> Moment:
        return max(self.forward_backward, self.optimizer_step, key=lambda moment: moment.on_device)

    @property
    def peak(self) -> float:
        return self.fullest.on_device

    @property
    def host(self) -> float:
        """At most in the host's memory."""
        return max(self.forward_backward.on_host, self.optimizer_step.on_host)


@dataclass(frozen=True)
class Layout:
    """How a step lies over ranks; `num_micro_batches` are those of one data rank."""

    parallel: ParallelConfig
    degrees: Degrees
    sizes: Sizes
    num_micro_batches: int
    device: str = "cuda"
    recompute: str = "none"
    every: int = 1
    """Of how many blocks of a part in a row the first is recomputed."""
    offloads_activations: bool = False

    @cached_property
    def is_cast(self) -> bool:
        """Whether one process copies what it trains into the compute type for a step."""
        return not self.is_sharded and self.sizes.compute != self.sizes.master

    @cached_property
    def stays_gathered(self) -> bool:
        """Whether what was gathered for a forward stays until the step ends (parallel/fsdp.py, parallel/pp.py)."""
        return self.parallel.zero < 3 or splits_backward(self.parallel)

    @cached_property
    def is_sharded(self) -> bool:
        """Whether weights are gathered and cast by FSDP2, as they are but in a process that trains by itself."""
        return self.degrees.world > 1 or self.parallel.offload == "parameters"

    def in_flight(self, rank: int) -> int:
        """Forward passes of a part that a pipeline rank keeps at most before it runs the backward of one.

        1F1B: arXiv 2104.04473, section 2.2; interleaved: the warm-up of torch's schedules, that with zero bubbles
        counted in its order of actions; zero-bubble V: arXiv 2401.10241 (as much as 1F1B's first rank on all).
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
            case "interleaved_zero_bubble":
                return min(micro * chunks, chunks * pp)
            case _:
                return min(micro * chunks, (chunks - 1) * pp + 2 * (pp - 1 - rank) + 1)


def rank_memory(model: RankModel, layout: Layout, parts: Sequence[range], pipeline_rank: int) -> RankMemory:
    """The memory of the ranks at `pipeline_rank`; `parts` are the layers of every part of the pipeline."""
    return Rank(model, layout, parts, pipeline_rank).memory


@dataclass
class Rank:
    """What the ranks at one place of a pipeline hold."""

    model: RankModel
    layout: Layout
    parts: Sequence[range]
    rank: int
    own: list[int] = field(init=False)
    _known_sizes: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pp = self.layout.degrees.pp
        self.own = list(parts_of(self.rank, self.layout.parallel)) if pp > 1 else [0]

    @cached_property
    def memory(self) -> RankMemory:
        pp = self.layout.degrees.pp
        name = "every rank" if pp == 1 else f"pipeline rank {self.rank}"
        layers = sum(len(self.parts[part]) for part in self.own)
        moments = [self._placed(moment) for moment in self._forward_backward()]
        # On a CPU the host's memory is the device's.
        fullest = max(moments, key=lambda m: m.on_device + (m.on_host if self.layout.device == "cpu" else 0.0))
        return RankMemory(name, layers, fullest, self.optimizer_step())

    @cached_property
    def moved(self) -> float:
        """Bytes of activations that a micro-batch sends to the host."""
        offloads = self.layout.offloads_activations
        return sum(one.host for part in self.own for one in self._passes(part, True)) if offloads else 0.0

    # --- what is there ---

    @cached_property
    def content(self) -> Content:
        """All that this rank holds of the model."""
        return total(self.model.layers(self.parts[part]) for part in self.own) + self.shell

    @cached_property
    def shell(self) -> Content:
        """All but the blocks, the copy of a tied head included."""
        return total(self._shell_of(part) for part in self.own)

    def _shell_of(self, part: int) -> Content:
        content = NOTHING
        if part == 0 or self._copies_head(part):
            content = content + self.model.embedding
        return content + self.model.head if part == len(self.parts) - 1 else content

    def _copies_head(self, part: int) -> bool:
        """Whether a part has a copy of the embedding for its head: weights and gradients that nothing updates."""
        return self.model.is_tied and 0 < part == len(self.parts) - 1

    @cached_property
    def copy(self) -> Content:
        return self.model.embedding if self._copies_head(max(self.own)) else NOTHING

    def always(self) -> dict[str, float]:
        """What is held from one step to the next."""
        sizes, degrees, content = self.layout.sizes, self.layout.degrees, self.content
        weights = content.trained.shard(degrees) * sizes.master + content.frozen.shard(degrees) * sizes.frozen
        updated = content.trained.shard(degrees) - self.copy.trained.shard(degrees)
        return {"weights": weights, "optimizer": updated * sizes.states}

    def gradients(self, content: Content, whole: bool) -> float:
        """Of all micro-batches until now."""
        sizes, trained = self.layout.sizes, content.trained
        if not self.layout.is_sharded:
            return trained.total * sizes.gradient
        return trained.total * sizes.reduce if whole else trained.shard(self.layout.degrees) * sizes.master

    @cached_property
    def keeps_whole_gradients(self) -> bool:
        """Whether gradients are reduced once a step, and whole until then (parallel/fsdp.py, parallel/pp.py)."""
        layout, parallel, sizes = self.layout, self.layout.parallel, self.layout.sizes
        if layout.degrees.pp > 1:
            return True
        return (
            layout.is_sharded and layout.num_micro_batches > 1 and (parallel.zero == 1 or sizes.master < sizes.reduce)
        )

    def _placed(self, moment: Moment) -> Moment:
        """With what is offloaded in the host's memory."""
        layout, sizes, degrees = self.layout, self.layout.sizes, self.layout.degrees
        device, host = dict(moment.device), dict(moment.host)
        match layout.parallel.offload:
            case "optimizer":
                updated = self.content.trained.shard(degrees) - self.copy.trained.shard(degrees)
                # HostOptimizer has copies of weights and gradients (train/optim.py).
                gradient = sizes.master if layout.is_sharded else sizes.gradient
                host |= {"weights": updated * sizes.master, "gradients": updated * gradient}
                host["optimizer"] = device.pop("optimizer")
            case "parameters":
                whole = self.keeps_whole_gradients and moment.name != OPTIMIZER
                for name in ("weights", "optimizer") if whole else ("weights", "gradients", "optimizer"):
                    host[name] = host.get(name, 0.0) + device.pop(name)
        return Moment(moment.name, device, {name: value for name, value in host.items() if value})

    # --- the optimizer's step ---

    def optimizer_step(self) -> Moment:
        """What is held while weights are updated; it asks for no footprint."""
        sizes, degrees = self.layout.sizes, self.layout.degrees
        is_on_host = self.layout.device == "cpu" or self.layout.parallel.offload != "none"
        stretch = sizes.stretch * min(STRETCH["cpu" if is_on_host else "cuda"], self.model.largest)
        parts = self.always() | {"gradients": self.gradients(self.content, whole=False)}
        parts["optimizer"] += stretch
        # What was updated is sent to the copy of a tied head.
        is_received = self.copy.all.total > 0 and 0 not in self.own
        parts["communication"] = self.copy.all.shard(degrees) * sizes.master * is_received
        return self._placed(Moment(OPTIMIZER, parts))

    # --- forward and backward ---

    def _forward_backward(self) -> Iterator[Moment]:
        rounds = (True,) if self.layout.num_micro_batches == 1 else (True, False)
        for part in self.own:
            for first in rounds:
                yield from self._micro_batch(part, first)
        if self.layout.degrees.pp > 1:
            yield from self._end_of_pipeline()

    def _passes(self, part: int, fresh: bool) -> list[Pass]:
        """Of every layer of a part."""
        layout, footprints = self.layout, self.model.footprints
        kinds = [
            footprints[layout.recompute if number % layout.every == 0 else "none"]
            for number in range(len(self.parts[part]))
        ]
        return [
            (kind.blocks if fresh else kind.later_blocks)[layer]
            for kind, layer in zip(kinds, self.parts[part], strict=True)
        ]

    def _micro_batch(self, part: int, first: bool) -> Iterator[Moment]:
        """The moments of one micro-batch in one part, of which one may be the fullest."""
        layout, sizes, layers = self.layout, self.layout.sizes, self.parts[part]
        # Copies of the weights leave their gradients to the masters, so that each backward is a first one.
        fresh = first or layout.is_sharded or layout.is_cast
        passes = self._passes(part, fresh)
        footprint = self.model.footprints[layout.recompute]
        shell = footprint.shell if fresh else footprint.later_shell
        always, whole = self.always(), self.keeps_whole_gradients
        held = 0.0 if first else self.gradients(self.content, whole)
        is_first, is_last = part == 0, part == len(self.parts) - 1
        # FSDP2 lets go of what it reduced last when it reduces again.
        last = 0.0 if first or whole or not layout.is_sharded else self._shell_of(part).trained.total * sizes.reduce
        kept, moved = [0.0], [0.0]
        for one in passes:
            kept.append(kept[-1] + one.kept)
            moved.append(moved[-1] + one.host)

        in_flight = [self._in_flight(shell.hidden, is_emptying) for is_emptying in (False, True)]

        def moment(name: str, activations: float, number: int, ahead: int, made: float, **more: float) -> Moment:
            is_backward = ahead <= 0 and name != HEAD
            gathered, coming = self._weights(part, number, ahead, first, is_backward)
            others, others_moved = in_flight[is_backward and not first]
            parts = {
                **always,
                "compute weights": gathered,
                "gradients": held + made,
                "activations": activations + others,
                "lm head": more.get("head", 0.0),
                "communication": coming + more.get("communication", 0.0),
            }
            return Moment(name, parts, {"activations": others_moved + moved[min(number, len(layers) - 1) + 1]})

        before = shell.before if is_first else shell.hidden
        for number, one in enumerate(passes):
            activations = before + kept[number] + one.forward - shell.hidden
            yield moment("a forward", activations, number, 1, 0.0, communication=last)
        if is_last:
            head = shell.head - shell.before
            yield moment(HEAD, before + kept[-1], len(layers) - 1, 0, 0.0, head=head, communication=last)
        after = shell.after if is_last else shell.hidden
        made = 0.0  # but for the shell's own, which `after` and `end` count
        for number, one in reversed(list(enumerate(passes))):
            content = self.model.blocks[layers[number]]
            reducing = self._reducing(layers, number + 1) if number + 1 < len(layers) else last
            # On CUDA what the block before it keeps on the host comes back meanwhile (parallel/offload.py).
            coming = passes[number - 1].host if number and layout.device == "cuda" else 0.0
            activations = after + kept[number] + one.backward + coming - shell.hidden
            yield moment("a backward", activations, number, -1, made, communication=reducing)
            if layout.is_sharded:
                activations = after + kept[number] + content.trained.total * sizes.compute
                reducing = self._reducing(layers, number)
                yield moment("a reduction", activations, number, -1, made, communication=reducing)
            if layout.is_cast:
                # Autograd casts gradients to the masters' type after all else, in the order of the parameters' making.
                made += content.trained.total * sizes.compute
            elif first:
                made += self.gradients(content, whole)
        if is_first:
            reducing = self._reducing(layers, 0)
            yield moment("the embedding's backward", shell.end, -1, 0, made, communication=reducing)
        if layout.is_sharded and layout.degrees.pp == 1:
            trained = self._shell_of(part).trained
            reduction = moment("the embedding's reduction", trained.total * sizes.compute, -1, 0, made)
            parts = dict(reduction.device)
            parts["communication"] += 0.0 if whole else self._reduction(trained)
            parts["compute weights"] -= self.shell.all.total * sizes.compute
            yield Moment(reduction.name, parts, reduction.host)
        if layout.is_cast:
            yield moment("the cast of gradients", 0.0, -1, 0, self._cast(first))

    def _end_of_pipeline(self) -> Iterator[Moment]:
        """What follows the last backward: whole gradients are reduced, the shell's first, while blocks are still
        gathered, and those of a tied head are sent to the embedding.
        """
        sizes, content, shell = self.layout.sizes, self.content, self.shell
        parts = self.always() | {
            "compute weights": (content.all.total - shell.all.total) * sizes.compute,
            "gradients": self.gradients(content, whole=True) - shell.trained.total * sizes.reduce,
            "communication": self._reduction(shell.trained),
        }
        yield Moment("the reduction of gradients", parts)
        if self.model.is_tied and 0 in self.own and not self.copy.all.total:
            shards = self.gradients(content, whole=False)
            received = self.model.embedding.trained.shard(self.layout.degrees) * max(sizes.master, 4)
            yield Moment("a tied head's gradient", self.always() | {"gradients": shards, "communication": received})

    def _reduction(self, trained: Values) -> float:
        """Buffers at most while gradients are reduced."""
        shards, degrees = trained.shard(self.layout.degrees), self.layout.degrees
        # Of one rank FSDP2 divides, by 1, what it would otherwise send.
        divided = trained.total if degrees.dp_shard * degrees.cp == 1 else 0
        return (trained.total + shards + divided) * self.layout.sizes.reduce

    def _cast(self, first: bool) -> float:
        """Gradients at most while those of the compute type become those of the masters', beside all earlier ones."""
        sizes, content, shell = self.layout.sizes, self.content, self.shell
        if first:
            return content.trained.total * sizes.gradient + self.model.embedding.trained.total * sizes.compute
        return max(
            content.trained.total * sizes.compute + self.model.largest * sizes.gradient,
            shell.trained.total * (sizes.compute + sizes.gradient),
        )

    def _in_flight(self, hidden: float, is_emptying: bool) -> tuple[float, float]:
        """What other micro-batches keep on this rank meanwhile, on the device and on the host."""
        # GPipe has run all forwards when it begins to go backward.
        others = self.layout.in_flight(self.rank) - 1 - (is_emptying and self.layout.parallel.pp_schedule == "gpipe")
        if splits_backward(self.layout.parallel):
            # Between its two backwards a part keeps gradients, here taken to be as large as one micro-batch's
            # activations; the last part runs both at once (parallel/pp.py).
            others += sum(part < len(self.parts) - 1 for part in self.own) / len(self.own)
        if self.layout.degrees.pp == 1 or others <= 0:
            return 0.0, 0.0
        kept, host = self._kept_by_each
        return others * (kept + 2 * hidden), others * host

    @cached_property
    def _kept_by_each(self) -> tuple[float, float]:
        """By a micro-batch in one part of this rank, on the device and on the host."""
        passes = [one for own in self.own for one in self._passes(own, True)]
        return sum(p.kept for p in passes) / len(self.own), sum(p.host for p in passes) / len(self.own)

    def _weights(self, part: int, number: int, ahead: int, first: bool, is_backward: bool) -> tuple[float, float]:
        """Weights of the compute type while layer `number` of `part` runs, and buffers of those that come."""
        layout, sizes = self.layout, self.layout.sizes
        if not layout.is_sharded:
            return (self._copied(self.content) if layout.is_cast else 0.0), 0.0
        unit, after = self._sizes(part)
        here = unit[number] if 0 <= number < len(unit) else 0
        coming = unit[number + ahead] if 0 <= number + ahead < len(unit) and ahead else 0
        gathered = self.shell.all.total
        if layout.stays_gathered:
            blocks = self.content.all.total - self.shell.all.total
            return (gathered + blocks) * sizes.compute, (here * sizes.compute if ahead == 1 else 0.0)
        if layout.degrees.pp > 1 and not (first and not is_backward):
            # A pipeline's backward leaves weights gathered, and the next forward through them gives them back.
            gathered += after[number + 1]
            if not first:
                gathered += sum(self.model.layers(self.parts[own]).all.total for own in self.own if own != part)
        # Forward copies what was gathered out of a buffer that lives until the next is there.
        buffer = here if ahead == 1 else coming
        return (gathered + here) * sizes.compute, buffer * sizes.compute

    def _sizes(self, part: int) -> tuple[list[int], list[int]]:
        """Values of the layers of a part, and of each and those after it."""
        if part not in self._known_sizes:
            unit = [self.model.blocks[layer].all.total for layer in self.parts[part]]
            self._known_sizes[part] = unit, [*accumulate(reversed(unit), initial=0)][::-1]
        return self._known_sizes[part]

    def _copied(self, content: Content) -> float:
        """Copies in the compute type of what is held in another."""
        sizes = self.layout.sizes
        frozen = content.frozen.total if sizes.frozen != sizes.compute else 0
        return (content.trained.total + frozen) * sizes.compute

    def _reducing(self, layers: range, number: int) -> float:
        """The buffer from which the gradients of layer `number` are reduced."""
        if not self.layout.is_sharded or not 0 <= number < len(layers) or self.keeps_whole_gradients:
            return 0.0
        return self.model.blocks[layers[number]].trained.total * self.layout.sizes.reduce


def gib(size: float) -> str:
    """Bytes in GiB, in three digits or three decimals."""
    value = size / GIB
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{decimals}f}"
