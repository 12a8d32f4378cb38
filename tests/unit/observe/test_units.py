"""Numbers as people read them, at the places where a unit ends."""

from __future__ import annotations

import pytest

from burnish.observe.units import count_text, duration_text, number_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (987, "987"),
        (999.7, "1.00 k"),
        (1000, "1.00 k"),
        (12_345, "12.3 k"),
        (99_960, "100 k"),
        (999_900, "1.00 M"),
        (7_615_616_512, "7.62 B"),
    ],
)
def test_counts_have_three_digits(count, text):
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1:00"),
        (187, "3:07"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86_390, "1 d 00 h"),
        (273_700, "3 d 04 h"),
    ],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (1_234_567, "1,234,567"),
        (0.0, "0.0000"),
        (2.34567, "2.3457"),
        (123.456, "123.46"),
        (12_345.6, "12,346"),
        (1e-5, "1.00e-05"),
        (float("nan"), "nan"),
    ],
)
def test_numbers(value, text):
    assert number_text(value) == text
