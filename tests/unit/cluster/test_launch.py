"""What a recipe and the environment say of a run's processes, and how failures of several ranks become one."""

from __future__ import annotations

import fcntl
import random
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.cluster.launch import check_devices, driving, is_local, joined_device, open_ranks, with_restarts
from burnish.cluster.numa import local_cores, parse_cores
from burnish.cluster.peers import World, _device, environment_world, first_host
from burnish.cluster.placement import (
    Host,
    _own_folder,
    await_hosts,
    hold_devices,
    local_devices,
    number_of,
    rank_order,
    shown_as,
)
from burnish.cluster.ranks import (
    ClusterError,
    Failure,
    LocalRanks,
    LostRanks,
    Place,
    first,
    hang,
    raise_failure,
    shared_values,
)
from burnish.cluster.ray_ranks import _within
from burnish.cluster.seat import Seat
from burnish.components import DriverComponents
from burnish.config import ClusterConfig, RecipeError
from burnish.recipe import recipe_from_dict
from burnish.types import UserError

sys.path.insert(0, str(Path(__file__).parent))


def cluster(**keys: Any) -> ClusterConfig:
    tree = {"model": {"path": "m"}, "data": {"train": ["rows.jsonl"]}, "cluster": keys}
    return recipe_from_dict(tree).cluster


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        ([0, 1, 2, 3], (0, 1, 2, 3)),
        ("list(range(0,8))", tuple(range(8))),
        ("range(4)", (0, 1, 2, 3)),
        ("list( range(0, 8, 2) )", (0, 2, 4, 6)),
        ("[7, 6] + list(range(0,2))", (7, 6, 0, 1)),
        (None, None),
    ],
)
def test_device_mapping_is_parsed(written: Any, devices: tuple[int, ...] | None) -> None:
    assert cluster(device_mapping=written).device_mapping == devices


@pytest.mark.parametrize(
    "written",
    [
        "__import__('os').getpid()",
        "[0, 1] * 2",
        "list(range(a))",
        "list(range(0,8,0))",
        "list(range(1,2,3,4))",
        "[0, True]",
        [0, True],
        [-1],
        "range(-2, 1)",
        [],
        "[]",
        [0, 0],
        "0-3",
        "[0,1] +",
    ],
)
def test_device_mapping_says_its_rule(written: Any) -> None:
    with pytest.raises(RecipeError, match=r"cluster.device_mapping.*(list of device numbers|named twice)"):
        cluster(device_mapping=written)


def test_numbers_in_messages_about_impossible_clusters() -> None:
    with pytest.raises(RecipeError, match=r"cluster.num_nodes=2 needs a cluster.*set cluster.address"):
        cluster(num_nodes=2)
    with pytest.raises(RecipeError, match=r"device 8.*num_nodes=2 x cluster.devices_per_node=4.*0 to 7"):
        cluster(address="auto", num_nodes=2, devices_per_node=4, device_mapping=[8])
    with pytest.raises(RecipeError, match="proxy"):
        cluster(address="ray://head:10001")


def test_ranks_follow_hosts_and_devices_whatever_comes_up_first() -> None:
    a, b = ((10, 0, 0, 9), "", 1), ((10, 0, 0, 10), "", 1)
    assert rank_order([(b, 1), (a, 1), (b, 0), (a, 0)]) == [3, 1, 2, 0]


@pytest.mark.parametrize("address", ["foo", "local", "10.0.0.1", ":6379", "head:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(RecipeError, match=f"cluster.address={address} .*set it to auto or HOST:PORT"):
        cluster(address=address)


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head:6379", "[::1]:6379"])
def test_addresses(address: str) -> None:
    assert cluster(address=address).address == address


def test_a_cluster_that_does_not_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.cluster.placement.ANSWER", 0.1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        for asked in ("auto", "cpu", "cuda"):
            with pytest.raises(ClusterError, match=rf"cluster.address={address}: no Ray .* \(.*refused\); start one"):
                joined_device(cluster(address=address), asked)


def test_what_ranks_have_is_said_by_the_hosts_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    joined, count = cluster(address="auto"), 8
    monkeypatch.setattr("burnish.cluster.placement.num_gpus", lambda address: count)
    assert [joined_device(joined, asked) for asked in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    count = 0
    assert [joined_device(joined, asked) for asked in ("auto", "cpu", "cuda")] == ["cpu", "cpu", "cuda"]
    assert joined_device(cluster(), "auto") is None
    recipe = recipe_from_dict(
        {"model": {"path": "m"}, "data": {"train": ["rows.jsonl"]}, "cluster": {"address": "auto"}}
    )
    driver = DriverComponents(recipe, Path("runs/a"), find_device=lambda: "cuda")
    assert driver.device == torch.device("cuda")  # whatever this host has


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        ({}, 1),
        ({"devices_per_node": 3}, 3),
        ({"device_mapping": [0, 3]}, 4),
        ({"device_mapping": "list(range(4, 8))"}, 8),
        ({"device_mapping": [0, 3], "devices_per_node": 6}, 6),
    ],
)
def test_a_ray_of_our_own_has_a_process_for_every_device_that_is_counted(keys: dict[str, Any], number: int) -> None:
    assert local_devices(cluster(**keys), "cpu") == number


def test_devices_that_this_host_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for keys in ({}, {"devices_per_node": 8}, {"device_mapping": [7, 0]}, {"address": "auto", "devices_per_node": 16}):
        check_devices(cluster(**keys), "cuda")
    with pytest.raises(RecipeError, match=r"cluster.devices_per_node=16: this host shows 8 CUDA .* set it to 8"):
        check_devices(cluster(devices_per_node=16), "cuda")
    with pytest.raises(RecipeError, match=r"cluster.device_mapping names device 8, .* 8 CUDA devices, numbered from 0"):
        check_devices(cluster(device_mapping=[0, 8]), "cuda")
    check_devices(cluster(devices_per_node=16), "cpu")


def test_the_folder_of_a_ray_is_no_stale_one_while_it_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    flock, others = fcntl.flock, []

    def look_first(file: Any, how: int) -> None:
        if not others:
            others.append(_own_folder())
            others[0].__enter__()  # as another run does just then
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", look_first)
    with _own_folder() as folder:
        assert (folder / "lock").is_file()
    with _own_folder():
        assert not folder.exists()  # whose process did not live to remove it
        assert len(list(tmp_path.iterdir())) == 2


def host(number: int, devices: int) -> Host:
    return Host((10, 0, 0, number), "", 1, str(number), f"10.0.0.{number}", devices)


def test_hosts_that_have_too_few_devices_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hosts = [host(1, 0), host(2, 8), host(3, 4)]
    monkeypatch.setattr("burnish.cluster.placement.hosts_of", lambda resource: hosts)
    two = cluster(address="auto", num_nodes=2, devices_per_node=8, wait=0.1)
    with caplog.at_level("INFO", "burnish"), pytest.raises(ClusterError) as raised:
        await_hosts(two, "GPU", None, time.monotonic() + 0.1)
    assert "1 hosts with 8 GPUs are up" in str(raised.value)
    few = "(too few of the 8 GPUs asked for: 10.0.0.1 has 0, 10.0.0.3 has 4)"
    assert few in str(raised.value)
    assert "waiting for hosts: 1 of 2 are up" in caplog.text
    assert few in caplog.text
    hosts = hosts[:2]  # of which one has none, and does not count where each gives what it has
    assert await_hosts(cluster(address="auto"), "GPU", None, time.monotonic()) == ([host(2, 8)], 8)


def test_devices_are_numbered_among_those_that_a_host_shows() -> None:
    cases = [(None, ["0", "1"]), (["4", "5"], ["4", "5"]), (["GPU-a8", "GPU-b3"], ["GPU-a8", "GPU-b3"])]
    for shown, names in cases:
        assert [shown_as(number, shown) for number in range(2)] == names
        assert [number_of(name, shown) for name in names] == [0, 1]


class Pool:
    """Devices 0 to 3 of a host, as Ray gives them to two runs: at first the even ones to one, the odd to the other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.free: dict[int, int | None] = {device: device % 2 for device in range(4)}
        """Free devices, with the run that alone may have them; None any."""
        self.given: dict[Any, int] = {}

    def wait(self, actors: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        for actor in actors:
            with self.lock:
                for device, run in self.free.items():
                    if run in (None, actor.run):
                        del self.free[device]
                        self.given[actor] = device
                        return [actor], []
        time.sleep(random.random() / 50)
        return [], actors

    def get(self, actors: list[Any]) -> list[Any]:
        return [("node", self.given[actor]) for actor in actors]

    def kill(self, actor: Any) -> None:
        with self.lock:
            if actor in self.given:
                self.free[self.given.pop(actor)] = None


class PooledActor:
    def __init__(self, run: int) -> None:
        self.run = run
        self.identify, self.remote = self, lambda _: self


def test_runs_that_seek_each_others_devices_both_get_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    pool = Pool()
    for name in ("wait", "get", "kill"):
        monkeypatch.setattr(ray, name, getattr(pool, name))

    def seek(run: int, devices: tuple[int, ...]) -> list[int]:
        wanted = [("node", device) for device in devices]
        actors = hold_devices(lambda node: PooledActor(run), wanted, time.monotonic() + 10, 10)
        return [pool.given[actor] for actor in actors]

    with ThreadPoolExecutor() as threads:
        assert list(threads.map(seek, (0, 1), ((3, 1), (0,)))) == [[3, 1], [0]]
    assert pool.free.keys() == {2}


def test_a_process_that_is_shown_its_own_device_alone_takes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(5, 8, 0, "host", "cuda")
    for count, device in ((8, "cuda:3"), (1, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert _device(place, 3) == Place(5, 8, 3, "host", device)
    assert _device(Place(5, 8, 0, "host", "cpu"), 3).device == "cpu"


def test_world_of_one_is_local() -> None:
    assert is_local(ClusterConfig(), "cpu")
    assert not is_local(ClusterConfig(devices_per_node=2), "cpu")
    assert not is_local(ClusterConfig(address="auto"), "cpu")
    ranks = open_ranks(ClusterConfig(), "cluster_fakes:Fake", device="cpu")
    assert isinstance(ranks, LocalRanks)
    assert "ray" not in sys.modules or sys.modules["ray"].is_initialized() is False
    assert ranks.call("place")[0][:3] == (0, 1, 0)
    assert ranks.call("echo", 1, by_rank=["mine"]) == [(1, "mine")]
    with pytest.raises(KeyError):
        ranks.call("fail", 0, "other")


def test_an_end_that_takes_too_long_is_said(caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    _within(0.01, done.wait)
    assert "ending Ray takes longer than 0.01 s" in caplog.text
    done.set()
    caplog.clear()
    _within(10, done.wait)
    assert caplog.text == ""


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "5"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "12345",
}


def test_worlds_of_environments() -> None:
    assert environment_world(TORCHRUN) == World(3, 4, 1, "h", 5)
    assert environment_world(SLURM) == World(5, 8, 1, "gpu07", 32345)
    assert environment_world({**SLURM, "MASTER_ADDR": "m", "MASTER_PORT": "9"}) == World(5, 8, 1, "m", 9)
    assert environment_world({}) is None
    assert environment_world({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None
    # A batch script without srun is one process, whatever number of tasks the job has.
    assert environment_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "a"}) is None
    with driving({}):
        pass


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[03-05,9],login1", "gpu03"), ("n1", "n1"), ("n1,n2", "n1"), ("a[1,3]-ib", "a1-ib"), ("c-1-[4-6]", "c-1-4")],
)
def test_first_host_of_slurm(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_cores_of_a_device(tmp_path: Path) -> None:
    assert parse_cores("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert local_cores(tmp_path) == set()
    (tmp_path / "local_cpulist").write_text("4-5\n")
    assert local_cores(tmp_path) == {4, 5}


def failure(rank: int, at: float, text: str = "ValueError: x", **more: Any) -> Failure:
    return Failure(rank, "host", 7, "step", text, "Traceback: here\n", at, **more)


def test_the_first_failure_is_the_cause() -> None:
    echo = failure(0, 1.0, "torch.distributed.DistBackendError: NCCL error")
    gloo = failure(1, 1.5, "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer")
    early, late = failure(2, 2.0), failure(3, 3.0)
    assert first([late, echo, early, gloo]) is early
    lost = failure(4, 9.0, is_lost=True)
    assert first([echo, early, lost]) is lost


def test_what_the_user_sees_of_a_failure() -> None:
    with pytest.raises(ClusterError) as raised:
        raise_failure(failure(3, 0.0), "logs/rank-3.log")
    for part in ("rank 3", "host", "pid 7", "step", "ValueError: x", "Traceback: here", "logs/rank-3.log"):
        assert part in str(raised.value)
    from cluster_fakes import Mended

    with pytest.raises(Mended, match=r"^set a.b to 1$"):
        raise_failure(Failure.of(Mended("set a.b to 1"), Place(1, 2, 1, "host", "cpu"), "step"))


def test_what_the_user_sees_of_a_hang() -> None:
    where = {0: "a (pid 1)", 2: "b (pid 3)"}
    text = str(hang("step", 5.0, where, {0: "in total", 1: "between calls"}, 3, "runs/a/logs"))
    for part in (
        "step hangs: no answer within cluster.timeout=5 s from ranks 0, 2 of 3",
        "rank 0 on a (pid 1): in total",
        "rank 2 on b (pid 3): no word",
        "the stacks of all ranks are in runs/a/logs, but for rank 2: a process that is stopped",
    ):
        assert part in text
    assert "but for" not in str(hang("step", 5.0, where, dict.fromkeys(range(3), "here"), 3, "runs/a/logs"))


def test_a_thread_that_is_held_up_between_calls_is_seen() -> None:
    where = Seat().whereabouts()
    assert where.startswith("between calls, in whereabouts (")
    assert f"test_a_thread_that_is_held_up_between_calls_is_seen ({__file__}:" in where


def test_shared_values_are_told_by_identity() -> None:
    one, two = [1], [1]
    values, indices = shared_values([one, two, one, two])
    assert indices == [0, 1, 0, 1]
    assert values[0] is one
    assert values[1] is two


def test_only_losses_restart() -> None:
    def run(errors: list[Exception]) -> tuple[list[int], Any]:
        calls = []

        def once(restarts: int) -> str:
            calls.append(restarts)
            if errors:
                raise errors.pop(0)
            return "done"

        try:
            return calls, with_restarts(once, 2)
        except UserError as error:
            return calls, error

    assert run([LostRanks("a"), LostRanks("b")]) == ([0, 1, 2], "done")
    last = LostRanks("c")
    assert run([LostRanks("a"), LostRanks("b"), last]) == ([0, 1, 2], last)
    hang = ClusterError("hangs")
    assert run([LostRanks("a"), hang]) == ([0, 1], hang)
    wrong = RecipeError("a key")
    assert run([wrong]) == ([0], wrong)
