"""The ranks of a run as a device mesh: who shares what with whom. Knows no model and sends nothing."""

from __future__ import annotations

from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from burnish.parallel.degrees import AXES, Degrees


class Mesh:
    """This rank's place among those of `degrees`. All ranks make it together; the default process group is there."""

    def __init__(self, degrees: Degrees, device: torch.device) -> None:
        assert dist.get_world_size() == degrees.world, (dist.get_world_size(), degrees)
        self.degrees = degrees
        self.device = device
        self.place = degrees.place(dist.get_rank())
        # fully_shard must find tp in the mesh that its own is a slice of, and cp ranks are among those it shards over.
        sizes = (degrees.pp, degrees.dp_replicate, degrees.dp_shard * degrees.cp, degrees.tp)
        self._dense = _make(device, sizes, ("pp", "dp_replicate", "shard", "tp"))

    def axis(self, name: str) -> DeviceMesh:
        """The ranks that differ from this one along `name` alone: one of AXES, `shard` (dp_shard x cp), `ep`, `etp`."""
        if name in ("ep", "etp"):
            return self._experts[name]
        return (self._tokens if name in ("dp_shard", "cp") else self._dense)[name]

    def group(self, name: str) -> dist.ProcessGroup:
        return self.axis(name).get_group()

    @property
    def shards(self) -> DeviceMesh:
        """What fully_shard takes: [dp_replicate, dp_shard x cp], or the latter alone where there are no replicas."""
        names = ("dp_replicate", "shard") if self.degrees.dp_replicate > 1 else ("shard",)
        return self._dense[names]

    @property
    def expert_shards(self) -> DeviceMesh:
        """The same for experts: [dp_replicate, expert_dp], or the latter alone."""
        names = ("dp_replicate", "expert_dp") if self.degrees.dp_replicate > 1 else ("expert_dp",)
        return self._experts[names]

    @property
    def expert_parts(self) -> DeviceMesh:
        """What experts are cut over: [ep, etp], or ep alone."""
        return self._experts[("ep", "etp") if self.degrees.etp > 1 else ("ep",)]

    @cached_property
    def _tokens(self) -> DeviceMesh:
        sizes = tuple(getattr(self.degrees, axis) for axis in AXES)
        return _make(self.device, sizes, AXES)

    @cached_property
    def _experts(self) -> DeviceMesh:
        degrees = self.degrees
        sizes = (degrees.pp, degrees.dp_replicate, degrees.expert_dp, degrees.ep, degrees.etp)
        return _make(self.device, sizes, ("pp", "dp_replicate", "expert_dp", "ep", "etp"))

    @property
    def data_rank(self) -> int:
        return self.degrees.data_rank(dist.get_rank())


def _make(device: torch.device, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    for group in mesh.get_all_groups():
        # By itself a group waits as long as torch's default, 10 minutes with NCCL, whatever the world was told.
        _set_pg_timeout(world_timeout(), group)
    return mesh


def world_timeout() -> timedelta:
    """How long a collective of the default process group waits."""
    world = dist.group.WORLD
    assert world is not None
    return world._get_backend(torch.device("cpu")).options._timeout
