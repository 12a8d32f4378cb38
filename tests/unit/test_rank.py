"""The verbs of one rank, asked of many: what travels to which, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from burnish.data.pack import Layout, pack
from burnish.parallel.degrees import Degrees
from burnish.rank import RankGroup, packed, unpacked
from burnish.types import Sample, StepInput, Weighted


@dataclass
class FakeRanks:
    """Ranks that answer from a table, and keep what they were asked."""

    answers: dict[str, list[Any]]
    asked: list[tuple[str, Sequence[Any] | None]] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        return 4

    def call(self, method: str, *args: Any, by_rank: Sequence[Any] | None = None) -> list[Any]:
        self.asked.append((method, by_rank))
        return self.answers[method]


def inputs(data_ranks: int) -> StepInput:
    samples = []
    for number, length in enumerate((5, 9, 3, 7)):
        weights = np.ones(length, np.float32)
        weights[0] = 0
        samples.append(Sample(np.arange(length, dtype=np.int32) + 10 * number, weights, "rows", number))
    return pack(samples, Layout(16, data_ranks))


def group(answers: dict[str, list[Any]]) -> tuple[RankGroup, FakeRanks]:
    ranks = FakeRanks(answers)
    return RankGroup(ranks, Degrees(dp_shard=2, tp=2)), ranks  # pyright: ignore[reportArgumentType]


def test_a_step_is_the_same_behind_the_wire() -> None:
    step = inputs(2)
    for rank, sent in enumerate(packed(step)):
        there = unpacked(sent)
        assert there.denominator == step.denominator
        assert there.num_trained_tokens == step.num_trained_tokens
        found, expected = list(there.batches[0]), list(step.batches[rank])
        assert len(found) == len(expected) > 0
        for one, two in zip(found, expected, strict=True):
            assert one.tokens_T.tolist() == two.tokens_T.tolist()
            assert one.targets_K.tolist() == two.targets_K.tolist()
            assert one.weights_K.tolist() == two.weights_K.tolist()
            assert one.documents.lengths == two.documents.lengths


def test_peers_of_a_data_rank_share_one_object_and_one_rank_tells_the_statistics() -> None:
    trainer, ranks = group({"step_packs": [None, {"loss": (6.0, 3.0)}, None, {"loss": (6.0, 3.0)}]})
    assert trainer.step(inputs(2)) == {"loss": Weighted(6.0, 3.0)}
    ((_, by_rank),) = ranks.asked
    assert by_rank is not None
    assert by_rank[0] is by_rank[1]
    assert by_rank[2] is by_rank[3]
    assert by_rank[0] is not by_rank[2]


def test_the_driver_times_a_step_of_its_ranks() -> None:
    timed: list[str] = []

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        timed.append(name)
        yield

    trainer, _ = group({"prepare": [None] * 4, "step_packs": [{"loss": (6.0, 3.0)}] * 4})
    trainer.prepare(1, clock)
    trainer.step(inputs(2))
    assert timed == ["step"]


def test_memory_is_that_of_the_fullest_rank() -> None:
    found = [{"memory/peak_gib": peak, "memory/allocated_gib": 8 - peak} for peak in (1.0, 7.0, 2.0, 3.0)]
    trainer, _ = group({"memory": found})
    assert trainer.memory() == {"memory/peak_gib": 7.0, "memory/allocated_gib": 7.0}
