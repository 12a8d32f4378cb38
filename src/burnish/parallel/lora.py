"""Adapters of a model that is cut over tensor-parallel ranks: each is cut as its layer is, and adds no collective but
the sum of [T, rank] behind layers that are cut by their inputs.

Call it behind `tp.parallelize`. Data-parallel ranks need nothing of it: `fully_shard` takes adapters as they are.
Shape suffixes: O outputs of a layer.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from burnish.model.base import CausalLM
from burnish.model.lora import NAME, Dora, adapted_layers
from burnish.parallel.tp import Columns, Rows, Whole


def cut_adapters(model: CausalLM, axis: DeviceMesh, sequence_parallel: bool) -> None:
    """Cut the adapters of `model` over the ranks of `axis`, as `tp.parallelize` has cut the layers they stand at."""
    tokens = Shard(0) if sequence_parallel else Replicate()
    of_tokens = Partial() if sequence_parallel else Replicate()
    for layer in adapted_layers(model).values():
        a, b = layer.lora_A[NAME], layer.lora_B[NAME]
        placement = layer.get_base_layer().weight.placements[0]
        if placement == Shard(0):
            Whole(Partial()).apply(a, axis)
            Columns().apply(b, axis)
            lengths, gradient = Shard(0), Shard(0)
        elif placement == Shard(1):
            Rows(tokens).apply(a, axis)
            Whole(of_tokens).apply(b, axis)
            lengths, gradient = Replicate(), of_tokens
        else:
            for factor in (a, b):
                Whole(Partial()).apply(factor, axis)
            lengths, gradient = Replicate(), Partial()
        if layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[NAME]
            cut = distribute_tensor(magnitude.weight.detach(), axis, [lengths], src_data_rank=None)
            magnitude.weight = nn.Parameter(cut, requires_grad=magnitude.weight.requires_grad)
            total = partial(_summed, axis) if placement == Shard(1) else Dora.total
            layer.lora_variant[NAME] = Dora(partial(_local, gradient), total)


def _local(gradient: Placement, parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local(grad_placements=[gradient])


def _summed(axis: DeviceMesh, squares_O: Tensor) -> Tensor:
    dist.all_reduce(squares_O, group=axis.get_group())
    return squares_O
