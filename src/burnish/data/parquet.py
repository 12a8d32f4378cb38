"""Rows of .parquet files in the order they stand, read as they are asked for, without `datasets` and its cache.

For whoever looks at rows one after the other: another row group than the last is read anew, so that random access,
which training needs, is `tables.py`'s.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from burnish.data.json_files import FileFacts
from burnish.data.schema import Fill, Schema, Signature, schema_of
from burnish.data.tables import without_nulls
from burnish.types import UserError

if TYPE_CHECKING:
    import pyarrow as pa

PLAIN_FEATURES = {"Value", "List", "LargeList", "Sequence"}
"""Features of `datasets` whose values are those that Arrow holds."""


@dataclass(eq=False)
class ParquetFile:
    """A .parquet file. A column that is null in a row is absent from it. Its `facts` have no hash."""

    path: Path
    schema: Schema
    facts: FileFacts
    ends: np.ndarray
    """int64 [row groups]: rows up to the end of each."""
    _group: int = -1
    _table: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.facts.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        group = int(np.searchsorted(self.ends, row, side="right"))
        if group != self._group:
            self._group, self._table = group, _open(self.path).read_row_group(group)
        first = int(self.ends[group - 1]) if group else 0
        return without_nulls(self._table.slice(row - first, 1).to_pylist()[0])

    def where(self, row: int) -> str:
        return f"{self.path.name} row {row}"


def open_parquet_rows(path: Path) -> ParquetFile | None:
    """The rows of a .parquet file; None where `datasets` would read other values than the file's plain ones.

    Raises UserError where the file is broken.
    """
    import pyarrow as pa

    signatures: Counter[Signature] = Counter()
    try:
        file = _open(path)
        if not _is_plain(file.schema_arrow.metadata or {}):
            return None
        for batch in file.iter_batches(batch_size=8192):
            signatures.update(dict(_signatures(batch)))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path} cannot be read as .parquet ({reason}); download or copy it again") from None
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    facts = FileFacts(str(path), path.stat().st_size, file.metadata.num_rows, "")
    return ParquetFile(path, schema_of(signatures), facts, np.cumsum(groups, dtype=np.int64))


def _signatures(batch: pa.RecordBatch) -> Iterator[tuple[Signature, int]]:
    fills = np.stack([_fills(column) for column in batch.columns], axis=1)
    kinds, counts = np.unique(fills, axis=0, return_counts=True)
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        yield tuple(zip(batch.schema.names, map(Fill, kind), strict=True)), count


def _fills(column: pa.Array) -> np.ndarray:
    """How each row fills a column, uint8 [rows]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        lengths = pc.call_function("binary_length", [column])
    elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.call_function("list_value_length", [column])
    else:
        return np.where(_bools(column.is_null()), Fill.NULL, Fill.FILLED).astype(np.uint8)
    is_empty = _bools(pc.call_function("equal", [lengths, pa.scalar(0, lengths.type)]))
    filled = np.where(is_empty, Fill.EMPTY, Fill.FILLED)
    return np.where(_bools(column.is_null()), Fill.NULL, filled).astype(np.uint8)


def _bools(array: pa.BooleanArray) -> np.ndarray:
    """An array of truth values, null as false. Arrow's own way there imports pandas, which takes a while."""
    plain = array.fill_null(False).cast("uint8")
    return np.frombuffer(plain.buffers()[1], np.uint8, len(plain), plain.offset).astype(bool)


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)


def _is_plain(metadata: dict[bytes, bytes]) -> bool:
    stated = metadata.get(b"huggingface")
    return stated is None or _types(json.loads(stated)) <= PLAIN_FEATURES


def _types(value: Any) -> set[str]:
    """Every `_type` in the description of features."""
    if isinstance(value, list):
        return set().union(*map(_types, value))
    if not isinstance(value, dict):
        return set()
    own = {value["_type"]} if isinstance(value.get("_type"), str) else set()
    return own.union(*map(_types, value.values()))
