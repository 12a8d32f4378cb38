"""Weights, gradients and optimizer shared by data-parallel ranks: ZeRO's stages by FSDP2.

Gradients are sums over ranks, never means: each rank's loss is already divided by the denominator of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from burnish.model.base import CausalLM
from burnish.model.moe import Experts
from burnish.parallel.mesh import Mesh


@dataclass(frozen=True)
class Sharding:
    """The sharded modules of this rank, and when they are gathered and reduced."""

    modules: Sequence[FSDPModule]
    zero: Literal[1, 2, 3]
    has_narrow_masters: bool = False
    is_offloaded: bool = False

    def begin(self, is_last: bool) -> None:
        """Call before the forward of each micro-batch of a step; `is_last` for the last one."""
        reduces_once = self.zero == 1 or self.has_narrow_masters
        for module in self.modules:
            module.set_is_last_backward(is_last)
            module.set_requires_gradient_sync(is_last or not reduces_once, recurse=False)
            module.set_reshard_after_backward(is_last or self.zero == 3, recurse=False)

    def reshard(self) -> None:
        """Give back what a forward without backward has gathered; it would be stale after the next update."""
        for module in self.modules:
            module.reshard()


def shard(
    model: CausalLM,
    mesh: Mesh,
    zero: Literal[1, 2, 3],
    *,
    compute: torch.dtype,
    reduce: torch.dtype,
    offload: bool = False,
    held: torch.dtype | None = None,
) -> Sequence[FSDPModule]:
    """Shard the parameters of `model`, which may be on meta, over the data-parallel and context-parallel ranks.

    Returns the modules that gather and reduce. Experts that expert-parallel ranks share are sharded over the others.
    What lies on another device, and is of another type than `held`, is brought over and converted one block at a time.

    Stage 3 gathers the weights of a block for its forward and again for its backward; 2 keeps them from the first
    forward of a step to its last backward; 1 keeps whole gradients, too, and reduces them once a step. Embedding, last
    norm and head are gathered once a micro-batch at every stage. `offload` keeps the shards in the host's memory.

    FSDP2 adds up reduced gradients in the type of the parameters. Where that is bf16 they are added up before that,
    whole and in `reduce`, as in stage 1.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    offload_policy = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload else OffloadPolicy()

    def wrap(module: nn.Module, **how: Any) -> None:
        for parameter in module.parameters():
            if held is not None and parameter.dtype != held:
                parameter.data = parameter.data.to(held)
        fully_shard(module, mp_policy=policy, offload_policy=offload_policy, **how)

    if mesh.degrees.ep * mesh.degrees.etp * mesh.degrees.tp > 1:  # with tp alone its ranks share whole experts
        for experts in (module for module in model.modules() if isinstance(module, Experts)):
            wrap(experts, mesh=mesh.expert_shards, reshard_after_forward=zero == 3)
    for block in model.blocks():
        wrap(block, mesh=mesh.shards, reshard_after_forward=zero == 3)
    wrap(model, mesh=mesh.shards, reshard_after_forward=False)
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return modules


def give_every_gradient(module: nn.Module) -> None:
    """From now on each backward of `module` gives all its trained parameters a gradient, of zeros where it used none.

    FSDP2 reduces what has a gradient on a rank. Of a module that uses what its tokens ask for, such as experts that are
    modules of their own, ranks would otherwise add up gradients of unlike parameters. Comes before `shard`.
    """

    def tie(module: nn.Module, _: Any, output: Any) -> Any:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if isinstance(output, torch.Tensor):
            return _Tie.apply(output, *trained)
        return type(output)((_Tie.apply(output[0], *trained), *output[1:]))

    module.register_forward_hook(tie)


class _Tie(torch.autograd.Function):
    """The first argument as it is; in backward the others get zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.zeros = [parameter.new_zeros(()).expand_as(parameter) for parameter in parameters]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients[0], *ctx.zeros
