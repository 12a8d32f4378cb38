"""Mixture-of-experts decoders with Hugging Face's parameter names: Qwen3-MoE, and DeepSeek-V3's kind by `mla`.

`MoE` computes who goes where and hands it to `MoE.dispatch`, one call from hidden states, experts' numbers and weights
to the weighted sums; `dispatch_locally` is that of experts that are all here. Whoever cuts the experts puts another
in its place, and another `Experts.compute`, which gets the rows of each expert and the weights. `Router` measures and
steers the load.

Shape suffixes: T tokens of a pack, N its documents, D hidden size, E experts, K experts of a token, R rows (a token
once for each of its experts), F inner size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from burnish.model.attention import Kernel
from burnish.model.base import Stack
from burnish.model.dense import MLP, Attention, Block, DecoderLM, DenseShape, Family, read_shape
from burnish.types import Documents, UserError

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class MoEShape:
    """What the expert blocks need to know of a config.json. `is_sparse` has one entry a layer."""

    num_experts: int
    top_k: int
    intermediate_size: int
    normalises: bool
    is_sparse: tuple[bool, ...]
    scores: Literal["softmax", "sigmoid"] = "softmax"
    scale: float = 1.0
    num_shared: int = 0
    num_groups: int = 1
    top_groups: int = 1


QWEN3_MOE = Family(
    required=(
        "num_key_value_heads",
        "head_dim",
        "moe_intermediate_size",
        "num_experts_per_tok",
        "norm_topk_prob",
    ),
    qk_norm=True,
    has_windows=False,
    keys=frozenset(
        {
            "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
            "decoder_sparse_step", "mlp_only_layers",
            # Without use_sliding_window, which is refused, the window's size means nothing.
            "sliding_window",
            # Of a loss that is the recipe's to choose.
            "router_aux_loss_coef", "output_router_logits",
        }
    ),
)  # fmt: skip


def read_moe_shape(config: Mapping[str, Any]) -> MoEShape:
    """The expert blocks of a Qwen3-MoE config.json. Raises UserError where it contradicts itself."""
    num_experts = config.get("num_experts") or config.get("num_local_experts")
    if num_experts is None:
        raise UserError("config.json has no num_experts; a model cannot be built without, so add it")
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    layers = range(config["num_hidden_layers"])
    return checked(
        MoEShape(
            num_experts=num_experts,
            top_k=config["num_experts_per_tok"],
            intermediate_size=config["moe_intermediate_size"],
            normalises=config["norm_topk_prob"],
            is_sparse=tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers),
        )
    )


def checked(moe: MoEShape) -> MoEShape:
    """The same shape. Raises UserError where its numbers do not fit each other."""
    reachable = moe.num_experts * moe.top_groups // moe.num_groups
    if moe.num_experts % moe.num_groups or moe.num_experts // moe.num_groups < 2 <= moe.num_groups:
        raise UserError(
            f"config.json: n_group={moe.num_groups} does not cut n_routed_experts={moe.num_experts} into groups of two "
            "or more; correct it"
        )
    if not moe.top_k <= reachable <= moe.num_experts:
        raise UserError(
            f"config.json: num_experts_per_tok={moe.top_k} cannot be chosen of {moe.num_experts} experts in "
            f"{moe.top_groups} of {moe.num_groups} groups; correct it"
        )
    return moe


def _never_compiled(function: Function) -> Function:
    """What waits for counts on the host, or keeps count itself, stays out of torch.compile."""
    return cast(Function, torch.compiler.disable(function))


class Compute(Protocol):
    """SwiGLU of each row by its expert: the first counts_E[0] rows by the first expert, and so on. Returns [R, D].

    `gate_up_E2FD` holds the gate's matrix and the up matrix of each expert, `down_EDF` the one back.
    """

    def __call__(self, rows_RD: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor: ...


def compute_grouped(rows_RD: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """`Compute` by two grouped matmuls; the host does not wait for the counts on CUDA."""
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    both_RF = functional.grouped_mm(rows_RD, gate_up_E2FD.flatten(1, 2).transpose(1, 2), offs=ends_E)
    gate_RF, up_RF = both_RF.chunk(2, dim=-1)
    return functional.grouped_mm(functional.silu(gate_RF) * up_RF, down_EDF.transpose(1, 2), offs=ends_E)


compute_grouped_eagerly = _never_compiled(compute_grouped)
"""torch.compile knows grouped matmuls in bf16 alone."""


@_never_compiled
def compute_one_by_one(rows_RD: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """`Compute` by plain matmuls, expert by expert: any type and size."""
    by_expert = zip(rows_RD.split(counts_E.tolist()), gate_up_E2FD.unbind(), down_EDF.unbind(), strict=True)
    return torch.cat([(functional.silu(x @ gate.T) * (x @ up.T)) @ down.T for x, (gate, up), down in by_expert])


def choose_compute(dtype: torch.dtype, device: torch.device | str, *sizes: int) -> Compute:
    """How experts compute in `dtype`: grouped, where torch knows the type on `device` and rows of `sizes` are aligned.

    bf16 is known everywhere, float32 and fp16 on a CPU alone.
    """
    if dtype == torch.float64 or any(size * dtype.itemsize % 16 for size in sizes):
        return compute_one_by_one
    if dtype == torch.bfloat16:
        return compute_grouped
    return compute_grouped_eagerly if torch.device(device).type == "cpu" else compute_one_by_one


class Experts(nn.Module):
    """The weights of all experts of a layer, as `transformers` names them; gate and up have a dimension of their own.

    `gate_up_proj` is [E, 2, F, D], so that each half is cut alike, and `down_proj` [E, D, F].
    """

    compute: Compute

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.compute = compute_one_by_one

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert, of which counts_E tells how many each one gets, to their outputs."""
        return self.compute(rows_RD, counts_E, self.gate_up_proj, self.down_proj)


class Dispatch(Protocol):
    """Take each token to its experts and add up what they say: sum_k weights[t, k] * expert[indices[t, k]](hidden[t]).

    The order of the sum is that of k, whoever else is in the pack. Returns [T, D] in the type of `hidden_TD`.
    """

    def __call__(self, hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, experts: Experts) -> Tensor: ...


def dispatch_locally(hidden_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, experts: Experts) -> Tensor:
    """`Dispatch` to experts that are all here."""
    rows_RD, order_R = rows_by_expert(hidden_TD, indices_TK)
    counts_E = count(indices_TK.flatten(), len(experts.down_proj))
    return weighted_sums(experts(rows_RD, counts_E), order_R, weights_TK, hidden_TD.dtype)


def count(numbers: Tensor, size: int) -> Tensor:
    """How often each number below `size` occurs, int64 [size]; unlike bincount it does not wait for the device."""
    return numbers.new_zeros(size).scatter_add_(0, numbers, torch.ones_like(numbers))


def rows_by_expert(hidden_TD: Tensor, indices_TK: Tensor) -> tuple[Tensor, Tensor]:
    """A row for each token and expert of it, sorted by expert and within by token, and the places they come from:
    row r is entry order_R[r] of the flattened [T, K].
    """
    order_R = indices_TK.flatten().argsort(stable=True)
    return _Spread.apply(hidden_TD, order_R, indices_TK.shape[1]), order_R


def weighted_sums(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in the order that `rows_by_expert` gave, weighted and summed to [T, D]."""
    rows_TKD = _Unsort.apply(rows_RD, order_R).unflatten(0, weights_TK.shape)
    return (rows_TKD * weights_TK[..., None]).sum(1).to(dtype)


def _inverse(order_R: Tensor) -> Tensor:
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


class _Spread(torch.autograd.Function):
    """Rows of tokens, whose gradients are added up in a fixed order: indexing alone would add them as they come."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.top_k = top_k
        return hidden_TD[order_R // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order_R,) = ctx.saved_tensors
        return grads[0][_inverse(order_R)].unflatten(0, (-1, ctx.top_k)).sum(1), None, None


class _Unsort(torch.autograd.Function):
    """Row r goes to place order_R[r]; the gradient is gathered, which takes no sorting as that of indexing would."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return rows_RD[_inverse(order_R)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order_R,) = ctx.saved_tensors
        return grads[0][order_R], None


class Gate(nn.Module):
    """The router's matrix, and for a sigmoid router the correction of its choice.

    The correction is no parameter: no gradient reaches it, `Router.update_bias` steers it, and it stays float32.
    """

    e_score_correction_bias: Tensor

    def __init__(self, hidden_size: int, num_experts: int, scores: Literal["softmax", "sigmoid"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.is_wide = scores == "sigmoid"
        if scores == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, E], for a sigmoid router in float32 at least."""
        if not self.is_wide:
            return functional.linear(hidden_TD, self.weight)
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        return functional.linear(hidden_TD.to(wide), self.weight.to(wide))


class Router:
    """Chooses the experts of each token, adds the gradients of its load's losses, and counts the load of a step.

    `aux` weighs the load-balancing loss, which is computed in each document and averaged over the step's tokens: with
    n_d tokens in document d, c_de of which go to expert e, and mean score P_de, it is

        softmax: E * sum_e c_de / n_d * P_de (Switch Transformer, arXiv 2101.03961; K when balanced)
        sigmoid: E / K * sum_e c_de / n_d * P_de, of scores that sum to 1 (DeepSeek-V3, arXiv 2412.19437; 1 if balanced)

    `z` weighs the mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906). Each layer's router has both, and
    they add to the gradient alone, not to the loss. Padding is routed, but neither counted nor in a loss.

    Ranks that have parts of the same documents set `reduce`, which adds up int64 counts [N, E] over them; a rank that
    routes a part alone of the tokens that `documents` says are at hand sets `part`, which takes it of a tensor [T].
    """

    def __init__(self, gate: Gate, moe: MoEShape) -> None:
        self.gate = gate
        self.moe = moe
        self.aux = 0.0
        self.z = 0.0
        self.reduce: Callable[[Tensor], Tensor] = _same
        self.part: Callable[[Tensor], Tensor] = _same
        self.num_tokens: int | None = None
        """Of the step, padding aside; None outside of training, where nothing is counted."""
        self.begin(None)

    def begin(self, num_tokens: int | None, device: torch.device | str = "cpu") -> None:
        """Start to count a step of `num_tokens` tokens on all ranks together. Call it before each step's forwards.

        From then on every forward that keeps a graph adds to these, recomputation aside. They are this rank's; summed
        over ranks with other tokens they are the step's.
        """
        self.num_tokens = num_tokens
        self.counts_E = torch.zeros(self.moe.num_experts, dtype=torch.int64, device=device)
        """Tokens that each expert got."""
        self.aux_sum = torch.zeros((), dtype=torch.float64, device=device)
        """Of the load-balancing loss, n_d * loss(d) over documents; 0 where `aux` is 0."""
        self.z_sum = torch.zeros((), dtype=torch.float64, device=device)
        """Of the z-loss over tokens; 0 where `z` is 0."""

    def __call__(self, logits_TE: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        """Experts and their weights of each token: int64 [T, K] and [T, K]."""
        wide = torch.promote_types(logits_TE.dtype, torch.float32)
        if self.moe.scores == "softmax":
            scores_TE = logits_TE.softmax(-1, dtype=wide)
            indices_TK = scores_TE.detach().topk(self.moe.top_k).indices
        else:
            scores_TE = logits_TE.to(wide).sigmoid()
            indices_TK = self._choose_corrected(scores_TE.detach())
        weights_TK = scores_TE.gather(1, indices_TK)
        if self.moe.normalises:
            # A sigmoid may be 0 of all that are chosen; a softmax may not.
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + self._guard)
        weights_TK = weights_TK * self.moe.scale
        if self.moe.scores == "softmax":
            weights_TK = weights_TK.to(logits_TE.dtype)
        if self.num_tokens is not None and torch.is_grad_enabled():
            weights_TK = self._account(logits_TE, scores_TE, indices_TK, weights_TK, documents)
        return indices_TK, weights_TK

    @property
    def _guard(self) -> float:
        return 0.0 if self.moe.scores == "softmax" else 1e-20

    def _choose_corrected(self, scores_TE: Tensor) -> Tensor:
        """The best by corrected score, in the groups whose two best add up to most (DeepSeek-V3)."""
        corrected_TE = scores_TE + self.gate.e_score_correction_bias
        if self.moe.top_groups < self.moe.num_groups:
            by_group = corrected_TE.unflatten(1, (self.moe.num_groups, -1))
            best = by_group.topk(2).values.sum(-1).topk(self.moe.top_groups).indices
            is_out = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, False)
            corrected_TE = by_group.masked_fill(is_out[..., None], -torch.inf).flatten(1)
        return corrected_TE.topk(self.moe.top_k).indices

    @_never_compiled
    def _account(
        self, logits_TE: Tensor, scores_TE: Tensor, indices_TK: Tensor, weights_TK: Tensor, documents: Documents
    ) -> Tensor:
        """Count, and hand back the weights, to whose backward the losses' is tied."""
        assert self.num_tokens is not None
        document_T, num_documents = self.part(documents.of_tokens()), len(documents.lengths)
        cells = document_T[:, None] * self.moe.num_experts + indices_TK
        counts_NE = count(cells.flatten(), num_documents * self.moe.num_experts).unflatten(0, (num_documents, -1))
        real_T = document_T < documents.num_real
        is_first = torch._C._current_graph_task_id() == -1  # a backward runs only where this is recomputation
        if is_first:
            self.counts_E += counts_NE[: documents.num_real].sum(0)
        loss = None
        if self.aux:
            lengths_N = documents.cu_seqlens.diff()
            share_NE = self.reduce(counts_NE).to(scores_TE.dtype) / lengths_N[:, None]
            is_softmax = self.moe.scores == "softmax"
            probs_TE = scores_TE if is_softmax else scores_TE / scores_TE.sum(-1, keepdim=True)
            factor = self.moe.num_experts / (1 if is_softmax else self.moe.top_k)
            aux_sum = factor * ((share_NE[document_T] * probs_TE).sum(-1) * real_T).sum()
            self.aux_sum += aux_sum.detach() * is_first
            loss = self.aux * aux_sum
        if self.z:
            z_sum = (logits_TE.to(scores_TE.dtype).logsumexp(-1).square() * real_T).sum()
            self.z_sum += z_sum.detach() * is_first
            loss = self.z * z_sum + (0.0 if loss is None else loss)
        return weights_TK if loss is None else _Tie.apply(weights_TK, loss / self.num_tokens)

    @torch.no_grad()
    def update_bias(self, rate: float, counts_E: Tensor) -> None:
        """Make experts with less than the mean of the step's counts likelier, and the others less (arXiv 2408.15664).

        `counts_E` are those of all ranks together. Changes nothing in a softmax router, which has no correction.
        """
        if self.moe.scores == "sigmoid":
            counts_E = counts_E.to(self.gate.e_score_correction_bias)
            self.gate.e_score_correction_bias += rate * (counts_E.mean() - counts_E).sign()


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Tie(torch.autograd.Function):
    """The first argument as it is; its backward is also that of the second, a loss that nobody else need know."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)


def load_of(counts_E: Tensor) -> tuple[Tensor, Tensor]:
    """How even a load is: that of the busiest expert in means (1 when even, E when one has all), and the share of
    experts without a token. 0-dim float64.
    """
    counts_E = counts_E.double()
    return counts_E.max() / counts_E.mean().clamp_min(1e-9), (counts_E == 0).double().mean()


def set_compute(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Let the experts of a model compute in `dtype` on `device` by the fastest way there is."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.compute = choose_compute(dtype, device, *module.gate_up_proj.shape[2:])


class MoE(nn.Module):
    """In place of the MLP: each token's few experts, and those that all share."""

    def __init__(self, hidden_size: int, moe: MoEShape) -> None:
        super().__init__()
        self.gate = Gate(hidden_size, moe.num_experts, moe.scores)
        self.experts = Experts(moe.num_experts, hidden_size, moe.intermediate_size)
        self.shared_experts = MLP(hidden_size, moe.intermediate_size * moe.num_shared) if moe.num_shared else None
        self.router = Router(self.gate, moe)
        self.dispatch: Dispatch = dispatch_locally

    def forward(self, hidden_TD: Tensor, documents: Documents) -> Tensor:
        indices_TK, weights_TK = self.router(self.gate(hidden_TD), documents)
        routed_TD = self.dispatch(hidden_TD, indices_TK, weights_TK, self.experts)
        return routed_TD if self.shared_experts is None else routed_TD + self.shared_experts(hidden_TD)


def routers_of(model: nn.Module) -> dict[str, Router]:
    """The routers of a model's layers of experts, in order, by the names of those."""
    return {name: module.router for name, module in model.named_modules() if isinstance(module, MoE)}


class SparseBlock(Block):
    """One layer with experts in it."""

    mlp: MoE

    def forward(self, hidden_TD: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        hidden_TD = hidden_TD + self.self_attn(self.input_layernorm(hidden_TD), rotary, documents)
        return hidden_TD + self.mlp(self.post_attention_layernorm(hidden_TD), documents)


class MoELM(DecoderLM):
    """A decoder some of whose layers are `SparseBlock`s. `attention` makes the attention of one layer."""

    def __init__(
        self, config: dict[str, Any], shape: DenseShape, moe: MoEShape, attention: Callable[[], nn.Module]
    ) -> None:
        def block(is_sparse: bool) -> nn.Module:
            if is_sparse:
                return SparseBlock(shape, attention(), MoE(shape.hidden_size, moe))
            return Block(shape, attention(), MLP(shape.hidden_size, shape.intermediate_size))

        super().__init__(config, shape, [block(is_sparse) for is_sparse in moe.is_sparse])
        self.moe = moe
        self.stacks = {}
        for layer in (layer for layer, is_sparse in enumerate(moe.is_sparse) if is_sparse):
            experts = f"model.layers.{layer}.mlp.experts"
            gate_up = (f"{experts}.{{}}.gate_proj.weight", f"{experts}.{{}}.up_proj.weight")
            self.stacks[f"{experts}.gate_up_proj"] = Stack(gate_up)
            self.stacks[f"{experts}.down_proj"] = Stack((f"{experts}.{{}}.down_proj.weight",))


class Qwen3MoE(MoELM):
    """Qwen3's attention and a softmax router."""

    def __init__(self, config: dict[str, Any], kernel: Kernel) -> None:
        shape = read_shape(config, QWEN3_MOE)
        super().__init__(config, shape, read_moe_shape(config), partial(Attention, shape, None, kernel))
