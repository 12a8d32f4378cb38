"""Rows to samples, in this process or in several: read, normalise, tokenise, measure, cut.

A worker is a bare Python process that talks over one socket and imports neither torch nor the user's `__main__`. It
ends when its socket closes or its parent is gone, so none outlives a run however that ends.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from burnish.config import SourceConfig
from burnish.data.chat import Encoded, Row, TextTokenizer, TruncateSide, TurnRow, caught, truncate, turn_rows
from burnish.data.conversation import Format, row_facts, to_conversation
from burnish.data.turns import ASSISTANT_TURNS, Selection
from burnish.types import RowError, Sample, Status, UserError


class RandomRows(Protocol):
    """Raw rows by number; `rows[i]` raises RowError where row i cannot be read."""

    @property
    def fingerprint(self) -> str: ...

    def __getitem__(self, row: int, /) -> dict[str, Any]: ...

    def where(self, row: int, /) -> str: ...


@dataclass(frozen=True)
class SourceRows:
    """A source as a preparer needs it; `rows` is None for a stream, whose rows come as `StreamedRow`."""

    name: str
    rows: RandomRows | None
    format: Format
    config: SourceConfig


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """A row that was read elsewhere, or why it could not be."""

    source: int
    index: int
    where: str
    row: Mapping[str, Any] | RowError


Item = tuple[int, int] | StreamedRow
"""A row to prepare: (source, row number), or the row itself."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that gives no sample; `message` says where it stands and why."""

    kind: Literal["bad", "over_long"]
    source: str
    index: int
    message: str


Prepared = Sample | Rejected
PreparedRow = Sequence[Prepared]
"""What becomes of a row: its samples, and of each part that gives none the reason, in order."""

DROPPED = ("bad", "over_long")
"""Kinds of what is rejected."""


def counted(prepared: Prepared, offset: int) -> tuple[str, ...]:
    """What is counted by source of the sample at `offset` of its row.

    `kept`, `cut` (also kept) and the kinds of its notices, or why it was dropped; `further` where it is not its row's
    first: there are that many fewer rows than samples.
    """
    further = ("further",) if offset else ()
    if isinstance(prepared, Rejected):
        return (*further, prepared.kind)
    cut = ("cut",) if prepared.status is Status.TRUNCATED else ()
    return (*further, "kept", *cut, *prepared.notices)


def count_rows(counts: Mapping[str, int]) -> dict[str, int]:
    """`counts`, as `counted` names them, for people: what is further goes into numbers of `rows` and `samples`."""
    named = {kind: number for kind, number in counts.items() if kind != "further"}
    if "further" not in counts:
        return named
    samples = sum(counts.get(kind, 0) for kind in ("kept", *DROPPED))
    return {"rows": samples - counts["further"], "samples": samples, **named}


def counts_text(counts: Mapping[str, int]) -> str:
    """`counts`, as `counted` names them, in words."""
    return ", ".join(f"{number:,} {kind.replace('_', '-')}" for kind, number in count_rows(counts).items())


@dataclass(frozen=True)
class Preparer:
    """What makes samples of a row; picklable, and the same row always gives the same samples.

    `limits` maps what limits a row's length (data.max_length, the model's maximum, ...) to tokens; the least counts.
    """

    sources: tuple[SourceRows, ...]
    tokenizer: TextTokenizer
    limits: Mapping[str, int]
    vocab_size: int
    selection: Selection = ASSISTANT_TURNS
    turn_per_sample: bool = False
    over_long: Literal["error", "drop", "truncate"] = "error"
    truncate_side: TruncateSide = "right"

    def prepare(self, items: Sequence[Item]) -> list[PreparedRow]:
        """What becomes of each row, in order. Raises UserError where the fault is no single row's."""
        found = [self._read(item) for item in items]
        parts = [caught(self.parts, row) for row in found]
        fresh = [part for row in parts if not isinstance(row, RowError) for part in row]
        encoded = iter(self.tokenizer.encode_batch(fresh, self.selection))
        return [
            [self._finish(row, None, of_row)]
            if isinstance(of_row, RowError)
            else [self._finish(row, part, next(encoded)) for part in of_row]
            for row, of_row in zip(found, parts, strict=True)
        ]

    def fingerprint(self, source: int) -> str:
        """SHA-256 of all that the samples of a source depend on: rows, options, tokenizer, template and code."""
        origin = self.sources[source]
        assert origin.rows is not None, f"{origin.name} is a stream, which has no content to go by"
        facts = {
            "rows": origin.rows.fingerprint,
            "source": [origin.name, origin.format, origin.config.model_dump(mode="json")],
            "tokenizer": self.tokenizer.fingerprint,
            "selection": [repr(self.selection), self.turn_per_sample],
            "options": [self.over_long, self.truncate_side, self.vocab_size, dict(self.limits)],
            "code": code_version(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _read(self, item: Item) -> StreamedRow:
        if isinstance(item, StreamedRow):
            return item
        source, index = item
        rows = self.sources[source].rows
        assert rows is not None, f"{self.sources[source].name} is a stream and has no row {index}"
        return StreamedRow(source, index, rows.where(index), caught(rows.__getitem__, index))

    def parts(self, found: StreamedRow) -> list[Row]:
        """What of the row is tokenised, each part to a sample of its own."""
        if isinstance(found.row, RowError):
            raise found.row
        source = self.sources[found.source]
        row = to_conversation(found.row, source.format, source.config)
        return turn_rows(row, self.selection) if self.turn_per_sample else [row]

    def _finish(self, found: StreamedRow, part: Row | None, encoded: Encoded | RowError) -> Prepared:
        turn = part.number if isinstance(part, TurnRow) else None
        made = caught(self._sample, found, turn, encoded)
        if isinstance(made, Sample):
            return made
        kind = "over_long" if isinstance(made, _OverLong) else "bad"
        where = found.where if turn is None else f"{found.where}, messages[{turn}]"
        return Rejected(kind, self.sources[found.source].name, found.index, f"{where}: {made}")

    def _sample(self, found: StreamedRow, turn: int | None, encoded: Encoded | RowError) -> Sample:
        if isinstance(encoded, RowError):
            raise encoded
        assert not isinstance(found.row, RowError), f"{found.where} is tokenised, and cannot be read"
        source = self.sources[found.source]
        fitting = self.fit(encoded)
        label, metadata = row_facts(found.row, source.config)
        return Sample(
            fitting.tokens,
            fitting.loss_weights,
            source=source.name,
            index=found.index,
            status=Status.COMPLETE if fitting is encoded else Status.TRUNCATED,
            metadata=metadata,
            label=label,
            turn=turn,
            notices=tuple(dict.fromkeys(notice.kind for notice in encoded.notices)),
        )

    def fit(self, encoded: Encoded) -> Encoded:
        """A tokenised row, cut where it is too long and may be. Raises RowError where it cannot be trained on."""
        largest = int(encoded.tokens.max())
        if largest >= self.vocab_size:
            raise RowError(f"token id {largest} is outside the model's embedding of {self.vocab_size} rows")
        limit, most = min(self.limits.items(), key=lambda named: named[1])
        if self.over_long != "truncate" and len(encoded.tokens) > most:
            remedy = "; raise that, or set data.over_long to drop or truncate" if self.over_long == "error" else ""
            raise _OverLong(f"{len(encoded.tokens)} tokens, more than {limit}={most}{remedy}")
        return truncate(encoded, most, self.truncate_side)


class _OverLong(RowError):
    """A row that is longer than it may be."""


def code_version() -> str:
    """SHA-256 of the code that decides ids and weights, ours and what it stands on."""
    here = Path(__file__).parent
    digest = hashlib.sha256(f"{version('tokenizers')} {version('jinja2')}".encode())
    for file in sorted([*here.glob("*.py"), here.parent / "types.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# --- processes ---

CHUNKS_AHEAD = 2
"""Chunks in flight for each worker."""


class PreparePool:
    """A preparer in `workers` processes of its own, or in this one where `workers` is 0. Close it, or use `with`."""

    def __init__(self, preparer: Preparer, workers: int) -> None:
        self._preparer = preparer
        pickled = pickle.dumps(preparer) if workers else b""
        self._workers = [_Worker(pickled) for _ in range(workers)]
        self._stop = weakref.finalize(self, _stop, self._workers)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # A thread waits for each worker, so that a chunk is read off the socket as soon as it is done.
        self._threads = ThreadPoolExecutor(max(workers, 1), "prepare")

    def map(self, chunks: Iterable[Sequence[Item]]) -> Iterator[list[PreparedRow]]:
        """What becomes of the rows of each chunk, in order; at most `CHUNKS_AHEAD` chunks a worker are under way.

        Raises UserError where a worker died or met a fault that is no row's, RuntimeError with the worker's traceback
        where it failed otherwise.
        """
        if not self._workers:
            yield from map(self._preparer.prepare, chunks)
            return
        pending: deque[Future[list[PreparedRow]]] = deque()
        try:
            for chunk in chunks:
                pending.append(self._threads.submit(self._ask, chunk))
                if len(pending) >= CHUNKS_AHEAD * len(self._workers):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the workers; what they were at is lost."""
        self._stop()
        self._threads.shutdown(cancel_futures=True)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def __enter__(self) -> PreparePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, chunk: Sequence[Item]) -> list[PreparedRow]:
        worker = self._idle.get()
        try:
            return worker.ask(chunk)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process and the socket to it."""

    def __init__(self, pickled: bytes) -> None:
        self._unsent: bytes | None = pickled
        """The preparer, until the first chunk follows it: the process is still starting when this returns."""
        self.connection, theirs = Pipe()
        # -P and PYTHONPATH: the worker finds the modules that this process finds, and no others.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        code = f"from burnish.data.prepare import work; work({theirs.fileno()}, {os.getpid()})"
        # A process group of its own, so that Ctrl-C in a terminal reaches the main process alone.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=[theirs.fileno()],
            process_group=0,
        )
        theirs.close()

    def ask(self, chunk: Sequence[Item]) -> list[PreparedRow]:
        try:
            if self._unsent is not None:
                self.connection.send_bytes(self._unsent)
                self._unsent = None
            self.connection.send(list(chunk))
            reply = self.connection.recv()
        except (EOFError, OSError):
            status = self.process.wait()
            raise UserError(
                f"data worker {self.process.pid} ended with status {status}; if it was killed for want of memory, "
                "set data.workers to fewer"
            ) from None
        if isinstance(reply, _Fault):
            raise UserError(reply.text) if reply.is_users else RuntimeError(f"a data worker failed:\n{reply.text}")
        return reply.unpack()


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.wait()


@dataclass(frozen=True, slots=True)
class _Fault:
    text: str
    is_users: bool


@dataclass(frozen=True, slots=True)
class _Packed:
    """What became of a chunk's rows as it travels: all tokens in one array, all weights in another."""

    tokens: np.ndarray
    loss_weights: np.ndarray
    ends: np.ndarray
    rest: list[list[Rejected | dict[str, Any]]] = field(default_factory=list)
    """By row, in order: what was rejected, and what samples hold besides their arrays."""

    @classmethod
    def of(cls, rows: Sequence[PreparedRow]) -> _Packed:
        samples = [one for row in rows for one in row if isinstance(one, Sample)]
        return cls(
            np.concatenate([np.empty(0, np.int32), *(sample.tokens for sample in samples)], dtype=np.int32),
            np.concatenate([np.empty(0, np.float32), *(s.loss_weights for s in samples)], dtype=np.float32),
            np.cumsum([len(sample.tokens) for sample in samples], dtype=np.int64),
            [[besides_arrays(one) if isinstance(one, Sample) else one for one in row] for row in rows],
        )

    def unpack(self) -> list[PreparedRow]:
        arrays = iter(zip(np.split(self.tokens, self.ends), np.split(self.loss_weights, self.ends), strict=True))
        return [
            [one if isinstance(one, Rejected) else Sample(*next(arrays), **one) for one in row] for row in self.rest
        ]


def besides_arrays(sample: Sample) -> dict[str, Any]:
    """What a prepared sample holds besides its arrays, by field."""
    names = ("source", "index", "status", "metadata", "label", "turn", "notices")
    return {name: getattr(sample, name) for name in names}


def work(file_descriptor: int, parent: int) -> None:
    """The main function of a worker: a pickled preparer comes first, then chunks, each answered in turn."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    connection = Connection(file_descriptor)
    try:
        preparer: Preparer = pickle.loads(connection.recv_bytes())
        # A row leaves few cycles behind, and what a worker starts with none: looking for them often is for nothing.
        gc.freeze()
        gc.set_threshold(20_000)
        while True:
            connection.send(_answer(preparer.prepare, connection.recv()))
    except (EOFError, ConnectionError):
        return  # the parent closed the socket, or is gone


def _answer(prepare: Callable[[Sequence[Item]], list[PreparedRow]], chunk: Sequence[Item]) -> _Packed | _Fault:
    try:
        return _Packed.of(prepare(chunk))
    except UserError as error:
        return _Fault(str(error), True)
    except Exception:
        return _Fault(traceback.format_exc(), False)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, even amid a chunk."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
