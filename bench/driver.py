"""How much of a step the driver takes at 64 data ranks: its own work on a step's batches, with trainers that are fakes.

Each of 64 data ranks, with two ranks that share its packs, gets 16 of 8,192 tokens a step. `RankGroup` sends what
`pack` made, as in a run; the ranks live in a few processes of a local Ray, and a fake's step looks at its arrays and is
done. Printed are the seconds that the driver itself works in a step, the least of some steps, for other jobs only add
to it, and as a share of steps of given lengths: packing, which a thread does while the step before runs, and what ranks
wait for. Sockets stand for torchrun's way.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from burnish.cluster.ranks import shared_values
from burnish.data.pack import Layout, pack
from burnish.parallel.degrees import Degrees
from burnish.rank import RankGroup, packed
from burnish.types import Sample, StepInput

PACKS, TOKENS, DOCUMENT = 16, 8192, 512
TIMES = {"forward_backward": 1.0, "optimizer": 0.1}
NAMES = ("loss", "accuracy", "entropy", "loss/rows", "grad_norm", "lr", "nonfinite_steps")
STATISTICS = dict.fromkeys(NAMES, (1.0, 1.0))


class FakeTrainers:
    """Several ranks in one process."""

    def step_packs(self, packs: Mapping[str, Any]) -> Any:
        assert packs["tokens"][-1] >= 0
        assert packs["lengths"].sum() == len(packs["tokens"])
        return STATISTICS, TIMES


@dataclass
class FewProcesses:
    """`cluster.ranks.Ranks` with as many calls as there are ranks, of which several share a process: what a call costs
    the driver does not depend on whose process it is."""

    world_size: int
    actors: Sequence[Any]
    waited: list[float] = field(default_factory=list)
    """Seconds of every call in which the driver waits for the ranks."""

    def call(self, method: str, *args: Any, by_rank: Sequence[Any] | None = None) -> list[Any]:
        import ray

        assert by_rank is not None
        values, indices = shared_values(by_rank)
        stored = [ray.put(value) for value in values]
        actors = [self.actors[rank % len(self.actors)] for rank in range(self.world_size)]
        refs = [getattr(actor, method).remote(stored[index]) for actor, index in zip(actors, indices, strict=True)]
        begun = time.perf_counter()
        ray.wait(refs, num_returns=len(refs))
        self.waited.append(time.perf_counter() - begun)
        return ray.get(refs)


def by_ray(steps: Sequence[StepInput], degrees: Degrees, processes: int) -> list[float]:
    """Seconds of every step that the driver works."""
    import ray

    with tempfile.TemporaryDirectory(prefix="burnish-ray-") as folder:
        ray.init(
            address="local",
            num_cpus=processes,
            object_store_memory=500_000_000,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        remote: Any = ray.remote(FakeTrainers)
        ranks = FewProcesses(degrees.world, [remote.options(num_cpus=1).remote() for _ in range(processes)])
        group: Any = RankGroup(ranks, degrees)  # pyright: ignore[reportArgumentType] - it is asked to step alone
        group.step(steps[0])
        seconds = []
        for step in steps:
            begun = time.perf_counter()
            group.step(step)
            seconds.append(time.perf_counter() - begun - ranks.waited[-1])
        ray.shutdown()
    return seconds


def by_sockets(steps: Sequence[StepInput]) -> list[float]:
    """The same through sockets on loopback: each data rank's packs once, to a reader that throws them away."""
    sender, reader = socket.socketpair()

    def drain() -> None:
        while reader.recv(1 << 20):
            pass

    threading.Thread(target=drain, daemon=True).start()
    seconds = []
    for step in steps:
        begun = time.perf_counter()
        for own in packed(step):
            sender.sendall(pickle.dumps(own, protocol=5))
        seconds.append(time.perf_counter() - begun)
    sender.close()
    return seconds


def num_bytes(step: StepInput) -> int:
    return sum(value.nbytes for own in packed(step) for value in own.values() if isinstance(value, np.ndarray))


def rows(data_ranks: int) -> list[Sample]:
    """As many tokens as the packs hold, in rows of 512."""
    weights = np.ones(DOCUMENT, np.float32)
    weights[0] = 0
    number = data_ranks * PACKS * TOKENS // DOCUMENT
    return [Sample(np.full(DOCUMENT, i % 1000, np.int32), weights.copy(), "rows", i) for i in range(number)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-ranks", type=int, default=64)
    parser.add_argument("--peers", type=int, default=2, help="ranks that share a data rank's packs (2)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, nargs="+", default=[5.0, 10.0], help="lengths of a step (5 10)")
    parser.add_argument("--processes", type=int, default=2, help="that hold the fake ranks (2)")
    options = parser.parse_args()
    degrees = Degrees(dp_shard=options.data_ranks, tp=options.peers)
    packing, steps = [], []
    for _ in range(options.steps):
        samples = rows(options.data_ranks)
        begun = time.perf_counter()
        steps.append(pack(samples, Layout(TOKENS, options.data_ranks)))
        packing.append(time.perf_counter() - begun)
    work = {
        "pack, while the step before runs": packing,
        "flatten, put, call, collect (Ray)": by_ray(steps, degrees, options.processes),
        "flatten, pickle, send (sockets)": by_sockets(steps),
    }
    print(
        f"{options.data_ranks} data ranks, {degrees.world} ranks, {steps[0].num_tokens:,} tokens and "
        f"{num_bytes(steps[0]) / 1e6:.0f} MB a step, {options.processes} processes, Python {sys.version.split()[0]}"
    )
    shares = "".join(f" | of {length:g} s" for length in options.step_seconds)
    print(f"| the driver's work | s a step{shares} |\n|---|---{'|---' * len(options.step_seconds)}|")
    for name, seconds in work.items():
        least = min(seconds)
        print(f"| {name} | {least:.3f}" + "".join(f" | {least / n:.1%}" for n in options.step_seconds) + " |")


if __name__ == "__main__":
    main()
