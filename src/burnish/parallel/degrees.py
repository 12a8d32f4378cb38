"""How many ranks each kind of parallelism takes, and which rank stands where. Imports no torch: `burnish plan` and the
driver count with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from burnish.config import ParallelConfig, RecipeError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Of the mesh, from the ranks that talk least to those that talk most: neighbours in tp are neighbours in number."""


@dataclass(frozen=True, slots=True)
class Degrees:
    """Ranks along each axis. Experts lie on the same ranks, cut into expert_dp x ep x etp, not dp_shard x cp x tp."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int) -> Degrees:
        """The degrees of `parallel` on `world` ranks. Raises RecipeError where they do not make that many."""
        fixed = {"dp_replicate": parallel.dp_replicate, "cp": parallel.cp, "tp": parallel.tp, "pp": parallel.pp}
        numbers = " x ".join(f"{name}={size}" for name, size in fixed.items())
        dp_shard = parallel.dp_shard
        if dp_shard == "auto":
            dp_shard, rest = divmod(world, prod(fixed.values()))
            if rest or not dp_shard:
                raise RecipeError(
                    f"parallel: {numbers} = {prod(fixed.values())} does not divide the number of ranks, {world}; lower "
                    "one of them, or change cluster.num_nodes or cluster.devices_per_node"
                )
        elif prod(fixed.values()) * dp_shard != world:
            raise RecipeError(
                f"parallel: {numbers} x dp_shard={dp_shard} = {prod(fixed.values()) * dp_shard}, and the number "
                f"of ranks is {world}; set parallel.dp_shard to auto, or change cluster.num_nodes or "
                "cluster.devices_per_node"
            )
        degrees = cls(**fixed, dp_shard=dp_shard, ep=parallel.ep, etp=parallel.etp)
        inner = degrees.dp_shard * degrees.cp * degrees.tp
        if inner % (degrees.ep * degrees.etp):
            raise RecipeError(
                f"parallel.ep={degrees.ep} x etp={degrees.etp} does not divide dp_shard={dp_shard} x cp={degrees.cp} x "
                f"tp={degrees.tp} = {inner}; set parallel.ep to a divisor of {inner // degrees.etp}"
            )
        return degrees

    @classmethod
    def least(cls, parallel: ParallelConfig) -> Degrees:
        """Those of `parallel` where nobody knows how many ranks there will be: no more than its experts take."""
        names = ("dp_replicate", "cp", "tp", "pp", "ep", "etp")
        dp_shard = parallel.ep if parallel.dp_shard == "auto" else parallel.dp_shard
        return cls(**{name: getattr(parallel, name) for name in names}, dp_shard=dp_shard)

    @property
    def world(self) -> int:
        return prod(getattr(self, axis) for axis in AXES)

    @property
    def data_ranks(self) -> int:
        """Ranks with batches of their own; the others share those of a peer."""
        return self.dp_replicate * self.dp_shard

    @property
    def expert_dp(self) -> int:
        """Ranks that share the same experts and see other tokens."""
        return self.dp_shard * self.cp * self.tp // (self.ep * self.etp)

    def place(self, rank: int) -> dict[str, int]:
        """Where `rank` stands along each axis."""
        place = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return place

    def data_rank(self, rank: int) -> int:
        """Whose batches `rank` works on, 0 to data_ranks - 1."""
        place = self.place(rank)
        return place["dp_replicate"] * self.dp_shard + place["dp_shard"]
