"""Which columns rows have: all that is known of a source before any of its rows is rendered.

A shape is the set of a row's columns that are neither null nor empty; recognition goes by the shapes of all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

Signature = tuple[tuple[str, "Fill"], ...]
"""A row's columns, each with how it is filled."""


class Fill(IntEnum):
    """What stands in a column of one row. An empty text, list or mapping is EMPTY; 0 and false are FILLED."""

    NULL = 0
    EMPTY = 1
    FILLED = 2


@dataclass(frozen=True, slots=True)
class Schema:
    """`columns` counts the rows where a column is not null, `shapes` the rows that have the same filled columns.

    Rows that could not be read are in neither.
    """

    columns: Mapping[str, int]
    shapes: Mapping[frozenset[str], int]

    def __add__(self, other: Schema) -> Schema:
        columns = {
            name: self.columns.get(name, 0) + other.columns.get(name, 0) for name in (*self.columns, *other.columns)
        }
        return Schema(columns, dict(Counter(self.shapes) + Counter(other.shapes)))


def schema_of(signatures: Mapping[Signature, int]) -> Schema:
    """The schema of rows counted by signature."""
    columns: Counter[str] = Counter()
    shapes: Counter[frozenset[str]] = Counter()
    for signature, count in signatures.items():
        for name, fill in signature:
            columns[name] += count if fill is not Fill.NULL else 0
        shapes[frozenset(name for name, fill in signature if fill is Fill.FILLED)] += count
    return Schema(dict(columns), dict(shapes))


def signature(row: Mapping[str, Any]) -> Signature:
    """The signature of a row that is held as a mapping."""
    return tuple([(name, _fill(value)) for name, value in row.items()])


def schema_of_rows(rows: Iterable[Mapping[str, Any]]) -> Schema:
    return schema_of(Counter(signature(row) for row in rows))


def _fill(value: Any) -> Fill:
    if value:
        return Fill.FILLED
    if value is None:
        return Fill.NULL
    return Fill.EMPTY if isinstance(value, str | list | dict) else Fill.FILLED
