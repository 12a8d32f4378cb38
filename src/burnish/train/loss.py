"""Losses: pure functions (scores, batch) -> (sum of weighted losses, statistics). The trainer divides by the step's
denominator, which the packer computed, so that no split of the step changes the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from burnish.types import Batch, Stats, TokenScores, Weighted


@dataclass(frozen=True)
class CrossEntropy:
    """l = (1-s)*(-log p(target)) - s*mean over V of log p + z*(log Z)^2, with label smoothing s and z-loss weight z.

    z-loss: PaLM (arXiv 2204.02311), section 5. Both default to 0: plain negative log-likelihood.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(self, scores: TokenScores, batch: Batch) -> tuple[torch.Tensor, Stats]:
        weights_K = batch.weights_K.to(scores.logprobs_K.dtype)
        loss_K = -scores.logprobs_K
        if self.label_smoothing:
            loss_K = (1 - self.label_smoothing) * loss_K - self.label_smoothing * scores.mean_logprobs_K
        if self.z_loss:
            loss_K = loss_K + self.z_loss * scores.logsumexp_K**2
        loss_sum = (weights_K * loss_K).sum()
        return loss_sum, {"loss": Weighted(loss_sum.detach(), batch.weights_K.sum()), **token_stats(scores, batch)}


def token_stats(scores: TokenScores, batch: Batch) -> Stats:
    """What is reported of every sweep: accuracy and entropy over trained tokens, and nll (weighted) for each source."""
    num_trained = float(len(batch.targets_K))
    raw_K = batch.raw_weights_K.to(scores.logprobs_K.dtype)
    nll_K = -scores.logprobs_K.detach() * raw_K
    zeros = torch.zeros(len(batch.sources), dtype=nll_K.dtype, device=nll_K.device)
    nll_S = zeros.index_add(0, batch.sources_K, nll_K)
    weight_S = zeros.index_add(0, batch.sources_K, raw_K)
    return {
        "accuracy": Weighted(scores.is_top1_K.sum(), num_trained),
        "entropy": Weighted(scores.entropy_K.detach().sum(), num_trained),
        **{f"loss/{name}": Weighted(nll_S[i], weight_S[i]) for i, name in enumerate(batch.sources)},
    }
