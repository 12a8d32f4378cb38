"""Gradients of sharded models that do not use all of themselves on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn

from burnish.model.base import CausalLM
from burnish.parallel.degrees import Degrees
from burnish.parallel.fsdp import Sharding, give_every_gradient, shard
from burnish.parallel.mesh import Mesh


class Block(nn.Module):
    """Two experts that are modules of their own, as code that comes with a checkpoint may have them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, x: Tensor, number: int) -> tuple[Tensor, int]:
        return x + self.experts[number](x), number


class Experts(CausalLM):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Linear(4, 4)
        self.layers = nn.ModuleList([Block(), Block()])

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor, number: int) -> Tensor:
        x = self.embedding(x)
        for block in self.layers:
            x, _ = block(x, number)
        return x


def rows(rank: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(rank))


def gradients() -> dict[str, Tensor]:
    model = Experts()
    for block in model.blocks():
        give_every_gradient(block)
    mesh = Mesh(Degrees(dp_shard=2), torch.device("cpu"))
    Sharding(shard(model, mesh, 3, compute=torch.float32, reduce=torch.float32), 3).begin(True)
    model(rows(dist.get_rank()), dist.get_rank()).square().sum().backward()
    return {name: parameter.grad.to_local().clone() for name, parameter in model.named_parameters()}


def test_what_one_rank_does_not_use_gets_the_gradient_of_the_other():
    by_rank = run_ranks(2, gradients)
    model = Experts()
    sum(model(rows(rank), rank).square().sum() for rank in (0, 1)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(torch.cat([found[name] for found in by_rank]), parameter.grad)
