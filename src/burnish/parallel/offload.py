"""Activations in the host's memory between a block's forward and its backward: the same numbers, less device memory.

What moves are the tensors autograd saves, weights and small ones aside; they come back contiguous. What recomputation
does not save at all has no copy; of what selective recomputation keeps, only the inputs of blocks move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

SMALLEST = 2**16
"""Bytes from which a tensor is worth a copy."""


def offload_activations(blocks: Sequence[nn.Module]) -> None:
    """Wrap the forward of each block. Call it after recomputation was applied, so that it moves what that saves."""
    for block in blocks:
        block.forward = torch.compiler.disable(  # the blocks' own forward may still be compiled
            partial(_forward, block, block.forward), recursive=False
        )


def _forward(block: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    copies = _Copies(block)
    with saved_tensors_hooks(copies.pack, _unpack):
        output = forward(*inputs)
    copies.let_go()
    return output


class _Copies:
    """The copies that one forward of `block` makes: one of each tensor, however many operators save it."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._made: dict[tuple[Any, ...], tuple[Tensor, _Copy]] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Copy:
        if isinstance(tensor, DTensor) or tensor.nbytes < SMALLEST or self._is_weight(tensor):
            return tensor
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if place not in self._made:
            # The tensor is kept until the block ends, so that no other takes its place.
            self._made[place] = tensor, _Copy(tensor)
        return self._made[place][1]

    def let_go(self) -> None:
        """Of the tensors. Autograd keeps `pack`, and all that it reaches, for as long as what was packed."""
        self._made.clear()

    def _is_weight(self, tensor: Tensor) -> bool:
        # Asked anew each time: experts are gathered after the forward of their block has begun.
        memory = tensor.untyped_storage().data_ptr()
        return any(_local(parameter).untyped_storage().data_ptr() == memory for parameter in self._block.parameters())


def _local(parameter: Tensor) -> Tensor:
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


class _Copy:
    """A tensor on the host, which on CUDA a stream of its own has brought there."""

    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device
        is_cuda = tensor.device.type == "cuda"
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=is_cuda)
        if is_cuda:
            stream, now = _stream(tensor.device), torch.cuda.current_stream(tensor.device)
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                self._host.copy_(tensor, non_blocking=True)
                self._is_done = stream.record_event()
            tensor.record_stream(stream)
        else:
            self._host.copy_(tensor)

    def back(self) -> Tensor:
        """The tensor where it was, as often as a backward asks."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_event(self._is_done)
        return self._host.to(self._device, non_blocking=True)


def _unpack(packed: Tensor | _Copy) -> Tensor:
    return packed.back() if isinstance(packed, _Copy) else packed


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    return _STREAMS.setdefault(device, torch.cuda.Stream(device))
