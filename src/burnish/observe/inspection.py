"""What `burnish inspect` found: rows as they would be trained, statistics of all rows read, and warnings.

Plain data between whoever prepares rows and whoever shows them; nothing here reads, computes or draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np


def plural(count: int, noun: str) -> str:
    """`count` with its noun: 1 row, 2 rows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """One row of L tokens, or why it gives none.

    `tokens` is int32 [L]; `loss_weights` is float32 [L], the weight with which token i is predicted.
    """

    index: int
    """Counts the rows of the file from 0."""
    source: str
    """The recipe's name of the source, or the file name."""
    where: str
    """File and line, as messages have it."""
    error: str | None
    """Why it gives no sample; all below is empty then."""
    tokens: np.ndarray
    loss_weights: np.ndarray
    text: str
    """The rendering, of which a cut row holds less in its tokens; of a row that came tokenised, its tokens' text."""
    pieces: tuple[str, ...]
    """What to show of each token. Of a character that several tokens share the first shows it, the others nothing."""
    spans: tuple[tuple[int, int, str, float], ...]
    """(start, end, origin, weight) of tokens [start, end), in order; together they cover every token once."""
    warnings: tuple[tuple[str, str], ...]
    """(kind, text)."""
    truncated: int
    """Tokens that were cut off; 0 for none."""
    roles: Mapping[str, tuple[int, int]]
    """(tokens, trained tokens) by the origin's role: system, user, tool, assistant, tools, template."""
    message: int | None = None
    """Where each turn is a sample: the message whose turn it is."""
    dropped: bool = False
    """Whether it gives no sample because the recipe chose so of such rows; `error` says why."""

    @property
    def name(self) -> str:
        turn = "" if self.message is None else f", messages[{self.message}]"
        return f"{self.source}, row {self.index:,}{turn}"


@dataclass(frozen=True, slots=True)
class SourceStatistics:
    """All rows read of one source."""

    name: str
    split: str
    """train or validation."""
    rows: int
    """Those with errors included."""
    errors: int
    tokens: int
    trained_tokens: int
    roles: Mapping[str, tuple[int, int]]
    """(tokens, trained tokens) by the origin's role: system, user, tool, assistant, tools, template."""
    truncated: int
    """Rows that were cut."""
    tokens_cut: int
    duplicates: int
    """Rows that give the same tokens and weights as one before them, of this source or another."""
    lengths: np.ndarray
    """int32: tokens of each row that gives a sample, in order; of a row that gives several, of each sample."""
    dropped: int = 0
    """What the recipe chose to drop; `errors` are others."""

    @property
    def samples(self) -> int:
        """Samples, and rows or turns that give none: the rows, but where each turn is a sample."""
        return len(self.lengths) + self.errors + self.dropped


@dataclass(frozen=True, slots=True)
class DataWarning:
    """What is wrong, or worth a look, in `count` rows; 0 where it is no row's but the tokenizer's or the model's."""

    kind: str
    text: str
    """What is said of `count` rows (give no sample; of one: gives no sample), or a whole sentence."""
    count: int
    rows: tuple[tuple[str, int], ...]
    """(source, index) of the first of these rows."""


@dataclass(frozen=True, slots=True)
class PackingFill:
    """How full packs of at most `budget` tokens would be if all training rows were packed at once."""

    budget: int
    packs: int
    fill: float
    """Tokens over what the packs could hold, 0 to 1."""


@dataclass(frozen=True)
class Inspection:
    """A look at data as it would be trained: some rows in detail, statistics and warnings over all rows read."""

    title: str
    facts: tuple[tuple[str, str], ...]
    """Tokenizer, template, limits, recipe, ..., as (name, value)."""
    rows: tuple[InspectedRow, ...]
    """Those shown in detail."""
    sources: tuple[SourceStatistics, ...]
    warnings: tuple[DataWarning, ...]
    packing: PackingFill | None
    unit: Literal["row", "sample"] = "row"
    """What is counted: samples where each turn is one."""

    @property
    def num_counted(self) -> int:
        return sum(source.rows if self.unit == "row" else source.samples for source in self.sources)
