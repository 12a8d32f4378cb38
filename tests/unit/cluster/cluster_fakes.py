"""What runs in the ranks of these tests: a class whose methods answer, fail, hang or die on a rank of choice."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from burnish.cluster.phases import phase
from burnish.cluster.ranks import Place
from burnish.types import UserError


class Mended(UserError):
    """An error of its reader's."""


class Fake:
    def __init__(self, place: Place, note: str = "", folder: str | None = None) -> None:
        if note == "broken":
            raise ValueError(f"no object on rank {place.rank}")
        self.place_, self.note = place, note
        if note == "broken on the last":
            self.total_but(place.world_size - 1, "fail")
        self.folder = folder
        phase("object made")

    def place(self) -> tuple[int, int, int, int]:
        return self.place_.rank, self.place_.world_size, self.place_.local_rank, os.getpid()

    def node(self) -> str:
        """Ray's name of this host."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def environment(self, *names: str) -> list[str | None]:
        return [os.environ.get(name) for name in names]

    def echo(self, *values: Any) -> Any:
        return values

    def arrays(self, own: dict[str, np.ndarray]) -> float:
        return float(sum(value.sum() for value in own.values()))

    def say(self, text: str) -> None:
        print(f"printed {text} {self.place_.rank}")
        os.write(2, f"written {text} {self.place_.rank}\n".encode())
        logging.getLogger("burnish.fake").info("logged %s %d", text, self.place_.rank)

    def fail(self, rank: int, kind: str, delay: float = 0.0) -> None:
        if self.place_.rank == rank:
            time.sleep(delay)
            errors = {"user": Mended("set a.b to 1"), "other": KeyError("missing-key"), "exit": SystemExit(3)}
            raise errors[kind]

    def die(self, rank: int) -> None:
        if self.place_.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def hang(self, rank: int) -> None:
        if self.place_.rank == rank:
            self.stuck_here()

    def stuck_here(self) -> None:
        time.sleep(3600)

    def total(self, value: float) -> float:
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([value + self.place_.rank])
        dist.all_reduce(tensor)
        return float(tensor)

    def total_but(self, rank: int, how: str) -> float:
        if self.place_.rank == rank:
            getattr(self, how)(rank) if how != "fail" else self.fail(rank, "other")
        return self.total(0.0)

    def count(self, restarts: int) -> int:
        """Work with a checkpoint: rank 0 notes each finished step; the last rank dies in step 3 of the first start."""
        assert self.folder is not None
        saved = Path(self.folder) / "saved"
        start = int(saved.read_text()) if saved.exists() else 0
        for step in range(start + 1, 5):
            if restarts == 0 and step == 3:
                self.die(self.place_.world_size - 1)
            self.total(0.0)
            if self.place_.rank == 0:
                saved.write_text(str(step))
        return start
