"""Bytes that tensors hold while a stretch of code runs. Counts what goes through torch's dispatcher, on any device,
`meta` included, where nothing is allocated and all the same is seen; not what a kernel holds within itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import finalize

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """Within, `bytes` is what the tensors made within hold at this moment, and `peak` the most they held at one.

    Storages are counted once, however many views there are. What was made before is not counted. Those of which
    `is_apart` says so when they are made are told from the others: `apart` is what they hold of `bytes`, and `peaks`
    has the most that all others held, by what these held then.
    """

    def __init__(self, is_apart: Callable[[torch.Tensor], bool] = lambda tensor: False) -> None:
        super().__init__()
        self.bytes = 0
        self.apart = 0
        self.peaks = {0: 0}
        self._is_apart = is_apart
        self._counted: set[int] = set()

    @property
    def peak(self) -> int:
        return max(apart + others for apart, others in self.peaks.items())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {_key(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not (_key(tensor) in known or _key(tensor) in self._counted):
                self._count(tensor.untyped_storage(), self._is_apart(tensor))
        self.peaks[self.apart] = max(self.peaks.get(self.apart, 0), self.bytes - self.apart)
        return result

    def begin_peak(self) -> None:
        """Forget the peak so far."""
        self.peaks = {self.apart: self.bytes - self.apart}

    def _count(self, storage: torch.UntypedStorage, is_apart: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._counted.add(key)
        self.bytes += size
        self.apart += size * is_apart
        finalize(storage, partial(self._free, key, size, is_apart))

    def _free(self, key: int, size: int, is_apart: bool) -> None:
        self._counted.discard(key)
        self.bytes -= size
        self.apart -= size * is_apart


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
