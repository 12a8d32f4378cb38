"""Batches of rows: what is in them, where the cursor stands, and what prefetching may not change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.order import Order
from burnish.data.prepare import Item, Prepared, Rejected
from burnish.data.source import BatchSize, Prefetch, RowsError, RowSource, count_steps
from burnish.types import Sample, UserError

KEPT_ALL: dict[int, str] = {}


def make_source(
    num_rows: int, size: BatchSize, rejected: dict[int, str] = KEPT_ALL, stop_on: Iterable[str] = (), **order: Any
) -> RowSource:
    """Rows of one source; row i has i % 7 + 2 tokens, unless it is rejected for a reason."""

    def prepare(chunks: Iterable[Sequence[Item]]) -> Iterator[list[Prepared]]:
        for chunk in chunks:
            yield [make_row(item) for item in chunk]

    def make_row(item: Item) -> Prepared:
        assert isinstance(item, tuple)
        row = item[1]
        if row in rejected:
            return Rejected(rejected[row], "a", row, f"a:{row}: {rejected[row]}")  # pyright: ignore[reportArgumentType]
        length = row % 7 + 2
        return Sample(np.full(length, row, np.int32), np.eye(1, length, 1, np.float32)[0], "a", row)

    return RowSource(Order([num_rows], [None], seed=3, **order), prepare, size, stop_on=frozenset(stop_on))


def take(source: RowSource | Prefetch, num_batches: int) -> list[list[int]]:
    return [[sample.index for sample in source.next()] for _ in range(num_batches)]


def test_epochs_end_in_partial_batches_and_hold_every_row_once() -> None:
    batches = take(make_source(10, BatchSize("samples", 4)), 6)
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    first, second = list(chain(*batches[:3])), list(chain(*batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 150),
    unit=st.sampled_from(["samples", "tokens"]),
    count=st.integers(1, 60),
    bad=st.sets(st.integers(0, 149), max_size=40),
    shuffle=st.booleans(),
)
def test_counted_steps_are_those_that_come(num_rows: int, unit: Any, count: int, bad: set[int], shuffle: bool) -> None:
    rejected = {row: "bad" for row in bad if row < num_rows}
    if len(rejected) == num_rows:
        return
    size = BatchSize(unit, count)
    source = make_source(num_rows, size, rejected, shuffle=shuffle)
    lengths = np.array([0 if row in rejected else row % 7 + 2 for row in range(num_rows)], np.int32)
    for epoch in range(2):
        batches = take(source, count_steps(source.order, [lengths], size, epoch))
        assert sorted(chain(*batches)) == [row for row in range(num_rows) if row not in rejected]
        if unit == "tokens":
            assert all(len(b) == 1 or sum(lengths[b]) <= count for b in batches)


@settings(max_examples=30, deadline=None)
@given(stop=st.integers(0, 12), unit=st.sampled_from(["samples", "tokens"]), prefetch=st.booleans())
def test_a_cursor_goes_on_at_the_next_batch(stop: int, unit: Any, prefetch: bool) -> None:
    size, rejected = BatchSize(unit, 9), {3: "bad", 40: "over_long", 99: "bad"}
    whole = take(make_source(100, size, rejected), 30)
    source = make_source(100, size, rejected)
    first: RowSource | Prefetch = Prefetch(source) if prefetch else source
    begun = take(first, stop)
    state = first.state_dict()
    if isinstance(first, Prefetch):
        first.close()
    resumed = make_source(100, size, rejected)
    resumed.load_state_dict(state)
    assert begun + take(resumed, 30 - stop) == whole
    reference = make_source(100, size, rejected)
    take(reference, 30)
    assert resumed.state_dict() == reference.state_dict(), "counts included"


def test_a_row_that_stops_the_run_comes_at_its_batch_and_leaves_the_cursor() -> None:
    source = Prefetch(make_source(20, BatchSize("samples", 4), {9: "bad"}, stop_on=["bad"], shuffle=False))
    assert take(source, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    state = source.state_dict()
    with pytest.raises(RowsError, match="a:9: bad"):
        source.next()
    assert source.state_dict() == state
    assert (state["epoch"], state["position"]) == (0, 8)
    source.close()


def test_rows_that_are_all_dropped_are_an_error_not_a_hang() -> None:
    source = make_source(5, BatchSize("samples", 2), dict.fromkeys(range(5), "bad"))
    with pytest.raises(UserError, match="none of 5 rows in a row was kept; last: a:"):
        source.next()


def test_a_peek_hands_nothing_out() -> None:
    source = Prefetch(make_source(8, BatchSize("samples", 4), shuffle=False))
    assert [s.index for s in source.peek()] == [0, 1, 2, 3]
    assert source.state_dict()["position"] == 0
    assert take(source, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    source.close()
