"""report.html: one self-contained page that shows what a run was given, what it did and what came of it.

It is written from plain data, and computes no metrics. What makes a page self-contained and inert is in `page.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from burnish.files import write_whole
from burnish.observe.chart import Series, bars, line_chart
from burnish.observe.metrics import Line
from burnish.observe.page import Section, document, escape, pairs, tiles
from burnish.observe.units import count_text, duration_text

_MAX_SAMPLE_CHARACTERS = 20_000
_MAX_ANSWERS = 12  # shown of each prompt: the first, the last and some between
_MAX_SOURCE_CURVES = 6


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """How long a source's kept rows are, in tokens."""

    edges: tuple[int, ...]
    """Bin i holds lengths from edges[i] up to, but not including, edges[i + 1]; one more than `counts`."""
    counts: tuple[int, ...]
    median: int
    percentile_95: int
    longest: int

    @classmethod
    def of(cls, lengths: Iterable[int], num_bins: int = 32) -> LengthDistribution | None:
        """The distribution of these lengths (any iterable of whole numbers), in equal bins; None for no rows."""
        values = np.fromiter(lengths, np.int64)
        if not values.size:
            return None
        longest = int(values.max())
        width = max(1, -(-longest // num_bins))
        edges = np.arange(0, longest + width + 1, width)
        counts, _ = np.histogram(values, edges)
        median, percentile_95 = np.percentile(values, (50, 95), method="lower")
        return cls(tuple(edges.tolist()), tuple(counts.tolist()), int(median), int(percentile_95), longest)


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """What became of the rows of one source."""

    name: str
    split: str
    """train or validation."""
    rows: int
    """Rows read, `kept` and dropped ones together."""
    kept: int
    dropped: Mapping[str, int]
    """Rows left out, by kind, and the first of each."""
    cut: int
    """Kept rows that were truncated."""
    tokens: int
    """Of the kept rows."""
    trained_tokens: int
    lengths: LengthDistribution | None = None


@dataclass(frozen=True, slots=True)
class RenderedSample:
    """A sample as the model sees it: the text of each token and the weight with which it is predicted, in order."""

    source: str
    index: int
    """Row of the source, from 0."""
    pieces: Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Generation:
    """What the model answered to a prompt after `step` finished steps."""

    step: int
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows. Empty sequences leave their section out."""

    title: str
    facts: Sequence[tuple[str, str]]
    """What ran, label and value: model, implementation, parameters, precision, layout, device, versions, git state."""
    summary: Sequence[tuple[str, str]]
    """What came of it, label and value: runtime, losses, dropped and cut rows, where export and checkpoints lie."""
    metrics: Sequence[Line]
    """The lines of metrics.jsonl."""
    sources: Sequence[SourceSummary] = ()
    samples: Sequence[RenderedSample] = ()
    generations: Sequence[Generation] = ()
    recipe: str = ""
    """The resolved recipe, YAML."""


def write_report(path: Path, report: Report) -> None:
    """Write the page, in one piece: a kill leaves the old one or the new one."""
    write_whole(path, render(report).encode())


def render(report: Report) -> str:
    """The page as text."""
    sections = [
        Section("curves", "Curves", _curves(report.metrics)),
        Section("data", "Data", _data(report.sources)),
        Section("samples", "Samples", _samples(report.samples)),
        Section("generations", "Generations", _generations(report.generations)),
        Section("run", "Run", _pairs("Result", report.summary) + _pairs("Set-up", report.facts)),
        Section("recipe", "Recipe", _recipe(report.recipe)),
    ]
    return document(report.title, _highlights(report.metrics), sections, _STYLE, _SCRIPT)


def _points(metrics: Sequence[Line], key: str) -> list[tuple[float, float | None]]:
    return [(line["step"], line[key]) for line in metrics if key in line]


def _last(metrics: Sequence[Line], key: str) -> Any:
    return next((line[key] for line in reversed(metrics) if line.get(key) is not None), None)


def _highlights(metrics: Sequence[Line]) -> str:
    """The figures one looks for first."""
    figures: list[tuple[str, str, str]] = []
    for label, key in (("Held-out loss", "eval/loss"), ("Training loss", "loss")):
        finite = [y for _, y in _points(metrics, key) if y is not None]
        if finite:
            figures.append((label, f"{finite[-1]:.4f}", f"from {finite[0]:.4f}" if len(finite) > 1 else ""))
    if metrics:
        figures.append(("Steps", f"{metrics[-1]['step']:,}", ""))
    if (tokens := _last(metrics, "total_tokens")) is not None:
        trained = _last(metrics, "total_trained_tokens") or 0
        figures.append(("Tokens", count_text(tokens), f"{trained / max(tokens, 1):.0%} trained"))
    rates = [y for _, y in _points(metrics, "tokens_per_second") if y is not None]
    if rates:
        utilisation = _last(metrics, "mfu")
        note = "median" if utilisation is None else f"median, MFU {utilisation:.1%}"
        figures.append(("Tokens per second", count_text(float(np.median(rates))), note))
    return tiles(figures)


def _curves(metrics: Sequence[Line]) -> str:
    def one(key: str, name: str, colour: int = 0, smooth: bool = True) -> Series:
        return Series(name, _points(metrics, key), colour, smooth)

    keys = list(dict.fromkeys(key for line in metrics for key in line))
    trained = _by_source(keys, r"loss/(.+)")
    held_out = _by_source(keys, r"eval/(.+)/loss")
    charts = [
        line_chart("Loss", [one("loss", "training"), one("eval/loss", "held-out", 1, smooth=False)]),
        _source_chart("Training loss by source", [one(k, name, i) for i, (k, name) in enumerate(trained)]),
        _source_chart("Held-out loss by source", [one(k, n, i, smooth=False) for i, (k, n) in enumerate(held_out)]),
        line_chart("Learning rate", [one("lr", "learning rate", smooth=False)], from_zero=True),
        line_chart("Gradient norm", [one("grad_norm", "gradient norm")], may_be_log=True),
        line_chart("Tokens per second", [one("tokens_per_second", "tokens/s")], from_zero=True),
        _time_chart(metrics, _by_source(keys, r"time/(.+)")),
    ]
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _by_source(keys: Sequence[str], pattern: str) -> list[tuple[str, str]]:
    """Keys that match, with what the pattern's group names in them."""
    return [(key, match[1]) for key in keys if (match := re.fullmatch(pattern, key))]


def _source_chart(title: str, series: Sequence[Series]) -> str:
    """Nothing for one source, whose curve would be the whole's; the first few of many."""
    if len(series) < 2:
        return ""
    left_out = len(series) - _MAX_SOURCE_CURVES
    note = f", first {_MAX_SOURCE_CURVES} of {len(series)}" if left_out > 0 else ""
    return line_chart(title + note, series[:_MAX_SOURCE_CURVES])


def _time_chart(metrics: Sequence[Line], parts: Sequence[tuple[str, str]]) -> str:
    """A bar of the whole run's time by part."""
    seconds = {name: sum(line.get(key) or 0.0 for line in metrics) for key, name in parts}
    total = sum(seconds.values())
    if not total:
        return ""
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{duration_text(value)}</td><td>{value / total:.1%}</td>"
        f'<td class="share"><svg><rect width="{100 * value / total:.1f}%" height="100%"/></svg></td></tr>'
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    )
    return f'<figure class="chart"><figcaption><b>Where the time went</b></figcaption><table>{rows}</table></figure>'


def _data(sources: Sequence[SourceSummary]) -> str:
    if not sources:
        return ""
    heads = ("Source", "Split", "Rows", "Kept", "Dropped", "Cut", "Tokens", "Trained", "Median", "p95", "Longest")
    head = "".join(f"<th{'' if i < 2 else ' class=number'}>{name}</th>" for i, name in enumerate(heads))
    rows = "".join(_source_row(source) for source in sources)
    return (
        f'<div class="scroll"><table class="data"><thead><tr>{head}<th>Lengths in tokens</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{_dropped(sources)}"
    )


def _source_row(source: SourceSummary) -> str:
    lengths = source.lengths
    numbers = [f"{n:,}" for n in (source.rows, source.kept, sum(source.dropped.values()), source.cut)]
    numbers += [count_text(source.tokens), f"{source.trained_tokens / max(source.tokens, 1):.1%}"]
    numbers += [f"{n:,}" for n in (lengths.median, lengths.percentile_95, lengths.longest)] if lengths else ["", "", ""]
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    chart = bars(lengths.edges, lengths.counts, "tokens") if lengths else ""
    return f"<tr><th>{escape(source.name)}</th><td>{escape(source.split)}</td>{cells}<td>{chart}</td></tr>"


def _dropped(sources: Sequence[SourceSummary]) -> str:
    rows = "".join(
        f'<tr><th>{escape(source.name)}</th><td class="number">{count:,}</td>'
        f'<td class="reason">{escape(reason)}</td></tr>'
        for source in sources
        for reason, count in sorted(source.dropped.items(), key=lambda item: -item[1])
    )
    return f'<h3>Dropped rows</h3><div class="scroll"><table>{rows}</table></div>' if rows else ""


def _samples(samples: Sequence[RenderedSample]) -> str:
    if not samples:
        return ""
    note = '<p class="note">What the model sees. <mark>Marked text</mark> is trained; ↵ is a trained line break.</p>'
    return note + "".join(_sample(sample) for sample in samples)


def _sample(sample: RenderedSample) -> str:
    num_trained = sum(weight > 0 for _, weight in sample.pieces)
    runs = [
        (weight, "".join(text for text, _ in run)) for weight, run in groupby(sample.pieces, lambda piece: piece[1])
    ]
    shown, room = [], _MAX_SAMPLE_CHARACTERS
    for weight, text in runs:
        shown.append(_run(text[:room], weight))
        room -= len(text[:room])
    hidden = sum(len(text) for _, text in runs) - (_MAX_SAMPLE_CHARACTERS - room)
    tail = f'<span class="note"> … {hidden:,} characters not shown</span>' if hidden else ""
    title = f"{escape(sample.source)}, row {sample.index:,}: {len(sample.pieces):,} tokens, {num_trained:,} trained"
    return f'<div class="sample"><p class="note">{title}</p><pre dir="auto">{"".join(shown)}{tail}</pre></div>'


def _run(text: str, weight: float) -> str:
    if weight == 0:
        return escape(text)
    partial = "" if weight == 1 else f' class="partial" title="weight {weight:g}"'
    return f"<mark{partial}>" + escape(text).replace("\n", "↵\n") + "</mark>" if text else ""


def _generations(generations: Sequence[Generation]) -> str:
    by_prompt: dict[str, list[Generation]] = {}
    for generation in generations:
        by_prompt.setdefault(generation.prompt, []).append(generation)
    return "".join(_answers(prompt, answers) for prompt, answers in by_prompt.items())


def _answers(prompt: str, answers: Sequence[Generation]) -> str:
    last = len(answers) - 1
    num_shown = min(len(answers), _MAX_ANSWERS)
    chosen = sorted({round(i * last / max(num_shown - 1, 1)) for i in range(num_shown)})
    rows = "".join(
        f'<tr><th class="number">step {answer.step:,}</th><td><pre dir="auto">{escape(answer.answer)}</pre></td></tr>'
        for answer in (answers[i] for i in chosen)
    )
    hidden = len(answers) - len(chosen)
    note = f'<p class="note">{hidden} answers between are not shown.</p>' if hidden else ""
    return f'<div class="prompt"><pre dir="auto">{escape(prompt)}</pre><table>{rows}</table>{note}</div>'


def _pairs(title: str, rows: Sequence[tuple[str, str]]) -> str:
    return f"<h3>{title}</h3>{pairs(rows)}" if rows else ""


def _recipe(recipe: str) -> str:
    if not recipe:
        return ""
    return f'<button type="button" id="copy">Copy</button><pre id="recipe-text">{escape(recipe)}</pre>'


_SCRIPT = """
const button = document.getElementById("copy");
button?.addEventListener("click", async () => {
  const text = document.getElementById("recipe-text");
  getSelection().selectAllChildren(text);
  try {
    await navigator.clipboard.writeText(text.textContent);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
});
"""

_STYLE = """
.sample pre, .prompt > pre, #recipe-text {
  padding: 12px 14px; max-height: 480px; overflow: auto; background: var(--code); border: 1px solid var(--rule);
  border-radius: 6px;
}
.sample, .prompt { margin-bottom: 28px; }
.sample .note { margin: 0 0 6px; }
.prompt table { width: 100%; } .prompt td { width: 100%; white-space: normal; }
.prompt th { color: var(--quiet); font-size: 13px; }
#recipe { position: relative; }
#copy { position: absolute; right: 0; top: 14px; }
@media (max-width: 560px) {
  .prompt th, .prompt td { display: block; text-align: left; border: 0; padding: 4px 0; }
}
@media print { .sample pre, .prompt > pre, #recipe-text { max-height: none; } }
"""
