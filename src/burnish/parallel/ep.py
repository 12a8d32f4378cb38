"""Expert parallelism (arXiv 2006.16668): each rank of `ep` has some experts, and tokens travel to theirs and back.

Cuts the experts of every `MoE` and swaps its dispatch; the rest of a model and the data-parallel cut are others'.
Shape suffixes: T tokens, D hidden size, E experts, K experts of a token, P ranks of ep, L experts of a rank, R rows
(a token once for each of its experts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from burnish.config import RecipeError
from burnish.model.base import CausalLM
from burnish.model.moe import Dispatch, Experts, MoE, compute_one_by_one, count, rows_by_expert, weighted_sums
from burnish.parallel.degrees import Degrees
from burnish.parallel.exchange import exchange
from burnish.parallel.mesh import Mesh
from burnish.types import UserError


def check_expert_parallel(config: Mapping[str, Any], degrees: Degrees) -> None:
    """Raises RecipeError where the ranks cannot have equal parts of the experts of a config.json."""
    ep, etp = degrees.ep, degrees.etp
    if ep == etp == 1:
        return
    number = config.get("n_routed_experts") or config.get("num_experts") or config.get("num_local_experts")
    if number is None:
        raise RecipeError(f"parallel.ep={ep} and etp={etp} cut experts, and this model has none; set both of them to 1")
    if number % ep:
        raise RecipeError(
            f"parallel.ep={ep} does not divide the model's {number} experts, of which every rank holds an equal "
            f"share; set parallel.ep to {_divisors(number, degrees.dp_shard * degrees.cp * degrees.tp // etp)}"
        )
    size = config["moe_intermediate_size"]
    if size % etp:
        raise RecipeError(
            f"parallel.etp={etp} does not divide moe_intermediate_size={size}, of which every rank holds an equal "
            "share; set parallel.etp to 1"
        )


def _divisors(number: int, ranks: int) -> str:
    common = [str(degree) for degree in range(1, ranks + 1) if number % degree == 0 and ranks % degree == 0]
    return " or ".join(filter(None, (", ".join(common[:-1]), common[-1])))


def parallelize(model: CausalLM, mesh: Mesh, sequence_parallel: bool) -> None:
    """Cut the experts of `model`, which each rank has whole or on meta, over ep and etp, swap their dispatch, and tell
    routers which tokens are here and who has others of the same documents.

    `sequence_parallel` says that tp ranks have tokens of their own, [T / tp, D]; else they have the same ones. The
    gradient of an expert is that of the tokens of this rank's ep and tp peers: what is left is to sum it over
    `mesh.expert_shards`. Raises UserError where the model's experts are not ours to cut.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    degrees = mesh.degrees
    if not layers and degrees.ep * degrees.etp > 1:
        raise UserError(
            f"parallel.ep={degrees.ep} and etp={degrees.etp}: nothing is known of how to cut this model's experts; set "
            "both of them to 1, or model.implementation to native where the architecture has one"
        )
    tp = None
    if degrees.tp > 1:
        tp = TensorRanks(mesh.axis("tp"), Shard(0) if sequence_parallel else Replicate(), has_columns=degrees.etp > 1)
    dispatch = torch.compiler.disable(ExpertRanks(mesh.group("ep"), tp).dispatch)
    for layer in layers:
        cut(layer.experts, mesh)
        layer.dispatch = cast(Dispatch, dispatch)
        layer.router.reduce = partial(_sum_documents, mesh, sequence_parallel)
        if sequence_parallel:
            layer.router.part = partial(_chunk, mesh.axis("tp"))


def _sum_documents(mesh: Mesh, sequence_parallel: bool, counts_NE: Tensor) -> Tensor:
    """Counts over the ranks that have parts of the same documents."""
    for axis in ("cp", "tp") if sequence_parallel else ("cp",):
        if getattr(mesh.degrees, axis) > 1:
            counts_NE = counts_NE.clone()
            dist.all_reduce(counts_NE, group=mesh.group(axis))
    return counts_NE


def _chunk(axis: DeviceMesh, x_T: Tensor) -> Tensor:
    """Of something about all tokens of tp peers what goes with those of this rank."""
    return x_T.chunk(axis.size())[axis.get_local_rank()]


def cut(experts: Experts, mesh: Mesh) -> None:
    """Leave this rank its experts, and of these the columns that etp leaves it."""
    if mesh.degrees.ep * mesh.degrees.etp == 1:
        return
    parts = mesh.expert_parts
    for name, parameter in list(experts.named_parameters()):
        placements = [Shard(0), Shard(2)][: parts.ndim]
        placed = distribute_tensor(parameter.detach(), parts, placements, src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(placed, requires_grad=parameter.requires_grad))
    if experts.gate_up_proj.shape[2] // mesh.degrees.etp % 8:
        experts.compute = compute_one_by_one  # a grouped matmul wants rows aligned to 16 bytes
    experts.forward = partial(_compute_locally, experts)


def _compute_locally(experts: Experts, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
    gate_up, down = cast(DTensor, experts.gate_up_proj), cast(DTensor, experts.down_proj)
    return experts.compute(rows_RD, counts_E, gate_up.to_local(), down.to_local())


@dataclass(frozen=True, slots=True)
class TensorRanks:
    """How the tokens of the ranks of tp, which lie outside as `tokens` says, come to their experts.

    Where each rank has columns of its experts, it takes all tokens there and its results are summed; where it has whole
    experts, it takes its share of the tokens.
    """

    axis: DeviceMesh
    tokens: Placement
    has_columns: bool

    @property
    def result(self) -> Placement:
        """How what comes of the experts lies, and the gradient of what goes to them."""
        return Partial() if self.has_columns else Shard(0)

    def enter(self, x: DTensor) -> Tensor:
        inside = Replicate() if self.has_columns else Shard(0)
        return x.redistribute(placements=[inside]).to_local(grad_placements=[self.result])

    def outside(self, x: Tensor) -> DTensor:
        return DTensor.from_local(x, self.axis, [self.tokens], run_check=False)

    def leave(self, x: Tensor, like: DTensor) -> Tensor:
        placed = DTensor.from_local(
            x, self.axis, [self.result], run_check=False, shape=like.shape, stride=like.stride()
        )
        return placed.redistribute(placements=[self.tokens]).to_local()


@dataclass(frozen=True, slots=True)
class ExpertRanks:
    """Experts that lie in order over the ranks of `group`, each of which has as many. `dispatch` is a `Dispatch`."""

    group: dist.ProcessGroup
    tp: TensorRanks | None

    def dispatch(self, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, experts: Experts) -> Tensor:
        if self.tp is None:
            return self._dispatch(hidden_TD, indices_TK, weights_TK, experts)
        hidden, indices, weights = (self.tp.outside(x) for x in (hidden_TD, indices_TK, weights_TK))
        outputs_TD = self._dispatch(self.tp.enter(hidden), self.tp.enter(indices), self.tp.enter(weights), experts)
        return self.tp.leave(outputs_TD, like=hidden)

    def _dispatch(self, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, experts: Experts) -> Tensor:
        rows_RD, order_R = rows_by_expert(hidden_TD, indices_TK)
        # Sorted by expert, they are sorted by rank.
        leaving_PL = count(indices_TK.flatten(), len(experts.down_proj)).unflatten(0, (self.group.size(), -1))
        arriving_PL = torch.empty_like(leaving_PL)
        dist.all_to_all_single(arriving_PL, leaving_PL, group=self.group)
        send, receive = torch.stack((leaving_PL.sum(1), arriving_PL.sum(1))).tolist()
        by_rank_RD = exchange(rows_RD, self.group, send, receive)
        by_expert_R = _by_expert(arriving_PL, sum(receive))
        outputs_RD = experts(_Permuted.apply(by_rank_RD, by_expert_R), arriving_PL.sum(0))
        returning_RD = _Permuted.apply(outputs_RD, by_expert_R.argsort())
        back_RD = exchange(cast(Tensor, returning_RD), self.group, receive, send)
        return weighted_sums(back_RD, order_R, weights_TK, hidden_TD.dtype)


def _by_expert(arriving_PL: Tensor, num_rows: int) -> Tensor:
    """int64 [R]: rows that came by rank and within by expert, in the order of experts and within by rank."""
    num_ranks, num_local = arriving_PL.shape
    expert_PL = torch.arange(num_local, device=arriving_PL.device).repeat(num_ranks)
    expert_R = expert_PL.repeat_interleave(arriving_PL.flatten(), output_size=num_rows)
    return expert_R.argsort(stable=True)


class _Permuted(torch.autograd.Function):
    """Rows in another order; the gradient is gathered, too, where that of indexing would be added up."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return rows_RD[order_R]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (order_R,) = ctx.saved_tensors
        return gradients[0][order_R.argsort()], None
