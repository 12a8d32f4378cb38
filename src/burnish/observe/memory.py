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

    Storages are counted once, however many views there are. What was made before is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {_key(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in known | self._counted:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return result

    def begin_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.bytes

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._counted.add(key)
        self.bytes += size
        finalize(storage, partial(self._free, key, size))

    def _free(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.bytes -= size


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
