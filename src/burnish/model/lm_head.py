"""Linear layer and softmax cross-entropy in one sweep over the vocabulary, without the logits ever existing as a whole.

Gives what losses and metrics read of each trained token. It knows no loss, weights no token and moves nothing between
devices or ranks.
Shape suffixes: K trained tokens, D hidden size, V vocabulary, B one block of the vocabulary, N blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from burnish.types import TokenScores

BLOCK_BYTES = 256 * 2**20
"""Size of one block of logits in bytes; a sweep holds at most two buffers of this size, and their bf16 copy."""


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


def logits(hidden_KD: Tensor, head: Head) -> Tensor:
    """All logits [K, V] in float32 (float64 where the inputs are): for a handful of tokens, never for training."""
    logits_KV = functional.linear(hidden_KD, head.weight_VD, head.bias_V)
    logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    if head.scale != 1.0:
        logits_KV = logits_KV.mul_(head.scale)
    if head.softcap is not None:
        logits_KV = logits_KV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_KV


def score(hidden_KD: Tensor, head: Head, targets_K: Tensor, block_bytes: int = BLOCK_BYTES) -> TokenScores:
    """Score the targets against the hidden states that predict them.

    With logits z and S = sum_v exp(z_v) of one token, p = exp(z) / S:
        logprob = z_target - log S      logsumexp = log S      mean_logprob = mean_v z_v - log S
        entropy = log S - sum_v p_v z_v      is_top1 = no token has a higher logit than the target
    and for gradients g of the first three (entropy and is_top1 carry none):
        dz = g_logprob onehot(target) + g_mean / V + (g_logsumexp - g_logprob - g_mean) p

    The sweep runs over blocks of the vocabulary, so that each row of the weight's gradient is one matmul over all
    tokens and nothing is accumulated for it. Of a block, each token keeps max z, sum exp z, sum z exp z and sum z;
    these are merged at the end as in the online softmax (Milakov and Gimelshein, arXiv:1805.02867). The backward pass
    computes every block again, from log S alone (as Cut Cross-Entropy does: Wijmans et al., arXiv:2411.09009); where
    one block holds the whole vocabulary, it is kept instead.

    Matmuls run in the dtype of the inputs, everything else in float32 (float64 where the inputs are). Inputs that
    require no gradient cost none. Nothing waits for the device.
    """
    return TokenScores(
        *_Score.apply(hidden_KD, head.weight_VD, head.bias_V, head.scale, head.softcap, targets_K, block_bytes)
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
        block_bytes: int,
    ) -> tuple[Tensor, ...]:
        head = Head(weight_VD, bias_V, scale, softcap)
        blocks = _blocks(hidden_KD, weight_VD, block_bytes)
        target_logits_K = hidden_KD.new_zeros(len(hidden_KD), dtype=_wide(hidden_KD))
        statistics, logits_KB = [], None
        for block in blocks:
            logits_KB = logits(hidden_KD, head.rows(block))
            index_K, inside_K = _targets_in(block, targets_K)
            target_logits_K += torch.where(inside_K, logits_KB.gather(1, index_K[:, None])[:, 0], 0.0)
            statistics.append(_statistics(logits_KB))
        max_K, logsumexp_K, expected_logit_K, sum_K = _merge(torch.stack(statistics))

        ctx.save_for_backward(
            hidden_KD, weight_VD, bias_V, targets_K, logsumexp_K, logits_KB if len(blocks) == 1 else None
        )
        ctx.scale, ctx.softcap, ctx.blocks = scale, softcap, blocks
        ctx.set_materialize_grads(False)
        entropy_K, is_top1_K = logsumexp_K - expected_logit_K, target_logits_K >= max_K
        ctx.mark_non_differentiable(entropy_K, is_top1_K)
        mean_logprobs_K = sum_K / len(weight_VD) - logsumexp_K
        return target_logits_K - logsumexp_K, logsumexp_K, mean_logprobs_K, entropy_K, is_top1_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_K, grad_logsumexp_K, grad_mean_logprobs_K, *_) -> tuple[Tensor | None, ...]:
        hidden_KD, weight_VD, bias_V, targets_K, logsumexp_K, kept_KV = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        head = Head(weight_VD, bias_V, ctx.scale, ctx.softcap)
        zeros_K = torch.zeros_like(logsumexp_K)
        # The scale multiplies every term, so it is applied here, to K numbers and not to K x V.
        to_target_K, to_sum_K, to_mean_K = (
            zeros_K if grad_K is None else grad_K * ctx.scale
            for grad_K in (grad_logprobs_K, grad_logsumexp_K, grad_mean_logprobs_K)
        )
        to_softmax_K = to_sum_K - to_target_K - to_mean_K

        grad_hidden_KD = torch.zeros_like(hidden_KD, dtype=logsumexp_K.dtype) if needs_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if needs_weight else None
        grad_bias_V = torch.empty_like(bias_V) if needs_bias else None
        for block in ctx.blocks:
            part = head.rows(block)
            logits_KB = logits(hidden_KD, part) if kept_KV is None else kept_KV
            grad_KB = (logits_KB - logsumexp_K[:, None]).exp_().mul_(to_softmax_K[:, None])
            if grad_mean_logprobs_K is not None:
                grad_KB += to_mean_K[:, None] / len(weight_VD)
            index_K, inside_K = _targets_in(block, targets_K)
            _add_at(grad_KB, index_K, torch.where(inside_K, to_target_K, 0.0))
            if ctx.softcap is not None:
                grad_KB.mul_((logits_KB / ctx.softcap).square_().neg_().add_(1.0))
            del logits_KB
            if grad_bias_V is not None:
                grad_bias_V[block] = grad_KB.sum(0)
            grad_KB = grad_KB.to(hidden_KD.dtype)
            if grad_weight_VD is not None:
                torch.mm(grad_KB.T, hidden_KD, out=grad_weight_VD[block])
            if grad_hidden_KD is not None:
                grad_hidden_KD += grad_KB @ part.weight_VD
        grad_hidden_KD = None if grad_hidden_KD is None else grad_hidden_KD.to(hidden_KD.dtype)
        return grad_hidden_KD, grad_weight_VD, grad_bias_V, None, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(hidden_KD: Tensor, weight_VD: Tensor, block_bytes: int) -> list[slice]:
    """The vocabulary in blocks of logits within `block_bytes`; a multiple of 64 wide, for the tiles of matmuls."""
    num_tokens, num_vocabulary = max(len(hidden_KD), 1), len(weight_VD)
    width = max(block_bytes // (num_tokens * _wide(hidden_KD).itemsize) // 64 * 64, 64)
    return [slice(start, min(start + width, num_vocabulary)) for start in range(0, num_vocabulary, width)]


def _targets_in(block: slice, targets_K: Tensor) -> tuple[Tensor, Tensor]:
    """Where each target stands in a block, clamped to it, and whether it stands there at all."""
    width = block.stop - block.start
    index_K = targets_K - block.start
    return index_K.clamp(0, width - 1), (index_K >= 0) & (index_K < width)


def _statistics(logits_KB: Tensor) -> Tensor:
    """[4, K]: max z, sum exp(z - max), sum z exp(z - max), sum z."""
    max_K = logits_KB.amax(1)
    exp_KB = (logits_KB - max_K[:, None]).exp_()
    sum_exp_K = exp_KB.sum(1)
    return torch.stack((max_K, sum_exp_K, exp_KB.mul_(logits_KB).sum(1), logits_KB.sum(1)))


def _merge(statistics_N4K: Tensor) -> Tensor:
    """[4, K] over all blocks: max z, log sum exp z, the mean of z under the softmax, sum z."""
    max_NK, sum_exp_NK, sum_z_exp_NK, sum_NK = statistics_N4K.unbind(1)
    max_K = max_NK.amax(0)
    rescale_NK = (max_NK - max_K).exp()
    sum_exp_K = (rescale_NK * sum_exp_NK).sum(0)
    expected_K = (rescale_NK * sum_z_exp_NK).sum(0) / sum_exp_K
    return torch.stack((max_K, sum_exp_K.log() + max_K, expected_K, sum_NK.sum(0)))


def _add_at(matrix_KB: Tensor, index_K: Tensor, values_K: Tensor) -> None:
    """Add one value to each row, in place; unlike scatter_add_, deterministic on every device."""
    index_K1 = index_K[:, None]
    matrix_KB.scatter_(1, index_K1, matrix_KB.gather(1, index_K1) + values_K[:, None])
