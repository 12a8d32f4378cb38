"""A model on a mesh of ranks: which kernel it is built with, and in which order it is cut, wrapped and sharded.

The order matters: tensor and expert parallelism make the pieces, recomputation and compilation wrap blocks of pieces,
sharding comes last. Weights are not written here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from burnish.config import ParallelConfig
from burnish.model.attention import Kernel
from burnish.model.base import CausalLM
from burnish.parallel import tp
from burnish.parallel.cp import ContextParallel
from burnish.parallel.execution import MeshExecution
from burnish.parallel.fsdp import shard
from burnish.parallel.mesh import Mesh
from burnish.parallel.recompute import compile_blocks, recompute_blocks


@dataclass(frozen=True)
class Blocks:
    """How blocks are wrapped."""

    recompute: str = "none"
    is_compiled: bool = False

    def wrap(self, model: CausalLM) -> None:
        recompute_blocks(model.blocks(), self.recompute)
        if self.is_compiled:
            compile_blocks(model.blocks())


@dataclass(frozen=True)
class Parallelism:
    """What `parallel` comes to on `mesh`."""

    mesh: Mesh
    parallel: ParallelConfig

    @property
    def _context(self) -> ContextParallel | None:
        degrees = self.mesh.degrees
        return ContextParallel(self.mesh.group("cp"), self.parallel.cp_kind) if degrees.cp > 1 else None

    def kernel(self, inner: Kernel) -> Kernel:
        """The attention kernel to build the model with: `inner`, or one that spans context-parallel ranks."""
        return inner if self._context is None else self._context.kernel(inner)

    def apply(self, model: CausalLM, blocks: Blocks, *, compute: torch.dtype, reduce: torch.dtype) -> MeshExecution:
        """Cut `model`, which may be on meta, to this rank's part of it.

        Gradients are reduced in `reduce` or the type of the parameters, whichever is wider.
        """
        mesh, parallel, vocabulary = self.mesh, self.parallel, None
        if mesh.degrees.tp > 1:
            sequence_parallel = parallel.sequence_parallel is not False
            tp.parallelize(model, mesh.axis("tp"), sequence_parallel)
            vocabulary = tp.VocabularyParallel(mesh.axis("tp"), sequence_parallel)
        blocks.wrap(model)
        masters = next(iter(model.parameters())).dtype
        sharding = shard(
            model,
            mesh,
            parallel.zero,
            compute=compute,
            reduce=torch.promote_types(masters, reduce),
            offload=parallel.offload == "parameters",
        )
        return MeshExecution(model, compute, mesh.device, mesh, sharding, self._context, vocabulary)
