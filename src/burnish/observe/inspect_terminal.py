"""Inspected rows and a summary of them on a terminal, in colour or with plain marks. What rows hold stays harmless:
control and bidirectional characters, and halves of characters, are shown by name. It reads and computes no rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TextIO

import numpy as np
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from burnish.observe.inspection import InspectedRow, Inspection, SourceStatistics, plural
from burnish.observe.units import count_text

_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", re.UNICODE
)
_ROLES = ("system", "user", "tool", "assistant", "tools", "template")
_SAID_ONCE = ("pad_equals_eos",)
"""Kinds of warnings that are the tokenizer's more than a row's: said in the summary alone."""
_SHOWN_ROWS = 5
_DISPENSABLE = ("median", "longest", "duplicates", "cut", "samples", "tokens", "dropped", "trained", "errors")
"""Columns in the order in which a narrow terminal goes without them."""
_PLAIN_WIDTH = 120


def harmless(text: str) -> str:
    """`text` with what could command or confuse a terminal written out; line ends and tabs stay."""
    return _HARMFUL.sub(lambda match: _named(match[0]), text)


def _named(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


class _Console(Console):
    """rich's, which leaves to the caller what becomes of a reader that went away: it is called while that is caught."""

    def on_broken_pipe(self) -> None:
        raise


class Terminal:
    """Writes to `file`. With `tokens` the tokens' boundaries are shown."""

    def __init__(self, file: TextIO, tokens: bool = False) -> None:
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
        self._console = _Console(file=file, highlight=False, markup=False, emoji=False)
        self._plain = self._console.no_color or not self._console.is_terminal or self._console.is_dumb_terminal
        if not self._console.is_terminal:
            self._console.width = _PLAIN_WIDTH
        self._tokens = tokens

    def opening(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """What is looked at, and how to read what follows."""
        self._line(Text(harmless(title), "bold"))
        width = max((len(name) for name, _ in facts), default=0)
        for name, value in facts:
            self._line(Text.assemble((f"  {name:<{width}}  ", "dim"), harmless(value)))
        if self._plain:
            legend = Text(
                "  {+trained+}, {+0.5:half as much+}, not trained; [end]: an end-of-turn token stands before it"
            )
        else:
            legend = Text.assemble(
                "  ", ("trained", _style(1.0)), ", ", *self._weight(0.5), ("half as much", _style(0.5)), ", ",
                ("not trained", _style(0.0)), ", ", ("end of turn", _style(1.0, is_end=True)),
            )  # fmt: skip
        self._line(legend)

    def row(self, row: InspectedRow) -> None:
        """One row: where it stands, its warnings, and its text with what is trained of it."""
        turn = f" messages[{row.message}]" if row.message is not None else ""
        facts = [f"{row.source} {row.index}{turn}", row.where]
        if row.error is None:
            num_trained = int(np.count_nonzero(row.loss_weights))
            facts += [plural(len(row.tokens), "token"), f"{_share(num_trained, len(row.tokens))} trained"]
        if row.truncated:
            facts.append(f"{row.truncated:,} cut off")
        head = harmless(" \u00b7 ".join(facts)) if not self._plain else harmless(" | ".join(facts))
        self._line(Text())
        self._line(Text(f"== {head}" if self._plain else f"\u2500\u2500 {head}", "bold cyan"))
        if row.error is not None:
            word, style = ("dropped", "yellow") if row.dropped else ("error", "red")
            self._line(Text(f"{word}: {harmless(row.error)}", style))
            return
        for kind, text in row.warnings:
            if kind not in _SAID_ONCE:
                self._line(Text(f"! {harmless(text)}", "yellow"))
        text = Text.assemble(*self._pieces(row))
        self._console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")

    def summary(self, inspection: Inspection, num_rows: int | None) -> None:
        """Statistics and warnings over all rows read, of `num_rows` that there are (None: not known)."""
        read = sum(source.rows for source in inspection.sources)
        of = f" of {num_rows:,}" if num_rows not in (None, read) else ""
        more = "" if num_rows == read else "; --limit N reads more"
        self._line(Text())
        rows = plural(read, "row") if not of else f"{read:,}{of} rows"
        self._line(Text(f"{rows} read{more}", "bold"))
        self._line(Text())
        self._console.print(self._sources(inspection))
        self._line(Text())
        if any(source.tokens for source in inspection.sources):
            self._console.print(self._roles(inspection))
            self._line(Text())
        packing = inspection.packing
        if packing is not None and num_rows == read:
            packs = plural(packing.packs, "pack")
            self._line(Text(f"packing: {packs} of at most {packing.budget:,} tokens, {packing.fill:.1%} full"))
        for warning in inspection.warnings:
            links = ", ".join(f"{source} {index}" for source, index in warning.rows[:_SHOWN_ROWS])
            more = ", ..." if warning.count > min(len(warning.rows), _SHOWN_ROWS) else ""
            count = f"{plural(warning.count, inspection.unit)} " if warning.count else ""
            links = f" ({links}{more})" if links else ""
            style = "red" if warning.kind == "error" else "yellow"
            self._line(Text(harmless(f"! {count}{warning.text}{links}"), style))

    def _line(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)

    def _pieces(self, row: InspectedRow) -> Iterator[tuple[str, str] | str]:
        weights = [float(str(weight)) for weight in row.loss_weights]
        tokens = zip(weights, _ends(row), map(harmless, row.pieces), strict=True)
        if self._plain:
            for weight, run in groupby(tokens, key=lambda token: token[0]):
                yield _plain(self._joined(text + "[end]" * is_end for _, is_end, text in run), weight)
            return
        before = 0.0
        for (weight, is_end), run in groupby(tokens, key=lambda token: token[:2]):
            text = self._joined(text for _, _, text in run)
            if weight != before:
                yield from self._weight(weight)
            before = weight
            yield _visible_ends(text) if weight else text, _style(weight, is_end)

    def _joined(self, texts: Iterable[str]) -> str:
        return "".join(f"{text}\u2502" for text in texts) if self._tokens else "".join(texts)

    def _weight(self, weight: float) -> list[tuple[str, str]]:
        return [(f"{weight:g}\u00d7", "italic yellow")] if weight not in (0.0, 1.0) else []

    def _sources(self, inspection: Inspection) -> Table:
        names = [source.name for source in inspection.sources]
        first = [
            harmless(source.name)
            + (" (held out)" if source.split == "validation" and names.count(source.name) > 1 else "")
            for source in inspection.sources
        ]
        columns = _columns(inspection.sources)
        room = self._console.width - max(map(cell_len, ("source", *first)))
        for name in _DISPENSABLE:
            if sum(2 + max(map(cell_len, (head, *cells))) for head, cells in columns.items()) > room:
                columns.pop(name, None)
        table = _table("source", *columns)
        for name, *cells in zip(first, *columns.values(), strict=True):
            table.add_row(Text(name), *cells)
        return table

    def _roles(self, inspection: Inspection) -> Table:
        table = _table("written by", "tokens", "trained", "share of what is trained")
        total = sum(source.trained_tokens for source in inspection.sources)
        for role in _ROLES:
            found = [source.roles[role] for source in inspection.sources if role in source.roles]
            tokens, trained = (sum(counts) for counts in zip(*found, strict=True)) if found else (0, 0)
            if tokens:
                table.add_row(role, count_text(tokens), _share(trained, tokens), _share(trained, total))
        return table


def _columns(sources: Sequence[SourceStatistics]) -> dict[str, list[str]]:
    """What is said of each source, by the name of the column."""
    columns = {"rows": [f"{source.rows:,}" for source in sources]}
    if any(source.samples != source.rows for source in sources):
        columns["samples"] = [f"{source.samples:,}" for source in sources]
    columns["errors"] = [f"{source.errors:,}" for source in sources]
    if any(source.dropped for source in sources):
        columns["dropped"] = [f"{source.dropped:,}" for source in sources]
    return columns | {
        "cut": [f"{source.truncated:,}" for source in sources],
        "duplicates": [f"{source.duplicates:,}" for source in sources],
        "tokens": [count_text(source.tokens) for source in sources],
        "trained": [_share(source.trained_tokens, source.tokens) for source in sources],
        "median": [f"{int(np.median(source.lengths)):,}" if len(source.lengths) else "" for source in sources],
        "longest": [f"{int(source.lengths.max()):,}" if len(source.lengths) else "" for source in sources],
    }


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _ends(row: InspectedRow) -> list[bool]:
    """Whether each token ends a turn."""
    return [origin == "template:end" for start, end, origin, _ in row.spans for _ in range(start, end)]


def _style(weight: float, is_end: bool = False) -> str:
    colour = "green" if weight == 1 else "yellow" if weight else ""
    if is_end:
        return f"bold reverse {colour}".strip() if weight else "dim reverse"
    return f"bold {colour}" if weight else "dim"


def _plain(text: str, weight: float) -> str:
    return text if not weight else f"{{+{text}+}}" if weight == 1 else f"{{+{weight:g}:{text}+}}"


def _visible_ends(text: str) -> str:
    """Line ends that are trained, so that they can be told from those that are not."""
    return text.replace("\n", "\u21b5\n")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
