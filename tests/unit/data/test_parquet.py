"""Parquet rows read in order are those that `datasets` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from burnish.data.parquet import open_parquet_rows
from burnish.data.tables import open_parquet

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a", "weight": None}], "tools": "[]", "count": 1, "empty": ""},
    {"messages": [{"role": "user", "content": "b", "weight": 0.5}], "tools": None, "count": None, "empty": ""},
    {"messages": [], "tools": "x", "count": 3, "empty": None},
    {"messages": None, "tools": "", "count": 4, "empty": "\u00e9"},
]


@pytest.mark.parametrize("group", [1, 3, 100])
def test_rows_and_schema(tmp_path: Path, group: int) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=group)
    found, expected = open_parquet_rows(file), open_parquet(file)
    assert found is not None
    assert len(found) == len(expected) == 4
    assert [found[i] for i in (3, 0, 1, 2, 0)] == [expected[i] for i in (3, 0, 1, 2, 0)]
    assert [found.where(i) for i in range(4)] == [expected.where(i) for i in range(4)]
    assert found.schema == expected.schema


def test_features_that_datasets_reads_otherwise(tmp_path: Path) -> None:
    def features(kind: str) -> dict[bytes, bytes]:
        return {b"huggingface": json.dumps({"info": {"features": {"a": {"_type": kind, "dtype": "string"}}}}).encode()}

    table = pa.table({"a": ["x"]})
    for kind, is_plain in (("Value", True), ("Image", False), ("ClassLabel", False)):
        pq.write_table(table.replace_schema_metadata(features(kind)), tmp_path / f"{kind}.parquet")
        assert (open_parquet_rows(tmp_path / f"{kind}.parquet") is not None) == is_plain


def test_a_file_without_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "none.parquet")
    found = open_parquet_rows(tmp_path / "none.parquet")
    assert found is not None
    assert len(found) == 0
