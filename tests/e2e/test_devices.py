"""Devices that a recipe names, in a cluster that other runs use as well. Ray only counts them: there is no device."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import STORE, Hosts

from burnish.cluster.placement import num_gpus

FAKES = str(Path(__file__).parents[1] / "unit" / "cluster")
JOB = """
import sys
sys.path.insert(0, sys.argv[1])
from burnish.cluster.launch import open_ranks
from burnish.config import ClusterConfig
from burnish.types import UserError
config = ClusterConfig(address=sys.argv[2], devices_per_node=int(sys.argv[3]), wait=float(sys.argv[4]),
                       device_mapping=tuple(map(int, sys.argv[5:])) or None)
try:
    ranks = open_ranks(config, "cluster_fakes:Fake", device="cuda", meet=False)
except UserError as error:
    sys.exit(print(error, flush=True))
print(ranks.call("environment", "CUDA_VISIBLE_DEVICES"), flush=True)
sys.stdin.read()
ranks.close()
"""


@contextlib.contextmanager
def job(hosts: Hosts, per_host: int, *mapping: int, wait: float = 120.0) -> Iterator[str]:
    """What a job says first, which lives in a process of its own until the block ends."""
    arguments = [FAKES, hosts.address, str(per_host), str(wait), *map(str, mapping)]
    with subprocess.Popen([sys.executable, "-c", JOB, *arguments], stdin=-1, stdout=-1, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
            process.communicate(timeout=60)
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("shown", [None, "4,5,6,GPU-7a"])
def test_named_devices_are_those_that_no_other_run_holds(monkeypatch: pytest.MonkeyPatch, shown: str | None) -> None:
    """Numbers count what the host shows."""
    name = ("0,1,2,3" if shown is None else shown).split(",")
    with contextlib.closing(Hosts(0)) as hosts:
        with monkeypatch.context() as environment:
            if shown is not None:
                environment.setenv("CUDA_VISIBLE_DEVICES", shown)
            hosts.cluster.add_node(num_cpus=8, num_gpus=4, object_store_memory=STORE, include_dashboard=False)
        assert num_gpus(hosts.address) == 4
        with job(hosts, 2) as first:
            assert first == str([[name[0]], [name[1]]])
            with job(hosts, 4, 3) as second:  # Ray by itself would give device 2
                assert second == str([[name[3]]])
            with job(hosts, 4, 2, 1, wait=5.0) as third:
                assert third.startswith("cluster.device_mapping: devices 1 of their hosts are not free")
        with job(hosts, 4, 2, 1) as fourth:
            assert fourth == str([[name[2]], [name[1]]])
