"""Random access to the rows of .jsonl and .json files, without holding them.

Opening parses a file once, hashes it and keeps the offset of every few KiB; a row is found again by reading its block.
So the index of 10 GB of lines is some 30 MB, and a pickled file is a path and its index: workers open what they read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from burnish.data.schema import Schema, Signature, schema_of, signature
from burnish.types import RowError, UserError

BLOCK_BYTES = 8_192
ARRAY_BLOCK_BYTES = 4_096
"""Less than that of lines: to find one row, the elements of a block are parsed, and its lines only split."""
BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\n\r]*")
_FIRST_KEY = re.compile(rb'\s*\[\s*(\{\s*"[^"\\]*")')
_LARGEST_BLOCK_BYTES = 262_144
_HASHED_BYTES = 16_777_216


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What data.json says of a file; `hash` is blake2b of its bytes, hex."""

    path: str
    bytes: int
    rows: int
    hash: str


@dataclass(frozen=True, eq=False, slots=True)
class BlockIndex:
    """Blocks of whole rows: bytes [offsets[b], offsets[b+1]), beginning with row firsts[b]. Both int64 [B+1]."""

    offsets: np.ndarray
    firsts: np.ndarray

    @property
    def num_rows(self) -> int:
        return int(self.firsts[-1])

    def find(self, row: int) -> tuple[int, int]:
        """The block that holds a row, and the row's place in it."""
        block = int(self.firsts.searchsorted(row, "right")) - 1
        return block, row - int(self.firsts[block])

    def read(self, path: Path, size: int, block: int) -> bytes:
        """The bytes of a block. Raises UserError where the file no longer has the size it was indexed with."""
        start, stop = int(self.offsets[block]), int(self.offsets[block + 1])
        file = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(file, stop - start, start)
            if os.fstat(file).st_size != size or len(data) != stop - start:
                raise UserError(
                    f"{path} was changed while in use: it had {size} bytes; start again with a file that stays"
                )
            return data
        finally:
            os.close(file)


class _LastBlock:
    """What was read of the last block: a row's place is asked for beside the row, and files are read in order too.

    Stays behind when its file is pickled.
    """

    def __init__(self) -> None:
        self._held: tuple[int, Any] = (-1, None)

    def get(self, block: int, read: Callable[[int], Any]) -> Any:
        held = self._held  # one look: another thread may read too
        if held[0] != block:
            held = self._held = block, read(block)
        return held[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return _LastBlock, ()


@dataclass(frozen=True, eq=False, slots=True)
class JsonLines:
    """A .jsonl file. Blank lines are no rows; broken lines are rows that raise RowError."""

    path: Path
    index: BlockIndex
    lines: np.ndarray  # int64 [B+1]: lines before each block
    schema: Schema
    facts: FileFacts
    _last: _LastBlock = field(default_factory=_LastBlock, init=False, repr=False)

    def __len__(self) -> int:
        return self.facts.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return parse_row(self._line(row)[1])

    def where(self, row: int) -> str:
        return f"{self.path.name}:{self._line(row)[0]}"

    def _line(self, row: int) -> tuple[int, bytes]:
        """A row's line, counted from 1, and its text."""
        block, place = self.index.find(row)
        number, text = self._last.get(block, self._read)[place]
        return int(self.lines[block]) + number, text

    def _read(self, block: int) -> list[tuple[int, bytes]]:
        """The lines of a block that are not blank, with their numbers from 1."""
        text = self.index.read(self.path, self.facts.bytes, block)
        return [(number, line) for number, line in enumerate(text.split(b"\n"), 1) if line.strip()]


@dataclass(frozen=True, eq=False, slots=True)
class JsonArray:
    """A .json file that holds one array of rows."""

    path: Path
    index: BlockIndex
    schema: Schema
    facts: FileFacts
    _last: _LastBlock = field(default_factory=_LastBlock, init=False, repr=False)

    def __len__(self) -> int:
        return self.facts.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        block, place = self.index.find(row)
        text = self._last.get(block, self._read)
        return _checked_row(json.loads(f"[{text}]")[place], text)

    def _read(self, block: int) -> str:
        return self.index.read(self.path, self.facts.bytes, block).decode().rstrip().removesuffix(",")

    def where(self, row: int) -> str:
        return f"{self.path.name}[{row}]"


def open_lines(path: Path) -> JsonLines:
    """Index, hash and scan a .jsonl file in one pass. Raises UserError where it is a .json array under a wrong name."""
    signatures: Counter[Signature] = Counter()
    with path.open("rb") as file, ThreadPoolExecutor(1) as beside:
        digest = beside.submit(file_hash, path)  # hashing lets other threads run
        begin = skip_bom(file)
        if _is_array(file, path.stat().st_size):
            raise UserError(f"{path} holds a JSON array, not one JSON object per line; rename it to {path.stem}.json")
        file.seek(begin)
        offsets, firsts, lines = [begin], [0], [0]
        for block in _blocks(file):
            found = block.split(b"\n")
            rows = [text for text in found if text.strip()]
            signatures.update(signatures_of(rows))
            offsets.append(offsets[-1] + len(block))
            firsts.append(firsts[-1] + len(rows))
            lines.append(lines[-1] + len(found) - 1)
    index = BlockIndex(np.array(offsets), np.array(firsts))
    facts = FileFacts(str(path), offsets[-1], index.num_rows, digest.result())
    return JsonLines(path, index, np.array(lines), schema_of(signatures), facts)


def open_array(path: Path) -> JsonArray:
    """Index, hash and scan a .json file.

    Raises UserError with line and column where it is broken, and where it is no array.
    """
    data = path.read_bytes()
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(file_hash, path)
        index, schema = _index_by_seams(data) or _index_by_elements(path, data)
    return JsonArray(path, index, schema, FileFacts(str(path), len(data), index.num_rows, digest.result()))


def parse_row(text: bytes) -> dict[str, Any]:
    """One JSON object. Raises RowError with the parser's own words.

    The standard parser, because orjson reads integers beyond 64 bits as floats.
    """
    try:
        decoded = text.decode()
        return _checked_row(json.loads(decoded), decoded)
    except json.JSONDecodeError as error:
        raise RowError(f"broken JSON: {error.msg} at column {error.pos + 1}") from None
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: {error.reason} at byte {error.start + 1}; save the file as UTF-8") from None
    except RecursionError:
        raise RowError("broken JSON: nested too deeply") from None


def json_kind(value: Any) -> str:
    """What a JSON value is, for messages: `a list`, `text`, `null`."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def signatures_of(texts: Iterable[bytes]) -> Iterator[Signature]:
    """The signature of each JSON text that is a row."""
    for text in texts:
        try:
            row = orjson.loads(text)
        except orjson.JSONDecodeError:
            try:
                row = parse_row(text)
            except RowError:
                continue
        if isinstance(row, dict):
            yield signature(row)


def file_hash(path: Path) -> str:
    """blake2b of a file's bytes, hex. In pieces so large that a thread of its own seldom waits for another to yield."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_HASHED_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def skip_bom(file: BinaryIO) -> int:
    """Stand behind a byte order mark; its length."""
    length = len(BOM) if file.read(len(BOM)) == BOM else 0
    file.seek(length)
    return length


def _checked_row(value: Any, text: str) -> dict[str, Any]:
    """`value`, parsed from `text`, as a row. Raises RowError where it is no object, or holds half a character."""
    if not isinstance(value, dict):
        raise RowError(f"the row is {json_kind(value)}, not a JSON object")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise RowError(f"{half} is half of a character (a lone surrogate), which no tokenizer can read") from None
    return value


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK_BYTES):
        yield block if block.endswith(b"\n") else block + file.readline()


def _is_array(file: BinaryIO, size: int) -> bool:
    """Whether a file begins and ends as a JSON array does."""
    head = file.read(BLOCK_BYTES).lstrip()[:1]
    file.seek(max(0, size - BLOCK_BYTES))
    return head + file.read().rstrip()[-1:] == b"[]"


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start + 1}; save it as UTF-8") from None


def _index_by_seams(data: bytes) -> tuple[BlockIndex, Schema] | None:
    """Index and schema of an array whose elements begin with the same key; None where it is any other, or broken.

    A block ends where that beginning follows a comma. That this is between elements and not inside one is certain, as
    what lies before it parses as a list.
    """
    beginning = _FIRST_KEY.match(data, len(BOM) if data.startswith(BOM) else 0)
    if beginning is None:
        return None
    seam = re.compile(rb"\}[ \t\n\r]*,[ \t\n\r]*(?=" + re.escape(beginning[1]) + rb")")
    signatures: Counter[Signature] = Counter()
    offsets, firsts = [beginning.start(1)], [0]
    while offsets[-1] < len(data):
        begin = offsets[-1]
        found = seam.search(data, begin + ARRAY_BLOCK_BYTES)
        text = b"[" + data[begin : found.start() + 1] + b"]" if found else b"[" + data[begin:]
        try:
            rows = orjson.loads(text)
        except orjson.JSONDecodeError:
            return None
        if len(rows) > 1 and len(text) > _LARGEST_BLOCK_BYTES:
            return None
        signatures.update([signature(row) for row in rows if isinstance(row, dict)])
        offsets.append(found.end() if found else len(data))
        firsts.append(firsts[-1] + len(rows))
    offsets[-1] = data.rindex(b"]")
    return BlockIndex(np.array(offsets), np.array(firsts)), schema_of(signatures)


def _index_by_elements(path: Path, data: bytes) -> tuple[BlockIndex, Schema]:
    """Index and schema of any array, parsed element by element. Raises UserError where it is broken."""
    text = _decoded(path, data)
    signatures: Counter[Signature] = Counter()
    offsets, firsts, begin, num_rows = [0], [0], 0, 0
    for start, row in _elements(path, text):
        if num_rows == 0:
            begin = start
            offsets[0] = _num_bytes(text, 0, start) + len(data) - len(data.removeprefix(BOM))
        elif start - begin >= ARRAY_BLOCK_BYTES:
            offsets.append(offsets[-1] + _num_bytes(text, begin, start))
            firsts.append(num_rows)
            begin = start
        num_rows += 1
        if isinstance(row, dict):
            signatures[signature(row)] += 1
    offsets.append(offsets[-1] + _num_bytes(text, begin, text.rindex("]")))
    return BlockIndex(np.array(offsets), np.array([*firsts, num_rows])), schema_of(signatures)


def _num_bytes(text: str, start: int, stop: int) -> int:
    return len(text[start:stop].encode())


def _elements(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Where each element of the array begins, and the element."""
    decoder = json.JSONDecoder()
    place = _after_space(text, 0)
    if text[place : place + 1] != "[":
        raise _no_array(path, text)
    place = _after_space(text, place + 1)
    more = text[place : place + 1] != "]"
    try:
        while more:
            row, stop = decoder.raw_decode(text, place)
            yield place, row
            stop = _after_space(text, stop)
            more = text[stop : stop + 1] == ","
            if not more and text[stop : stop + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, stop)
            place = _after_space(text, stop + 1) if more else stop
        rest = _after_space(text, place + 1)
        if rest < len(text):
            raise json.JSONDecodeError("Extra data", text, rest)
    except json.JSONDecodeError as error:
        raise _broken(path, error) from None


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


def _broken(path: Path, error: json.JSONDecodeError) -> UserError:
    return UserError(f"{path}: broken JSON: {error.msg} at line {error.lineno} column {error.colno}")


def _no_array(path: Path, text: str) -> UserError:
    if not text.strip():
        return UserError(f"{path} is empty; a .json source must hold one array of rows")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return UserError(f"{path} holds one JSON value per line, not one array; rename it to {path.stem}.jsonl")
        return _broken(path, error)
    lists = [name for name, item in value.items() if isinstance(item, list)] if isinstance(value, dict) else []
    inside = f"; its rows may be in .{lists[0]}: jq -c '.{lists[0]}[]' {path.name} > {path.stem}.jsonl" if lists else ""
    return UserError(f"{path} holds {json_kind(value)}; a .json source must hold one array of rows{inside}")
