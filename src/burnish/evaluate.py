"""Held-out loss: every row once, weighted by trained tokens, for each source and over all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from burnish.data.pack import Layout, pack
from burnish.types import Evaluator, Sample, Stats, merge

CHUNK = 2048
"""Rows packed together; it bounds memory, and packs are the fuller the larger it is."""


def evaluate(evaluator: Evaluator, sources: Mapping[str, Iterable[Sample]], layout: Layout) -> dict[str, float]:
    """`eval/loss`, `eval/perplexity` and `eval/accuracy` over all rows, and `eval/<source>/loss` of each source.

    Loss is the mean negative log-likelihood of trained tokens in nats, weighted by their weights.
    """
    stats: Stats = {}
    for rows in sources.values():
        for chunk in _chunks(rows):
            stats = merge(stats, evaluator.evaluate(pack(chunk, layout)))
    loss = stats["loss"].mean
    values = {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)),
        "eval/accuracy": stats["accuracy"].mean,
    }
    return values | {f"eval/{name}/loss": stats[f"loss/{name}"].mean for name in sources}


def _chunks(rows: Iterable[Sample]) -> Iterable[Sequence[Sample]]:
    chunk: list[Sample] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
