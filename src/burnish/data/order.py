"""The order of training rows as a pure function of (seed, epoch, position): nothing is stored, so a seek costs nothing.

An epoch is a permutation of slots. Every row of the sources without weight has one slot; a weighted source gets as many
slots as its share asks for, and draws its rows from permutations of its own, one after another without end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

STREAM_BLOCK = 10_000
"""Slots of an epoch where no source gives it a length: the window in which a stream is shuffled, in rows."""


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) over uint64 values offset by `key`; wraps by design."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(key & 0xFFFFFFFFFFFFFFFF)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def seed_from(*parts: int) -> int:
    """One 64-bit seed from several integers, such as (seed, step, sample); a change in any changes all bits."""
    state = 0
    for part in parts:
        state = int(_mix(np.array([part & 0xFFFFFFFFFFFFFFFF], np.uint64), state + 0x9E3779B97F4A7C15)[0])
    return state


def permute(positions: np.ndarray, size: int, seed: int, rounds: int = 6) -> np.ndarray:
    """Where each of `positions` (int64, 0 <= p < size) goes under the permutation of range(size) that `seed` names.

    A Feistel network over the smallest even-bit domain that holds `size`, walked until it lands inside
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Time and memory are those of `positions`.
    """
    half = max(1, math.ceil(math.log2(max(size, 2)) / 2))
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = [seed_from(seed, i) for i in range(rounds)]
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> shift, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        values[outside] = (left << shift) | right
        outside = values >= size
    return values.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """Which row stands at which position of which epoch.

    `num_rows[s]` is None for a stream, whose "row" is then its number in the stream; `weights[s]` is None for a source
    whose rows make the epoch. Shares beside such sources are those of the whole mixture; otherwise they are normalised.
    """

    num_rows: Sequence[int | None]
    weights: Sequence[float | None]
    seed: int
    shuffle: bool = True

    @cached_property
    def has_epochs(self) -> bool:
        """Whether some source without weight gives the epoch an end."""
        return any(w is None and n is not None for n, w in zip(self.num_rows, self.weights, strict=True))

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Slots of each source in one epoch."""
        counted = [n if w is None else None for n, w in zip(self.num_rows, self.weights, strict=True)]
        if not self.has_epochs:
            total = math.fsum(1.0 if w is None else w for w in self.weights)
            return _apportion([(1.0 if w is None else w) / total for w in self.weights], STREAM_BLOCK)
        num_counted = sum(n or 0 for n in counted)
        shares = [w or 0.0 for w in self.weights]
        length = num_counted / (1 - math.fsum(shares))
        return tuple(n if n is not None else max(1, round(length * w)) for n, w in zip(counted, shares, strict=True))

    @property
    def epoch_length(self) -> int:
        return sum(self.slots)

    def at(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row) at each of `positions` (int64, below `epoch_length`) of `epoch`, both int64."""
        if self.shuffle:
            slots = permute(positions, self.epoch_length, seed_from(self.seed, 1, epoch))
        else:
            slots = positions if self._interleaved is None else self._interleaved[positions]
        starts = np.concatenate(([0], np.cumsum(self.slots)))
        sources = np.searchsorted(starts, slots, side="right") - 1
        rows = slots - starts[sources]
        for s, (num_rows, weight, num_slots) in enumerate(zip(self.num_rows, self.weights, self.slots, strict=True)):
            if num_rows is None:
                rows = np.where(sources == s, rows + epoch * num_slots, rows)
            elif weight is not None:
                mine = np.flatnonzero(sources == s)
                rows[mine] = self._drawn(s, num_rows, rows[mine] + epoch * num_slots)
        return sources, rows

    def _drawn(self, source: int, num_rows: int, draws: np.ndarray) -> np.ndarray:
        """The rows of a weighted source's draws, counted over the whole run; each pass has an order of its own."""
        rows = draws % num_rows
        if not self.shuffle:
            return rows
        passes = draws // num_rows
        for number in np.unique(passes):
            mine = passes == number
            rows[mine] = permute(rows[mine], num_rows, seed_from(self.seed, 2, source, int(number)))
        return rows

    @cached_property
    def _interleaved(self) -> np.ndarray | None:
        """Slots spread evenly by share, in file order, for a mixture that is not shuffled."""
        if all(w is None for w in self.weights):
            return None
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in self.slots])
        return np.argsort(places, kind="stable")


def _apportion(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers in proportion to `shares` that sum to `total` (largest remainder), at least 1 each."""
    floors = [max(1, math.floor(share * total)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: floors[i] - shares[i] * total)
    for i in by_remainder[: max(0, total - sum(floors))]:
        floors[i] += 1
    return tuple(floors)


def hold_out(num_rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): sorted row numbers of a split in which `fraction` of the rows, at least one, are held out.

    Raises ValueError where a side would be empty.
    """
    num_held = max(1, round(num_rows * fraction))
    if num_held >= num_rows:
        raise ValueError(
            f"data.validation={fraction} of {num_rows} rows holds out {num_held} and leaves none to train on"
        )
    moved = permute(np.arange(num_rows), num_rows, seed_from(seed, 3))
    return np.flatnonzero(moved >= num_held), np.flatnonzero(moved < num_held)
