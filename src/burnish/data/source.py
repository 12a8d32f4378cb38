"""Sources of samples: rows in their order, prepared ahead, cut into the batches of optimizer steps.

The cursor is (epoch, position) after the last batch handed out; rows prepared beyond it are prepared again on resume.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from burnish.data.order import Order
from burnish.data.prepare import Item, Prepared, Rejected, StreamedRow
from burnish.data.streams import Stream
from burnish.types import Sample, Source, Status, Trainer, UserError

CHUNK = 64
"""Rows sent to a tokenising process at a time."""


class RowsError(UserError):
    """A row stops the run: bad or over-long where the recipe says `error`. What was trained before is worth saving."""


PrepareRows = Callable[[Iterable[Sequence[Item]]], Iterator[list[Prepared]]]
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


@dataclass
class RowSource:
    """Rows of files as an endless stream of batches; where epochs have an end, so has their last batch.

    `selected` has the row numbers that count of a source (by index) of which not all do; `streams` the streamed ones,
    which are read an epoch's share at a time and shuffled within it.
    """

    order: Order
    prepare: PrepareRows
    size: BatchSize
    selected: Mapping[int, np.ndarray] = field(default_factory=dict)
    streams: Mapping[int, Stream] = field(default_factory=dict)
    stop_on: frozenset[str] = frozenset({"bad", "over_long"})
    """Kinds of rejected rows that stop the run; others are dropped and counted."""
    epoch: int = 0
    position: int = 0
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """By source: rows that were `kept`, `cut` (also kept), `bad` and `over_long` so far."""
    _feed: Iterator[tuple[int, int, Prepared]] | None = None
    _held: tuple[int, int, Prepared] | None = None
    _stream_starts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By epoch from the current one on: where each stream stood before it."""

    def next(self) -> list[Sample]:
        """The next step's samples. Raises RowsError at a row that stops the run, UserError where no row is kept."""
        samples: list[Sample] = []
        seen: list[tuple[str, str]] = []  # (source, what became of the row), counted once the batch is complete
        epoch, position = self.epoch, self.position
        num_tokens = 0
        while True:
            row_epoch, row_position, prepared = self._peek()
            if samples and self.order.has_epochs and row_epoch != epoch:
                break
            if isinstance(prepared, Rejected):
                if prepared.kind in self.stop_on:
                    remedy = "; mend it, or set data.bad_rows=drop" if prepared.kind == "bad" else ""
                    raise RowsError(prepared.message + remedy)
                seen.append((prepared.source, prepared.kind))
                if not samples and len(seen) > self.order.epoch_length:
                    raise UserError(
                        f"none of {self.order.epoch_length} rows in a row was kept; last: {prepared.message}"
                    )
            else:
                if self.size.ends_before(len(samples), num_tokens, len(prepared.tokens)):
                    break
                samples.append(prepared)
                num_tokens += len(prepared.tokens)
                seen.append((prepared.source, "kept"))
                if prepared.status is Status.TRUNCATED:
                    seen.append((prepared.source, "cut"))
            epoch, position, self._held = row_epoch, row_position + 1, None
            if self.size.unit == "samples" and len(samples) == self.size.count:
                # Dropped rows behind the last kept one count too, at the end of the data as anywhere.
                while (dropped := self._dropped_next(epoch)) is not None:
                    position, rejected = dropped
                    seen.append((rejected.source, rejected.kind))
                break
        self.epoch, self.position = epoch, position
        self._stream_starts = {e: start for e, start in self._stream_starts.items() if e >= epoch}
        for source, what in seen:
            self.counts.setdefault(source, Counter())[what] += 1
        return samples

    def _dropped_next(self, epoch: int) -> tuple[int, Rejected] | None:
        """The next row of this epoch and the place behind it, where it is one to drop; None where it is not."""
        row_epoch, row_position, prepared = self._peek()
        if row_epoch != epoch or not isinstance(prepared, Rejected) or prepared.kind in self.stop_on:
            return None
        self._held = None
        return row_position + 1, prepared

    def update(self, trainer: Trainer) -> None:
        """Nothing: rows do not depend on the weights."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "counts": {name: dict(counter) for name, counter in self.counts.items()},
            "streams": self._stream_starts.get(self.epoch, {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.counts = {name: Counter(counter) for name, counter in state["counts"].items()}
        for index, stream in self.streams.items():
            if str(index) in state["streams"]:
                stream.load_state_dict(state["streams"][str(index)])
        self._feed = self._held = None

    def _peek(self) -> tuple[int, int, Prepared]:
        if self._held is None:
            if self._feed is None:
                self._feed = self._prepared_from(self.epoch, self.position)
            self._held = next(self._feed)
        return self._held

    def _prepared_from(self, epoch: int, position: int) -> Iterator[tuple[int, int, Prepared]]:
        places: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

        def chunks() -> Iterator[list[Item]]:
            e, p = epoch, position
            while True:
                blocks = self._read_blocks(e)
                while p < self.order.epoch_length:
                    positions = np.arange(p, min(p + CHUNK, self.order.epoch_length))
                    places.put((e, p))
                    pairs = zip(*(a.tolist() for a in self.order.at(e, positions)), strict=True)
                    yield [self._item(source, row, blocks) for source, row in pairs]
                    p += len(positions)
                e, p = e + 1, 0

        for rows in self.prepare(chunks()):
            e, start = places.get()
            for i, row in enumerate(rows):
                yield e, start + i, row

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


def count_steps(order: Order, lengths: Sequence[np.ndarray], size: BatchSize, epoch: int) -> int:
    """Steps that `RowSource` makes of one epoch, from the tokens of every row by source (0 where a row is dropped)."""
    num_steps = num_samples = num_tokens = 0
    for start in range(0, order.epoch_length, 1 << 16):
        sources, rows = order.at(epoch, np.arange(start, min(start + (1 << 16), order.epoch_length)))
        row_lengths = np.zeros(len(rows), np.int64)
        for s, lengths_of_source in enumerate(lengths):
            row_lengths[sources == s] = lengths_of_source[rows[sources == s]]
        kept = row_lengths[row_lengths > 0]
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


Ready = tuple[list[Sample], dict[str, Any], BaseException | None]
"""A batch and the cursor after it, or what was raised in its place."""


class Prefetch:
    """A source whose next batches are made ready by a thread while the current one trains.

    The thread produces (batch, cursor after it) up to `lag` ahead and waits while that many lie ready; `next` consumes
    them and waits for the thread; closing unblocks it. What the source raises is raised by the `next` it belongs to.
    """

    def __init__(self, source: Source, lag: int = 2) -> None:
        self._source = source
        self._state = source.state_dict()
        self._ready: queue.Queue[Ready] = queue.Queue(lag)
        self._peeked: Ready | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def next(self) -> list[Sample]:
        samples, state, error = self._first()
        self._peeked = None
        if error is not None:
            raise error
        self._state = state
        return samples

    def peek(self) -> list[Sample]:
        """What the next `next` returns, or raises, without handing it out."""
        samples, _, error = self._first()
        if error is not None:
            raise error
        return samples

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

    def _first(self) -> Ready:
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, name="prefetch", daemon=True)
            self._thread.start()
        self._peeked = self._peeked or self._ready.get()
        return self._peeked

    def _produce(self) -> None:
        while not self._closed.is_set():
            try:
                item: Ready = (self._source.next(), self._source.state_dict(), None)
            except BaseException as error:
                item = ([], {}, error)
            self._ready.put(item)
            if item[2] is not None:
                return
