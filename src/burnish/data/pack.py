"""Samples of one optimizer step -> packed micro-batches and the step's exact denominators, before anything runs.

Shape suffixes: T tokens of a pack, K its trained tokens, N its documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from burnish.types import Batch, Documents, Sample, StepInput, UserError


@dataclass(frozen=True)
class Layout:
    """How a step is cut: over how many data ranks, into micro-batches of at most how many tokens, and of what kind.

    packed: documents back to back. rows: one document a row, padded to the longest of its micro-batch, and rows times
    that length keep the budget. single: one document a micro-batch.
    """

    tokens_per_micro_batch: int
    data_ranks: int = 1
    kind: Literal["packed", "rows", "single"] = "packed"


def pack(samples: Sequence[Sample], layout: Layout, normalization: Literal["token", "sample"] = "token") -> StepInput:
    """Cut one step's samples into micro-batches of at most `layout.tokens_per_micro_batch` tokens each.

    token: the loss is sum(w*l) / sum(w) over the step. sample: (1/N) * sum over samples of [sum(w*l) / sum(w)], over
    the N samples with a positive sum. Weights in batches are scaled so that sum(weights*l) / denominator is that loss.

    Raises UserError where no token of the step is trained or a sample is longer than the budget.
    """
    budget = layout.tokens_per_micro_batch
    over = next((s for s in samples if len(s.tokens) > budget), None)
    if over is not None:
        raise UserError(
            f"row {over.id} has {len(over.tokens)} tokens, more than batch.tokens_per_micro_batch={budget}; "
            f"raise it, or set data.over_long to drop or truncate"
        )
    sums = np.array([float(s.loss_weights.sum(dtype=np.float64)) for s in samples])
    denominator = float(sums.sum()) if normalization == "token" else float(np.count_nonzero(sums))
    if denominator <= 0:
        ids = ", ".join(s.id for s in samples[:20])
        raise UserError(
            f"no token of this step is trained, so its loss has no denominator; its rows: {ids}; "
            "check their weights and data.train_on, or raise batch.samples"
        )
    scales = np.ones(len(samples)) if normalization == "token" else 1.0 / np.where(sums > 0, sums, 1.0)
    names = tuple(dict.fromkeys(s.source for s in samples))
    lengths = [len(s.tokens) for s in samples]
    bins = {"packed": first_fit, "rows": rows_by_length, "single": one_each}[layout.kind](lengths, budget)
    ranks = _deal(bins, lengths, layout.data_ranks)
    # Ranks meet in every micro-batch, so each has the same number of them.
    most = max(len(rank) for rank in ranks)
    batches = [
        Packs(
            [Pack([samples[i] for i in b], scales[b]) for b in rank] + [Pack([], scales[:0])] * (most - len(rank)),
            names,
        )
        for rank in ranks
    ]
    num_slots = sum(max(lengths[i] for i in b) * len(b) for b in bins) if layout.kind == "rows" else sum(lengths)
    return StepInput(
        batches=batches,
        samples=tuple(samples),
        denominator=denominator,
        num_samples=len(samples),
        num_tokens=sum(lengths),
        num_trained_tokens=sum(s.num_trained for s in samples),
        capacity=budget * len(bins),
        num_padding=num_slots - sum(lengths),
    )


class Pack(NamedTuple):
    """The samples of one micro-batch, and what each one's weights are multiplied by; none for a rank that waits."""

    samples: Sequence[Sample]
    scales: np.ndarray


@dataclass(frozen=True)
class Packs(Sequence[Batch]):
    """The micro-batches of one data rank, built as they are asked for."""

    packs: Sequence[Pack]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.packs)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Packs: ...

    def __getitem__(self, index: int | slice) -> Batch | Packs:
        """The batch, or fewer of them. A pack without samples is one token that nobody trains."""
        if isinstance(index, slice):
            return replace(self, packs=self.packs[index])
        return _batch(*self.packs[index], self.sources)

    def flat(self) -> dict[str, Any]:
        """What a rank needs to build them, in few arrays: ids and weights, no text."""
        samples = [sample for pack in self.packs for sample in pack.samples]
        return {
            "tokens": np.concatenate([sample.tokens for sample in samples] or [np.zeros(0, np.int32)]),
            "weights": np.concatenate([sample.loss_weights for sample in samples] or [np.zeros(0, np.float32)]),
            "lengths": np.array([len(sample.tokens) for sample in samples], np.int64),
            "scales": np.concatenate([pack.scales for pack in self.packs]),
            "source": np.array([self.sources.index(sample.source) for sample in samples], np.int32),
            "index": np.array([sample.index for sample in samples], np.int64),
            "in_pack": np.array([len(pack.samples) for pack in self.packs], np.int64),
            "sources": self.sources,
        }

    @classmethod
    def of_flat(cls, flat: Mapping[str, Any]) -> Packs:
        """The same micro-batches again, of what `flat` gave; samples lack what no rank needs."""
        ends, sources = np.cumsum(flat["lengths"])[:-1], flat["sources"]
        rows = zip(
            np.split(flat["tokens"], ends), np.split(flat["weights"], ends), flat["source"], flat["index"], strict=True
        )
        samples = (
            [Sample(tokens, weights, sources[source], int(index)) for tokens, weights, source, index in rows]
            if len(flat["lengths"])
            else []
        )
        bounds = np.concatenate(([0], np.cumsum(flat["in_pack"])))
        return cls([Pack(samples[a:b], flat["scales"][a:b]) for a, b in itertools.pairwise(bounds)], sources)


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most `budget`: first-fit decreasing, at most 11/9 of the optimum + 6/9.

    A tournament tree over the bins' free space finds the first that fits, so n lengths take O(n log n).
    """
    size = 1
    while size < len(lengths):
        size *= 2
    free = [0] * size + [budget] * len(lengths) + [0] * (size - len(lengths))
    for node in range(size - 1, 0, -1):
        free[node] = max(free[2 * node], free[2 * node + 1])
    bins: list[list[int]] = [[] for _ in lengths]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < size:
            node *= 2
            if free[node] < lengths[i]:
                node += 1
        bins[node - size].append(i)
        free[node] -= lengths[i]
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return [sorted(b) for b in bins if b]


ROW_FILL = 0.8
"""Least length of a row in a padded micro-batch, as a share of the longest: it bounds what padding costs."""


def rows_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of indices of alike lengths in which rows times the longest length is at most `budget`."""
    bins: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not bins or width * (len(bins[-1]) + 1) > budget or lengths[i] < ROW_FILL * width:
            bins.append([])
            width = lengths[i]
        bins[-1].append(i)
    return bins


def one_each(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """A bin for each index."""
    return [[i] for i in range(len(lengths))]


def _deal(bins: list[list[int]], lengths: Sequence[int], num_ranks: int) -> list[list[list[int]]]:
    """Deal bins to data ranks by cost, dearest first to the cheapest rank so far, at most ceil(bins / ranks) each."""
    if num_ranks == 1:
        return [bins]
    most = -(-len(bins) // num_ranks)
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    costs = [0.0] * num_ranks
    for b in sorted(bins, key=lambda b: -_cost(b, lengths)):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < most), key=lambda r: (costs[r], r))
        ranks[rank].append(b)
        costs[rank] += _cost(b, lengths)
    return ranks


def _cost(indices: list[int], lengths: Sequence[int], linear: float = 24576.0) -> float:
    """Relative time of a pack, a*L + b*L^2 over its documents, with the ratio ROLL uses for a 7B model."""
    return sum(linear * lengths[i] + lengths[i] ** 2 for i in indices)


def _batch(samples: Sequence[Sample], scales: np.ndarray, source_names: tuple[str, ...]) -> Batch:
    import torch  # data workers import this package without torch

    if not samples:
        idle = Sample(np.zeros(1, np.int32), np.zeros(1, np.float32), source_names[0])
        batch = _batch([idle], np.ones(1), source_names)
        return replace(batch, samples=(), documents=replace(batch.documents, has_padding=True))
    lengths = [len(s.tokens) for s in samples]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    raw_T = np.concatenate([s.loss_weights for s in samples])
    scaled_T = np.concatenate([s.loss_weights * scale for s, scale in zip(samples, scales, strict=True)])
    tokens_T = np.concatenate([s.tokens for s in samples]).astype(np.int64)
    predicted_K = np.flatnonzero(raw_T)
    assert not raw_T[starts[:-1]].any(), "a document's first token is never predicted, so its weight must be 0"
    source_N = np.array([source_names.index(s.source) for s in samples])
    document_K = np.searchsorted(starts, predicted_K, side="right") - 1
    return Batch(
        tokens_T=torch.from_numpy(tokens_T),
        positions_T=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        documents=Documents(torch.from_numpy(starts.astype(np.int32)), tuple(lengths)),
        trained_K=torch.from_numpy(predicted_K - 1),
        targets_K=torch.from_numpy(tokens_T[predicted_K]),
        weights_K=torch.from_numpy(scaled_T[predicted_K].astype(np.float64)),
        raw_weights_K=torch.from_numpy(raw_T[predicted_K].astype(np.float64)),
        sources_K=torch.from_numpy(source_N[document_K]),
        sources=source_names,
        samples=tuple(samples),
    )
