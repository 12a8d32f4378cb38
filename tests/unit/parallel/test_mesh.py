"""The groups of a mesh."""

from __future__ import annotations

import torch
from ranks import run_ranks

from burnish.parallel.degrees import Degrees
from burnish.parallel.mesh import Mesh, world_timeout
from burnish.train.checkpoint import Checkpointer


def timeouts_of_groups() -> set[float]:
    mesh = Mesh(Degrees(dp_shard=2, tp=2, ep=2), torch.device("cpu"))
    groups = [mesh.group(axis) for axis in ("shard", "tp", "dp_shard", "cp", "ep", "etp")]
    groups.append(mesh.expert_shards.get_group())
    saves = Checkpointer()._ranks.group
    assert saves is not None
    known = [group._get_backend(torch.device("cpu")).options._timeout for group in (*groups, saves)]
    return {timeout.total_seconds() for timeout in (*known, world_timeout())}


def test_every_group_waits_as_long_as_the_world_was_told():
    for timeouts in run_ranks(4, timeouts_of_groups):
        assert timeouts == {60.0}
