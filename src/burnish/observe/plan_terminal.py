"""Tables of a plan on a terminal. It draws what it is given and knows nothing of models or layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from burnish.observe.inspect_terminal import harmless

_PLAIN_WIDTH = 120


@dataclass(frozen=True)
class Section:
    """One table with a title; `notes` stand below it, as they are where they are code."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    is_bad: bool = False
    """Whether the last note is a warning."""
    is_code: bool = False


def draw(file: TextIO, title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> None:
    """Write all of it to `file`, in colour where that is a terminal."""
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    console.print(Text(harmless(title), "bold"))
    width = max(len(name) for name, _ in facts)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=width)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, harmless(value))
    console.print(_indented(grid))
    for section in sections:
        _draw_section(console, section)


def _draw_section(console: Console, section: Section) -> None:
    console.print()
    console.print(Text(section.title, "bold cyan"))
    if section.rows:
        console.print(_indented(_table(section)))
    for number, note in enumerate(section.notes):
        is_last = number == len(section.notes) - 1
        style = "" if section.is_code else "yellow" if section.is_bad and is_last else "dim"
        console.print(_indented(Text(harmless(note), style)))


def _indented(content: Text | Table) -> Padding:
    return Padding(content, (0, 0, 0, 2), expand=False)


def _table(section: Section) -> Table:
    has_head = any(section.columns[1:]) or bool(section.columns[0])
    table = Table(box=box.SIMPLE_HEAD if has_head else None, show_header=has_head, show_edge=False, pad_edge=False)
    for number, name in enumerate(section.columns):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in section.rows:
        table.add_row(*row)
    return table
