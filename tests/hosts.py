"""Hosts that a test makes, which are Ray nodes on this machine; runs of several processes, and what is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read at Ray's import: loopback alone
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

MARK = "BURNISH_TEST_MARK"
"""An environment variable by whose value a test finds all processes that descend from one."""
STORE = 80_000_000


class Hosts:
    """Ray nodes of two cores each on this machine, each with an address of its own where `apart` says so."""

    def __init__(self, number: int, apart: bool = False) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        self._apart = apart
        self._number = 0
        for _ in range(number):
            self.add()

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self) -> Any:
        """One more; Ray's handle of it."""
        self._number += 1
        own = {"node_ip_address": f"127.0.0.{self._number}"} if self._apart else {}
        return self.cluster.add_node(num_cpus=2, object_store_memory=STORE, include_dashboard=False, **own)

    def close(self) -> None:
        self.cluster.shutdown()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def name_of(pid: int) -> str:
    """Its command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def await_end(pids: Iterable[int], seconds: float = 30.0) -> list[int]:
    """Those of `pids` that live after that long."""
    pids, deadline = list(pids), time.monotonic() + seconds
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def marked(mark: str) -> list[int]:
    """Processes that descend from one with the mark in its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


class Training:
    """`burnish sft` in a process of its own, which, with all that descends from it, a test can find and end."""

    def __init__(
        self, folder: Path, run: str, *arguments: str, recipe: str = "recipe.yaml", launcher: Sequence[str] = ()
    ) -> None:
        self.run = folder / run
        self._mark = secrets.token_hex(8)
        self._output = folder / f"output-{self._mark}.txt"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "burnish", "sft", recipe, f"run.dir={folder / run}", *arguments],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARK: self._mark, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
                start_new_session=True,
            )
        self._seen = {self.process.pid}
        """Ray's agents lose the mark when they take a title."""

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes:
            with contextlib.suppress(OSError):
                os.kill(pid, 9)
        self.process.wait()

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def ranks(self) -> list[int]:
        """Pids of the ranks of the last start."""
        lists = re.findall(r"ranks up: pids ([\d, ]+)", self.output)
        return [int(pid) for pid in lists[-1].split(",")] if lists else []

    @property
    def processes(self) -> list[int]:
        """All that live: the driver, the ranks, its workers and what of Ray it started."""
        self._seen |= {*marked(self._mark), *self.ranks}
        return [pid for pid in self._seen if is_alive(pid)]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl about training."""
        file = self.run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in map(json.loads, filter(lambda text: text.endswith("}"), lines)) if "loss" in line]

    def until(self, what: Callable[[], Any], seconds: float = 180.0) -> None:
        """Wait for it, while the run lives."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"not in {seconds} s:\n{self.output}"
            assert self.process.poll() is None, self.output
            self._seen.update(self.processes)
            time.sleep(0.2)

    def until_step(self, step: int) -> None:
        self.until(lambda: self.steps and self.steps[-1]["step"] >= step)

    def until_saved(self) -> None:
        self.until((self.run / "checkpoints" / "latest_checkpointed_iteration.txt").exists)

    def end(self, seconds: float = 240.0) -> int:
        """Its exit status, once it has come to its end by itself and nothing is left of it within 30 s."""
        status = self.process.wait(seconds)
        left = {pid: name_of(pid) for pid in await_end(self.processes)}
        assert not left, "processes outlive the run"
        return status
