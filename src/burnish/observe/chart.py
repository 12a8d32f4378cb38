"""Line charts and histograms as SVG text: responsive without scripts, coloured by the page's style sheet.

Positions are percentages of the plot, so that one drawing serves every width and its text keeps its size; only the
curves themselves are stretched. The page styles the classes used here (`page.py`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from burnish.observe.units import count_text, number_text

Point = tuple[float, float | None]
"""x and y; a y that is None (not finite) leaves a gap."""

NUM_COLOURS = 6
_MAX_BUCKETS = 250  # of a curve, two points each; finer than a screen shows
_MAX_READOUTS = 100
_MAX_DOTTED = 40
_SMOOTHED_FROM = 100  # points; below, a curve is read as it is
_SPAN = 1000.0  # the curves' own coordinates


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: its name in the legend and its points, by rising x."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    smooth: bool = False
    """Draw a long curve faintly, with its running mean on top."""

    @property
    def finite(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if y is not None]


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values to percentages from the low end."""

    low: float
    high: float
    ticks: list[float] = field(default_factory=list)
    log: bool = False

    def percent(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return 100 * (value - low) / (high - low)


def line_chart(title: str, series: Sequence[Series], from_zero: bool = False, may_be_log: bool = False) -> str:
    """A `<figure>` with title, legend, axes and curves, and a read-out of the values under the pointer.

    Series without a finite point are left out; nothing at all gives an empty text. `may_be_log` takes a logarithmic
    axis where positive values span more than a factor of 50.
    """
    drawn = [one for one in series if one.finite]
    if not drawn:
        return ""
    x_axis = _whole_axis([x for one in drawn for x, _ in one.points])
    y_axis = _value_axis([y for one in drawn for _, y in one.finite], from_zero, may_be_log)
    body = _grid(x_axis, y_axis) + _curves(drawn, x_axis, y_axis) + _readouts(drawn, x_axis)
    note = " (log scale)" if y_axis.log else ""
    label = html.escape(f"{title}: " + "; ".join(f"{one.name} {_ends(one)}" for one in drawn), quote=True)
    return (
        f'<figure class="chart"><figcaption><b>{html.escape(title)}</b>{note}{_legend(drawn)}</figcaption>'
        f'<div class="plot"><svg role="img" aria-label="{label}">{body}</svg></div></figure>'
    )


def bars(edges: Sequence[int], counts: Sequence[int], unit: str) -> str:
    """A small histogram: bin i counts values from edges[i] up to, but not including, edges[i + 1]."""
    width, most = 100 / len(counts), max(1, *counts)
    drawn = "".join(
        f"<g><title>{edges[i]:,} to {edges[i + 1] - 1:,} {html.escape(unit)}: {count:,} rows</title>"
        f'<rect class="hit-area" x="{i * width:.2f}%" width="{width:.2f}%" height="100%"/>'
        f'<rect x="{i * width:.2f}%" width="{width * 0.85:.2f}%" '
        f'y="{100 - 100 * count / most:.1f}%" height="{100 * count / most:.1f}%"/></g>'
        for i, count in enumerate(counts)
    )
    return f'<svg class="bars" role="img" aria-label="distribution of {html.escape(unit)}">{drawn}</svg>'


def histogram(title: str, note: str, edges: Sequence[int], counts: Sequence[int], unit: str) -> str:
    """A `<figure>` with axes and a read-out: bar i counts rows from edges[i] up to, but not including, edges[i + 1]."""
    high = 1.06 * max(1, *counts)
    x_axis = _Axis(edges[0], edges[-1], nice_ticks(edges[0], edges[-1], whole=True))
    y_axis = _Axis(0, high, nice_ticks(0, high, whole=True))
    drawn = []
    for (start, end), count in zip(pairwise(edges), counts, strict=True):
        left, width, height = x_axis.percent(start), x_axis.percent(end) - x_axis.percent(start), y_axis.percent(count)
        place = f'x="{left:.2f}%" width="{width:.2f}%"'
        drawn.append(
            f'<rect class="bar" x="{left:.2f}%" width="{width * 0.92:.2f}%" y="{100 - height:.2f}%" '
            f'height="{height:.2f}%"/><g class="hit"><rect {place} height="100%"/>'
            f'<text x="100%" y="-7" text-anchor="end">{start:,} to {end - 1:,} {unit}: {count:,} rows</text></g>'
        )
    label = html.escape(f"{title}: {note}", quote=True)
    return (
        f'<figure class="chart"><figcaption><b>{html.escape(title)}</b><span class="note">{html.escape(note)}</span>'
        f'</figcaption><div class="plot"><svg role="img" aria-label="{label}">{_grid(x_axis, y_axis)}{"".join(drawn)}'
        "</svg></div></figure>"
    )


def thin(points: Sequence[Point], num_buckets: int = _MAX_BUCKETS) -> list[Point]:
    """At most two points for each of `num_buckets` stretches, the lowest and the highest, so that no spike is lost.

    A stretch that holds a gap keeps one.
    """
    if len(points) <= 2 * num_buckets:
        return list(points)
    kept: list[Point] = []
    for bucket in range(num_buckets):
        stretch = points[bucket * len(points) // num_buckets : (bucket + 1) * len(points) // num_buckets]
        finite = [(x, y) for x, y in stretch if y is not None]
        extremes = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        kept += sorted(extremes)
        if len(finite) < len(stretch):
            kept.append((stretch[-1][0], None))
    return kept


def running_mean(points: Sequence[Point]) -> list[Point]:
    """The mean over a centred window of about a fiftieth of the points, cut off at both ends; gaps stay gaps."""
    half = max(1, len(points) // 100)
    sums = [0.0, *accumulate(y or 0.0 for _, y in points)]
    counts = [0, *accumulate(y is not None for _, y in points)]
    smoothed: list[Point] = []
    for i, (x, y) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        smoothed.append((x, None if y is None else (sums[high] - sums[low]) / (counts[high] - counts[low])))
    return smoothed


def nice_ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= most)
    step = max(step, 1) if whole else step
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _whole_axis(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return _Axis(low, high, nice_ticks(low, high, whole=True))


def _value_axis(values: Sequence[float], from_zero: bool, may_be_log: bool) -> _Axis:
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low > 50:
        low, high = low / 1.2, high * 1.2
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1,) if len(decades) > 4 else (1, 3)
        return _Axis(low, high, [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high], log=True)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low = 0.0 if from_zero and low >= 0 else low - margin
    return _Axis(low, high + margin, nice_ticks(low, high + margin, most=7))


def _grid(x_axis: _Axis, y_axis: _Axis) -> str:
    parts = []
    for tick, text in zip(y_axis.ticks, _tick_texts(y_axis.ticks, y_axis.log), strict=True):
        y = 100 - y_axis.percent(tick)
        parts.append(f'<line class="grid" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>')
        parts.append(f'<text class="tick" x="-8" y="{y:.2f}%" dy=".32em" text-anchor="end">{text}</text>')
    for tick in x_axis.ticks:
        x = x_axis.percent(tick)
        parts.append(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="100%" y2="100%" stroke-width="8"/>')
        parts.append(f'<text class="tick" x="{x:.2f}%" y="100%" dy="1.6em" text-anchor="middle">{tick:,.0f}</text>')
    parts.append('<line class="axis" x2="100%" y1="100%" y2="100%"/>')
    return "".join(parts)


def _tick_texts(ticks: Sequence[float], is_log: bool) -> list[str]:
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if largest >= 10_000:
        return [count_text(tick) for tick in ticks]
    if is_log:
        return [f"{tick:.6g}" for tick in ticks]
    if 0 < largest < 1e-2:
        exponent = math.floor(math.log10(largest))
        return [f"{tick / 10.0**exponent:.3g}e{exponent}" if tick else "0" for tick in ticks]
    spacing = min((b - a for a, b in pairwise(ticks)), default=1.0)
    decimals = max(0, -math.floor(math.log10(spacing) + 1e-9))
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def _curves(series: Sequence[Series], x_axis: _Axis, y_axis: _Axis) -> str:
    paths, dots = [], []
    for one in series:
        colour = f"c{one.colour % NUM_COLOURS}"
        is_long = one.smooth and len(one.points) >= _SMOOTHED_FROM
        if is_long:
            paths.append(f'<path class="raw {colour}" d="{_path(thin(one.points), x_axis, y_axis)}"/>')
        curve = running_mean(one.points) if is_long else one.points
        paths.append(f'<path class="curve {colour}" d="{_path(thin(curve), x_axis, y_axis)}"/>')
        if len(one.points) <= _MAX_DOTTED:
            places = [(x_axis.percent(x), 100 - y_axis.percent(y)) for x, y in one.finite]
            dots += [f'<circle class="dot {colour}" r="2.5" cx="{x:.2f}%" cy="{y:.2f}%"/>' for x, y in places]
    stretched = f'<svg viewBox="0 0 {_SPAN:.0f} {_SPAN:.0f}" preserveAspectRatio="none">{"".join(paths)}</svg>'
    return stretched + "".join(dots)


def _path(points: Sequence[Point], x_axis: _Axis, y_axis: _Axis) -> str:
    scale = _SPAN / 100
    commands, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        commands.append(f"{pen}{scale * x_axis.percent(x):.1f} {_SPAN - scale * y_axis.percent(y):.1f}")
        pen = "L"
    return "".join(commands)


def _readouts(series: Sequence[Series], x_axis: _Axis) -> str:
    """Invisible columns side by side; the one under the pointer shows a line and the values there."""
    values = [dict(one.points) for one in series]
    columns = _readout_columns(series)
    between = [(a + b) / 2 for a, b in pairwise(columns)]
    parts = []
    for x, left, right in zip(columns, [x_axis.low, *between], [*between, x_axis.high], strict=True):
        start, end = x_axis.percent(left), x_axis.percent(right)
        here = [(one, value[x]) for one, value in zip(series, values, strict=True) if x in value]
        shown = "".join(_readout(one, y, named=len(series) <= 2) for one, y in here)
        parts.append(
            f'<g class="hit"><rect x="{start:.2f}%" width="{end - start:.2f}%" height="100%"/>'
            f'<line x1="{x_axis.percent(x):.2f}%" x2="{x_axis.percent(x):.2f}%" y2="100%"/>'
            f'<text x="100%" y="-7" text-anchor="end">step {x:,.0f}{shown}</text></g>'
        )
    return "".join(parts)


def _readout(series: Series, y: float | None, named: bool) -> str:
    """A value with its name, or in its colour where the names of many would not fit."""
    text = "not finite" if y is None else number_text(float(y))
    if named:
        return f"  {html.escape(series.name)} {text}"
    return f'<tspan class="value c{series.colour % NUM_COLOURS}">  {text}</tspan>'


def _readout_columns(series: Sequence[Series]) -> list[float]:
    """At most about `_MAX_READOUTS` x, evenly chosen, and every x of the short series (evaluations)."""
    everywhere = sorted({x for one in series for x, _ in one.points})
    stride = math.ceil(len(everywhere) / _MAX_READOUTS)
    sparse = {x for one in series if len(one.points) <= _MAX_READOUTS for x, _ in one.points}
    return sorted({*everywhere[::stride], everywhere[-1], *sparse})


def _legend(series: Sequence[Series]) -> str:
    if len(series) == 1:
        return ""
    return "".join(
        f'<span class="key"><svg width="14" height="8"><line class="curve c{one.colour % NUM_COLOURS}" x2="14" y1="4" '
        f'y2="4"/></svg>{html.escape(one.name)}</span>'
        for one in series
    )


def _ends(series: Series) -> str:
    """First and last value, for those who cannot see the chart."""
    first, last = series.finite[0], series.finite[-1]
    return f"{number_text(float(first[1]))} at step {first[0]:.0f}, {number_text(float(last[1]))} at step {last[0]:.0f}"
