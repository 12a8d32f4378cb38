"""Activations in the host's memory between a block's forward and its backward: the same numbers, less device memory.

What moves are the tensors autograd saves, weights and small ones aside; they come back contiguous. What recomputation
does not save at all has no copy; of what selective recomputation keeps, only the inputs of blocks move. On CUDA copies
go both ways on a stream of their own; those of a block come back during the backward of the block behind it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    latest = _Latest()
    for number, block in enumerate(blocks):
        block.forward = torch.compiler.disable(  # the blocks' own forward may still be compiled
            partial(_forward, block, block.forward, latest, number == 0), recursive=False
        )


@dataclass
class _Latest:
    """The copies of the block that ran last."""

    copies: _Copies | None = None


def _forward(block: nn.Module, forward: Callable[..., Any], latest: _Latest, is_first: bool, *inputs: Any) -> Any:
    copies = latest.copies = _Copies(block, None if is_first else latest.copies)
    with saved_tensors_hooks(copies.pack, _unpack):
        output = forward(*inputs)
    copies.let_go()
    return output


class _Copies:
    """The copies that one forward of `block` makes: one of each tensor, however many operators save it. `before` are
    those of the block before it, whose backward comes after its own."""

    def __init__(self, block: nn.Module, before: _Copies | None) -> None:
        self._block = block
        self._before = before
        self._all: list[weakref.ref[_Copy]] = []  # which live as long as autograd keeps them
        self._made: dict[tuple[Any, ...], tuple[Tensor, _Copy]] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Copy:
        if isinstance(tensor, DTensor) or tensor.nbytes < SMALLEST or self._is_weight(tensor):
            return tensor
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if place not in self._made:
            # The tensor is kept until the block ends, so that no other takes its place.
            self._made[place] = tensor, _Copy(tensor, self)
            self._all.append(weakref.ref(self._made[place][1]))
        return self._made[place][1]

    def let_go(self) -> None:
        """Of the tensors. Autograd keeps `pack`, and all that it reaches, for as long as what was packed."""
        self._made.clear()

    def begin_backward(self) -> None:
        """The block's backward has begun: time to fetch what the next will ask for, once."""
        before, self._before = self._before, None
        for reference in before._all if before is not None else ():
            copy = reference()
            if copy is not None:
                copy.fetch()

    def _is_weight(self, tensor: Tensor) -> bool:
        # Asked anew each time: experts are gathered after the forward of their block has begun.
        memory = tensor.untyped_storage().data_ptr()
        return any(_local(parameter).untyped_storage().data_ptr() == memory for parameter in self._block.parameters())


def _local(parameter: Tensor) -> Tensor:
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


class _Copy:
    """A tensor on the host, one of `copies`."""

    def __init__(self, tensor: Tensor, copies: _Copies) -> None:
        self._device = tensor.device
        self._copies = copies
        self._fetched: tuple[Tensor, Any] | None = None
        """On the device, and the event from which on it is whole."""
        is_cuda = tensor.device.type == "cuda"
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=is_cuda)
        if is_cuda:
            stream, now = _stream(tensor.device), torch.cuda.current_stream(tensor.device)
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                self._host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        else:
            self._host.copy_(tensor)

    def fetch(self) -> None:
        """Begin to bring the tensor back to a CUDA device."""
        if self._device.type != "cuda":
            return
        stream, now = _stream(self._device), torch.cuda.current_stream(self._device)
        tensor = torch.empty_like(self._host, device=self._device)
        stream.wait_stream(now)  # which may still use what the memory was before
        with torch.cuda.stream(stream):
            tensor.copy_(self._host, non_blocking=True)
            self._fetched = tensor, stream.record_event()
        tensor.record_stream(stream)

    def back(self) -> Tensor:
        """The tensor where it was, as often as a backward asks."""
        self._copies.begin_backward()
        if self._device.type != "cuda":
            return self._host
        if self._fetched is None:
            self.fetch()
        assert self._fetched is not None
        (tensor, is_there), self._fetched = self._fetched, None  # kept by who asked, for as long as it is used
        torch.cuda.current_stream(self._device).wait_event(is_there)
        return tensor


def _unpack(packed: Tensor | _Copy) -> Tensor:
    return packed.back() if isinstance(packed, _Copy) else packed


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    return _STREAMS.setdefault(device, torch.cuda.Stream(device))
