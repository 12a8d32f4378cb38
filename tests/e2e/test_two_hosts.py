"""One run over two hosts, which are Ray nodes with addresses of their own: the same numbers as in one process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Hosts, Training
from workshop import Workshop

ROOT = Path(__file__).resolve().parents[2]
ALONE = ["cluster.address=null", "cluster.num_nodes=1", "cluster.devices_per_node=1"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with contextlib.closing(Hosts(2, apart=True)) as hosts:
        yield hosts


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_same_numbers(one: Path, two: Path) -> float:
    """Steps, losses, norms, held-out losses and counts; the largest relative difference of a loss."""
    expected, found = lines(one), lines(two)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    worst = 0.0
    for left, right in zip(found, expected, strict=True):
        for key in ("loss", "eval/loss", "grad_norm", "lr"):
            assert (key in left) == (key in right)
            if key in left:
                assert left[key] == pytest.approx(right[key], rel=1e-5), (right["step"], key)
            if key in left and key.endswith("loss"):
                worst = max(worst, abs(left[key] - right[key]) / right[key])
        for key in ("samples", "tokens", "trained_tokens", "total_tokens"):
            assert left.get(key) == right.get(key)
    return worst


def check_what_is_seen(run: Training, num_ranks: int) -> None:
    """The console shows the driver and rank 0; each rank has its log."""
    assert f"placement: {num_ranks} ranks on 2 hosts" in run.output
    assert f"layout     {num_ranks} ranks on cpu: dp_shard {num_ranks}" in run.output
    for part in ("driver pid", "rows: ", "rank 0 pid", "joined the process group", "every rank ready", "finished"):
        assert part in run.output
    assert "rank 1 pid" not in run.output
    logs = [(run.run / "logs" / f"rank-{rank}.log").read_text() for rank in range(num_ranks)]
    hosts = ["127.0.0.1"] * (num_ranks // 2) + ["127.0.0.2"] * (num_ranks // 2)
    for rank, (log, host) in enumerate(zip(logs, hosts, strict=True)):
        assert f"rank {rank} pid {run.ranks[rank]}: up on {host}" in log
        for part in ("joined the process group", "weights loaded: ", " parameters", f"pid {run.ranks[rank]}: ready"):
            assert part in log


def test_three_steps_on_two_hosts_are_those_of_one_process(workshop: Workshop, hosts: Hosts) -> None:
    settings = {"run": {"trackers": []}, "train": {"steps": 3}, "checkpoint": {"export": "never"}}
    recipe = workshop.recipe(**settings, evaluate={"every": 3})
    workshop.burnish("sft", str(recipe), "run.dir=runs/one")
    keys = [f"cluster.address={hosts.address}", "cluster.num_nodes=2", "cluster.devices_per_node=1"]
    with Training(workshop.folder, "runs/two", *keys) as run:
        assert run.end() == 0, run.output
        check_what_is_seen(run, 2)
        print(f"largest relative difference {check_same_numbers(workshop.folder / 'runs' / 'one', run.run):.1e}")


@pytest.mark.slow
def test_an_example_on_real_rows_on_two_hosts_is_that_of_one_process(
    tmp_path: Path, shared: Path, hosts: Hosts
) -> None:
    data = shared / "data"
    keys = [
        f"model.init={ROOT / 'examples' / 'gsm8k-model.json'}",
        f"model.tokenizer={shared / 'tokenizers' / 'minimind'}",
        f"data.train.0.path={data / 'gsm8k_train.jsonl'}",
        f"data.validation.0.path={data / 'gsm8k_test.jsonl'}",
        "data.validation.0.slice=0:16",
        "data.workers=1",
        "optim.warmup_steps=2",
        "train.steps=10",
        "evaluate.every=5",
        "checkpoint.every=5",
    ]
    recipe = str(ROOT / "examples" / "two-hosts.yaml")
    with Training(tmp_path, "one", *keys, *ALONE, recipe=recipe) as one:
        assert one.end(300) == 0, one.output
    devices = [f"cluster.address={hosts.address}", "cluster.devices_per_node=2"]
    with Training(tmp_path, "two", *keys, *devices, recipe=recipe) as two:
        assert two.end(300) == 0, two.output
        check_what_is_seen(two, 4)
    print(two.output, f"largest relative difference {check_same_numbers(one.run, two.run):.1e}", sep="\n")
    losses = [line["loss"] for line in lines(two.run) if "loss" in line]
    assert losses[-1] < losses[0] - 1
