"""What a driver sees of its ranks: calls to all of them, and what it raises when one fails. Starts no process.

A world of one lies in the driver's own process, where a debugger works.
"""

from __future__ import annotations

import os
import pickle
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, NoReturn, Protocol

from burnish.types import UserError

POLL = 0.25
"""Seconds between two looks at whether a rank was lost while calls run."""
GATHER = 3.0
"""Seconds after the first failure in which others may tell theirs: what comes first here need not have come first."""
DIED = "its process died without a word: killed, out of memory, or its host is gone"

Answer = tuple[bool, Any]
"""(True, what a rank returned) or (False, its Failure)."""


class ClusterError(UserError):
    """Ranks that could not be started, failed, or do not answer."""


class LostHead(ClusterError):
    """The head of a Ray cluster is gone. Ray then waits for it when this process ends."""


class LostRanks(ClusterError):
    """A process or host that is gone: the run may be started again from its last checkpoint."""


class Ranks(Protocol):
    """A world of processes, each of which holds one object.

    A rank that raises a UserError raises it here; another exception is a ClusterError with rank, host and traceback. A
    process that is gone is LostRanks. Ranks that do not answer within `cluster.timeout` are a ClusterError that says
    where they are. After any of them no rank is left.
    """

    world_size: int

    def call(self, method: str, *args: Any, by_rank: Sequence[Any] | None = None) -> list[Any]:
        """What `method(*args)`, or `method(*args, by_rank[rank])`, of every rank's object returns, by rank.

        A value that stands at several ranks of `by_rank`, as one object, travels once to each host at most.
        """
        ...

    def close(self) -> None:
        """End the ranks, and with them what still runs there."""
        ...

    def kill(self) -> None:
        """End the ranks as they are. It may be called from any thread."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank an object is, and where. `device` is torch's name for it: cpu, cuda:0."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    device: str


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong on a rank; `exception` is pickled where that works."""

    rank: int
    host: str
    pid: int
    method: str
    text: str
    traceback: str
    at: float
    exception: bytes | None = None
    is_lost: bool = False

    @classmethod
    def of(cls, error: BaseException, place: Place, method: str) -> Failure:
        return cls(
            rank=place.rank,
            host=place.host,
            pid=os.getpid(),
            method=method,
            text="".join(traceback.format_exception_only(error)).strip(),
            traceback="".join(traceback.format_exception(error)),
            at=time.time(),
            exception=_pickled(error) if isinstance(error, UserError) else None,
        )

    @property
    def is_echo(self) -> bool:
        """Whether it only says that a peer went away in the middle of a collective."""
        return bool(
            re.match(r"(torch\.distributed\.\w*Dist\w*Error|RuntimeError: .*(gloo|NCCL|Connection))", self.text)
        )


def _pickled(error: BaseException) -> bytes | None:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # whatever a class of somebody's own raises when it is pickled
        return None
    return data


def await_answers(
    ranks: Iterable[int], look: Callable[[Sequence[int]], Mapping[int, Answer]], timeout: float
) -> dict[int, Answer]:
    """What `ranks` answer to one call, by rank. `look` is given those that are waited for, and returns, after POLL
    seconds at most, what came of them; a loss is a Failure too.

    Less than all are there where a rank failed and others said nothing for GATHER seconds more, or where none failed
    within `timeout` seconds.
    """
    answers: dict[int, Answer] = {}
    deadline, has_failed = time.monotonic() + timeout, False
    while (waiting := [rank for rank in ranks if rank not in answers]) and time.monotonic() < deadline:
        answers |= look(waiting)
        if not has_failed and not all(done for done, _ in answers.values()):
            deadline, has_failed = time.monotonic() + GATHER, True
    return answers


def failures_of(answers: Mapping[int, Answer]) -> list[Failure]:
    return [result for done, result in answers.values() if not done]


def first(failures: Iterable[Failure]) -> Failure:
    """The failure that the others follow from: a lost process, else the earliest that is no peer's echo."""
    return min(failures, key=lambda failure: (not failure.is_lost, failure.is_echo, failure.at))


def raise_failure(failure: Failure, log: str | None = None) -> NoReturn:
    """Raise what the user sees of `failure`; `log` names the file where more may stand."""
    if failure.exception is not None:
        raise pickle.loads(failure.exception)
    where = f"rank {failure.rank} on {failure.host} (pid {failure.pid})"
    more = "" if log is None else f"\nits log: {log}"
    if failure.is_lost:
        raise LostRanks(f"{where} was lost in {failure.method}: {failure.text}{more}")
    raise ClusterError(f"{where} failed in {failure.method}: {failure.text}\n{failure.traceback.rstrip()}{more}")


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def hang(
    method: str, timeout: float, ranks: Mapping[int, str], places: Mapping[int, str], world_size: int, logs: str | None
) -> ClusterError:
    """What the user sees of `ranks`, by rank with where each runs, that did not answer a call in time; `places` is
    where in its code each rank is that told its stacks."""
    names = ", ".join(map(str, ranks))
    lines = [f"{method} hangs: no answer within cluster.timeout={timeout:g} s from rank"]
    lines[0] += f"{'s' if len(ranks) > 1 else ''} {names} of {world_size}"
    for rank, where in ranks.items():
        lines.append(f"  rank {rank} on {where}: {places.get(rank, 'no word, not even from a thread of its own')}")
    if logs is not None:
        silent = ", ".join(str(rank) for rank in range(world_size) if rank not in places)
        lines.append(
            f"the stacks of all ranks are in {logs}"
            + (f", but for rank {silent}: a process that is stopped, or gone, writes none" if silent else "")
        )
    lines.append("a rank in a collective waits for one that is elsewhere; if none hangs, raise cluster.timeout")
    return ClusterError("\n".join(lines))


class LocalRanks:
    """A world of one, in this process. What its object raises goes through as it is, and nobody watches for a hang.

    `meet` makes torch's process group of one, which lives until `close`.
    """

    world_size = 1

    def __init__(self, target: str, args: Sequence[Any], device: str, meet: bool = False) -> None:
        self._has_met = meet
        if meet:
            import torch.distributed as dist
            from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

            backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        try:
            self._object = resolve_name(target)(Place(0, 1, 0, socket.gethostname(), device), *args)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any, by_rank: Sequence[Any] | None = None) -> list[Any]:
        own = () if by_rank is None else (by_rank[0],)
        return [getattr(self._object, method)(*args, *own)]

    def close(self) -> None:
        if self._has_met:
            import torch.distributed as dist

            self._has_met = False
            dist.destroy_process_group()

    def kill(self) -> None:
        self.close()


def shared_values(by_rank: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The distinct objects of `by_rank`, and for every rank the index of its own among them."""
    order: dict[int, int] = {}
    indices = [order.setdefault(id(value), len(order)) for value in by_rank]
    values = [by_rank[indices.index(index)] for index in range(len(order))]
    return values, indices
