"""Linear layer and softmax cross-entropy in one sweep over the vocabulary, without the logits ever existing as a whole.

Gives what losses and metrics read of each trained token. It knows no loss, weights no token and moves nothing between
devices or ranks; a head may hold a part of the vocabulary, if it is told how to see what the other parts found.
Shape suffixes: K trained tokens, D hidden size, V vocabulary (or the part at hand), B one block of it, P parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from burnish.types import TokenScores

CPU_BLOCK_BYTES = 8 * 2**20
DEVICE_BLOCK_BYTES = 256 * 2**20
"""Size of one block of logits. On a CPU it stays in the cache; elsewhere it is large enough to fill the device."""
MIN_BLOCK = 512
"""Narrowest block, in tokens of the vocabulary; it outweighs the sizes above, because thinner matmuls are slow."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last layer of a language model: logits = softcap * tanh(scale * (h W^T + b) / softcap)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def rows(self, block: slice) -> Head:
        """The head of a part of the vocabulary."""
        bias_B = None if self.bias_V is None else self.bias_V[block]
        return Head(self.weight_VD[block], bias_B, self.scale, self.softcap)


@dataclass(frozen=True, slots=True)
class Part:
    """A head holds the rows from `first` on of `num_vocabulary`; `gather` stacks a tensor with those of all parts."""

    first: int
    num_vocabulary: int
    gather: Callable[[Tensor], Tensor]


def logits(hidden_KD: Tensor, head: Head) -> Tensor:
    """All logits [K, V] in float32 (float64 where the inputs are): for a handful of tokens, never for training."""
    logits_KV = functional.linear(hidden_KD, head.weight_VD, head.bias_V)
    logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    if head.scale != 1.0:
        logits_KV = logits_KV.mul_(head.scale)
    if head.softcap is not None:
        logits_KV = logits_KV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_KV


def score(
    hidden_KD: Tensor, head: Head, targets_K: Tensor, block: int | None = None, part: Part | None = None
) -> TokenScores:
    """Score the targets against the hidden states that predict them; `block` is a width in tokens of the vocabulary.

    Where the head is a `part`, the scores are those of the whole vocabulary, and the gradient of the hidden states is
    the part's share of a sum over all of them.

    With logits z and S = sum_v exp(z_v) of one token, p = exp(z) / S:
        logprob = z_target - log S      logsumexp = log S      mean_logprob = mean_v z_v - log S
        entropy = log S - sum_v p_v z_v      is_top1 = no token has a higher logit than the target
    and for gradients g of the first three (entropy and is_top1 carry none):
        dz = g_logprob onehot(target) + g_mean / V + (g_logsumexp - g_logprob - g_mean) p

    The sweep runs over blocks of the vocabulary, so that each row of the weight's gradient is one matmul over all
    tokens and nothing is accumulated for it. The forward pass is the online softmax (Milakov and Gimelshein,
    arXiv:1805.02867); the backward pass computes every block again, from log S alone (as Cut Cross-Entropy does:
    Wijmans et al., arXiv:2411.09009). At most two buffers of the size of a block are alive at a time; by default it
    takes 8 MiB on a CPU and 256 MiB elsewhere.

    Matmuls run in the dtype of the inputs, everything else in float32 (float64 where the inputs are). Inputs that
    require no gradient cost none. Nothing waits for the device.
    """
    block = block or _block_width(hidden_KD)
    return TokenScores(
        *_Score.apply(hidden_KD, head.weight_VD, head.bias_V, head.scale, head.softcap, targets_K, block, part)
    )


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        scale: float,
        softcap: float | None,
        targets_K: Tensor,
        block: int,
        part: Part | None,
    ) -> tuple[Tensor, ...]:
        head = Head(weight_VD, bias_V, scale, softcap)
        num_vocabulary = len(weight_VD) if part is None else part.num_vocabulary
        targets_K = targets_K if part is None else targets_K - part.first
        target_logits_K = hidden_KD.new_zeros(len(hidden_KD), dtype=_wide(hidden_KD))
        running_4K = hidden_KD.new_zeros(4, len(hidden_KD), dtype=_wide(hidden_KD))
        running_4K[0] = -math.inf
        for columns in _blocks(head, block):
            logits_KB = logits(hidden_KD, head.rows(columns))
            index_K, inside_K = _targets_in(columns, targets_K)
            target_logits_K += torch.where(inside_K, logits_KB.gather(1, index_K[:, None])[:, 0], 0.0)
            running_4K = _absorb(running_4K, logits_KB)
            del logits_KB
        if part is not None:
            running_4K, target_logits_K = _merge(part.gather(torch.stack((*running_4K, target_logits_K))))
        max_K, sum_exp_K, sum_z_exp_K, sum_z_K = running_4K
        logsumexp_K = sum_exp_K.log() + max_K

        ctx.save_for_backward(hidden_KD, weight_VD, bias_V, targets_K, logsumexp_K)
        ctx.scale, ctx.softcap, ctx.block, ctx.num_vocabulary = scale, softcap, block, num_vocabulary
        ctx.set_materialize_grads(False)
        entropy_K, is_top1_K = logsumexp_K - sum_z_exp_K / sum_exp_K, target_logits_K >= max_K
        ctx.mark_non_differentiable(entropy_K, is_top1_K)
        mean_logprobs_K = sum_z_K / num_vocabulary - logsumexp_K
        return target_logits_K - logsumexp_K, logsumexp_K, mean_logprobs_K, entropy_K, is_top1_K

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads_K: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_KD, weight_VD, bias_V, targets_K, logsumexp_K = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        head = Head(weight_VD, bias_V, ctx.scale, ctx.softcap)
        grad_hidden_KD = torch.zeros_like(hidden_KD, dtype=logsumexp_K.dtype) if needs_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if needs_weight else None
        grad_bias_V = torch.empty_like(bias_V) if needs_bias else None
        for columns in _blocks(head, ctx.block):
            rows = head.rows(columns)
            grad_KB = _grad_of_block(
                hidden_KD, rows, _targets_in(columns, targets_K), logsumexp_K, grads_K, ctx.num_vocabulary
            )
            if grad_bias_V is not None:
                grad_bias_V[columns] = grad_KB.sum(0)
            grad_KB = grad_KB.to(hidden_KD.dtype)
            if grad_weight_VD is not None:
                torch.mm(grad_KB.T, hidden_KD, out=grad_weight_VD[columns])
            if grad_hidden_KD is not None:
                grad_hidden_KD += grad_KB @ rows.weight_VD
            del grad_KB
        grad_hidden_KD = None if grad_hidden_KD is None else grad_hidden_KD.to(hidden_KD.dtype)
        return grad_hidden_KD, grad_weight_VD, grad_bias_V, None, None, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _block_width(hidden_KD: Tensor) -> int:
    """Tokens of the vocabulary whose logits fit the device's block, a multiple of 64 for the tiles of matmuls."""
    block_bytes = CPU_BLOCK_BYTES if hidden_KD.device.type == "cpu" else DEVICE_BLOCK_BYTES
    width = block_bytes // (max(len(hidden_KD), 1) * _wide(hidden_KD).itemsize)
    return max(width // 64 * 64, MIN_BLOCK)


def _blocks(head: Head, width: int) -> list[slice]:
    num_vocabulary = len(head.weight_VD)
    return [slice(start, min(start + width, num_vocabulary)) for start in range(0, num_vocabulary, width)]


def _targets_in(columns: slice, targets_K: Tensor) -> tuple[Tensor, Tensor]:
    """Where each target stands in a block, clamped to it, and whether it stands there at all."""
    width = columns.stop - columns.start
    index_K = targets_K - columns.start
    return index_K.clamp(0, width - 1), (index_K >= 0) & (index_K < width)


def _absorb(running_4K: Tensor, logits_KB: Tensor) -> Tensor:
    """Take a block into max z, sum exp(z - max), sum z exp(z - max) and sum z of all blocks so far."""
    max_K, sum_exp_K, sum_z_exp_K, sum_z_K = running_4K
    new_max_K = torch.maximum(max_K, logits_KB.amax(1))
    shrink_K = (max_K - new_max_K).exp()
    exp_KB = (logits_KB - new_max_K[:, None]).exp_()
    sum_exp_K = sum_exp_K * shrink_K + exp_KB.sum(1)
    sum_z_exp_K = sum_z_exp_K * shrink_K + exp_KB.mul_(logits_KB).sum(1)
    return torch.stack((new_max_K, sum_exp_K, sum_z_exp_K, sum_z_K + logits_KB.sum(1)))


def _merge(parts_P5K: Tensor) -> tuple[Tensor, Tensor]:
    """What `_absorb` keeps [4, K], of all parts together, and the targets' logits [K], which are 0 in all but one."""
    max_PK, sum_exp_PK, sum_z_exp_PK, sum_z_PK, target_logits_PK = parts_P5K.unbind(1)
    max_K = max_PK.amax(0)
    shrink_PK = (max_PK - max_K).exp()
    sums_3K = torch.stack(((sum_exp_PK * shrink_PK).sum(0), (sum_z_exp_PK * shrink_PK).sum(0), sum_z_PK.sum(0)))
    return torch.cat((max_K[None], sums_3K)), target_logits_PK.sum(0)


def _grad_of_block(
    hidden_KD: Tensor,
    head: Head,
    targets: tuple[Tensor, Tensor],
    logsumexp_K: Tensor,
    grads_K: Sequence[Tensor | None],
    num_vocabulary: int,
) -> Tensor:
    """Gradient [K, B] of h W^T + b for one block, given those of log p(target), log S and mean log p (None is 0)."""
    zeros_K = torch.zeros_like(logsumexp_K)
    # The scale multiplies every term, so it is applied here, to K numbers and not to K x B.
    target_K, sum_K, mean_K = (zeros_K if grad_K is None else grad_K * head.scale for grad_K in grads_K[:3])
    grad_KB = logits(hidden_KD, head)
    slope_KB = None if head.softcap is None else 1.0 - (grad_KB / head.softcap).square_()
    grad_KB.sub_(logsumexp_K[:, None]).exp_().mul_((sum_K - target_K - mean_K)[:, None])
    if grads_K[2] is not None:
        grad_KB += mean_K[:, None] / num_vocabulary
    index_K, inside_K = targets
    _add_at(grad_KB, index_K, torch.where(inside_K, target_K, 0.0))
    return grad_KB if slope_KB is None else grad_KB.mul_(slope_KB)


def _add_at(matrix_KB: Tensor, index_K: Tensor, values_K: Tensor) -> None:
    """Add one value to each row, in place; unlike scatter_add_, deterministic on every device."""
    index_K1 = index_K[:, None]
    matrix_KB.scatter_(1, index_K1, matrix_KB.gather(1, index_K1) + values_K[:, None])
