"""What a checkpoint costs: how long training stands still, how long writing and reading take, and what memory.

    python bench/checkpoint.py [--values 100000000] [--ranks 1 2] [--folder DIR] [--quick]

The state is `--values` fp32 weights with two moments each, 12 bytes a value, sharded over ranks that are processes of
this machine. Each way runs in processes of its own. The stall is the time until `save` returns; `prepare` allocates the
copies before the first step. Memory is the peak of all ranks above the state, as a share of it, file cache aside.
Writing is to `--folder`, which is emptied, and includes the wait for the disk; reading is of files that are still in
the cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZE = 2**20
"""Values of one tensor."""


def measure(way: str, values: int, rank: int, world: int, folder: str) -> dict[str, float]:
    """Seconds and bytes of one rank; `way` is `sync` or `async`."""
    # Imported here: a child inherits its parent's peak across exec, so the parent must stay small.
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from burnish.train.checkpoint import Checkpointer, checkpoint_folder, load_checkpoint, save_checkpoint

    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    store = f"file://{folder}/store-{way}"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cuda" if cuda else "cpu", (world,))
    parts = {
        f"{kind}.{number}": torch.empty(SIZE // 1024 // world, 1024, device=mesh.device_type).normal_()
        for number in range(max(1, values // SIZE))
        for kind in ("model", "optim.exp_avg", "optim.exp_avg_sq")
    }
    tensors = {name: DTensor.from_local(part, mesh, [Shard(0)]) for name, part in parts.items()}
    own_bytes = sum(part.nbytes for part in parts.values())
    root = Path(folder) / way
    before = _peak()

    def timed(function: Any, *arguments: Any, **options: Any) -> float:
        dist.barrier()
        start = time.perf_counter()
        function(*arguments, **options)
        return time.perf_counter() - start

    found: dict[str, float] = {"state": own_bytes}
    if way == "sync":
        found["save"] = timed(save_checkpoint, root, 1, tensors, {})
        found["peak"] = _peak() - before
        for name, verified in (("load", False), ("read", True)):
            found[name] = timed(load_checkpoint, checkpoint_folder(root, 1), tensors, verified=verified)
        found["disk"] = sum(file.stat().st_size for file in checkpoint_folder(root, 1).iterdir())
    else:
        checkpointer = Checkpointer()
        found["prepare"] = timed(checkpointer.prepare, tensors)
        for step, stall in ((1, "first stall"), (2, "stall")):
            dist.barrier()
            start = time.perf_counter()
            found[stall] = timed(checkpointer.save, root, step, tensors, {}, keep=1)
            checkpointer.wait()
            found["save"] = time.perf_counter() - start
        found["peak"] = _peak() - before
    dist.barrier()
    return found


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=100_000_000, help="weights, each with two moments")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes to shard them over")
    parser.add_argument("--folder", help="where to write, a temporary folder unless set")
    parser.add_argument("--quick", action="store_true", help="8 million values")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(*json.loads(options.point))))
        return

    values = 8_000_000 if options.quick else options.values
    titles = (
        "state",
        "on disk",
        "sync save",
        "prepare",
        "first stall",
        "stall",
        "of sync",
        "behind",
        "load",
        "unchecked",
    )
    print(f"{'ranks':>5}", *(f"{title:>11}" for title in titles), f"{'memory: sync':>13} {'behind':>7}", flush=True)
    for world in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            sync, behind = (_ranks(way, values, world, folder) for way in ("sync", "async"))
        seconds = [
            sync["save"],
            behind["prepare"],
            behind["first stall"],
            behind["stall"],
            behind["save"],
            sync["load"],
            sync["read"],
        ]
        cells = [f"{seconds:>9.2f} s" for seconds in seconds]
        cells.insert(4, f"{100 * behind['stall'] / sync['save']:>9.1f} %")
        sizes = [f"{num_bytes / 2**20:>7.0f} MiB" for num_bytes in (sync["state"], sync["disk"])]
        memory = f"{sync['peak'] / sync['state']:>13.2f} {behind['peak'] / behind['state']:>7.2f}"
        print(f"{world:>5}", *sizes, *cells, memory, flush=True)


def _ranks(way: str, values: int, world: int, folder: str) -> dict[str, float]:
    """What all ranks measured: the longest times, and bytes added up."""
    points = [json.dumps([way, values, rank, world, folder]) for rank in range(world)]
    children = [
        subprocess.Popen([sys.executable, *sys.argv, "--point", point], stdout=subprocess.PIPE, text=True)
        for point in points
    ]
    answers = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(1)
    found = [json.loads(answer) for answer in answers]
    summed = ("state", "peak")
    return {name: (sum if name in summed else max)(each[name] for each in found) for name in found[0]}


if __name__ == "__main__":
    main()
