"""Rows read as they come, round and round, for sources too large to index. The cursor is JSON and resumes exactly.

.jsonl is read here, by byte offset; .parquet and the hub through the iterable data sets of `datasets`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from burnish.config import SourceConfig
from burnish.data.json_files import parse_row, skip_bom
from burnish.data.locate import Place, locate
from burnish.data.schema import Schema, schema_of_rows
from burnish.data.tables import load, without_nulls
from burnish.types import RowError, UserError

if TYPE_CHECKING:
    import datasets

NUM_SCHEMA_ROWS = 1_000
_SAMPLE_BYTES = 1 << 20

Found = tuple[str, dict[str, Any] | RowError]
"""Where a row stands, and the row or why it cannot be read."""


class Reader(Protocol):
    """One pass over a source; the cursor is JSON."""

    def rows(self, cursor: dict[str, Any] | None) -> Iterator[Found]:
        """The rows from a cursor, or from the first."""
        ...

    def cursor(self) -> dict[str, Any]:
        """The place behind the row that `rows` gave last."""
        ...


@dataclass
class Stream:
    """Rows without an end: behind the last comes the first again, and `passes` counts how often that happened.

    `schema` is that of the first 1,000 rows. `fingerprint` tells whether names, sizes and samples of the files are the
    same; it is no proof that all of their rows are.
    """

    name: str
    reader: Reader
    schema: Schema
    fingerprint: str
    passes: int = 0
    _cursor: dict[str, Any] | None = None
    _rows: Iterator[Found] | None = None

    def read(self, n: int) -> list[Found]:
        """The next n rows, and where each stands."""
        found: list[Found] = []
        while len(found) < n:
            if self._rows is None:
                self._rows = self.reader.rows(self._cursor)
            found += islice(self._rows, n - len(found))
            if len(found) < n:
                self.passes, self._cursor, self._rows = self.passes + 1, None, None
        return found

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last row that `read` returned."""
        return {"passes": self.passes, "cursor": self._cursor if self._rows is None else self.reader.cursor()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes, self._cursor, self._rows = state["passes"], state["cursor"], None


@dataclass
class LineCursor:
    """Behind line `line` of file `file`, `offset` bytes into it; `row` rows of this pass lie before."""

    file: int = 0
    offset: int = 0
    line: int = 0
    row: int = 0


@dataclass
class LineReader:
    """Reads .jsonl files one after the other; keeps the rows [start, stop) of all of them."""

    files: tuple[Path, ...]
    start: int = 0
    stop: int | None = None
    _at: LineCursor = field(default_factory=LineCursor)

    def rows(self, cursor: dict[str, Any] | None) -> Iterator[Found]:
        self._at = at = LineCursor(**cursor or {})
        while at.file < len(self.files):
            for line in self._lines():
                if not line.strip():
                    continue
                if self.stop is not None and at.row >= self.stop:
                    return
                at.row += 1
                if at.row > self.start:
                    yield f"{self.files[at.file].name}:{at.line}", _parsed(line)
            at.file, at.offset, at.line = at.file + 1, 0, 0

    def cursor(self) -> dict[str, Any]:
        return asdict(self._at)

    def _lines(self) -> Iterator[bytes]:
        at = self._at
        with self.files[at.file].open("rb") as file:
            at.offset = at.offset or skip_bom(file)
            file.seek(at.offset)
            for line in file:
                at.offset += len(line)
                at.line += 1
                yield line


@dataclass
class TableReader:
    """Reads what `datasets` streams; `open` makes the data set anew for each pass."""

    open: Callable[[], datasets.IterableDataset]
    label: str
    first: int = 0
    """Number of the first row in the source, where a slice leaves out some."""
    _dataset: Any = None
    _row: int = 0

    def rows(self, cursor: dict[str, Any] | None) -> Iterator[Found]:
        self._dataset, self._row = self.open(), 0
        if cursor is not None:
            self._dataset.load_state_dict(cursor["dataset"])
            self._row = cursor["row"]
        for row in self._dataset:
            self._row += 1
            yield f"{self.label} row {self.first + self._row - 1}", without_nulls(row)

    def cursor(self) -> dict[str, Any]:
        return {"row": self._row, "dataset": self._dataset.state_dict()}


def open_stream(source: SourceConfig, key: str = "data.train") -> Stream:
    """Find a source and look at its first 1,000 rows.

    `key` is the recipe's name for the source, for messages. Raises UserError where nothing is found, where the source
    cannot be streamed, where its slice counts from the end, and where it holds no rows.
    """
    place = locate(source, key)
    start, stop = place.bounds[0] or 0, place.bounds[1]
    if start < 0 or (stop is not None and stop < 0):
        raise UserError(
            f"{key}: a slice of a stream cannot count from the end, which is not known; use rows from 0 on, or "
            "streaming=false"
        )
    reader = _reader(place, source, key, start, stop)
    sample = [row for _, row in islice(reader.rows(None), NUM_SCHEMA_ROWS)]
    if not sample:
        raise UserError(f"{key}.path={source.path}: it holds no rows, or its slice keeps none of them")
    schema = schema_of_rows(row for row in sample if not isinstance(row, RowError))
    return Stream(place.name, reader, schema, _fingerprint(place, source))


def _reader(place: Place, source: SourceConfig, key: str, start: int, stop: int | None) -> Reader:
    kinds = {file.suffix for file in place.files}
    if kinds == {".jsonl"}:
        return LineReader(place.files, start, stop)
    if place.folder is not None:
        raise UserError(
            f"{key}.path={source.path}: a saved `datasets` folder is read from disk as it is; set streaming=false"
        )
    if ".json" in kinds:
        remedy = "set streaming=false, or write a row per line: jq -c '.[]' rows.json > rows.jsonl"
        raise UserError(f"{key}.path={source.path}: a .json array cannot be read as it comes; {remedy}")
    if len(kinds) > 1:
        raise UserError(
            f"{key}.path={source.path}: a stream reads files of one kind, and these are {', '.join(sorted(kinds))}"
        )
    return TableReader(lambda: _table_stream(place, source, start, stop), _label(place, source), start)


def _table_stream(place: Place, source: SourceConfig, start: int, stop: int | None) -> datasets.IterableDataset:
    if place.hub is not None:
        dataset = load(place.hub, name=source.config, split=source.split, streaming=True)
    else:
        dataset = load("parquet", data_files=[str(file) for file in place.files], split="train", streaming=True)
    dataset = dataset.skip(start) if start else dataset
    return dataset if stop is None else dataset.take(max(0, stop - start))


def _label(place: Place, source: SourceConfig) -> str:
    if place.hub is not None:
        return f"{place.hub}[{source.split}]"
    return place.files[0].name if len(place.files) == 1 else place.name


def _parsed(line: bytes) -> dict[str, Any] | RowError:
    try:
        return parse_row(line)
    except RowError as error:
        return error


def _fingerprint(place: Place, source: SourceConfig) -> str:
    digest = hashlib.blake2b(
        json.dumps([place.bounds, place.hub, source.config, source.split]).encode(), digest_size=16
    )
    for path in place.files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
