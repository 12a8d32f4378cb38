"""Charts: what is thinned, smoothed and drawn, and where."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from burnish.observe.chart import Series, bars, line_chart, nice_ticks, running_mean, thin


def paths(chart: str) -> list[list[list[float]]]:
    """The points of each curve, in drawing order; y from the top."""
    return [
        [[float(number) for number in point.split()] for point in re.split("[ML]", d) if point]
        for d in re.findall(r' d="([^"]+)"', chart)
    ]


def test_thinning_keeps_every_spike_and_the_order():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[1234], points[7777] = (1234.0, 90.0), (7777.0, -90.0)
    thinned = thin(points, 100)
    assert len(thinned) <= 200
    assert (1234.0, 90.0) in thinned
    assert (7777.0, -90.0) in thinned
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)
    assert thin(points[:200], 100) == points[:200]


def test_thinning_keeps_gaps():
    points = [(float(i), None if 500 <= i < 520 else 1.0) for i in range(1000)]
    thinned = thin(points, 50)
    assert None in [y for _, y in thinned]
    assert len(thinned) <= 150


def test_the_running_mean_is_that_of_its_window_and_skips_gaps():
    y = np.random.default_rng(0).normal(size=1000)
    smoothed = running_mean([(float(i), float(v)) for i, v in enumerate(y)])
    assert smoothed[500][1] == pytest.approx(y[490:511].mean())
    assert smoothed[0][1] == pytest.approx(y[:11].mean())
    with_gap = running_mean([(0.0, 2.0), (1.0, None), (2.0, 4.0)])
    assert with_gap == [(0.0, 2.0), (1.0, None), (2.0, 4.0)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.98, 11.3), (1, 300), (0, 1e-5), (-3.2, 7.1), (9_990, 10_010)])
def test_ticks_are_round_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    spacing = ticks[1] - ticks[0]
    assert f"{spacing:.0e}"[0] in "125"
    assert all(b - a == pytest.approx(spacing) for a, b in pairwise(ticks))


def test_whole_ticks_are_whole():
    assert nice_ticks(0, 2, whole=True) == [0, 1, 2]


def test_a_curve_goes_where_its_values_are():
    chart = line_chart("Loss", [Series("training", [(0, 4.0), (5, 0.0), (10, 2.0)])], from_zero=True)
    (curve,) = paths(chart)
    assert [x for x, _ in curve] == [0, 500, 1000]
    tops = [y for _, y in curve]
    assert tops[1] == 1000.0, "zero is the bottom of the plot"
    assert (1000 - tops[0]) == pytest.approx(2 * (1000 - tops[2]), abs=0.2)
    assert 0 < tops[0] < 100


def test_values_that_were_not_finite_leave_a_gap_and_are_named_in_the_read_out():
    points = [(1, 1.0), (2, 2.0), (3, None), (4, 2.0), (5, 1.0)]
    chart = line_chart("Loss", [Series("training", points)])
    (d,) = re.findall(r' d="([^"]+)"', chart)
    assert d.count("M") == 2
    assert "step 3  training not finite" in chart
    assert "None" not in chart
    assert "nan" not in chart


def test_a_long_curve_is_drawn_faintly_with_its_mean_on_top_and_stays_small():
    points = [(float(i), 5 + np.sin(i).item()) for i in range(1, 10_001)]
    chart = line_chart("Loss", [Series("training", points, smooth=True), Series("held-out", points[::1000], 1)])
    raw, mean, held_out = paths(chart)
    assert len(raw) <= 500
    assert len(mean) <= 500
    assert np.std([y for _, y in mean]) < 0.1 * np.std([y for _, y in raw])
    assert len(held_out) == 10
    assert len(chart) < 60_000
    assert all(f"step {x:,.0f}  training" in chart for x, _ in points[::1000]), "every evaluation can be read out"
    columns = re.findall(r'class="hit"><rect x="([\d.]+)%" width="([\d.]+)%"', chart)
    ends = [(float(x), float(x) + float(width)) for x, width in columns]
    assert ends[0][0] == 0
    assert ends[-1][1] == pytest.approx(100, abs=0.05)
    assert all(a[1] == pytest.approx(b[0], abs=0.02) for a, b in pairwise(ends)), "no gap between them"


def test_a_single_point_is_a_dot_in_the_middle():
    chart = line_chart("Loss", [Series("training", [(1, 2.5)])])
    assert 'cx="50.00%" cy="50.00%"' in chart
    assert line_chart("Loss", [Series("training", [(1, 0.0)])], from_zero=True)


def test_series_without_a_finite_point_are_left_out():
    assert line_chart("Loss", [Series("training", []), Series("held-out", [(0, None)])]) == ""
    assert "held-out" not in line_chart("Loss", [Series("training", [(1, 2.0)]), Series("held-out", [(0, None)])])


def test_a_wide_range_takes_a_log_axis_only_where_asked():
    points = [(1, 0.1), (2, 1.0), (3, 10.0)]
    (logged,) = paths(line_chart("Norm", [Series("norm", points)], may_be_log=True))
    assert logged[0][1] - logged[1][1] == pytest.approx(logged[1][1] - logged[2][1], abs=0.3)
    (linear,) = paths(line_chart("Norm", [Series("norm", points)]))
    assert linear[0][1] - linear[1][1] < 0.2 * (linear[1][1] - linear[2][1])
    assert "log scale" not in line_chart("Norm", [Series("norm", [(1, 0.0), (2, 10.0)])], may_be_log=True)


def test_names_are_escaped():
    chart = line_chart("<b>", [Series('"><img src=x>', [(1, 1.0)]), Series("other", [(1, 2.0)])])
    assert "<img" not in chart
    assert "&lt;b&gt;" in chart


def test_bars_are_as_high_as_their_counts():
    drawn = bars((0, 10, 20, 30), (5, 10, 0), "tokens")
    assert re.findall(r' height="([\d.]+)%"/></g>', drawn) == ["50.0", "100.0", "0.0"]
    assert "10 to 19 tokens: 10 rows" in drawn
