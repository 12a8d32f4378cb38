"""What becomes of a training run when something fails, tried for real: processes killed, stopped, out of disk."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import Hosts, Training, await_end, name_of
from workshop import Workshop

TWO = "cluster.devices_per_node=2"


@pytest.fixture
def shop(workshop: Workshop) -> Workshop:
    """A run that lasts until a fault ends it, saved every fifth step."""
    workshop.recipe(
        train={"steps": 1000},
        evaluate={"every": 1000, "at_start": False},
        checkpoint={"every": 5, "export": "never"},
        run={"trackers": []},
    )
    return workshop


@pytest.fixture
def timed() -> Callable[[Training, str], int]:
    """Ends a run and prints, for the table of docs/cluster.md: status, seconds to the driver's end and to the last."""

    def end(training: Training, what: str) -> int:
        begun = time.monotonic()
        status = training.process.wait(240)
        driver = time.monotonic() - begun
        left = {pid: name_of(pid) for pid in await_end(training.processes)}
        last = time.monotonic() - begun
        said = "\n    ".join(training.output.splitlines()[-12:])
        print(f"{what}: status {status}, driver gone {driver:.1f} s, last process {last:.1f} s, said\n    {said}")
        assert not left, "processes outlive the run"
        return status

    return end


def same_losses(training: Training, other: Training, exact: bool = True) -> None:
    found, expected = ({line["step"]: line["loss"] for line in run.steps} for run in (training, other))
    assert found.keys() == expected.keys()
    assert found == (expected if exact else pytest.approx(expected, rel=1e-5))


def test_a_killed_worker_ends_the_run(shop: Workshop, timed) -> None:
    with Training(shop.folder, "runs/a", TWO) as run:
        run.until_step(3)
        os.kill(run.ranks[1], signal.SIGKILL)
        assert timed(run, "kill -9 of a worker") == 1
        assert f"rank 1 on 127.0.0.1 (pid {run.ranks[1]}) was lost in step_packs" in run.output
        assert "Traceback" not in run.output


@pytest.mark.slow
def test_a_killed_worker_with_restarts_changes_no_bit(shop: Workshop, timed) -> None:
    with Training(shop.folder, "runs/whole", TWO, "train.steps=20") as whole:
        assert whole.end() == 0
    with Training(shop.folder, "runs/again", TWO, "train.steps=20", "cluster.max_restarts=1") as again:
        again.until_step(7)
        os.kill(again.ranks[1], signal.SIGKILL)
        assert timed(again, "kill -9 of a worker, max_restarts=1") == 0
        assert "restart 1 of 1, from the last checkpoint" in again.output
    same_losses(again, whole)


def test_nothing_outlives_a_killed_driver_and_the_run_goes_on_from_its_checkpoint(shop: Workshop, timed) -> None:
    with Training(shop.folder, "runs/a", TWO) as run:
        run.until_step(7)
        run.until_saved()
        assert len(run.processes) > 5  # the driver, two ranks, a worker, and Ray's own
        run.process.kill()
        timed(run, "kill -9 of the driver")
    with Training(shop.folder, "runs/a", TWO) as run:
        run.until(lambda: "going on from" in run.output)
        run.until_step(run.steps[-1]["step"] + 2)  # of the run before, at first
        run.process.send_signal(signal.SIGTERM)
        assert timed(run, "SIGTERM") == 128 + signal.SIGTERM
        assert "SIGTERM: saved step" in run.output
    latest = int((run.run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert latest == run.steps[-1]["step"]


def starts_a_cluster(run: Training) -> bool:
    return any("gcs_server" in name_of(pid) for pid in run.processes)


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGTERM, starts_a_cluster),
        pytest.param(signal.SIGINT, lambda run: bool(run.ranks), marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, lambda run: "every rank ready" in run.output, marks=pytest.mark.slow),
    ],
    ids=["as-ray-starts", "as-ranks-meet", "ranks-ready"],
)
def test_a_signal_ends_a_start_at_once(shop: Workshop, timed, number: signal.Signals, when: Any) -> None:
    with Training(shop.folder, "runs/a", TWO) as run:
        run.until(lambda: when(run))
        os.killpg(run.process.pid, number)
        assert timed(run, f"{number.name} to the group before step 1") == 128 + number
        last = run.output.splitlines()[-1]
        assert last.endswith("run the same command again to go on")
        if "every rank ready" not in run.output:  # from then on a step may be under way, which is saved
            assert last.startswith(f"burnish: {number.name}: stopped, while no step was under way")
        assert "Traceback" not in run.output
        assert "***" not in run.output  # with which traces of C++ begin
    if number == signal.SIGINT:
        with Training(shop.folder, "runs/a", TWO, "train.steps=2") as run:
            assert run.end() == 0, run.output


def test_a_signal_to_all_processes_at_once_lets_the_step_finish(shop: Workshop, timed) -> None:
    """As `timeout` does, and Ctrl-C in a terminal: to the driver, and to the group with all that stand in it."""
    with Training(shop.folder, "runs/a", TWO) as run:
        run.until_step(3)
        os.kill(run.process.pid, signal.SIGTERM)
        os.killpg(run.process.pid, signal.SIGTERM)
        assert timed(run, "SIGTERM to the group") == 128 + signal.SIGTERM
        assert "SIGTERM: saved step" in run.output
    latest = int((run.run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert latest == run.steps[-1]["step"]


@pytest.mark.slow
def test_under_torchrun_the_ranks_leave_a_signal_to_the_driver(shop: Workshop, timed) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with Training(shop.folder, "runs/a", launcher=torchrun) as run:
        run.until_step(3)
        os.killpg(run.process.pid, signal.SIGINT)
        assert timed(run, "SIGINT to torchrun") != 0
        assert "SIGINT: saved step" in run.output
        assert "burnish: error" not in run.output
    latest = int((run.run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert latest == run.steps[-1]["step"]


@pytest.mark.slow
def test_a_step_that_outlasts_the_grace_period_is_cut_off(shop: Workshop, timed) -> None:
    with Training(shop.folder, "runs/a", TWO, "cluster.grace=3") as run:
        run.until_step(7)
        run.until_saved()
        os.kill(run.ranks[1], signal.SIGSTOP)
        run.process.send_signal(signal.SIGTERM)
        assert timed(run, "SIGTERM, not done within grace=3") == 128 + signal.SIGTERM
        assert "not finished within cluster.grace=3 s" in run.output


@pytest.mark.slow
def test_a_worker_that_stands_still_is_told_of_with_the_stacks_of_the_others(shop: Workshop, timed) -> None:
    with Training(shop.folder, "runs/a", TWO, "cluster.timeout=40") as run:
        run.until_step(7)
        os.kill(run.ranks[1], signal.SIGSTOP)
        assert timed(run, "SIGSTOP of a worker, timeout=40") == 1
        assert "hangs: no answer within cluster.timeout=40 s from ranks 0, 1 of 2" in run.output
        assert "no word, not even from a thread of its own" in run.output
        assert "but for rank 1: a process that is stopped, or gone, writes none" in run.output
    assert "Thread 0x" in (run.run / "logs" / "rank-0.log").read_text()


HANG = """
import signal, time
def stand_still(*_):
    time.sleep(1e6)
signal.signal(signal.SIGUSR1, stand_still)
"""


FAIL = """
import signal
def fail(*_):
    raise KeyError("missing-key")
def fail_in_the_next_step(*_):
    from burnish.rank import SeatedRank
    SeatedRank.step_packs = fail
signal.signal(signal.SIGUSR1, fail_in_the_next_step)
"""


def customised(shop: Workshop, text: str) -> str:
    """The key by which ranks begin with `text`, Python code."""
    (shop.folder / "custom").mkdir()
    (shop.folder / "custom" / "sitecustomize.py").write_text(text)
    path = ":".join(filter(None, [str(shop.folder / "custom"), os.environ.get("PYTHONPATH")]))
    return f"cluster.env={{PYTHONPATH: '{path}'}}"


@pytest.mark.slow
def test_an_exception_in_one_rank_is_shown_with_its_place_and_ends_all(shop: Workshop, timed) -> None:
    with Training(shop.folder, "runs/a", TWO, customised(shop, FAIL)) as run:
        run.until_step(3)
        os.kill(run.ranks[1], signal.SIGUSR1)
        assert timed(run, "an exception in a rank") == 1
        where = (
            f"burnish: error: rank 1 on 127.0.0.1 (pid {run.ranks[1]}) failed in step_packs: KeyError: 'missing-key'"
        )
        assert where in run.output
        assert 'raise KeyError("missing-key")' in run.output
        assert run.output.count("Traceback") == 1
        assert "Connection" not in run.output  # rank 0's, which waited for rank 1


@pytest.mark.slow
def test_a_worker_that_hangs_shows_where_and_so_do_its_peers_in_a_collective(shop: Workshop, timed) -> None:
    with Training(shop.folder, "runs/a", TWO, "cluster.timeout=40", customised(shop, HANG)) as run:
        run.until_step(7)
        os.kill(run.ranks[1], signal.SIGUSR1)
        assert timed(run, "a worker that hangs, timeout=40") == 1
        assert "stand_still" in run.output
        assert "Traceback" not in run.output
    logs = [(run.run / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert all("Thread 0x" in log for log in logs)
    assert "stand_still" in logs[1]


@pytest.mark.slow
def test_a_head_that_is_killed_ends_the_run(shop: Workshop, timed) -> None:
    with Training(shop.folder, "runs/a", TWO) as run:
        run.until_step(7)
        heads = [pid for pid in run.processes if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(heads) == 1
        os.kill(heads[0], signal.SIGKILL)
        assert timed(run, "kill -9 of the head") == 1
        assert "the head of the Ray cluster" in run.output


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of `size` at `folder`. Skips the test where none may be mounted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted, which takes root: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_save_before_it(shop: Workshop, timed) -> None:
    checkpoints = shop.folder / "runs" / "a" / "checkpoints"
    with small_disk(checkpoints, "1m"), Training(shop.folder, "runs/a", TWO) as run:
        assert timed(run, "disk full during a save") == 1
        assert "No space left on device (it takes under 1 MiB" in run.output
        assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "5"
        assert [path.name for path in checkpoints.glob("iter_*")] == ["iter_0000005"]
        with Training(shop.folder, "runs/a", TWO, "checkpoint.every=500") as again:
            again.until(lambda: "going on from" in again.output)
            again.until_step(7)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_is_used(shop: Workshop, timed) -> None:
    with Training(shop.folder, "runs/a", TWO) as run:
        run.until_step(12)
        run.process.send_signal(signal.SIGTERM)
        run.end()
    newest, before = sorted((run.run / "checkpoints").glob("iter_*"))[:-3:-1]
    file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with Training(shop.folder, "runs/a", TWO) as run:
        run.until_step(int(newest.name.removeprefix("iter_")) + 2)
        assert f"{newest.name} cannot be used: {file.name} does not have the content that was written" in run.output
        assert f"going on from runs/a/checkpoints/{before.name}" in run.output.replace(f"{shop.folder}/", "")
        run.process.send_signal(signal.SIGTERM)
        assert timed(run, "a corrupted checkpoint") == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(shop: Workshop, timed) -> None:
    with Training(shop.folder, "runs/a", TWO) as first:
        first.until_step(1)
        with Training(shop.folder, "runs/a", TWO) as second:
            assert timed(second, "two runs in one folder") == 1
            assert f"is in use by process {first.process.pid}" in second.output
        step = first.steps[-1]["step"]
        first.until_step(step + 3)


@pytest.mark.slow
def test_a_run_goes_on_over_fewer_ranks(shop: Workshop, timed) -> None:
    with Training(shop.folder, "runs/alone", "train.steps=20") as alone:
        assert alone.end() == 0
    with Training(shop.folder, "runs/a", TWO, "train.steps=20") as run:
        run.until_step(11)
        run.process.kill()
        run.process.wait()
    with Training(shop.folder, "runs/a", "train.steps=20") as run:
        assert timed(run, "started again on one rank") == 0
        assert "going on from" in run.output
    same_losses(run, alone, exact=False)


@pytest.mark.slow
def test_hosts_come_late_and_go(shop: Workshop, timed) -> None:
    with contextlib.closing(Hosts(1, apart=True)) as hosts:
        keys = [f"cluster.address={hosts.address}", "cluster.num_nodes=2", "cluster.devices_per_node=1"]
        keys += ["cluster.wait=90", "cluster.restart_wait=1", "checkpoint.every=5"]
        with Training(shop.folder, "runs/lost", *keys) as run:
            run.until(lambda: "waiting for hosts: 1 of 2 are up" in run.output)
            late = hosts.add()
            run.until_step(7)
            assert "placement: 2 ranks on 2 hosts" in run.output
            os.kill(late.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            assert timed(run, "kill -9 of a raylet") == 1
            assert "rank 1 on 127.0.0.2" in run.output
            assert "(raylet)" not in run.output
        second = hosts.add()
        with Training(shop.folder, "runs/less", *keys, "cluster.max_restarts=1", "train.steps=40") as run:
            run.until_step(7)
            os.kill(second.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            assert timed(run, "kill -9 of a raylet, max_restarts=1") == 0
            assert "1 of 2 hosts are left: going on with 1 rank\n" in run.output
        assert [line["step"] for line in run.steps] == list(range(1, 41))
    with Training(shop.folder, "runs/alone", "train.steps=40") as alone:
        assert alone.end() == 0
    same_losses(run, alone, exact=False)


@pytest.mark.slow
def test_the_head_of_a_cluster_of_hosts_is_killed(shop: Workshop, timed) -> None:
    with contextlib.closing(Hosts(2, apart=True)) as hosts:
        keys = [f"cluster.address={hosts.address}", "cluster.num_nodes=2", "cluster.devices_per_node=1"]
        with Training(shop.folder, "runs/a", *keys) as run:
            run.until_step(7)
            os.kill(hosts.cluster.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
            assert timed(run, "kill -9 of the head of two hosts") == 1
            assert "the head of the Ray cluster" in run.output
