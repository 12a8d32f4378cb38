"""Numbers as people read them, for the console and the report."""

from __future__ import annotations

import math

_COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count_text(count: float) -> str:
    """A count in three digits: 987, 12.3 k, 1.54 B."""
    for size, unit in _COUNT_UNITS:
        if abs(count) >= size * 0.9995:
            return f"{_three_digits(count / size)} {unit}"
    return f"{count:.0f}"


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"


def duration_text(seconds: float) -> str:
    """A time span to the second below an hour, then to the minute: 8 s, 3:07, 2 h 05 min, 3 d 04 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def rate_text(learning_rate: float) -> str:
    """A learning rate, always in three digits: 1.00e-05."""
    return f"{learning_rate:.2e}"


def number_text(value: float) -> str:
    """Any number in five significant digits, integers whole with separators, what is not finite by name."""
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        decimals = 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0
        return f"{value:,.{decimals}f}"
    return f"{value:.2e}"
