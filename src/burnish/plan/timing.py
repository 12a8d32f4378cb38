"""Seconds of a step on stated hardware: a roofline of computing, memory and links.

Builds no model and imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from burnish.parallel.stages import num_chunks
from burnish.plan.memory import GIB, Layout, Rank


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

HOST_LINK = 50e9
"""Bytes a second between a device and its host's memory, each way: of PCIe 5.0 x16's 63."""


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


def recompute_flops(work: Work, recompute: str, every: int = 1) -> float:
    """What recomputation repeats: the forward of one block of `every`, a third of its FLOPs; products are kept by
    selective.
    """
    return (work.flops["body"] + work.flops["attention"]) / 3 / every if recompute == "full" else 0.0


def bubble(layout: Layout) -> float:
    """Time of a step's micro-batches in a pipeline against time without waiting.

    (p - 1) / m for GPipe and 1F1B, that over the parts of a rank where they interleave (arXiv 2104.04473, section 2.2),
    a third of it with weight gradients deferred (ZB-H1, arXiv 2401.10241).
    """
    pp, micro = layout.degrees.pp, layout.num_micro_batches
    share = (pp - 1) / micro / num_chunks(layout.parallel)
    return 1 + (share / 3 if "zero_bubble" in layout.parallel.pp_schedule else share)


def step_time(ranks: Sequence[Rank], work: Work, hardware: Hardware, assumptions: Assumptions) -> StepTime:
    """Seconds of a step of the ranks of a pipeline, or of one of those that are alike: a roofline of computing, memory
    and links, with what cannot overlap added up.
    """
    layout = ranks[0].layout
    degrees, sizes, parallel = layout.degrees, layout.sizes, layout.parallel
    rate = hardware.flops * assumptions.efficiency

    def link(inner: int, size: int) -> float:
        """Bytes a second among `size` ranks, neighbours of which are `inner` ranks apart."""
        crosses = inner * size > assumptions.devices_per_node
        return (hardware.network if crosses else hardware.link) * assumptions.transfer

    micro = layout.num_micro_batches
    # Ranks wait for the one with most micro-batches.
    uneven = micro * degrees.data_ranks / work.num_packs
    flops = (sum(work.flops.values()) + recompute_flops(work, layout.recompute, layout.every)) * uneven
    computing = flops / degrees.world / rate
    layers = work.num_layers / degrees.pp
    tokens = work.micro_tokens / degrees.cp
    hidden = tokens * work.hidden_size * sizes.compute
    again = 1 + 0.5 / layout.every if layout.recompute == "full" else 1.0

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
    held = max(ranks, key=lambda rank: rank.content.all.total)
    sharing = _sharing(held, layout, link)
    moved = 2 * sum(held.always().values()) + held.gradients(held.content, whole=False)
    bus = HOST_LINK * assumptions.transfer
    carried = 2 * max(rank.moved for rank in ranks) * micro
    if parallel.offload == "parameters":
        gathers, reduces = _rounds(held)
        weights, shards = held.always()["weights"], held.gradients(held.content, whole=False)
        carried += gathers * weights + reduces * shards
    return StepTime(
        {
            "computing": computing,
            "tensor parallel": tensor,
            "context parallel": exposed,
            "expert parallel": experts,
            "pipeline": stage * micro,
            "data parallel": max(0.0, sharing - computing),
            "offloading": max(0.0, carried / bus - computing),
            "optimizer": moved / (bus if parallel.offload != "none" else hardware.bandwidth * assumptions.transfer),
        }
    )


def _rounds(rank: Rank) -> tuple[int, int]:
    """How often in a step weights are gathered and gradients reduced."""
    layout, micro = rank.layout, rank.layout.num_micro_batches
    # A pipeline's forward finds gathered what the backward before it has left so.
    gathers = 1 if layout.stays_gathered else micro + 1 if layout.degrees.pp > 1 else 2 * micro
    return gathers, 1 if layout.parallel.zero == 1 or rank.keeps_whole_gradients else micro


def _sharing(rank: Rank, layout: Layout, link: Callable[[int, int], float]) -> float:
    """Seconds in which weights are gathered and gradients reduced, which run beside computing."""
    degrees, sizes = layout.degrees, layout.sizes
    content, size = rank.content, degrees.dp_shard * degrees.cp
    gathers, reduces = _rounds(rank)
    rate = link(degrees.tp, size)
    share = (size - 1) / size
    moved = gathers * content.all.total * sizes.compute + reduces * content.trained.total * sizes.reduce
    replicas = degrees.dp_replicate
    summed = 2 * content.trained.shard(degrees) * sizes.reduce * (replicas - 1) / replicas * reduces
    return moved * share / rate + summed / link(degrees.tp * size, replicas)
