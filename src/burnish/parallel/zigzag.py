"""Which tokens of a pack the ranks of a ring hold, and what of two ranks' tokens meets: plain arithmetic on lengths.

A token's work in causal attention grows with what stands before it in its document. So a document is cut into twice as
many chunks as there are ranks, and a rank holds an early and a late one of it: chunks c and 2n - 1 - c (zigzag, as in
llama3's context parallelism, arXiv 2407.21783, 3.3.2; by document as in Transformer Engine's packed sequences).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple


class Piece(NamedTuple):
    """Tokens [start, end) of a pack, all of one document."""

    document: int
    start: int
    end: int


def deal(lengths: Sequence[int], size: int) -> list[list[Piece]]:
    """The pieces of a pack that each of `size` ranks holds, in the order of the pack; each has as many tokens.

    `lengths` of the documents add up to a multiple of 2 * size. Long documents are each cut into chunks. The others,
    one after the other, are cut as one, so that most of them stay whole: their attention is little work, and less so
    in one piece. Whatever the lengths, chunks are of as many tokens as each other, over the whole pack.
    """
    num_chunks, bounds = 2 * size, [0, *accumulate(lengths)]
    room = [bounds[-1] // num_chunks] * num_chunks
    assert sum(room) == bounds[-1], (lengths, size)
    # A fourth of a rank's tokens: with shorter ones cut as one, ranks of a 64K pack differ by half a percent of a step.
    is_long = [length * 4 * size > bounds[-1] for length in lengths]
    by_rank: list[list[Piece]] = [[] for _ in range(size)]

    def give(document: int, chunk: int, start: int, end: int) -> None:
        by_rank[min(chunk, num_chunks - 1 - chunk)].append(Piece(document, start, end))

    num_cut = 0
    for document, start in enumerate(bounds[:-1]):
        if is_long[document]:
            for chunk in range(num_chunks):
                # As many as there are numbers from num_cut on that are chunk mod num_chunks: what does not divide
                # goes to the chunks in turn.
                length = len(range((chunk - num_cut) % num_chunks, lengths[document], num_chunks))
                give(document, chunk, start, start + length)
                start, room[chunk] = start + length, room[chunk] - length
            num_cut += lengths[document]
    chunk = 0
    for document, (start, end) in enumerate(pairwise(bounds)):
        while not is_long[document] and start < end:
            while not room[chunk]:
                chunk += 1
            length = min(room[chunk], end - start)
            give(document, chunk, start, start + length)
            start, room[chunk] = start + length, room[chunk] - length
    return [_joined(sorted(pieces)) for pieces in by_rank]


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """`pieces` without empty ones, each as long as can be."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].document == piece.document and joined[-1].end == piece.start:
            joined[-1] = joined[-1]._replace(end=piece.end)
        elif piece.end > piece.start:
            joined.append(piece)
    return joined


class Span(NamedTuple):
    """Rows of a rank's queries and rows of a rank's keys, of one document; every query sees a key.

    Where `distance` is None, each query sees all of these keys. Else the first query stands that much after the first
    key; it sees the keys up to itself, and where there is a window those within that.
    """

    queries: range
    keys: range
    distance: int | None


def spans(queries: Sequence[Piece], keys: Sequence[Piece], window: int | None) -> list[list[Span]]:
    """What a rank with the pieces `queries` computes with the keys of a rank with the pieces `keys`.

    Each inner list can be computed at once: its spans are all of one kind, and no row is in two of them. `window` as of
    `burnish.model.attention.Kernel`.
    """
    found = list(_pairs(queries, keys, window) if window is not None else _spans(queries, keys))
    at_once = [[span for span in found if span.distance == 0]]
    if window is None:
        at_once.append([span for span in found if span.distance is None])
    else:
        at_once += [[span] for span in found if span.distance != 0]
    return [together for together in at_once if together]


def _rows(pieces: Sequence[Piece]) -> dict[int, list[tuple[Piece, range]]]:
    """By document its pieces and the rows they are on a rank that holds `pieces`."""
    ends = list(accumulate(piece.end - piece.start for piece in pieces))
    rows = [range(end - (piece.end - piece.start), end) for piece, end in zip(pieces, ends, strict=True)]
    placed = zip(pieces, rows, strict=True)
    return {document: list(group) for document, group in groupby(placed, key=lambda pair: pair[0].document)}


def _spans(queries: Sequence[Piece], keys: Sequence[Piece]) -> Iterator[Span]:
    """Without a window a document's tokens on a rank can be taken for neighbours: what matters is who comes first."""
    of_keys = _rows(keys)
    for document, pieces in _rows(queries).items():
        others = of_keys.get(document, [])
        if pieces == others:
            own = range(pieces[0][1].start, pieces[-1][1].stop)
            yield Span(own, own, 0)
            continue
        # Chunks of two ranks lie within each other, so that of a document the same keys are seen by all that see any.
        before = [(rows, [r for key, r in others if key.start < piece.start]) for piece, rows in pieces]
        seeing = [(rows, seen) for rows, seen in before if seen]
        if seeing:
            assert all(seen == seeing[0][1] for _, seen in seeing), (queries, keys)
            seen = seeing[0][1]
            yield Span(range(seeing[0][0].start, seeing[-1][0].stop), range(seen[0].start, seen[-1].stop), None)


def _pairs(queries: Sequence[Piece], keys: Sequence[Piece], window: int) -> Iterator[Span]:
    of_keys = _rows(keys)
    for document, pieces in _rows(queries).items():
        for query, rows in pieces:
            for key, columns in of_keys.get(document, []):
                if key == query:
                    yield Span(rows, columns, 0)
                elif key.start < query.start:
                    end, start = min(query.end, key.end + window - 1), max(key.start, query.start - window + 1)
                    if query.start < end and start < key.end:
                        is_seen_whole = end - 1 - start < window
                        seen = rows[: end - query.start], columns[start - key.start :]
                        yield Span(*seen, None if is_seen_whole else query.start - start)
