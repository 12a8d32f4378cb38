"""How much of a step the driver takes at 64 data ranks: its own work on a step's batches, with trainers that are fakes.

Each of 64 data ranks, with two peers that share its batches, gets 16 packs of 8,192 tokens a step: int32 ids, float32
weights and the documents' lengths, as numpy arrays. The ranks live in a few processes of a local Ray; a fake's step
looks at its arrays and is done. Printed are the seconds that the driver itself works in a step, as a share of steps of
given lengths, and the bytes that it puts into the object store; sockets stand for torchrun's way.
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
from typing import Any

import numpy as np

from burnish.cluster.ranks import shared_values

PACKS, TOKENS, DOCUMENT = 16, 8192, 512


class FakeTrainers:
    """Several data ranks in one process."""

    def step(self, *owns: list[dict[str, np.ndarray]]) -> int:
        return sum(int(pack["tokens"][-1]) + int(pack["lengths"].sum()) for own in owns for pack in own)


def step_batches(data_ranks: int, generator: np.random.Generator) -> list[list[dict[str, np.ndarray]]]:
    return [
        [
            {
                "tokens": generator.integers(0, 150_000, TOKENS, dtype=np.int32),
                "weights": np.ones(TOKENS, np.float32),
                "lengths": np.full(TOKENS // DOCUMENT, DOCUMENT, np.int32),
            }
            for _ in range(PACKS)
        ]
        for _ in range(data_ranks)
    ]


def by_ray(batches: list[list[list[dict[str, np.ndarray]]]], peers: int, processes: int) -> tuple[list[float], int]:
    """Seconds of every step that the driver works, and the bytes it puts into the object store for one."""
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
        actors = [remote.options(num_cpus=1).remote() for _ in range(processes)]
        ray.get([actor.step.remote() for actor in actors])
        seconds = []
        for step in batches:
            begun = time.perf_counter()
            values, indices = shared_values([own for own in step for _ in range(peers)])
            stored = [ray.put(value) for value in values]
            # As many calls as there are ranks: what a call costs the driver does not depend on whose process it is.
            refs = [actors[rank % processes].step.remote(stored[index]) for rank, index in enumerate(indices)]
            sent = time.perf_counter() - begun
            ray.wait(refs, num_returns=len(refs))
            begun = time.perf_counter()
            ray.get(refs)
            seconds.append(sent + time.perf_counter() - begun)
        ray.shutdown()
    return seconds, num_bytes(batches[0])


def by_sockets(batches: list[list[list[dict[str, np.ndarray]]]]) -> list[float]:
    """The same through sockets on loopback: each data rank's batches once, to a reader that throws them away."""
    sender, reader = socket.socketpair()

    def drain() -> None:
        while reader.recv(1 << 20):
            pass

    threading.Thread(target=drain, daemon=True).start()
    seconds = []
    for step in batches:
        begun = time.perf_counter()
        for own in step:
            sender.sendall(pickle.dumps(own, protocol=5))
        seconds.append(time.perf_counter() - begun)
    sender.close()
    return seconds


def num_bytes(step: list[list[dict[str, np.ndarray]]]) -> int:
    return sum(array.nbytes for own in step for pack in own for array in pack.values())


def packing(data_ranks: int) -> float:
    """Seconds in which the driver packs such a step from samples."""
    from burnish.data.pack import Layout, pack
    from burnish.types import Sample

    weights = np.ones(DOCUMENT, np.float32)
    weights[0] = 0
    number = data_ranks * PACKS * TOKENS // DOCUMENT
    samples = [Sample(np.full(DOCUMENT, i % 1000, np.int32), weights, index=i) for i in range(number)]
    begun = time.perf_counter()
    pack(samples, Layout(TOKENS, data_ranks=data_ranks))
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-ranks", type=int, default=64)
    parser.add_argument("--peers", type=int, default=2, help="ranks that share a data rank's batches (2)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, nargs="+", default=[5.0, 10.0], help="lengths of a step (5 10)")
    parser.add_argument("--processes", type=int, default=2, help="that hold the fake ranks (2)")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    batches = [step_batches(options.data_ranks, generator) for _ in range(options.steps)]
    ray_seconds, size = by_ray(batches, options.peers, options.processes)
    rows = {
        "put, call, collect (Ray)": float(np.median(ray_seconds)),
        "pickle, send (sockets)": float(np.median(by_sockets(batches))),
        "pack the samples": packing(options.data_ranks),
    }
    ranks = options.data_ranks * options.peers
    print(
        f"{options.data_ranks} data ranks, {ranks} ranks, {options.data_ranks * PACKS * TOKENS:,} tokens and "
        f"{size / 1e6:.0f} MB put a step, {options.processes} processes, Python {sys.version.split()[0]}"
    )
    shares = "".join(f" | of {length:g} s" for length in options.step_seconds)
    print(f"| the driver's work | s a step{shares} |\n|---|---{'|---' * len(options.step_seconds)}|")
    for name, seconds in rows.items():
        print(f"| {name} | {seconds:.3f}" + "".join(f" | {seconds / n:.1%}" for n in options.step_seconds) + " |")


if __name__ == "__main__":
    main()
