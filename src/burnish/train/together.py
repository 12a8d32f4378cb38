"""Ranks that do one thing together, so that what fails on one is raised by all and none is left waiting.

Objects alone are exchanged, and small ones; tensors have their own collectives.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

Given = TypeVar("Given")
Result = TypeVar("Result")


class Together:
    """The ranks of `group`, of the default process group for None, or this process alone where there is none."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.alone = not dist.is_initialized()
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.count = 1 if self.alone else dist.get_world_size(group)

    def each(self, function: Callable[[], Result]) -> list[Result]:
        """What `function` returns on every rank, by rank. All ranks raise what the first that failed did."""
        if self.alone:
            return [function()]
        outcomes: list[Any] = [None] * self.count
        own = self._try(function)
        dist.all_gather_object(outcomes, own, group=self.group)
        outcomes[self.rank] = own  # with the traceback of an error
        return _results(outcomes)

    def first(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on rank 0, which alone calls it."""
        results = self.each(lambda: function() if self.rank == 0 else None)
        return results[0]  # pyright: ignore[reportReturnType] - rank 0 called it

    def divide(self, function: Callable[[], Given], divide: Callable[[list[Given]], Sequence[Result]]) -> Result:
        """This rank's part of what `divide` makes, on rank 0 alone, of what `function` returns on every rank."""
        if self.alone:
            return divide([function()])[0]
        given: list[Any] | None = [None] * self.count if self.rank == 0 else None
        dist.gather_object(self._try(function), given, group=self.group, group_dst=0)
        parts: Sequence[Any] | None = None
        if given is not None:
            outcome = self._try(lambda: divide(_results(given)))
            parts = [outcome if outcome[0] else (None, part) for part in outcome[1] or given]
        received: list[Any] = [None]
        dist.scatter_object_list(received, parts, group=self.group, group_src=0)  # pyright: ignore[reportArgumentType]
        return _results(received)[0]

    def _try(self, function: Callable[[], Result]) -> tuple[Exception | None, Result | None]:
        try:
            return None, function()
        except Exception as error:
            error = _sendable(error)
            if not getattr(error, "__notes__", ()):
                error.add_note(f"on rank {self.rank}")
            return error, None


def _sendable(error: Exception) -> Exception:
    """It, or where a class of somebody's own does not survive pickling, its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        text = "".join(traceback.format_exception_only(error)).strip()
        return RuntimeError(text).with_traceback(error.__traceback__)
    return error


def _results(outcomes: Sequence[tuple[Exception | None, Result]]) -> list[Result]:
    for error, _ in outcomes:
        if error is not None:
            raise error
    return [result for _, result in outcomes]
