"""The rows a recipe names: its sources opened, recognised and split into training and held-out rows.

It says which rows there are; `prepare.py` makes samples of them, `source.py` batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from burnish.config import DataConfig, RecipeError, SourceConfig
from burnish.data.conversation import Format, recognise
from burnish.data.order import Order, hold_out
from burnish.data.rows import MemoryRows, Rows, open_rows
from burnish.data.streams import Stream, open_stream
from burnish.types import RowError, UserError


@dataclass(frozen=True)
class OpenSource:
    """A source with its rows; `selected` are the row numbers that count, None for all."""

    config: SourceConfig
    name: str
    rows: Rows | Stream
    format: Format
    selected: np.ndarray | None = None

    @property
    def num_rows(self) -> int | None:
        """Rows that count, None for a stream."""
        if self.selected is not None:
            return len(self.selected)
        return len(self.rows) if isinstance(self.rows, Rows) else None

    def row_numbers(self) -> np.ndarray:
        """The numbers of the rows that count, ascending."""
        assert isinstance(self.rows, Rows), "a stream has no row numbers"
        return np.arange(len(self.rows)) if self.selected is None else self.selected


@dataclass(frozen=True)
class Corpus:
    """Training and held-out sources. A source's index is its place in `sources`, training first."""

    train: tuple[OpenSource, ...]
    validation: tuple[OpenSource, ...]

    @property
    def sources(self) -> tuple[OpenSource, ...]:
        return (*self.train, *self.validation)

    def order(self, seed: int, shuffle: bool) -> Order:
        return Order([s.num_rows for s in self.train], [s.config.weight for s in self.train], seed, shuffle)

    def fingerprints(self) -> dict[str, str]:
        """The content of the training rows, by place: a name or a path may change."""
        return {f"data.train.{place}": source.rows.fingerprint for place, source in enumerate(self.train)}

    def facts(self) -> dict[str, Any]:
        """For data.json: files with sizes and hashes, formats and row counts of every source."""

        def one(source: OpenSource) -> dict[str, Any]:
            files = source.rows.files if isinstance(source.rows, Rows) else []
            return {
                "name": source.name,
                "format": str(source.format),
                "rows": source.num_rows,
                "fingerprint": source.rows.fingerprint,
                "files": files,
            }

        return {"train": [one(s) for s in self.train], "validation": [one(s) for s in self.validation]}


def open_corpus(data: DataConfig, seed: int, train_rows: Any = None, validation_rows: Any = None) -> Corpus:
    """Open what `data` names; `train_rows` and `validation_rows` are data sets handed over in Python instead.

    Raises UserError where a source is missing, empty or of no known shape.
    """
    train = _opened(data.train, "data.train", train_rows)
    if isinstance(data.validation, float) and validation_rows is None:
        return Corpus(*_split(train, data.validation, seed))
    configs = data.validation if isinstance(data.validation, tuple) else ()
    return Corpus(train, _opened(configs, "data.validation", validation_rows))


def _opened(configs: Sequence[SourceConfig], key: str, given: Any) -> tuple[OpenSource, ...]:
    if given is not None:
        return (_handed_over(configs, key, given),)
    opened: list[OpenSource] = []
    for number, config in enumerate(configs):
        place = f"{key}.{number}"
        rows = open_stream(config, place) if config.streaming else open_rows(config, place)
        check_readable(rows, place)
        taken = {source.name for source in opened}
        name = next(n for n in (rows.name, *(f"{rows.name}-{i}" for i in range(2, 99))) if n not in taken)
        opened.append(OpenSource(config, name, rows, recognise(rows.schema, config, place)))
    return tuple(opened)


def _handed_over(configs: Sequence[SourceConfig], key: str, given: Any) -> OpenSource:
    """Rows passed in from Python; the recipe's one source, where there is one, says which columns to read."""
    config = configs[0] if configs else SourceConfig(path=key.removeprefix("data."))
    unread = [name for name in ("slice", "weight", "streaming") if getattr(config, name)]
    if len(configs) > 1 or unread:
        fault = f"{key}.0.{unread[0]} is set" if unread else f"{key} names {len(configs)} sources"
        raise RecipeError(
            f"{fault}, but its rows are passed in as `dataset`; pass in what is to be used, or name files"
        )
    rows = MemoryRows(given, config.name or key.removeprefix("data."))
    check_readable(rows, key)
    return OpenSource(config, rows.name, rows, recognise(rows.schema, config, key))


def check_readable(rows: Rows | Stream, key: str) -> None:
    """Raises UserError with the first row's fault where no row of a source can be read."""
    if rows.schema.shapes or not isinstance(rows, Rows):
        return
    if not len(rows):
        raise UserError(f"{key}: it holds no rows")
    try:
        rows[0]
    except RowError as error:
        raise UserError(f"{key}: none of its rows can be read; the first: {rows.where(0)}: {error}") from None


def _split(
    train: Sequence[OpenSource], fraction: float, seed: int
) -> tuple[tuple[OpenSource, ...], tuple[OpenSource, ...]]:
    kept, held = [], []
    for source in train:
        assert source.num_rows is not None, "the recipe refuses a fraction of a stream"
        rows_kept, rows_held = hold_out(source.num_rows, fraction, seed)
        kept.append(replace(source, selected=rows_kept))
        held.append(replace(source, selected=rows_held))
    return tuple(kept), tuple(held)
