"""Batches of rows: what is in them, where the cursor stands, and what prefetching may not change."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.order import Order
from burnish.data.prepare import Item, Prepared, PreparedRow, Rejected, StreamedRow
from burnish.data.source import BatchSize, FirstOfKind, Prefetch, RowsError, RowSource, SampleLengths, count_steps
from burnish.types import Sample, Status, UserError

KEPT_ALL: dict[int, str] = {}


def make_source(
    num_rows: int, size: BatchSize, rejected: dict[int, str] = KEPT_ALL, stop_on: Iterable[str] = (), **order: Any
) -> RowSource:
    """Rows of one source; row i has i % 7 + 2 tokens, unless it is rejected for a reason."""

    def prepare(chunks: Iterable[Sequence[Item]]) -> Iterator[list[PreparedRow]]:
        for chunk in chunks:
            yield [[make_row(item)] for item in chunk]

    def make_row(item: Item) -> Prepared:
        assert isinstance(item, tuple)
        row = item[1]
        if row in rejected:
            return Rejected(rejected[row], "a", row, f"a:{row}: {rejected[row]}")  # pyright: ignore[reportArgumentType]
        length = row % 7 + 2
        return Sample(np.full(length, row, np.int32), np.eye(1, length, 1, np.float32)[0], "a", row)

    return RowSource(Order([num_rows], [None], seed=3, **order), prepare, size, where, stop_on=frozenset(stop_on))


def where(source: int, row: int) -> str:
    return f"{'ab'[source]}.jsonl:{row + 1}"


def make_several(
    lengths: Sequence[Sequence[int]], size: BatchSize, stop_on: Iterable[str] = (), order: Order | None = None
) -> RowSource:
    """Rows that give a sample for each of their lengths, a bad one for a length of 0."""

    def prepare(chunks: Iterable[Sequence[Item]]) -> Iterator[list[PreparedRow]]:
        for chunk in chunks:
            yield [make_row(item[1]) for item in chunk if isinstance(item, tuple)]

    def make_row(row: int) -> list[Prepared]:
        return [
            Sample(np.full(n, row, np.int32), np.eye(1, n, 1, np.float32)[0], "a", row, turn=turn)
            if n
            else Rejected("bad", "a", row, f"a:{row}, messages[{turn}]: bad")
            for turn, n in enumerate(lengths[row])
        ]

    return RowSource(order or Order([len(lengths)], [None], seed=3), prepare, size, where, stop_on=frozenset(stop_on))


def sample_lengths(rows: Sequence[Sequence[int]]) -> SampleLengths:
    """Of rows as `make_several` takes them."""
    kept = [[n for n in row if n] for row in rows]
    return SampleLengths(np.array([*chain(*kept)], np.int32), np.cumsum([0, *map(len, kept)]))


def take_ids(source: RowSource | Prefetch[list[Sample]], num_batches: int) -> list[list[str]]:
    return [[sample.id for sample in source.next()] for _ in range(num_batches)]


def take(source: RowSource | Prefetch[list[Sample]], num_batches: int) -> list[list[int]]:
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
        batches = take(source, count_steps(source.order, [sample_lengths(lengths[:, None].tolist())], size, epoch))
        assert sorted(chain(*batches)) == [row for row in range(num_rows) if row not in rejected]
        if unit == "tokens":
            assert all(len(b) == 1 or sum(lengths[b]) <= count for b in batches)


@settings(max_examples=30, deadline=None)
@given(stop=st.integers(0, 12), unit=st.sampled_from(["samples", "tokens"]), prefetch=st.booleans())
def test_a_cursor_goes_on_at_the_next_batch(stop: int, unit: Any, prefetch: bool) -> None:
    size, rejected = BatchSize(unit, 9), {3: "bad", 40: "over_long", 99: "bad"}
    whole = take(make_source(100, size, rejected), 30)
    source = make_source(100, size, rejected)
    first: RowSource | Prefetch[list[Sample]] = Prefetch(source, list) if prefetch else source
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


SEVERAL = st.lists(st.lists(st.sampled_from([0, 2, 3, 5]), min_size=1, max_size=5), min_size=1, max_size=40)
SIZES = st.builds(BatchSize, st.sampled_from(["samples", "tokens"]), st.integers(1, 12))


@settings(max_examples=80, deadline=None)
@given(rows=SEVERAL, size=SIZES, weighted=st.booleans(), data=st.data())
def test_rows_of_several_samples_are_cut_into_batches_and_resumed_between_any_two(
    rows: list[list[int]], size: BatchSize, weighted: bool, data: st.DataObject
) -> None:
    if not any(chain(*rows)):
        return
    order = Order([len(rows)], [1.0 if weighted else None], seed=3)
    whole = make_several(rows, size, order=order)
    ids, states = [], [whole.state_dict()]
    for _ in range(12):
        ids.append([sample.id for sample in whole.next()])
        states.append(whole.state_dict())
    stop = data.draw(st.integers(0, 12))
    resumed = make_several(rows, size, order=order)
    resumed.load_state_dict(json.loads(json.dumps(states[stop])))
    assert take_ids(resumed, 12 - stop) == ids[stop:]
    assert resumed.state_dict() == states[-1], "counts included"


@settings(max_examples=60, deadline=None)
@given(rows=SEVERAL, size=SIZES)
def test_counted_steps_of_rows_with_several_samples_are_those_that_come(rows: list[list[int]], size: BatchSize) -> None:
    if not any(chain(*rows)):
        return
    source = make_several(rows, size)
    for epoch in range(2):
        batches = take_ids(source, count_steps(source.order, [sample_lengths(rows)], size, epoch))
        kept = [f"a:{row}:{turn}" for row, lengths in enumerate(rows) for turn, n in enumerate(lengths) if n]
        assert sorted(chain(*batches)) == sorted(kept)


def test_lengths_of_several_sources_are_counted_by_their_rows() -> None:
    parts = [sample_lengths(rows) for rows in ([[2], [3, 4, 0]], [[0], [5], [6, 7]])]
    assert SampleLengths.joined(parts).of(np.array([4, 2, 1, 1])).tolist() == [6, 7, 3, 4, 3, 4]
    order = Order([2, 3], [None, None], seed=0, shuffle=False)
    assert count_steps(order, parts, BatchSize("samples", 4), 0) == 2
    assert count_steps(order, parts, BatchSize("tokens", 9), 0) == 4, "2 3 4, 5, 6, 7"


def test_a_batch_that_ends_within_a_row_counts_its_samples_and_the_row_once() -> None:
    source = make_several([[2, 3, 0, 2], [4, 4]], BatchSize("samples", 2), order=Order([2], [None], 0, shuffle=False))
    assert take_ids(source, 1) == [["a:0:0", "a:0:1"]]
    state = source.state_dict()
    assert (state["epoch"], state["position"], state["offset"]) == (0, 0, 3), "what is dropped behind counts too"
    assert state["counts"] == {"a": {"kept": 2, "bad": 1, "further": 2}}
    assert take_ids(source, 1) == [["a:0:3", "a:1:0"]]
    assert source.state_dict()["counts"] == {"a": {"kept": 4, "bad": 1, "further": 3}}


FIRST_REJECTED = {3: "over_long", 5: "over_long", 6: "bad"}
FIRST_SAID = ["a: first over-long: a:3: over_long", "a: first bad: a:6: bad"]


def test_the_first_of_each_kind_is_said_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    source = make_source(8, BatchSize("samples", 3), FIRST_REJECTED, shuffle=False)
    with caplog.at_level("INFO", "burnish"):
        take(source, 6)
    assert caplog.messages == FIRST_SAID
    assert source.state_dict()["first_of_kind"] == {"a": {"over_long": "a:3: over_long", "bad": "a:6: bad"}}


def test_a_resume_says_what_was_first_before_it(caplog: pytest.LogCaptureFixture) -> None:
    source = make_source(8, BatchSize("samples", 3), FIRST_REJECTED, shuffle=False)
    take(source, 1)
    state = json.loads(json.dumps(source.state_dict()))
    take(source, 1)
    assert state["first_of_kind"] == {"a": {"over_long": "a:3: over_long"}}, "of what was handed out, no more"
    resumed = make_source(8, BatchSize("samples", 3), FIRST_REJECTED, shuffle=False)
    with caplog.at_level("INFO", "burnish"):
        resumed.load_state_dict(state)
        assert caplog.messages == FIRST_SAID[:1]
        take(resumed, 4)
    assert caplog.messages == FIRST_SAID


def test_what_was_found_when_rows_were_prepared_is_not_said_again(caplog: pytest.LogCaptureFixture) -> None:
    source = make_source(8, BatchSize("samples", 3), FIRST_REJECTED, shuffle=False)
    source.first = FirstOfKind({"a": {"over_long": "a:5: over_long"}})
    with caplog.at_level("INFO", "burnish"):
        take(source, 6)
    assert caplog.messages == FIRST_SAID[1:]
    assert source.state_dict()["first_of_kind"]["a"]["over_long"] == "a:5: over_long"


def test_a_notice_and_a_cut_are_said_with_their_place(caplog: pytest.LogCaptureFixture) -> None:
    def prepare(chunks: Iterable[Sequence[Item]]) -> Iterator[list[PreparedRow]]:
        for chunk in chunks:
            yield [[make_sample(item)] for item in chunk]

    def make_sample(item: Item) -> Sample:
        source, row = (item.source, item.index) if isinstance(item, StreamedRow) else item
        kept = Sample(np.full(3, row, np.int32), np.eye(1, 3, 1, np.float32)[0], "ab"[source], row)
        if row < 2:
            return kept
        return replace(kept, notices=("open_turn",), status=Status.TRUNCATED, turn=None if source else 3)

    class OneStream:
        """Reads nothing twice; stands for a Stream."""

        def read(self, count: int) -> list[tuple[str, dict[str, Any]]]:
            return [(f"hub row {row}", {}) for row in range(count)]

        def state_dict(self) -> dict[str, Any]:
            return {}

    order = Order([4, 4], [None, None], seed=3, shuffle=False)
    streams: Any = {1: OneStream()}
    source = RowSource(order, prepare, BatchSize("samples", 8), where, streams=streams)
    with caplog.at_level("INFO", "burnish"):
        source.next()
    assert sorted(caplog.messages) == [
        "a: first cut: a.jsonl:3, messages[3]",
        "a: first open-turn: a.jsonl:3, messages[3]",
        "b: first cut: hub row 2",
        "b: first open-turn: hub row 2",
    ]


def test_a_cursor_of_an_older_version_still_loads() -> None:
    source = make_source(20, BatchSize("samples", 4), {12: "bad"}, shuffle=False)
    source.load_state_dict({"epoch": 0, "position": 8, "counts": {"a": {"kept": 7, "bad": 1}}, "streams": {}})
    assert take(source, 2) == [[8, 9, 10, 11], [13, 14, 15, 16]]
    assert source.state_dict()["first_of_kind"] == {"a": {"bad": "a:12: bad"}}, "the first since"


def test_a_bad_sample_stops_the_run_behind_the_ones_before_it_in_its_row() -> None:
    order = Order([3], [None], 0, shuffle=False)
    source = make_several([[2], [2, 2, 0, 2], [2]], BatchSize("samples", 3), ["bad"], order)
    assert take_ids(source, 1) == [["a:0:0", "a:1:0", "a:1:1"]]
    with pytest.raises(RowsError, match=r"a:1, messages\[2\]: bad"):
        source.next()
    mended = make_several([[2], [2, 2, 3, 2], [2]], BatchSize("samples", 3), ["bad"], order)
    mended.load_state_dict(source.state_dict())
    assert take_ids(mended, 1) == [["a:1:2", "a:1:3", "a:2:0"]]


def test_many_bad_samples_of_few_rows_are_not_taken_for_a_pass_over_all() -> None:
    rows = [[0, 0, 0, 0], [0, 0, 0, 0, 2]]
    order = Order([2], [None], 0, shuffle=False)
    assert take_ids(make_several(rows, BatchSize("samples", 1), order=order), 2) == [["a:1:4"], ["a:1:4"]]
    with pytest.raises(UserError, match=r"none of 2 rows in a row was kept; last: a:0, messages\[3\]: bad"):
        make_several([[0, 0, 0, 0], [0, 0]], BatchSize("samples", 1), order=order).next()


def test_a_row_that_stops_the_run_comes_at_its_batch_and_leaves_the_cursor() -> None:
    source = Prefetch(make_source(20, BatchSize("samples", 4), {9: "bad"}, stop_on=["bad"], shuffle=False), list)
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


def test_batches_are_packed_by_the_thread_and_what_it_raises_comes_at_their_turn() -> None:
    def make(samples: list[Sample]) -> tuple[list[int], int]:
        if samples[0].index == 8:
            raise UserError("no token of this step is trained")
        return [sample.index for sample in samples], threading.get_ident()

    source = Prefetch(make_source(20, BatchSize("samples", 4), shuffle=False), make)
    made = [source.next(), source.next()]
    assert [indices for indices, _ in made] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert threading.get_ident() not in {thread for _, thread in made}
    with pytest.raises(UserError, match="no token of this step"):
        source.next()
    assert source.state_dict()["position"] == 8
    source.close()


def test_a_peek_hands_nothing_out() -> None:
    source = Prefetch(make_source(8, BatchSize("samples", 4), shuffle=False), list)
    assert [s.index for s in source.peek()] == [0, 1, 2, 3]
    assert source.state_dict()["position"] == 0
    assert take(source, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    source.close()
