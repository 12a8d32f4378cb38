"""Which tokens the ranks of a ring hold: all of them, once, evenly; and what meets is all that attention needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.parallel.zigzag import Piece, deal, spans

lengths_of_documents = st.lists(st.integers(1, 60), min_size=1, max_size=12)
sizes = st.integers(1, 5)


def padded(lengths: Sequence[int], size: int) -> list[int]:
    missing = -sum(lengths) % (2 * size)
    return [*lengths, missing] if missing else list(lengths)


def tokens_of(pieces: Sequence[Piece]) -> list[int]:
    return [token for piece in pieces for token in range(piece.start, piece.end)]


@settings(deadline=None)
@given(lengths_of_documents, sizes)
def test_every_token_is_on_one_rank_and_each_has_as_many(lengths: list[int], size: int):
    lengths = padded(lengths, size)
    bounds, by_rank = [0, *accumulate(lengths)], deal(lengths, size)
    assert sorted(token for pieces in by_rank for token in tokens_of(pieces)) == list(range(bounds[-1]))
    for pieces in by_rank:
        assert len(tokens_of(pieces)) * size == bounds[-1]
        assert pieces == sorted(pieces)
        for piece in pieces:
            assert bounds[piece.document] <= piece.start < piece.end <= bounds[piece.document + 1]
        for one, other in pairwise(pieces):
            assert one.end < other.start or one.document != other.document, "neighbours are one piece"


@settings(deadline=None)
@given(lengths_of_documents, sizes, st.none() | st.integers(1, 70))
def test_each_query_meets_each_key_that_it_sees_once(lengths: list[int], size: int, window: int | None):
    lengths = padded(lengths, size)
    by_rank = deal(lengths, size)
    document_T = np.repeat(np.arange(len(lengths)), lengths)
    place_T = np.arange(len(document_T))
    back_TT = place_T[:, None] - place_T
    seen_TT = (document_T[:, None] == document_T) & (back_TT >= 0)
    if window is not None:
        seen_TT &= back_TT < window
    met_TT = np.zeros(seen_TT.shape, int)
    for queries in by_rank:
        q_places = np.array(tokens_of(queries))
        for keys in by_rank:
            k_places = np.array(tokens_of(keys))
            for together in spans(queries, keys, window):
                rows = [row for span in together for row in span.queries]
                columns = [column for span in together for column in span.keys]
                assert len(set(rows)) == len(rows)
                assert len(set(columns)) == len(columns)
                assert rows == sorted(rows)
                assert len({span.distance is None for span in together}) == 1
                assert len(together) == 1 or not any(span.distance for span in together)
                for span in together:
                    assert span.queries
                    assert span.keys
                    q_L, k_M = np.array(span.queries), np.array(span.keys)
                    visible_LM = np.ones((len(q_L), len(k_M)), bool)
                    if span.distance is not None:
                        back_LM = (q_L - q_L[0])[:, None] - (k_M - k_M[0]) + span.distance
                        visible_LM = (back_LM >= 0) & (window is None or back_LM < window)
                    met_TT[np.ix_(q_places[q_L], k_places[k_M])] += visible_LM
    assert (met_TT == seen_TT).all()


def work(lengths: Sequence[int], size: int) -> np.ndarray:
    """Pairs of a query and a key of each rank, by where its tokens stand in their documents."""
    bounds = [0, *accumulate(lengths)]
    return np.array(
        [
            sum(int(np.arange(p.start - bounds[p.document], p.end - bounds[p.document]).sum()) + p.end - p.start
                for p in pieces)
            for pieces in deal(lengths, size)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(
    "lengths", [[65536], [40000, 25536], [9000, 30000, 17000, 9536], [40000, *[200] * 127, 136], [60000, 5536]]
)
def test_long_documents_are_the_same_work_on_every_rank(lengths: list[int], size: int):
    pairs = work(lengths, size)
    assert pairs.sum() == sum(n * (n + 1) // 2 for n in lengths)
    assert pairs.max() < 1.02 * pairs.mean()


def test_short_documents_stay_whole():
    lengths = [300] * 212 + [64]
    lengths = padded(lengths, 8)
    pieces = [piece for of_rank in deal(lengths, 8) for piece in of_rank]
    assert len(pieces) <= len(lengths) + 2 * 8 - 1, "none is cut but where one chunk ends and the next begins"
