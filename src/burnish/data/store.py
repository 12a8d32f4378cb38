"""Prepared rows kept on disk between runs: an append-only file of records and an index of where each row's stands.

A record holds all that became of a row. A killed writer loses at most the record it was at: a row counts once the index
names it, and a record whose checksum is wrong counts as absent. One run writes; others that use the folder meanwhile
read.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.data.prepare import Item, Prepared, PreparedRow, Rejected, StreamedRow, besides_arrays
from burnish.types import Sample, Status

_HEADER = struct.Struct("<qIII")
"""Row number, bytes of facts (JSON), tokens, CRC-32 of what follows: facts, tokens (int32), loss weights (float32).

The tokens of a row's samples stand one behind the other, and so do their weights; facts say how many each has."""


class TokenStore:
    """The prepared rows of one source, in a folder whose name is the key (`Preparer.fingerprint`)."""

    def __init__(self, folder: str | Path, num_rows: int) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        self.is_writer = _locked(self._lock)
        self._data = os.open(folder / "rows.bin", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        index = os.open(folder / "index.bin", os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(index, max(num_rows, 1) * 8)
        os.close(index)
        self._index = np.memmap(folder / "index.bin", np.int64, "r+" if self.is_writer else "r")
        """1 + the place of the row's record in rows.bin, or 0."""
        self._map: mmap.mmap | None = None
        self._end = os.fstat(self._data).st_size

    def get(self, row: int) -> PreparedRow | None:
        """The stored row, or None where there is none."""
        place = int(self._index[row]) - 1
        if place < 0:
            return None
        number, size, num_tokens, checksum = _HEADER.unpack(self._read(place, _HEADER.size) or bytes(_HEADER.size))
        body = self._read(place + _HEADER.size, size + 8 * num_tokens)
        if number != row or body is None or zlib.crc32(body) != checksum:
            return None
        prepared: list[Prepared] = []
        start = size
        for facts in json.loads(body[:size]):
            if "kind" in facts:
                prepared.append(Rejected(**facts))
                continue
            length = facts.pop("num_tokens")
            tokens = np.frombuffer(body, np.int32, length, start).copy()
            loss_weights = np.frombuffer(body, np.float32, length, start + 4 * num_tokens).copy()
            facts |= {"status": Status(facts["status"]), "notices": tuple(facts["notices"])}
            prepared.append(Sample(tokens, loss_weights, **facts))
            start += 4 * length
        return prepared

    def put(self, row: int, prepared: PreparedRow) -> None:
        """Store a row. Does nothing where another run is the writer, or where a row's facts are not plain JSON."""
        text = _json([_facts(one) for one in prepared])
        if not self.is_writer or text is None:
            return
        samples = [one for one in prepared if isinstance(one, Sample)]
        tokens, loss_weights = [s.tokens.tobytes() for s in samples], [s.loss_weights.tobytes() for s in samples]
        body = b"".join([text, *tokens, *loss_weights])
        num_tokens = sum(len(sample.tokens) for sample in samples)
        record = _HEADER.pack(row, len(text), num_tokens, zlib.crc32(body)) + body
        written = os.write(self._data, record)
        if written == len(record):
            self._index[row] = self._end + 1
        self._end += written

    def close(self) -> None:
        self._index = np.empty(0, np.int64)
        self._map = None
        os.close(self._data)
        os.close(self._lock)

    def _read(self, start: int, size: int) -> bytes | None:
        if self._map is None or start + size > len(self._map):
            length = os.fstat(self._data).st_size
            if start + size > length:
                return None
            self._map = mmap.mmap(self._data, length, prot=mmap.PROT_READ)
        return self._map[start : start + size]


class StoredPreparation:
    """`prepare` (as `PreparePool.map`) for rows that no store holds yet; `stores` are by source, None for a stream."""

    def __init__(
        self,
        prepare: Callable[[Iterable[Sequence[Item]]], Iterator[list[PreparedRow]]],
        stores: Sequence[TokenStore | None],
    ) -> None:
        self._prepare = prepare
        self._stores = stores

    def map(self, chunks: Iterable[Sequence[Item]]) -> Iterator[list[PreparedRow]]:
        """What becomes of the rows of each chunk, in order."""
        under_way: deque[tuple[Sequence[Item], list[PreparedRow | None]]] = deque()

        def missing() -> Iterator[list[Item]]:
            for chunk in chunks:
                found = [self._get(item) for item in chunk]
                under_way.append((chunk, found))
                yield [item for item, stored in zip(chunk, found, strict=True) if stored is None]

        for fresh in self._prepare(missing()):
            chunk, found = under_way.popleft()
            new = iter(fresh)
            yield [
                self._put(item, next(new)) if stored is None else stored
                for item, stored in zip(chunk, found, strict=True)
            ]

    def _get(self, item: Item) -> PreparedRow | None:
        store = None if isinstance(item, StreamedRow) else self._stores[item[0]]
        return None if store is None or isinstance(item, StreamedRow) else store.get(item[1])

    def _put(self, item: Item, prepared: PreparedRow) -> PreparedRow:
        store = None if isinstance(item, StreamedRow) else self._stores[item[0]]
        if store is not None and not isinstance(item, StreamedRow):
            store.put(item[1], prepared)
        return prepared


def _locked(file_descriptor: int) -> bool:
    try:
        fcntl.flock(file_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _facts(prepared: Prepared) -> dict[str, Any]:
    if isinstance(prepared, Rejected):
        return {name: getattr(prepared, name) for name in ("kind", "source", "index", "message")}
    facts = besides_arrays(prepared)
    return facts | {"notices": list(prepared.notices), "num_tokens": len(prepared.tokens)}


def _json(facts: list[dict[str, Any]]) -> bytes | None:
    """`facts` as JSON, or None where they would not come back the same (dates, tuples, NaN)."""
    try:
        text = json.dumps(facts)
    except (TypeError, ValueError):
        return None
    return text.encode() if json.loads(text) == facts else None
