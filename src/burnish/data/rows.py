"""Raw rows with random access: files, tables and lists alike, one after the other and sliced, never held as objects.

Says where a row stands and what it holds, and nothing of what it means. What is too large to index is `streams.py`'s.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from itertools import accumulate
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from burnish.config import SourceConfig
from burnish.data.json_files import FileFacts, open_array, open_lines, parse_row, signatures_of
from burnish.data.locate import Place, locate
from burnish.data.schema import Schema, schema_of
from burnish.data.tables import open_hub, open_parquet, open_saved, open_table
from burnish.types import UserError

if TYPE_CHECKING:
    import datasets


class Part(Protocol):
    """Rows of one file, table or list, counted from 0."""

    @property
    def schema(self) -> Schema: ...

    @property
    def facts(self) -> FileFacts: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> dict[str, Any]: ...

    def where(self, row: int) -> str: ...


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """The rows [start, stop) of all parts together, numbered from 0.

    Pickles to paths and indices, for worker processes. `schema` counts the rows outside the slice too.
    """

    name: str
    parts: tuple[Part, ...]
    start: int
    stop: int
    _firsts: tuple[int, ...] = field(init=False, repr=False)
    """The row that each part begins with, before slicing; a part without rows is never found."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_firsts", tuple(accumulate(map(len, self.parts[:-1]), initial=0)))

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Raises RowError with the reason where the row cannot be read, IndexError where there is none."""
        part, place = self._find(row)
        return part[place]

    def where(self, row: int) -> str:
        """Where a row stands, for messages: `rows.jsonl:17` by line, `rows.json[16]`, `x.parquet row 16` from 0."""
        part, place = self._find(row)
        return part.where(place)

    @property
    def schema(self) -> Schema:
        return reduce(add, (part.schema for part in self.parts))

    @property
    def files(self) -> list[dict[str, Any]]:
        """Path, size, rows and hash of each file, for data.json."""
        return [asdict(part.facts) for part in self.parts]

    @property
    def fingerprint(self) -> str:
        """A hash of the rows that are kept; the same rows under another path have the same one. 32 hex digits."""
        identity = [self.start, self.stop, *(part.facts.hash for part in self.parts)]
        return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()

    def _find(self, row: int) -> tuple[Part, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, and {row} is none of them")
        place = self.start + row
        number = bisect_right(self._firsts, place) - 1
        return self.parts[number], place - self._firsts[number]


class MemoryRows(Rows):
    """Rows handed over in Python: a sequence of mappings, or a `datasets.Dataset`. Raises UserError for anything else.

    A sequence is kept as JSON, so that its rows are those which the same sequence written to a .jsonl file would give.
    """

    __slots__ = ()

    def __init__(self, rows: Sequence[Mapping[str, Any]] | datasets.Dataset, name: str = "rows") -> None:
        part = _memory_part(rows, name)
        Rows.__init__(self, name, (part,), 0, len(part))

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.name, self.parts, self.start, self.stop)


@dataclass(frozen=True, eq=False, slots=True)
class JsonInMemory:
    """Rows as JSON texts, one behind the other; offsets is int64 [rows+1]."""

    text: bytes
    offsets: np.ndarray
    schema: Schema
    facts: FileFacts

    def __len__(self) -> int:
        return self.facts.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return parse_row(self.text[self.offsets[row] : self.offsets[row + 1]])

    def where(self, row: int) -> str:
        return f"{self.facts.path}[{row}]"


def open_rows(source: SourceConfig, key: str = "data.train") -> Rows:
    """Find, index and hash the rows of a source, and count their columns, in one reading.

    `key` is the recipe's name for the source, for messages. Raises UserError where nothing is found, where a file is
    broken as a whole, and where no row is left; a row that is broken by itself raises RowError when it is asked for.
    """
    place = locate(source, key)
    _check_splits(place, source, key)
    parts = _parts(place, source)
    num_rows = sum(len(part) for part in parts)
    start, stop, _ = slice(*place.bounds).indices(num_rows)
    if start >= stop:
        rule = f"its slice keeps none of {num_rows} rows; widen the slice" if num_rows else "it holds no rows"
        raise UserError(f"{key}.path={source.path}: {rule}")
    return Rows(place.name, parts, start, stop)


def _check_splits(place: Place, source: SourceConfig, key: str) -> None:
    """A split or configuration asked for where there is none would be ignored."""
    if place.files and source.split != "train":
        raise UserError(
            f"{key}.split={source.split}: files such as {source.path} have no splits; name that split's file"
        )
    if place.hub is None and source.config is not None:
        raise UserError(f"{key}.config={source.config}: only a hub data set has configurations; remove it")


def _parts(place: Place, source: SourceConfig) -> tuple[Part, ...]:
    if place.hub is not None:
        return (open_hub(place.hub, source.config, source.split),)
    if place.folder is not None:
        return (open_saved(place.folder, source.split),)
    return tuple(_open_file(file) for file in place.files)


def _open_file(path: Path) -> Part:
    openers = {".jsonl": open_lines, ".json": open_array, ".parquet": open_parquet}
    return openers[path.suffix](path)


def _memory_part(rows: Any, name: str) -> Part:
    if hasattr(rows, "with_format") and hasattr(rows, "column_names") and hasattr(rows, "select"):
        return open_table(rows, name, name)
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        splits = f"; pass one of its splits, {', '.join(map(str, rows))}" if isinstance(rows, Mapping) else ""
        raise UserError(f"dataset is a {type(rows).__name__}; it must be a list of rows or a datasets.Dataset{splits}")
    texts = [_json(row, f"{name}[{number}]") for number, row in enumerate(rows)]
    text = b"".join(texts)
    facts = FileFacts(name, len(text), len(texts), hashlib.blake2b(text, digest_size=16).hexdigest())
    return JsonInMemory(text, np.cumsum([0, *map(len, texts)]), schema_of(Counter(signatures_of(texts))), facts)


def _json(row: Any, where: str) -> bytes:
    try:
        return json.dumps(row, default=_plain).encode()
    except TypeError as error:
        raise UserError(f"{where}: {error}; rows hold text, numbers, lists and mappings") from None


def _plain(value: Any) -> Any:
    """NumPy's arrays and numbers as Python's, mappings as dict."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")
