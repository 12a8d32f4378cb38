"""Prepared rows that come back from disk as they were, whatever was killed or torn in between."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.data.prepare import Item, Prepared, PreparedRow, Rejected, StreamedRow
from burnish.data.store import StoredPreparation, TokenStore
from burnish.types import Sample, Status


def sample(row: int, **more: Any) -> Sample:
    tokens = np.arange(row, row + 5, dtype=np.int32)
    return Sample(tokens, (tokens % 2).astype(np.float32) / 2, source="s", index=row, **more)


def same(one: PreparedRow | None, other: PreparedRow) -> bool:
    return one is not None and len(one) == len(other) and all(map(same_part, one, other))


def same_part(one: Prepared, other: Prepared) -> bool:
    if not isinstance(one, Sample) or not isinstance(other, Sample):
        return one == other
    arrays = np.array_equal(one.tokens, other.tokens) and np.array_equal(one.loss_weights, other.loss_weights)
    names = ("source", "index", "status", "metadata", "label", "turn", "notices")
    return arrays and all(getattr(one, name) == getattr(other, name) for name in names)


ROWS: list[list[Prepared]] = [
    [sample(0, metadata={"é": [1, None]}, label="x", notices=("open_turn", "straddling"))],
    [sample(1, status=Status.TRUNCATED), Rejected("over_long", "s", 1, "s:2: too long"), sample(1, turn=5)],
    [Rejected("over_long", "s", 2, "s:3: too long")],
    [Sample(np.empty(0, np.int32), np.empty(0, np.float32), source="s", index=3)],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = TokenStore(tmp_path / "key", 10)
    for row, prepared in enumerate(ROWS):
        store.put(row, prepared)
    assert all(same(store.get(row), prepared) for row, prepared in enumerate(ROWS))
    store.close()
    return tmp_path / "key"


def test_rows_come_back_in_a_later_run(folder: Path) -> None:
    store = TokenStore(folder, 10)
    assert store.is_writer
    for row, prepared in enumerate(ROWS):
        found = store.get(row)
        assert same(found, prepared)
    assert store.get(4) is None
    row = store.get(0)
    assert row is not None
    assert isinstance(first := row[0], Sample)
    assert (first.tokens.dtype, first.loss_weights.dtype) == (np.int32, np.float32)


def test_a_torn_tail_and_a_changed_byte_count_as_absent(folder: Path) -> None:
    data = folder / "rows.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-3])
    store = TokenStore(folder, 10)
    assert [store.get(row) is None for row in range(4)] == [False, False, False, True]
    store.put(3, [sample(3)])
    assert same(store.get(3), [sample(3)])
    store.close()
    data.write_bytes(whole[:30] + bytes([whole[30] ^ 1]) + whole[31:])
    assert TokenStore(folder, 10).get(0) is None


def test_a_record_that_the_index_does_not_name_is_passed_over(folder: Path) -> None:
    with (folder / "rows.bin").open("ab") as file:
        file.write(b"half a record")
    store = TokenStore(folder, 10)
    store.put(7, [sample(7)])
    store.close()
    again = TokenStore(folder, 10)
    assert same(again.get(7), [sample(7)])
    assert same(again.get(1), ROWS[1])


def test_one_run_writes_and_others_read_along(folder: Path) -> None:
    writer, reader = TokenStore(folder, 10), TokenStore(folder, 10)
    assert (writer.is_writer, reader.is_writer) == (True, False)
    reader.put(8, [sample(8)])
    assert writer.get(8) is None
    writer.put(9, [sample(9)])
    assert same(reader.get(9), [sample(9)])
    writer.close()
    assert TokenStore(folder, 10).is_writer


def test_of_a_row_with_several_samples_all_come_back_or_none(tmp_path: Path) -> None:
    short = Sample(np.array([7, 9], np.int32), np.array([0, 0.25], np.float32), source="s", index=6, turn=2)
    row = [short, Rejected("bad", "s", 6, "s:7, messages[4]: no"), sample(6, turn=6)]
    store = TokenStore(tmp_path, 10)
    store.put(6, row)
    store.close()
    data = tmp_path / "rows.bin"
    whole = data.read_bytes()
    for size in range(len(whole)):
        data.write_bytes(whole[:size])
        torn = TokenStore(tmp_path, 10)
        assert torn.get(6) is None
        torn.close()
    data.write_bytes(whole)
    assert same(TokenStore(tmp_path, 10).get(6), row)


@pytest.mark.parametrize("value", [datetime.date(2024, 1, 1), (1, 2), float("nan"), {1: 2}])
def test_what_json_would_change_is_not_stored(folder: Path, value: Any) -> None:
    store = TokenStore(folder, 10)
    store.put(5, [sample(5), sample(5, metadata={"value": value})])
    assert store.get(5) is None


def test_only_missing_rows_are_prepared(folder: Path) -> None:
    asked: list[Item] = []

    def prepare(chunks: Iterable[Sequence[Item]]) -> Iterator[list[PreparedRow]]:
        for chunk in chunks:
            asked.extend(chunk)
            yield [[sample(item.index if isinstance(item, StreamedRow) else item[1])] for item in chunk]

    streamed = StreamedRow(1, 6, "t:6", {})
    chunks: list[list[Item]] = [[(0, 1), (0, 4)], [(0, 0), (0, 2)], [(0, 5), streamed]]
    store = TokenStore(folder, 10)
    for expected in ([(0, 4), (0, 5), streamed], [streamed]):
        asked.clear()
        results = list(StoredPreparation(prepare, [store, None]).map(chunks))
        assert asked == expected
        known = [ROWS[1], [sample(4)], ROWS[0], ROWS[2]]
        assert all(same(a, b) for a, b in zip(results[0] + results[1], known, strict=True))
        assert [len(chunk) for chunk in results] == [2, 2, 2]
