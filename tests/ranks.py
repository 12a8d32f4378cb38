"""Ranks that a test forks: one process each, joined by gloo, forked from a process that imported torch once."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from workshop import COMMANDS


class RankFailed(Exception):
    """What a rank raised, with its traceback."""


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """What `function(*args)`, importable by its name, returns on each of `world` ranks of one gloo group, by rank.

    Results are pickled. Raises RankFailed with the traceback of the rank that failed first, or TimeoutError.
    """
    with tempfile.TemporaryDirectory() as folder:
        pairs = [COMMANDS.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            COMMANDS.Process(target=_rank, args=(rank, world, f"{folder}/store", sender, function, args))
            for rank, (_, sender) in enumerate(pairs)
        ]
        try:
            for rank, (_, sender) in zip(ranks, pairs, strict=True):
                rank.start()
                sender.close()
            return _collect([receiver for receiver, _ in pairs], time.monotonic() + timeout)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


def _collect(receivers: Sequence[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(range(len(receivers))) - results.keys())} did not answer in time")
        for receiver in ready:
            rank = receivers.index(receiver)  # pyright: ignore[reportArgumentType]
            try:
                failure, results[rank] = pickle.loads(receiver.recv_bytes())  # pyright: ignore
            except EOFError:
                raise RankFailed(f"rank {rank} died without a word") from None
            if failure is not None:
                raise RankFailed(f"rank {rank}: {failure}")
    return [results[rank] for rank in range(len(receivers))]


def _rank(rank: int, world: int, store: str, sender: Connection, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        result = function(*args)
        dist.barrier()  # a rank that leaves early breaks what its peers are still sending
        answer = (None, result)
    except BaseException:
        answer = (traceback.format_exc(), None)
    # By plain pickle: multiprocessing's own would share a tensor's memory, which ends with this process.
    sender.send_bytes(pickle.dumps(answer))
    os._exit(0)
