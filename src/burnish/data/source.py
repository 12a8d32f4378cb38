"""Sources of samples: rows in their order, prepared ahead, cut into the batches of optimizer steps.

A row gives one sample or several, and a batch may end within it. The cursor stands behind the last sample handed out;
rows prepared beyond it are prepared again on resume.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from burnish.data.order import Order
from burnish.data.prepare import Item, Prepared, PreparedRow, Rejected, StreamedRow, counted
from burnish.data.streams import Stream
from burnish.types import Sample, Source, Trainer, UserError

LOG = logging.getLogger(__name__)

CHUNK = 64
"""Rows sent to a tokenising process at a time."""
ORDINARY = ("kept", "further")
"""What is counted of every source; the first of any other kind is worth a line."""


class RowsError(UserError):
    """A row stops the run: bad or over-long where the recipe says `error`. What was trained before is worth saving."""


Where = Callable[[int, int], str]
"""Where a row (index of its source, number) stands, for messages."""
PrepareRows = Callable[[Iterable[Sequence[Item]]], Iterator[list[PreparedRow]]]
"""Maps chunks of rows to what became of each, in order."""


@dataclass(frozen=True)
class BatchSize:
    """How many samples, or at most how many tokens, make an optimizer step."""

    unit: Literal["samples", "tokens"]
    count: int

    def ends_before(self, num_samples: int, num_tokens: int, next_tokens: int) -> bool:
        """Whether a batch of this much is complete without the next sample."""
        if self.unit == "samples":
            return num_samples >= self.count
        return num_samples > 0 and num_tokens + next_tokens > self.count


class Cursor(NamedTuple):
    """What comes next: of `epoch`, of the row at `position`, what is behind its first `offset` samples."""

    epoch: int = 0
    position: int = 0
    offset: int = 0


class FirstOfKind:
    """By source, of each kind that `counted` names and that is not ordinary: the place of its first, and why there.

    Each is logged once, when it is found.
    """

    def __init__(self, found: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self.found = {source: dict(kinds) for source, kinds in (found or {}).items()}

    def see(self, prepared: Prepared, kinds: Iterable[str], where: Callable[[], str]) -> None:
        """Take note of what is counted as `kinds`, of a row that stands at `where()`."""
        for kind in kinds:
            if kind not in ORDINARY and kind not in self.found.get(prepared.source, {}):
                self.add(prepared.source, kind, _reason(prepared, where()))

    def add(self, source: str, kind: str, reason: str) -> None:
        """Take note of `reason`, unless one is known for the kind."""
        kinds = self.found.setdefault(source, {})
        if kind not in kinds:
            kinds[kind] = reason
            LOG.info("%s: first %s: %s", source, kind.replace("_", "-"), reason)


def _reason(prepared: Prepared, where: str) -> str:
    if isinstance(prepared, Rejected):
        return prepared.message
    return where if prepared.turn is None else f"{where}, messages[{prepared.turn}]"


class _Next(NamedTuple):
    """A sample, or why there is none, the cursors before and behind it, and the row it is of."""

    before: Cursor
    behind: Cursor
    prepared: Prepared
    item: Item


@dataclass
class RowSource:
    """Rows of files as an endless stream of batches; where epochs have an end, so has their last batch.

    `selected` has the row numbers that count of a source (by index) of which not all do; `streams` the streamed ones,
    which are read an epoch's share at a time and shuffled within it.
    """

    order: Order
    prepare: PrepareRows
    size: BatchSize
    where: Where
    selected: Mapping[int, np.ndarray] = field(default_factory=dict)
    streams: Mapping[int, Stream] = field(default_factory=dict)
    stop_on: frozenset[str] = frozenset({"bad", "over_long"})
    """Kinds of what is rejected that stop the run; others are dropped and counted."""
    cursor: Cursor = field(default_factory=Cursor)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """By source, of all up to the cursor: see `counted`."""
    first: FirstOfKind = field(default_factory=FirstOfKind)
    """Up to the cursor, or of all rows where they were prepared first."""
    _feed: Iterator[_Next] | None = None
    _held: _Next | None = None
    _stream_starts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By epoch from the current one on: where each stream stood before it."""

    def next(self) -> list[Sample]:
        """The next step's samples. Raises RowsError at a row that stops the run, UserError where no row is kept."""
        samples: list[Sample] = []
        seen: list[_Next] = []  # counted once the batch is complete
        cursor = self.cursor
        num_tokens = 0
        while True:
            following = self._peek()
            prepared = following.prepared
            if samples and self.order.has_epochs and following.before.epoch != cursor.epoch:
                break
            if isinstance(prepared, Rejected):
                if prepared.kind in self.stop_on:
                    remedy = "; mend it, or set data.bad_rows=drop" if prepared.kind == "bad" else ""
                    raise RowsError(prepared.message + remedy)
                if not samples and self._rows_until(following.behind) > self.order.epoch_length:
                    raise UserError(
                        f"none of {self.order.epoch_length} rows in a row was kept; last: {prepared.message}"
                    )
            else:
                if self.size.ends_before(len(samples), num_tokens, len(prepared.tokens)):
                    break
                samples.append(prepared)
                num_tokens += len(prepared.tokens)
            seen.append(following)
            cursor, self._held = following.behind, None
            if self.size.unit == "samples" and len(samples) == self.size.count:
                # What is dropped behind the last kept one counts too, at the end of the data as anywhere.
                while (dropped := self._dropped_next(cursor.epoch)) is not None:
                    seen.append(dropped)
                    cursor = dropped.behind
                break
        self.cursor = cursor
        self._stream_starts = {e: start for e, start in self._stream_starts.items() if e >= cursor.epoch}
        for following in seen:
            self._count(following)
        return samples

    def _count(self, following: _Next) -> None:
        prepared = following.prepared
        kinds = counted(prepared, following.before.offset)
        self.counts.setdefault(prepared.source, Counter()).update(kinds)
        item = following.item
        self.first.see(prepared, kinds, lambda: item.where if isinstance(item, StreamedRow) else self.where(*item))

    def _dropped_next(self, epoch: int) -> _Next | None:
        """What comes next in this epoch, where it is dropped; None where it is not."""
        following = self._peek()
        prepared = following.prepared
        if following.before.epoch != epoch or not isinstance(prepared, Rejected) or prepared.kind in self.stop_on:
            return None
        self._held = None
        return following

    def _rows_until(self, place: Cursor) -> int:
        """Whole rows from the row that the cursor stands at to `place`."""
        return (place.epoch - self.cursor.epoch) * self.order.epoch_length + place.position - self.cursor.position

    def update(self, trainer: Trainer) -> None:
        """Nothing: rows do not depend on the weights."""

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.cursor._asdict(),
            "counts": {name: dict(counter) for name, counter in self.counts.items()},
            "first_of_kind": {name: dict(kinds) for name, kinds in self.first.found.items()},
            "streams": self._stream_starts.get(self.cursor.epoch, {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = Cursor(state["epoch"], state["position"], state.get("offset", 0))
        self.counts = {name: Counter(counter) for name, counter in state["counts"].items()}
        for name, kinds in state.get("first_of_kind", {}).items():
            for kind, reason in kinds.items():
                self.first.add(name, kind, reason)
        for index, stream in self.streams.items():
            if str(index) in state["streams"]:
                stream.load_state_dict(state["streams"][str(index)])
        self._feed = self._held = None

    def _peek(self) -> _Next:
        if self._held is None:
            if self._feed is None:
                self._feed = self._from(self.cursor)
            self._held = next(self._feed)
        return self._held

    def _from(self, cursor: Cursor) -> Iterator[_Next]:
        rows = self._rows_from(cursor.epoch, cursor.position)
        skipped = cursor.offset
        for epoch, position, item, row in rows:
            for offset in range(skipped, len(row)):
                is_last = offset + 1 == len(row)
                behind = Cursor(epoch, position + 1) if is_last else Cursor(epoch, position, offset + 1)
                yield _Next(Cursor(epoch, position, offset), behind, row[offset], item)
            skipped = 0

    def _rows_from(self, epoch: int, position: int) -> Iterator[tuple[int, int, Item, PreparedRow]]:
        """(epoch, position, the row there, what becomes of it), without end."""
        places: queue.SimpleQueue[tuple[int, int, list[Item]]] = queue.SimpleQueue()

        def chunks() -> Iterator[list[Item]]:
            e, p = epoch, position
            while True:
                blocks = self._read_blocks(e)
                while p < self.order.epoch_length:
                    positions = np.arange(p, min(p + CHUNK, self.order.epoch_length))
                    pairs = zip(*(a.tolist() for a in self.order.at(e, positions)), strict=True)
                    items = [self._item(source, row, blocks) for source, row in pairs]
                    places.put((e, p, items))
                    yield items
                    p += len(positions)
                e, p = e + 1, 0

        for chunk in self.prepare(chunks()):
            e, start, items = places.get()
            for i, (item, row) in enumerate(zip(items, chunk, strict=True)):
                yield e, start + i, item, row

    def _read_blocks(self, epoch: int) -> dict[int, list[StreamedRow]]:
        """The rows of an epoch of each stream, whose places before it are kept for the cursor."""
        self._stream_starts[epoch] = {str(index): stream.state_dict() for index, stream in self.streams.items()}
        blocks = {}
        for index, stream in self.streams.items():
            size = self.order.slots[index]
            found = enumerate(stream.read(size), start=epoch * size)
            blocks[index] = [StreamedRow(index, number, where, row) for number, (where, row) in found]
        return blocks

    def _item(self, source: int, row: int, blocks: Mapping[int, list[StreamedRow]]) -> Item:
        if source in blocks:
            return blocks[source][row % len(blocks[source])]
        return source, int(self.selected[source][row]) if source in self.selected else row


@dataclass(frozen=True)
class SampleLengths:
    """The tokens of every kept sample, in row order: those of row i are tokens[starts[i]:starts[i + 1]]."""

    tokens: np.ndarray
    """int32 [samples]"""
    starts: np.ndarray
    """int64 [rows + 1]"""

    def any(self) -> bool:
        """Whether a sample is kept."""
        return len(self.tokens) > 0

    def max(self) -> int:
        """Tokens of the longest sample."""
        return int(self.tokens.max())

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The tokens of the samples of `rows`, one row's behind the other's: int32."""
        starts = self.starts[rows]
        counts = self.starts[rows + 1] - starts
        shifts = starts - (np.cumsum(counts) - counts)
        return self.tokens[np.repeat(shifts, counts) + np.arange(counts.sum())]

    @classmethod
    def joined(cls, parts: Sequence[SampleLengths]) -> SampleLengths:
        """Of the rows of all `parts`, one part's behind the other's."""
        before = np.cumsum([0, *(len(part.tokens) for part in parts)])
        starts = [part.starts[:-1] + shift for part, shift in zip(parts, before[:-1], strict=True)]
        return cls(np.concatenate([part.tokens for part in parts]), np.concatenate([*starts, before[-1:]]))


def count_steps(order: Order, lengths: Sequence[SampleLengths], size: BatchSize, epoch: int) -> int:
    """Steps that `RowSource` makes of one epoch, from the lengths of every source's samples."""
    every = SampleLengths.joined(lengths)
    first_rows = np.cumsum([0, *(len(part.starts) - 1 for part in lengths)])
    num_steps = num_samples = num_tokens = 0
    for start in range(0, order.epoch_length, 1 << 16):
        sources, rows = order.at(epoch, np.arange(start, min(start + (1 << 16), order.epoch_length)))
        kept = every.of(first_rows[sources] + rows)
        if size.unit == "samples":
            num_samples += len(kept)
            continue
        for length in kept.tolist():
            if size.ends_before(num_samples, num_tokens, length):
                num_steps, num_samples, num_tokens = num_steps + 1, 0, 0
            num_samples, num_tokens = num_samples + 1, num_tokens + length
    if size.unit == "samples":
        return -(-num_samples // size.count)
    return num_steps + (num_samples > 0)


Made = TypeVar("Made")


@dataclass(frozen=True)
class _Ready(Generic[Made]):
    """What was made of a batch, and the cursor after it; or what was raised in its place."""

    made: Made | None
    state: dict[str, Any]
    error: BaseException | None = None

    def get(self) -> Made:
        if self.error is not None:
            raise self.error
        assert self.made is not None
        return self.made


class Prefetch(Generic[Made]):
    """A source whose next batches are drawn, and made into what the loop takes, by a thread while the current one
    trains.

    The thread produces (what `make` returns of a batch, cursor after it) up to `lag` ahead and waits while that many
    lie ready; `next` consumes them and waits for the thread; closing unblocks it. What the source or `make` raises is
    raised by the `next` it belongs to, and the cursor stays before that batch.
    """

    def __init__(self, source: Source, make: Callable[[list[Sample]], Made], lag: int = 2) -> None:
        self._source = source
        self._make = make
        self._state = source.state_dict()
        self._ready: queue.Queue[_Ready[Made]] = queue.Queue(lag)
        self._peeked: _Ready[Made] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def next(self) -> Made:
        ready = self._first()
        self._peeked = None
        made = ready.get()
        self._state = ready.state
        return made

    def peek(self) -> Made:
        """What the next `next` returns, or raises, without handing it out."""
        return self._first().get()

    def update(self, trainer: Trainer) -> None:
        self._source.update(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the last batch that was handed out, never the prefetched one."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self._thread is None, "a source is moved before its first batch, not while the thread reads from it"
        self._source.load_state_dict(state)
        self._state = state

    def close(self) -> None:
        """Stop the thread; the source stays where the thread left it."""
        self._closed.set()
        if self._thread is not None:
            while self._thread.is_alive():
                while not self._ready.empty():
                    self._ready.get_nowait()
                self._thread.join(timeout=0.05)

    def _first(self) -> _Ready[Made]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, name="prefetch", daemon=True)
            self._thread.start()
        self._peeked = self._peeked or self._ready.get()
        return self._peeked

    def _produce(self) -> None:
        while not self._closed.is_set():
            try:
                samples, state = self._source.next(), self._source.state_dict()
                ready = _Ready(self._make(samples), state)
            except BaseException as error:
                ready = _Ready[Made](None, {}, error)
            self._ready.put(ready)
            if ready.error is not None:
                return
