"""Ranks as Ray's actors, over two hosts on one machine: order, data, and what every kind of fault comes to."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FAKES = Path(__file__).parents[1] / "unit" / "cluster"
sys.path.insert(0, str(FAKES))

from hosts import MARK, Hosts, await_end, is_alive, marked  # noqa: E402 - before Ray's import

from burnish.cluster.launch import open_ranks, with_restarts  # noqa: E402
from burnish.cluster.ranks import ClusterError, LostRanks  # noqa: E402
from burnish.config import ClusterConfig  # noqa: E402
from burnish.types import UserError  # noqa: E402


class FakeHosts(Hosts):
    def open(self, *args: Any, fits: Any = None, logs: Path | None = None, meet: bool = False, **keys: Any) -> Any:
        config = ClusterConfig(address=self.address, **{"timeout": 60.0, "wait": 60.0, **keys})
        return open_ranks(config, "cluster_fakes:Fake", args, device="cpu", logs=logs, meet=meet, fits=fits)


@pytest.fixture(scope="module")
def hosts() -> Iterator[FakeHosts]:
    hosts = FakeHosts(2)
    yield hosts
    hosts.close()


def pids_of(ranks: Any) -> list[int]:
    return [place[3] for place in ranks.call("place")]


def test_ranks_over_two_hosts_share_values_and_form_a_group(hosts: FakeHosts, tmp_path: Path) -> None:
    ranks = hosts.open(num_nodes=2, env={"OF_RANK": 7}, meet=True, logs=tmp_path / "logs")
    with contextlib.closing(ranks):
        pids = pids_of(ranks)
        assert [place[:3] for place in ranks.call("place")] == [(0, 2, 0), (1, 2, 0)]
        assert ranks.call("environment", "OF_RANK") == [["7"], ["7"]]
        assert ranks.call("total", 1.0) == [3.0, 3.0]
        first, second = {"x": np.arange(4, dtype=np.int32)}, {"x": np.ones(1000, np.float32)}
        assert ranks.call("arrays", by_rank=[first, second]) == [6.0, 1000.0]
        assert ranks.call("arrays", by_rank=[second, second]) == [1000.0, 1000.0]
        assert [ranks.call("echo", number) for number in range(3)] == [[(number,)] * 2 for number in range(3)]
        ranks.call("say", "hello")
    assert not await_end(pids)
    log = (tmp_path / "logs" / "rank-1.log").read_text()
    for part in ("printed hello 1", "written hello 1", "logged hello 1", "object made", "joined the process group"):
        assert part in log


def test_the_console_shows_the_driver_and_rank_0(
    hosts: FakeHosts, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "burnish"), contextlib.closing(hosts.open(num_nodes=2, logs=tmp_path)) as ranks:
        ranks.call("say", "hello")
        deadline = time.monotonic() + 10
        while "logged hello 0" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "logged hello 0" in caplog.text
    assert "logged hello 1" not in caplog.text
    phases = [record.getMessage() for record in caplog.records if record.name == "burnish.cluster.phases"]
    for part in ("placement: 2 ranks on 2 hosts", "ranks up", "object made"):
        assert any(part in line for line in phases), part
    assert any("rank 0 pid" in line for line in phases)
    assert "hello" not in "".join(capfd.readouterr())


@pytest.mark.slow
def test_a_device_mapping_orders_ranks(hosts: FakeHosts) -> None:
    with contextlib.closing(hosts.open(num_nodes=2, devices_per_node=2, device_mapping=[3, 0])) as ranks:
        mapped = ranks.call("node")
    with contextlib.closing(hosts.open(num_nodes=2, devices_per_node=2, device_mapping=[0, 3])) as ranks:
        assert ranks.call("node") == mapped[::-1]
    assert len(set(mapped)) == 2


@pytest.mark.parametrize(
    ("call", "kind", "parts"),
    [
        (("fail", 1, "user"), "Mended", ["set a.b to 1"]),
        (("fail", 1, "other"), "ClusterError", ["rank 1 on 127.0.0.1", "KeyError: 'missing-key'", "cluster_fakes.py"]),
        (("fail", 1, "exit"), "ClusterError", ["rank 1 on 127.0.0.1", "failed in fail: SystemExit: 3"]),
        (("die", 1), "LostRanks", ["rank 1 on 127.0.0.1", "lost in die"]),
        (("hang", 1), "ClusterError", ["hang hangs", "rank 1 of 2", "stuck_here", "cluster.timeout=3 s"]),
    ],
)
def test_the_first_failure_is_shown_and_ends_all(
    hosts: FakeHosts, tmp_path: Path, call: tuple[Any, ...], kind: str, parts: list[str]
) -> None:
    ranks = hosts.open(num_nodes=2, logs=tmp_path, timeout=3.0)
    pids = pids_of(ranks)
    with pytest.raises(UserError) as raised:
        ranks.call(*call)
    assert type(raised.value).__name__ == kind
    for part in parts:
        assert part in str(raised.value)
    assert not await_end(pids)
    with pytest.raises(ClusterError, match="asked of ranks that have ended"):
        ranks.call("echo")
    if call[0] == "hang":
        assert "stuck_here" in (tmp_path / "rank-1.log").read_text()
        assert "Thread 0x" in (tmp_path / "rank-0.log").read_text()


def test_an_object_that_cannot_be_made(hosts: FakeHosts) -> None:
    with pytest.raises(ClusterError, match=r"rank [01] on .* failed in start: ValueError: no object on rank"):
        hosts.open("broken", num_nodes=2)


def test_an_object_that_cannot_be_made_while_others_wait_for_it(hosts: FakeHosts) -> None:
    with pytest.raises(ClusterError, match=r"rank 1 on .* failed in start: KeyError: 'missing-key'"):
        hosts.open("broken on the last", num_nodes=2, meet=True, timeout=20.0)


def test_a_lost_rank_restarts_the_run_from_where_it_stood(hosts: FakeHosts, tmp_path: Path) -> None:
    starts = []

    def once(restarts: int) -> list[int]:
        with contextlib.closing(hosts.open("note", str(tmp_path), num_nodes=2, meet=True)) as ranks:
            starts.append(restarts)
            return ranks.call("count", restarts)

    assert with_restarts(once, 1) == [2, 2]
    assert starts == [0, 1]
    assert (tmp_path / "saved").read_text() == "4"


@pytest.mark.slow
def test_a_host_that_comes_late_and_one_that_is_lost(hosts: FakeHosts, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ClusterError, match=r"cluster.num_nodes=3: 2 hosts .* cluster.wait=1 s"):
        hosts.open(num_nodes=3, wait=1.0)
    with caplog.at_level(logging.INFO, "burnish"), ThreadPoolExecutor() as pool:
        opening = pool.submit(hosts.open, num_nodes=3)
        while "waiting for hosts: 2 of 3 are up" not in caplog.text:
            time.sleep(0.1)
        late = hosts.add()
        ranks = opening.result(60)
    assert ranks.world_size == 3
    pids = pids_of(ranks)
    os.kill(late.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    with pytest.raises(LostRanks, match="was lost in hang"):
        ranks.call("hang", 2)
    assert not await_end(pids)
    # Ray itself does not know yet that the host is gone.
    # A layout that takes an even number of ranks alone goes on with the two hosts that are left.
    with contextlib.closing(hosts.open(num_nodes=3, restart_wait=0.5, fits=lambda world: world % 2 == 0)) as ranks:
        assert ranks.world_size == 2
        assert "going on with 2 ranks" in caplog.text


DRIVER = """
import atexit, os, sys, time
atexit.register(print, "a hook of its own", flush=True)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from burnish.cluster.launch import open_ranks
from burnish.cluster.ranks import ClusterError
from burnish.config import ClusterConfig
keys = eval(sys.argv[2])
if __name__ == "__main__":
    ranks = open_ranks(ClusterConfig(object_store_memory=80_000_000, **keys), "cluster_fakes:Fake", device="cpu",
                       logs=Path(sys.argv[3]), meet=False)
    print("ready", *[place[3] for place in ranks.call("place")], flush=True)
    try:
        ranks.call(*sys.argv[4:5], *[int(a) for a in sys.argv[5:]])
    except ClusterError as error:
        print(error, flush=True)
        sys.exit(7)
"""


@contextlib.contextmanager
def driver(keys: dict[str, Any], logs: Path, *call: str) -> Iterator[tuple[subprocess.Popen[str], list[int], str]]:
    """A driver in a process of its own, the pids of its ranks, and the mark by which to find what it started."""
    mark = secrets.token_hex(8)
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(FAKES), repr(keys), str(logs), *call],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        words: list[str] = []
        said = []
        for line in process.stdout:
            said.append(line)
            words = line.split()
            if words[:1] == ["ready"]:
                break
        assert words[:1] == ["ready"], "".join(said)
        yield process, [int(word) for word in words[1:]], mark
    finally:
        process.kill()
        process.wait()


def test_no_process_outlives_a_driver_that_is_killed(tmp_path: Path) -> None:
    with driver({"devices_per_node": 2}, tmp_path, "hang", "0") as (process, ranks, mark):
        running = marked(mark)
        assert set(ranks) <= set(running)
        assert len(running) > 4  # Ray's own among them
        process.kill()
        process.wait()
        assert not await_end(marked(mark))


def test_ranks_in_a_cluster_end_with_a_driver_that_is_killed(hosts: FakeHosts, tmp_path: Path) -> None:
    keys = {"address": hosts.address, "num_nodes": 2}
    with driver(keys, tmp_path, "hang", "0") as (process, ranks, _):
        process.kill()
        process.wait()
        assert not await_end(ranks)


ADDRESSES = """
import os, sys
import ray
from ray._private import services
from burnish.cluster.placement import connected
from burnish.config import ClusterConfig
from burnish.types import UserError
services.node_ip_address_from_perspective = lambda address=None: "192.0.2.9"  # whatever this machine has
NAMES = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "BURNISH_RAY")
patched = lambda: (sys.excepthook, services.ConsolePopen, services.get_node_ip_address(), *map(os.environ.get, NAMES))
before = patched()
config = ClusterConfig(devices_per_node=1, object_store_memory=80_000_000)
with connected(config, "cpu"):
    print(ray.util.get_node_ip_address(), {node["NodeManagerAddress"] for node in ray.nodes()})
    try:
        with connected(config, "cpu"):
            pass
    except UserError as error:
        print(error, ray.is_initialized())
print(patched() == before, before[2])
services.get_localhost_ip = lambda: "127.9.9.9"
import ipaddress
class Address(ipaddress.IPv4Address):
    is_loopback = False
ipaddress.ip_address = Address
try:
    with connected(config, "cpu"):
        pass
except UserError as error:
    print(error, ray.is_initialized())
"""


def test_a_ray_of_our_own_is_on_loopback_whenever_ray_was_imported() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    done = subprocess.run([sys.executable, "-c", ADDRESSES], stdout=-1, text=True, env=environment, timeout=120)
    own, twice, after, other = done.stdout.splitlines()
    assert own == "127.0.0.1 {'127.0.0.1'}"
    assert twice == "this process is in a Ray cluster already; call ray.shutdown() before the run True"
    assert after == "True 192.0.2.9"
    assert other.startswith("the run's own Ray took the address 127.9.9.9, where others reach it")
    assert other.endswith("False")


@pytest.mark.slow
def test_jobs_side_by_side_on_one_host(tmp_path: Path) -> None:
    with (
        driver({"devices_per_node": 2}, tmp_path / "a", "hang", "0") as (_, one, _),
        driver({"devices_per_node": 2}, tmp_path / "b", "echo", "0") as (second, two, mark),
    ):
        assert not set(one) & set(two)
        assert second.wait(60) == 0
        assert not await_end(marked(mark))
        assert all(is_alive(pid) for pid in one)


@pytest.mark.slow
def test_a_head_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    with driver({"devices_per_node": 2, "timeout": 120.0}, tmp_path, "hang", "0") as (process, _, mark):
        heads = [pid for pid in marked(mark) if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(heads) == 1
        os.kill(heads[0], signal.SIGKILL)
        assert process.stdout is not None
        output = process.stdout.read()
        assert process.wait(60) == 7
        assert "the head of the Ray cluster" in output
        assert output.splitlines()[-1] == "a hook of its own"
        assert not await_end(marked(mark))


TORCHRUN = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from burnish.cluster.launch import driving, open_ranks
from burnish.config import ClusterConfig
from burnish.types import UserError
try:
    with driving(os.environ):
        ranks = open_ranks(ClusterConfig(), "cluster_fakes:Fake", device="cpu", logs=Path(sys.argv[2]))
        print("total", ranks.call("total", 1.0), "ray" in sys.modules, flush=True)
        ranks.call(*sys.argv[3:4], *[int(a) for a in sys.argv[4:]], "other")
        ranks.close()
except UserError as error:
    print(f"error: {error}", flush=True)
    sys.exit(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", [("echo",), ("fail", "1")])
def test_torchrun_starts_the_ranks(tmp_path: Path, call: tuple[str, ...]) -> None:
    script = tmp_path / "driver.py"
    script.write_text(TORCHRUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), str(FAKES), str(tmp_path / "logs"), *call],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "total [3.0, 3.0] False" in done.stdout, done.stdout + done.stderr
    if call == ("echo",):
        assert done.returncode == 0
        return
    assert done.returncode != 0
    assert "error: rank 1" in done.stdout
    assert "KeyError: 'missing-key'" in done.stdout
