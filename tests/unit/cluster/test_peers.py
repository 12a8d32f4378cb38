"""Processes as torchrun starts them: rank 0 drives, the others serve, and all of them end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import COMMANDS

from burnish.cluster.ranks import ClusterError, LostRanks

sys.path.insert(0, str(Path(__file__).parent))


def _process(rank: int, world: int, port: int, drive: Callable[..., Any], folder: str, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sys.path.insert(0, str(Path(__file__).parent))
    from burnish.cluster.launch import driving

    try:
        with driving(os.environ):
            result = drive(Path(folder))
        results.send((None, result))
    except Exception as error:
        results.send((f"{type(error).__name__}: {error}", None))
        sys.exit(1)


def run_peers(
    world: int, drive: Callable[..., Any], folder: Path, absent: int = 0
) -> tuple[str | None, Any, list[int | None]]:
    """(error, result) of the driver and the exit status of every process, of which the last `absent` never come."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    receiver, sender = COMMANDS.Pipe(duplex=False)
    processes = [
        COMMANDS.Process(target=_process, args=(rank, world, port, drive, str(folder), sender))
        for rank in range(world - absent)
    ]
    try:
        for process in processes:
            process.start()
        sender.close()
        try:
            error, result = receiver.recv() if receiver.poll(60) else ("no answer", None)
        except EOFError:
            error, result = "the driver died", None
        for process in processes:
            process.join(20)
        return error, result, [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def _open(folder: Path, timeout: float = 60.0, note: str = "note", **more: Any) -> Any:
    from burnish.cluster.launch import open_ranks
    from burnish.config import ClusterConfig

    config = ClusterConfig(timeout=timeout, env={"OF_RANK": 1}, **more)
    return open_ranks(config, "cluster_fakes:Fake", (note, str(folder)), device="cpu", logs=folder / "logs")


def _works(folder: Path) -> Any:
    ranks = _open(folder)
    first = {"x": np.arange(3, dtype=np.int32)}
    second = {"x": np.ones((4, 100_000), np.float32)}
    answers = [ranks.call("echo", number) for number in range(3)]
    ranks.call("say", "hello")
    result = (
        [place[:3] for place in ranks.call("place")],
        answers,
        ranks.call("arrays", by_rank=[first, second, second]),
        ranks.call("total", 1.0),
        ranks.call("environment", "OF_RANK")[1:],
    )
    ranks.close()
    return result


def test_calls_reach_every_rank_and_values_those_they_are_for(tmp_path: Path) -> None:
    error, result, statuses = run_peers(3, _works, tmp_path)
    assert error is None
    places, answers, sums, totals, environment = result
    assert places == [(0, 3, 0), (1, 3, 1), (2, 3, 2)]
    assert answers == [[(number,)] * 3 for number in range(3)]
    assert sums == [3.0, 400_000.0, 400_000.0]
    assert totals == [6.0] * 3
    assert environment == [["1"], ["1"]]
    assert statuses == [0, 0, 0]
    log = (tmp_path / "logs" / "rank-2.log").read_text()
    for part in ("printed hello 2", "written hello 2", "logged hello 2", "object made"):
        assert part in log


def _fails(folder: Path) -> None:
    _open(folder).call("total_but", 1, "fail")


def _user_error(folder: Path) -> None:
    _open(folder).call("fail", 1, "user")


def _fails_as_it_is_made(folder: Path) -> None:
    _open(folder, timeout=20.0, note="broken on the last")


def _exits(folder: Path) -> None:
    _open(folder, timeout=20.0).call("fail", 0, "exit")


def _dies(folder: Path) -> None:
    _open(folder).call("total_but", 1, "die")


def _hangs(folder: Path) -> None:
    _open(folder, timeout=3.0).call("total_but", 1, "hang")


@pytest.mark.parametrize(
    ("drive", "parts"),
    [
        (_fails, ["ClusterError: rank 1", "KeyError: 'missing-key'", "cluster_fakes.py", "rank-1.log"]),
        (_user_error, ["Mended: set a.b to 1"]),
        (_fails_as_it_is_made, ["ClusterError: rank 1", "failed in start: KeyError: 'missing-key'"]),
        (_exits, ["ClusterError: rank 0", "failed in fail: SystemExit: 3"]),
        (_dies, [f"{LostRanks.__name__}: rank 1", "died without a word"]),
        (_hangs, [f"{ClusterError.__name__}: total_but hangs", "rank 0", "in total", "rank 1", "stuck_here"]),
    ],
)
def test_a_failure_ends_all_with_its_text(drive: Callable[..., Any], parts: list[str], tmp_path: Path) -> None:
    error, _, statuses = run_peers(2, drive, tmp_path)
    assert error is not None
    for part in parts:
        assert part in error
    assert statuses[0] == 1
    assert statuses[1] in (1, -signal.SIGKILL)
    if drive is _hangs:
        assert "stuck_here" in (tmp_path / "logs" / "rank-1.log").read_text()


def _loses_one_before_all_are_here(folder: Path) -> None:
    from burnish.cluster.peers import environment_world, gathering

    world = environment_world(os.environ)
    assert world is not None
    others = gathering(world)
    while 1 not in others.hosts:
        time.sleep(0.05)
    os.kill(others.hosts[1][1], signal.SIGKILL)
    _open(folder, wait=20.0)


def test_a_rank_that_is_lost_before_all_are_here_is_named(tmp_path: Path) -> None:
    error, _, _ = run_peers(3, _loses_one_before_all_are_here, tmp_path, absent=1)
    assert error is not None
    assert error.startswith(f"{LostRanks.__name__}: rank 1 on 127.0.0.1 (pid ")


def _shares_with_one_that_stands_still(folder: Path) -> None:
    ranks = _open(folder, timeout=3.0)
    pids = [place[3] for place in ranks.call("place")]
    shared = {"x": np.ones(4_000_000, np.float32)}  # more than a connection holds that nobody reads
    ranks.call("arrays", by_rank=[{}, shared, shared])
    os.kill(pids[2], signal.SIGSTOP)
    try:
        ranks.call("arrays", by_rank=[{}, shared, shared])
    finally:
        os.kill(pids[2], signal.SIGCONT)


def test_who_hands_a_value_on_is_not_held_up_by_one_that_stands_still(tmp_path: Path) -> None:
    error, _, _ = run_peers(3, _shares_with_one_that_stands_still, tmp_path)
    assert error is not None
    assert "no answer within cluster.timeout=3 s from rank 2 of 3" in error
    assert "but for rank 2: a process that is stopped" in error


def _is_killed(folder: Path) -> None:
    _open(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def test_peers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    error, _, statuses = run_peers(2, _is_killed, tmp_path)
    assert error == "the driver died"
    assert statuses == [-signal.SIGKILL, 1]


def _is_killed_before_it_has_ranks(folder: Path) -> None:
    from burnish.cluster.peers import environment_world, gathering

    world = environment_world(os.environ)
    assert world is not None
    assert gathering(world).wait(60) == []
    os.kill(os.getpid(), signal.SIGKILL)


def test_peers_end_with_a_driver_that_is_killed_while_they_wait(tmp_path: Path) -> None:
    error, _, statuses = run_peers(2, _is_killed_before_it_has_ranks, tmp_path)
    assert error == "the driver died"
    assert statuses == [-signal.SIGKILL, 1]


def _runs_twice(folder: Path) -> bool:
    import torch.distributed as dist

    _open(folder).close()
    assert not dist.is_initialized()  # what follows in this process has no peers
    _open(folder)
    return True


def test_the_others_are_there_for_one_run(tmp_path: Path) -> None:
    error, _, statuses = run_peers(2, _runs_twice, tmp_path)
    assert error is not None
    assert error.startswith("ClusterError: the other processes")
    assert "start the launcher once for each run" in error
    assert statuses == [1, 0]


def _has_nothing_to_do(folder: Path) -> str:
    return "finished"


def test_peers_end_with_a_driver_that_needs_none(tmp_path: Path) -> None:
    assert run_peers(2, _has_nothing_to_do, tmp_path) == (None, "finished", [0, 0])


def _asks_for_restarts(folder: Path) -> None:
    _open(folder, max_restarts=1)


def test_keys_about_ray_are_refused(tmp_path: Path) -> None:
    error, _, statuses = run_peers(2, _asks_for_restarts, tmp_path)
    assert statuses == [1, 0]
    assert error is not None
    assert error.startswith("RecipeError: cluster.max_restarts=1")
    assert "torchrun --max-restarts" in error
