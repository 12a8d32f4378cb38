"""The order of rows: a permutation, the same from any position, in the proportions asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.order import Order, hold_out, permute, seed_from


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    moved = permute(np.arange(size), size, seed)
    assert sorted(moved) == list(range(size))


def test_permute_answers_for_single_positions_at_any_size() -> None:
    size = 3_000_000_000
    positions = np.array([0, 17, size - 1])
    together = permute(positions, size, 7)
    assert [int(permute(positions[i : i + 1], size, 7)[0]) for i in range(3)] == list(together)


def test_permutations_look_random() -> None:
    moved = permute(np.arange(10_000), 10_000, 3)
    assert abs(np.corrcoef(np.arange(10_000), moved)[0, 1]) < 0.05
    assert np.count_nonzero(moved == np.arange(10_000)) < 10
    steps = np.diff(moved)
    assert len(np.unique(steps)) > 5_000


def test_seeds_differ_by_every_part() -> None:
    seeds = {seed_from(*parts) for parts in [(1, 2, 3), (1, 3, 2), (1, 2), (1, 2, 3, 0), (2, 2, 3), (1, 2, 4)]}
    assert len(seeds) == 6


def test_every_row_once_an_epoch_and_epochs_differ() -> None:
    order = Order([5, 8], [None, None], seed=1)
    seen = []
    for epoch in range(2):
        sources, rows = order.at(epoch, np.arange(order.epoch_length))
        pairs = list(zip(sources.tolist(), rows.tolist(), strict=True))
        assert sorted(pairs) == [(0, i) for i in range(5)] + [(1, i) for i in range(8)]
        seen.append(pairs)
    assert seen[0] != seen[1]
    assert Order([5, 8], [None, None], seed=2).at(0, np.arange(13))[1].tolist() != [r for _, r in seen[0]]


def test_without_shuffle_rows_come_in_file_order() -> None:
    sources, rows = Order([2, 3], [None, None], seed=1, shuffle=False).at(4, np.arange(5))
    assert list(zip(sources, rows, strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_weighted_source_has_its_share_and_goes_round(shuffle: bool) -> None:
    order = Order([70, 7], [None, 0.3], seed=5, shuffle=shuffle)
    assert order.epoch_length == 100
    draws: list[int] = []
    for epoch in range(7):
        sources, rows = order.at(epoch, np.arange(100))
        assert sorted(rows[sources == 0]) == list(range(70))
        assert np.count_nonzero(sources == 1) == 30
        draws += rows[sources == 1].tolist()
    # 210 draws of 7 rows: each row exactly 30 times, since each pass takes every row once.
    assert np.bincount(draws).tolist() == [30] * 7
    if not shuffle:
        assert np.flatnonzero(order.at(0, np.arange(100))[0] == 1).tolist()[:3] == [1, 5, 8]


def test_an_endless_mixture_keeps_exact_proportions_in_each_block() -> None:
    order = Order([10, None], [3.0, 1.0], seed=0)
    assert not order.has_epochs
    assert order.slots == (7500, 2500)
    sources, rows = order.at(2, np.arange(order.epoch_length))
    assert sorted(rows[sources == 1]) == list(range(5000, 7500)), "a stream's rows are numbered on from block to block"


def test_hold_out_is_a_partition_of_the_asked_size() -> None:
    kept, held = hold_out(1000, 0.05, seed=3)
    assert len(held) == 50
    assert sorted([*kept, *held]) == list(range(1000))
    assert hold_out(1000, 0.05, seed=4)[1].tolist() != held.tolist()
    with pytest.raises(ValueError, match="leaves none"):
        hold_out(1, 0.5, 0)
