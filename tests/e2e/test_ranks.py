"""Runs on several ranks by the command line: each layout against one process, interrupted runs, and what goes wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from workshop import Workshop, weights

FULL = {"checkpoint": {"every": None, "export_dtype": "fp32"}, "run": {"dir": "runs/a", "trackers": []}}
"""Sections of a recipe whose exports tell runs apart to the last digit."""


def losses(workshop: Workshop, run: str) -> list[float]:
    return [line["loss"] for line in workshop.metrics(run) if "loss" in line]


def assert_alike(workshop: Workshop, run: str, other: str) -> None:
    """The same losses, rows and weights, but for the order of sums."""
    assert losses(workshop, run) == pytest.approx(losses(workshop, other), rel=1e-5)
    one, two = workshop.metrics(run), workshop.metrics(other)
    for name in ("total_samples", "total_tokens", "eval/loss"):
        found, expected = ([line[name] for line in lines if name in line] for lines in (one, two))
        assert found == pytest.approx(expected, rel=1e-5)
    first, second = weights(workshop.folder / run), weights(workshop.folder / other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        difference = (tensor - second[name]).abs().max()
        assert difference <= 1e-4, f"{name}: {difference}"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_processes_that_a_launcher_started_are_the_ranks(workshop: Workshop, launcher: str) -> None:
    recipe = workshop.recipe(**FULL)
    workshop.burnish("sft", str(recipe))
    command = ["-m", "burnish", "sft", str(recipe), "run.dir=runs/b"]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if launcher == "torchrun":
        options = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
        starts = [([sys.executable, "-m", "torch.distributed.run", *options, *command], environment)]
    else:
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port}
        places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
        starts = [([sys.executable, *command], {**environment, **step, **place}) for place in places]
    processes = [subprocess.Popen(c, env=e, cwd=workshop.folder, stdout=-1, stderr=-2, text=True) for c, e in starts]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    assert "2 ranks on cpu: dp_shard 2" in outputs[0]
    assert all(output == "" for output in outputs[1:])
    assert (workshop.folder / "runs/b/logs/rank-1.log").is_file()
    assert_alike(workshop, "runs/b", "runs/a")
