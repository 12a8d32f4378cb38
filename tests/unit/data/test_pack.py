"""Packs keep the budget, lose nothing, and carry exact denominators."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.pack import Layout, Packs, first_fit, pack, rows_by_length
from burnish.types import Sample, UserError


def make_sample(length: int, index: int = 0, weights: list[float] | None = None, source: str = "a") -> Sample:
    loss_weights = np.array(weights if weights is not None else [0.0] + [1.0] * (length - 1), np.float32)
    return Sample(np.arange(length, dtype=np.int32) + index * 100, loss_weights, source=source, index=index)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(60, 200))
def test_bins_hold_every_index_once_within_the_budget(lengths: list[int], budget: int) -> None:
    packed = first_fit(lengths, budget)
    assert sorted(i for b in packed for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget for b in packed)
    # First fit never leaves two bins that would fit into one.
    fills = sorted(sum(lengths[i] for i in b) for b in packed)
    assert len(fills) < 2 or fills[0] + fills[1] > budget
    rows = rows_by_length(lengths, budget)
    assert sorted(i for b in rows for i in b) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in b) * len(b) <= budget for b in rows)


def test_a_pack_restarts_positions_and_never_predicts_a_first_token() -> None:
    inputs = pack([make_sample(3, 0), make_sample(4, 1)], Layout(10))
    (batch,) = inputs.batches[0]
    assert batch.tokens_T.tolist() == [0, 1, 2, 100, 101, 102, 103]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.documents.cu_seqlens.tolist() == [0, 3, 7]
    assert batch.trained_K.tolist() == [0, 1, 3, 4, 5]
    assert batch.targets_K.tolist() == [1, 2, 101, 102, 103]
    assert (inputs.num_tokens, inputs.num_trained_tokens, inputs.capacity, inputs.num_padding) == (7, 5, 10, 0)


def test_denominators_of_token_and_sample() -> None:
    samples = [make_sample(3, 0, [0, 0.5, 1]), make_sample(3, 1, [0, 0, 0]), make_sample(2, 2, [0, 2], source="b")]
    token = pack(samples, Layout(4))
    assert token.denominator == 3.5
    sample = pack(samples, Layout(4), "sample")
    assert sample.denominator == 2, "a sample without weight does not count"
    weights = {int(t): float(w) for b in sample.batches[0] for t, w in zip(b.targets_K, b.weights_K, strict=True)}
    assert weights == pytest.approx({1: 1 / 3, 2: 2 / 3, 201: 1.0})
    raw = sorted(float(w) for b in sample.batches[0] for w in b.raw_weights_K)
    assert raw == [0.5, 1.0, 2.0]
    assert {s for b in token.batches[0] for s in b.sources} == {"a", "b"}


def test_faults_name_rows_and_remedy() -> None:
    with pytest.raises(UserError, match=r"row a:3 has 9 tokens.*tokens_per_micro_batch=8.*over_long"):
        pack([make_sample(9, 3)], Layout(8))
    with pytest.raises(UserError, match=r"no token of this step is trained.*a:4"):
        pack([make_sample(2, 4, [0, 0])], Layout(8))


def test_ranks_share_the_packs_evenly() -> None:
    samples = [make_sample(n, i) for i, n in enumerate([8, 7, 6, 5, 4, 3, 2, 1])]
    inputs = pack(samples, Layout(8, data_ranks=2))
    assert sorted(s.index for rank in inputs.batches for b in rank for s in b.samples) == list(range(8))
    assert max(map(len, inputs.batches)) == min(map(len, inputs.batches))


def test_a_rank_without_packs_has_idle_ones_that_train_nothing() -> None:
    samples = [make_sample(n, i) for i, n in enumerate([8, 8, 8])]
    inputs = pack(samples, Layout(8, data_ranks=2))
    assert [len(rank) for rank in inputs.batches] == [2, 2]
    (idle,) = [batch for rank in inputs.batches for batch in rank if not batch.samples]
    assert (idle.num_tokens, len(idle.trained_K)) == (1, 0)
    assert inputs.num_tokens == 24


def test_what_travels_to_a_rank_builds_the_same_batches() -> None:
    samples = [make_sample(n, i) for i, n in enumerate([8, 7, 6, 2, 1])]
    for rank in pack(samples, Layout(8, data_ranks=3), "sample").batches:
        assert isinstance(rank, Packs)
        again = Packs.of_flat(rank.flat())
        assert len(again) == len(rank)
        for here, there in zip(rank, again, strict=True):
            assert [(s.source, s.index) for s in here.samples] == [(s.source, s.index) for s in there.samples]
            for name in (
                "tokens_T",
                "positions_T",
                "trained_K",
                "targets_K",
                "weights_K",
                "raw_weights_K",
                "sources_K",
            ):
                assert torch.equal(getattr(here, name), getattr(there, name)), name
            assert here.documents.lengths == there.documents.lengths


def test_rows_count_their_padding_and_single_documents_have_none() -> None:
    samples = [make_sample(n, i) for i, n in enumerate([10, 9, 8, 3])]
    rows = pack(samples, Layout(40, kind="rows"))
    assert [[len(s.tokens) for s in b.samples] for b in rows.batches[0]] == [[10, 9, 8], [3]]
    assert (rows.num_padding, rows.capacity) == (3, 80)
    single = pack(samples, Layout(40, kind="single"))
    assert [len(b.samples) for b in single.batches[0]] == [1, 1, 1, 1]
    assert single.num_padding == 0
