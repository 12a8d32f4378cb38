"""A model on a mesh of ranks: which parts of it this rank holds, in which order they are cut, wrapped and sharded, and
how they get their weights.

The order matters: a pipeline takes whole layers, tensor and expert parallelism cut what is in them, recomputation and
compilation wrap what is left of a block, sharding comes last. Each kind of cut has a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from burnish.config import LoraConfig, ParallelConfig
from burnish.model.attention import Kernel
from burnish.model.base import CausalLM
from burnish.model.hf_io import named_weights
from burnish.model.lora import initialise_adapters, inject, read_adapter
from burnish.model.moe import MoE
from burnish.model.zoo import initialise
from burnish.parallel import ep, tp
from burnish.parallel.cp import ContextParallel
from burnish.parallel.execution import MeshExecution
from burnish.parallel.fsdp import Sharding, give_every_gradient, shard
from burnish.parallel.lora import cut_adapters
from burnish.parallel.mesh import Mesh
from burnish.parallel.pp import PipelineEngine, keep_part
from burnish.parallel.recompute import Blocks
from burnish.parallel.stages import Part, cut_model, parts_of
from burnish.parallel.weights import local_part, read_weights


@dataclass(frozen=True)
class Precision:
    """Types of the weights that are updated, of forward and backward, and of gradients as they are added up."""

    master: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype


@dataclass(frozen=True)
class Parallelism:
    """What `parallel` comes to on `mesh`."""

    mesh: Mesh
    parallel: ParallelConfig

    @property
    def sequence_parallel(self) -> bool:
        return self.mesh.degrees.tp > 1 and self.parallel.sequence_parallel is not False

    @property
    def context(self) -> ContextParallel | None:
        """How packs are cut over context-parallel ranks; None where there is one."""
        degrees = self.mesh.degrees
        return ContextParallel(self.mesh.group("cp"), self.parallel.cp_kind) if degrees.cp > 1 else None

    def kernel(self, inner: Kernel) -> Kernel:
        """The attention kernel to build the model with: `inner`, or one that spans context-parallel ranks."""
        return inner if self.context is None else self.context.kernel(inner)

    def own_parts(self, whole: CausalLM) -> list[Part]:
        """The parts of the model, given on meta, that this rank of the pipeline holds; all of it without a pipeline."""
        if self.mesh.degrees.pp == 1:
            return [Part(0, 1, range(len(whole.blocks())))]
        parts = cut_model(self.parallel, *layer_costs(whole))
        return [parts[index] for index in parts_of(self.mesh.place["pp"], self.parallel)]

    def apply(
        self,
        build: Callable[[], CausalLM],
        precision: Precision,
        blocks: Blocks | None = None,
        freeze: Callable[[CausalLM], object] = lambda model: None,
        lora: LoraConfig | None = None,
    ) -> MeshExecution:
        """This rank's part of the model that `build` makes on meta, its parameters without values.

        `freeze` is called for every part before it is cut. Gradients are reduced in `precision.reduce` or the type of
        the masters, whichever is wider. Raises UserError where the model cannot be cut so.
        """
        mesh, parallel = self.mesh, self.parallel
        whole = build()
        if any(isinstance(module, MoE) for module in whole.modules()):
            mesh.axis("ep")  # all ranks make the groups of experts together, also those whose stage has none
        stages: dict[Part, CausalLM] = {}
        modules: list[FSDPModule] = []
        for part in self.own_parts(whole):
            model = build()
            _adapt(model, lora, precision)
            freeze(model)
            if part.num_parts > 1:
                keep_part(model, part)
            if mesh.degrees.tp > 1:
                tp.parallelize(model, mesh.axis("tp"), self.sequence_parallel)
                cut_adapters(model, mesh.axis("tp"), self.sequence_parallel)
            if any(isinstance(module, MoE) for module in model.modules()) or part.num_parts == 1:
                ep.parallelize(model, mesh, self.sequence_parallel)
            (blocks or Blocks()).wrap(model)
            modules += self._shard(model, precision)
            stages[part] = model
        _adapt(whole, lora, precision)
        freeze(whole)
        vocabulary = tp.VocabularyParallel(mesh.axis("tp"), self.sequence_parallel) if mesh.degrees.tp > 1 else None
        execution = MeshExecution(
            next(iter(stages.values())),
            precision.compute,
            mesh.device,
            mesh,
            self._sharding(modules, precision),
            whole,
            self.context,
            vocabulary,
        )
        if mesh.degrees.pp > 1:
            execution.pipeline = PipelineEngine(
                stages, parallel, mesh.group("pp"), mesh.device, precision.compute, execution.rows
            )
        return execution

    def shard_loaded(
        self, model: CausalLM, precision: Precision, blocks: Blocks, held: torch.dtype | None = None
    ) -> MeshExecution:
        """A model that has its weights, whoever wrote its modules, sharded over data-parallel ranks alone.

        Weights on the host go to the device, and get the type `held`, block by block as they are sharded.
        """
        blocks.wrap(model)
        for block in model.blocks():
            give_every_gradient(block)
        modules = self._shard(model, precision, held)
        sharding = self._sharding(modules, precision)
        return MeshExecution(model, precision.compute, self.mesh.device, self.mesh, sharding, model)

    def _shard(self, model: CausalLM, precision: Precision, held: torch.dtype | None = None) -> Sequence[FSDPModule]:
        return shard(
            model,
            self.mesh,
            self.parallel.zero,
            compute=precision.compute,
            reduce=torch.promote_types(precision.master, precision.reduce),
            offload=self.parallel.offload == "parameters",
            held=held,
        )

    def _sharding(self, modules: Sequence[FSDPModule], precision: Precision) -> Sharding:
        is_narrow = precision.master == torch.bfloat16
        return Sharding(modules, self.parallel.zero, is_narrow, self.parallel.offload == "parameters")


def _adapt(model: CausalLM, lora: LoraConfig | None, precision: Precision) -> None:
    if lora is not None:
        inject(model, lora, precision.master)


def layer_costs(model: CausalLM) -> tuple[list[float], float, float]:
    """FLOPs a token of each layer, of the embedding, and of the final norm and head, but for a common factor."""
    costs = []
    for block in model.blocks():
        experts = [module for module in block.modules() if isinstance(module, MoE)]
        idle = sum(
            p.numel() * (1 - moe.router.moe.top_k / moe.router.moe.num_experts)
            for moe in experts
            for p in moe.experts.parameters()
        )
        costs.append(sum(parameter.numel() for parameter in block.parameters()) - idle)
    return costs, 0.0, float(model.head().weight_VD.numel())


def load_weights(execution: MeshExecution, folder: Path | None, seed: int, lora: LoraConfig | None = None) -> None:
    """Write values into this rank's parameters: those of a Hugging Face folder, or random ones drawn from `seed`.

    No rank ever has a whole copy of the model. Raises UserError as `hf_io.read_weights` does.
    """
    shapes = {name: tensor.shape for name, tensor in named_weights(execution.whole).items()}
    for model in execution.stages:
        nn.Module.to_empty(model, device=execution.storage)
        # Shards may be on the host; what belongs to no shard is read where the model runs.
        for module in model.modules():
            module._buffers.update({n: b.to(execution.device) for n, b in module._buffers.items() if b is not None})
        if folder is None:
            initialise(model, seed, local_part)
        else:
            read_weights(folder, model, shapes)
        if lora is not None and lora.path is not None:
            trained = {
                name: parameter.shape
                for name, parameter in execution.whole.named_parameters()
                if parameter.requires_grad
            }
            read_adapter(lora.path, model, lora, trained, local_part)
        elif lora is not None:
            initialise_adapters(model, seed, local_part)
    execution.after_update()
