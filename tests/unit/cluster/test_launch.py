"""What a recipe and the environment say of a run's processes, and how failures of several ranks become one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.cluster.launch import is_local, open_ranks, serve_as_peer, with_restarts
from burnish.cluster.numa import local_cores, parse_cores
from burnish.cluster.peers import World, environment_world, first_host
from burnish.cluster.placement import rank_order
from burnish.cluster.ranks import (
    ClusterError,
    Failure,
    LocalRanks,
    LostRanks,
    first,
    hang,
    raise_failure,
    shared_values,
)
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
        ranks.start("fail", 0, "other").result()


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
    assert serve_as_peer({}) is None


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

    from burnish.cluster.ranks import Place

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
