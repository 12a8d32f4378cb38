"""Weights between files and ranks: each rank reads what it holds, and rank 0 gets whole tensors, one at a time.

Works on whatever layout the parameters have: DTensors over any mesh, plain tensors, and pipeline stages that hold some
names alone. Knows no file format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

from burnish.model import hf_io, lora
from burnish.model.base import CausalLM, saved_buffers
from burnish.model.hf_io import Box, whole

Result = TypeVar("Result")


def box_of(
    shape: Sequence[int], mesh_shape: Sequence[int], place: Sequence[int], placements: Sequence[Placement]
) -> Box:
    """Which part of a tensor of `shape` a rank at `place` in the mesh holds.

    Every cut is that of torch.chunk, of what the cuts before it have left. Plain shards are cut first, from the left;
    then the strided ones, from the right: FSDP cuts what tensor and expert parallelism have left.
    """
    box = [slice(0, size) for size in shape]
    axes = range(len(placements))
    strided = [axis for axis in axes if getattr(placements[axis], "split_factor", 1) > 1]
    for axis in [*(axis for axis in axes if axis not in strided), *reversed(strided)]:
        placement = placements[axis]
        if isinstance(placement, Replicate):
            continue
        dim = getattr(placement, "dim", None)
        assert dim is not None, f"a parameter whose placement is {placement} has no value of its own"
        start, stop = box[dim].start, box[dim].stop
        chunk = -(-(stop - start) // mesh_shape[axis])
        box[dim] = slice(min(start + place[axis] * chunk, stop), min(start + (place[axis] + 1) * chunk, stop))
    return tuple(box)


def local_part(parameter: Tensor) -> tuple[Tensor, Box]:
    """The memory that this rank has of a parameter, and which part of the whole tensor that is."""
    if not isinstance(parameter, DTensor):
        return whole(parameter.detach())
    place = parameter.device_mesh.get_coordinate()
    assert place is not None, "this rank is no part of the parameter's mesh"
    local = parameter.to_local().detach()
    box = box_of(parameter.shape, parameter.device_mesh.shape, place, parameter.placements)
    assert local.shape == _shape(box), (local.shape, box, parameter.placements)
    return local, box


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(side.stop - side.start for side in box)


def read_weights(
    folder: Path, model: CausalLM | Sequence[CausalLM], expected: Mapping[str, torch.Size] | None = None
) -> None:
    """`hf_io.read_weights` for parameters of any layout; each rank reads its own part of each tensor alone.

    `model` is this rank's, or its parts where it has several of a pipeline; `expected` are names and shapes of the
    whole model, where this is not all of it. A last part's copy of a tied embedding is left for others to fill.
    """
    for part in _parts(model):
        hf_io.read_weights(folder, part, expected, local_part)


def _parts(model: CausalLM | Sequence[CausalLM]) -> Sequence[CausalLM]:
    return [model] if isinstance(model, CausalLM) else model


def _union(
    model: CausalLM | Sequence[CausalLM], of_part: Callable[[CausalLM], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors of all parts, without the copy of a tied embedding that the last may have."""
    return {n: t for part in _parts(model) for n, t in of_part(part).items() if n not in part.aliases}


class _Part(NamedTuple):
    """What a rank offers of a tensor, and the type of device it is sent from."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    box: Box
    device: str


def gather(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, order: Sequence[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """On rank 0 every tensor that any rank has, whole and on the CPU, one after the other; nothing on other ranks.

    All ranks call it and take it to its end. `dtype` is that of an export, by which tensors are rounded before they
    travel. They come in `order`, those it does not name behind, as ranks have them. Each travels between devices of the
    type that it lies on, which on one rank may be the host for shards and a GPU for what belongs to no shard. Replicas
    are sent once, and no rank but 0 holds more than its own.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield from ((name, _sent(name, local_part(tensors[name])[0], dtype).cpu()) for name in _ordered(tensors, order))
        return
    parts = {name: local_part(tensor) for name, tensor in tensors.items()}
    offered = [
        _Part(name, tensors[name].shape, _dtype_sent(name, local.dtype, dtype), box, local.device.type)
        for name, (local, box) in parts.items()
    ]
    is_first, world = dist.get_rank() == 0, dist.get_world_size()
    everyones: list[list[_Part]] = [[]] * world
    dist.gather_object(offered, everyones if is_first else None)
    plan = _plan(everyones, order) if is_first else {}
    wanted: list[list[str]] = [[]]
    dist.scatter_object_list(
        wanted, [[n for n, senders in plan.items() if rank in senders] for rank in range(world)] if is_first else None
    )
    if not is_first:
        for name in wanted[0]:
            dist.send(_sent(name, parts[name][0], dtype).contiguous(), dst=0)
        return
    for name, senders in plan.items():
        yield name, _receive(senders, None if name not in parts else _sent(name, parts[name][0], dtype))


def _plan(everyones: Sequence[Sequence[_Part]], order: Sequence[str]) -> dict[str, dict[int, _Part]]:
    """For each tensor in order the ranks that send, each another part of it, with rank 0 before its replicas."""
    senders: dict[str, dict[str, tuple[int, _Part]]] = {}
    for rank, offered in enumerate(everyones):
        for part in offered:
            boxes = senders.setdefault(part.name, {})
            if all(_shape(part.box)):
                boxes.setdefault(str(part.box), (rank, part))  # slices have no hash before Python 3.12
    return {name: dict(senders[name].values()) for name in _ordered(senders, order)}


def _ordered(names: Mapping[str, object], order: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*(name for name in order if name in names), *names]))


def _receive(senders: Mapping[int, _Part], own: Tensor | None) -> Tensor:
    """The whole tensor on the CPU, of the parts that ranks send and of rank 0's own."""
    example = next(iter(senders.values()))
    full = torch.empty(example.shape, dtype=example.dtype)
    buffers = {
        rank: torch.empty(_shape(part.box), dtype=part.dtype, device=part.device)
        for rank, part in senders.items()
        if rank
    }
    requests = [dist.irecv(buffer, src=rank) for rank, buffer in buffers.items()]
    for request in requests:
        assert request is not None
        request.wait()
    for rank, part in senders.items():
        source = buffers[rank] if rank else own
        assert source is not None
        full[part.box] = source.to("cpu")
    return full


def _dtype_sent(name: str, held: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return held if dtype is None else hf_io.written_as(name, held, dtype)


def _sent(name: str, local: Tensor, dtype: torch.dtype | None) -> Tensor:
    return local.to(_dtype_sent(name, local.dtype, dtype))


def gather_full(
    model: CausalLM | Sequence[CausalLM],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """All that a model saves, on rank 0's `device` by its names in the model, and nothing elsewhere. All ranks call it.

    But for `device` the host has one tensor at a time.
    """
    tensors = _union(model, lambda part: dict(part.named_parameters()) | saved_buffers(part))
    return {name: tensor.to(device) for name, tensor in gather(tensors, dtype)}


def publish(
    model: CausalLM | Sequence[CausalLM],
    take: Callable[[Iterator[tuple[str, Tensor]]], Result],
    dtype: torch.dtype | None = None,
    order: Sequence[str] = (),
) -> Result | None:
    """What `take` makes, on rank 0, of the weights: whole, by a checkpoint's names, on the CPU, one after the other,
    with adapters added in; None on other ranks. All ranks call it.

    No rank holds more of them at a time than one tensor, or than `take` keeps. They are in the type of the masters, or
    as an export in `dtype` writes them. What `take` does not ask for is gathered and dropped; what it raises is raised
    on rank 0 once the others have sent all that they have. `model` is as in `read_weights`, and `order` are the names
    of the whole model, where ranks have parts of it. Of a model of `transformers` names are those of its modules.
    """

    def take_stored(weights: Iterator[tuple[str, Tensor]]) -> Result:
        stored = hf_io.as_stored(_parts(model)[0], weights)
        return take((name, _sent(name, tensor, dtype)) for name, tensor in stored)

    return _take_whole(model, take_stored, dtype, order)


def export(
    model: CausalLM | Sequence[CausalLM],
    folder: Path,
    dtype: torch.dtype,
    order: Sequence[str] = (),
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json and safetensors into `folder`, which rank 0 sees, with adapters added in. All ranks call it.

    Rank 0 holds one file's tensors at a time, or all of them of a model of `transformers`. Otherwise as `publish`.
    """
    first = _parts(model)[0]
    _take_whole(model, lambda weights: first.export(folder, dtype, weights, max_shard_bytes), dtype, order)


def _take_whole(
    model: CausalLM | Sequence[CausalLM],
    take: Callable[[Iterator[tuple[str, Tensor]]], Result],
    dtype: torch.dtype | None,
    order: Sequence[str],
) -> Result | None:
    """`publish` by the model's own names; merged weights are not rounded."""
    first = _parts(model)[0]
    is_adapted = lora.peft_config(first) is not None
    adapters = dict(gather(_union(model, lora.trained))) if is_adapted else {}
    weights = gather(_union(model, hf_io.named_weights), None if is_adapted else dtype, order)
    try:
        if _is_first():
            return take(lora.merge(weights, first, adapters) if is_adapted else weights)
    finally:
        for _ in weights:
            pass
    return None


def export_adapter(
    model: CausalLM | Sequence[CausalLM], folder: Path, dtype: torch.dtype, base_model: str | None
) -> None:
    """Write the adapters into `folder`, which rank 0 sees, in peft's format. All ranks call it."""
    tensors = dict(gather(_union(model, lora.trained), dtype))
    if _is_first():
        lora.write_adapter(folder, _parts(model)[0], tensors, dtype, base_model)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
