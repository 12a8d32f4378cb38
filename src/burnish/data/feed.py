"""Prepared rows of a corpus: a pool of processes, stores on disk, and what training and evaluation read from them."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from burnish.data.corpus import Corpus
from burnish.data.order import Order
from burnish.data.prepare import DROPPED, Item, PreparedRow, PreparePool, Preparer, Rejected, counted, counts_text
from burnish.data.rows import Rows
from burnish.data.source import CHUNK, BatchSize, FirstOfKind, RowsError, RowSource, SampleLengths
from burnish.data.store import StoredPreparation, TokenStore
from burnish.types import Sample, UserError

LOG = logging.getLogger(__name__)

SHOWN = 20
"""Bad rows listed in one message."""


@dataclass
class Preparation:
    """What preparing all rows of a source found; `num_trained` are tokens of the kept samples."""

    lengths: SampleLengths
    num_trained: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """As `counted` names them."""
    first_of_kind: dict[str, str] = field(default_factory=dict)
    """By kind: see `FirstOfKind`."""


class Feed:
    """Rows of `corpus` through `preparer`. Sources for which `stored` is true keep their samples below `folder`.

    A context: it holds worker processes and files.
    """

    def __init__(
        self,
        corpus: Corpus,
        preparer: Preparer,
        workers: int,
        stop_on: frozenset[str],
        folder: Path | None = None,
        store_train: bool = False,
    ) -> None:
        self.corpus = corpus
        self.stop_on = stop_on
        self._exit = ExitStack()
        pool = self._exit.enter_context(PreparePool(preparer, workers))
        stores: list[TokenStore | None] = []
        opened: dict[str, TokenStore] = {}  # by key: a split source is held once, for both of its parts
        for index, source in enumerate(corpus.sources):
            stored = isinstance(source.rows, Rows) and (store_train or index >= len(corpus.train))
            if folder is None or not stored:
                stores.append(None)
                continue
            assert isinstance(source.rows, Rows)
            key = preparer.fingerprint(index)[:32]
            if key not in opened:
                opened[key] = _open_store(folder / key, len(source.rows))
                self._exit.callback(opened[key].close)
            stores.append(opened[key])
        self.keys = frozenset(opened)
        self._empty: frozenset[int] = frozenset()
        """Held-out sources of which no row is left."""
        self._prepare = StoredPreparation(pool.map, stores).map
        self._first_of_kind: dict[str, dict[str, str]] = {}
        """By training source, where all rows were prepared first."""

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def training(self, order: Order, size: BatchSize) -> RowSource:
        """The training rows as a source of batches."""
        streams = {i: s.rows for i, s in enumerate(self.corpus.train) if not isinstance(s.rows, Rows)}
        selected = {i: s.selected for i, s in enumerate(self.corpus.train) if s.selected is not None}
        first = FirstOfKind(self._first_of_kind)
        return RowSource(order, self._prepare, size, self._where, selected, streams, self.stop_on, first=first)

    def prepare_training(self) -> list[Preparation]:
        """Prepare every training row. Raises RowsError that lists the rows which stop the run."""
        found = self._prepare_all(range(len(self.corpus.train)))
        self._first_of_kind = {s.name: p.first_of_kind for s, p in zip(self.corpus.train, found, strict=True)}
        if not any(source.counts["kept"] for source in found):
            raise UserError(
                f"no training row is left: {self._dropped(found)}; look at data.bad_rows and data.over_long"
            )
        return found

    def _dropped(self, found: Sequence[Preparation]) -> str:
        total = sum((preparation.counts for preparation in found), Counter[str]())
        return ", ".join(f"{total[kind]} {kind.replace('_', '-')}" for kind in DROPPED if total[kind])

    def prepare_held_out(self) -> list[Preparation]:
        """Prepare every held-out row. Raises as `prepare_training`, and UserError where no row at all is left."""
        first = len(self.corpus.train)
        found = self._prepare_all(range(first, len(self.corpus.sources)))
        self._empty = frozenset(first + i for i, source in enumerate(found) if not source.counts["kept"])
        if found and len(self._empty) == len(found):
            raise UserError(
                f"no held-out row is left: {self._dropped(found)}; look at data.bad_rows and data.over_long"
            )
        for index in sorted(self._empty):
            LOG.warning("no held-out row of %s is left, so it is not evaluated", self.corpus.sources[index].name)
        return found

    def held_out(self) -> dict[str, Iterable[Sample]]:
        """The samples of each held-out source, read anew at each pass. `prepare_held_out` comes before."""
        first = len(self.corpus.train)
        indices = (first + i for i in range(len(self.corpus.validation)))
        return {self.corpus.sources[i].name: _Kept(self, i) for i in indices if i not in self._empty}

    def _prepare_all(self, indices: Sequence[int]) -> list[Preparation]:
        found = [self._prepare_one(index) for index in indices]
        stopping = [rejected for _, of_source in found for rejected in of_source]
        if stopping:
            num_rows = len({(rejected.source, rejected.index) for rejected in stopping})
            more = f"\n  and {len(stopping) - SHOWN} more" if len(stopping) > SHOWN else ""
            listed = "".join(f"\n  {rejected.message}" for rejected in stopping[:SHOWN])
            raise RowsError(
                f"{num_rows} row{'s' if num_rows > 1 else ''} cannot be used:{listed}{more}\n"
                "mend them, or set data.bad_rows=drop (data.over_long for length) to go on without"
            )
        return [preparation for preparation, _ in found]

    def _prepare_one(self, index: int) -> tuple[Preparation, list[Rejected]]:
        """Prepare the rows of a source; returns with it what stops the run."""
        stopping: list[Rejected] = []
        tokens, starts = array("i"), array("q", [0])
        num_trained, counts, first = 0, Counter[str](), FirstOfKind()
        for row in self.rows(index):
            for offset, prepared in enumerate(row):
                kinds = counted(prepared, offset)
                counts.update(kinds)
                first.see(prepared, kinds, partial(self._where, index, prepared.index))
                if isinstance(prepared, Sample):
                    tokens.append(len(prepared.tokens))
                    num_trained += prepared.num_trained
                elif prepared.kind in self.stop_on:
                    stopping.append(prepared)
            starts.append(len(tokens))
        if counts.keys() - {"kept"}:
            LOG.info("%s: %s", self.corpus.sources[index].name, counts_text(counts))
        lengths = SampleLengths(np.array(tokens, np.int32), np.array(starts, np.int64))
        return Preparation(lengths, num_trained, counts, first.found.get(self.corpus.sources[index].name, {})), stopping

    def _where(self, index: int, row: int) -> str:
        rows = self.corpus.sources[index].rows
        assert isinstance(rows, Rows), f"{self.corpus.sources[index].name} is a stream, whose rows say where they stand"
        return rows.where(row)

    def rows(self, index: int) -> Iterator[PreparedRow]:
        """What becomes of each row of a source, in file order."""
        numbers = self.corpus.sources[index].row_numbers()
        chunks: Iterator[Sequence[Item]] = (
            [(index, int(row)) for row in numbers[start : start + CHUNK]] for start in range(0, len(numbers), CHUNK)
        )
        for prepared in self._prepare(chunks):
            yield from prepared


def _open_store(folder: Path, num_rows: int) -> TokenStore:
    try:
        return TokenStore(folder, num_rows)
    except OSError as error:
        raise UserError(f"data.cache: {folder} cannot be written: {error.strerror}; name another folder") from None


@dataclass(frozen=True)
class _Kept:
    """The samples of one source; every iteration is a new pass."""

    feed: Feed
    index: int

    def __iter__(self) -> Iterator[Sample]:
        return (one for row in self.feed.rows(self.index) for one in row if isinstance(one, Sample))
