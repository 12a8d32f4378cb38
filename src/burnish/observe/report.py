"""report.html: one self-contained page that shows what a run was given, what it did and what came of it.

It is written from plain data and asks the network for nothing; a content security policy forbids it to, and forbids any
script but the page's own, should text from the data ever pass for markup. It computes no metrics.
"""

from __future__ import annotations

import base64
import hashlib
import html
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
    """Rows left out, by reason."""
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
    # A lone surrogate, which JSON rows can hold, has no UTF-8.
    write_whole(path, render(report).encode("utf-8", errors="replace"))


def render(report: Report) -> str:
    """The page as text."""
    sections = [
        ("curves", "Curves", _curves(report.metrics)),
        ("data", "Data", _data(report.sources)),
        ("samples", "Samples", _samples(report.samples)),
        ("generations", "Generations", _generations(report.generations)),
        ("run", "Run", _pairs("Result", report.summary) + _pairs("Set-up", report.facts)),
        ("recipe", "Recipe", _recipe(report.recipe)),
    ]
    shown = [(name, heading, body) for name, heading, body in sections if body]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in shown)
    bodies = "".join(f'<section id="{name}"><h2>{heading}</h2>{body}</section>' for name, heading, body in shown)
    policy = f"default-src 'none'; style-src '{_digest(_STYLE)}'; script-src '{_digest(_SCRIPT)}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_escape(report.title)} - burnish</title><style>{_STYLE}</style></head>\n"
        f"<body><header><h1>{_escape(report.title)}</h1><nav>{links}</nav>{_highlights(report.metrics)}</header>\n"
        f"<main>{bodies}</main>\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _escape(text: str) -> str:
    """Text as HTML; control characters, which HTML cannot hold, as their pictures."""
    pictured = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda m: "␡" if m[0] == "\x7f" else chr(0x2400 + ord(m[0])), text)
    return html.escape(pictured, quote=True)


def _points(metrics: Sequence[Line], key: str) -> list[tuple[float, float | None]]:
    return [(line["step"], line[key]) for line in metrics if key in line]


def _last(metrics: Sequence[Line], key: str) -> Any:
    return next((line[key] for line in reversed(metrics) if line.get(key) is not None), None)


def _highlights(metrics: Sequence[Line]) -> str:
    """The figures one looks for first."""
    tiles: list[tuple[str, str, str]] = []
    for label, key in (("Held-out loss", "eval/loss"), ("Training loss", "loss")):
        finite = [y for _, y in _points(metrics, key) if y is not None]
        if finite:
            tiles.append((label, f"{finite[-1]:.4f}", f"from {finite[0]:.4f}" if len(finite) > 1 else ""))
    if metrics:
        tiles.append(("Steps", f"{metrics[-1]['step']:,}", ""))
    if (tokens := _last(metrics, "total_tokens")) is not None:
        trained = _last(metrics, "total_trained_tokens") or 0
        tiles.append(("Tokens", count_text(tokens), f"{trained / max(tokens, 1):.0%} trained"))
    rates = [y for _, y in _points(metrics, "tokens_per_second") if y is not None]
    if rates:
        utilisation = _last(metrics, "mfu")
        note = "median" if utilisation is None else f"median, MFU {utilisation:.1%}"
        tiles.append(("Tokens per second", count_text(float(np.median(rates))), note))
    return (
        '<dl class="tiles">'
        + "".join(f"<div><dt>{label}</dt><dd>{value}</dd><small>{note}</small></div>" for label, value, note in tiles)
        + "</dl>"
    )


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
        f"<tr><th>{_escape(name.replace('_', ' '))}</th><td>{duration_text(value)}</td><td>{value / total:.1%}</td>"
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
    return f"<tr><th>{_escape(source.name)}</th><td>{_escape(source.split)}</td>{cells}<td>{chart}</td></tr>"


def _dropped(sources: Sequence[SourceSummary]) -> str:
    rows = "".join(
        f'<tr><th>{_escape(source.name)}</th><td class="number">{count:,}</td>'
        f'<td class="reason">{_escape(reason)}</td></tr>'
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
    title = f"{_escape(sample.source)}, row {sample.index:,}: {len(sample.pieces):,} tokens, {num_trained:,} trained"
    return f'<div class="sample"><p class="note">{title}</p><pre dir="auto">{"".join(shown)}{tail}</pre></div>'


def _run(text: str, weight: float) -> str:
    if weight == 0:
        return _escape(text)
    partial = "" if weight == 1 else f' class="partial" title="weight {weight:g}"'
    return f"<mark{partial}>" + _escape(text).replace("\n", "↵\n") + "</mark>" if text else ""


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
        f'<tr><th class="number">step {answer.step:,}</th><td><pre dir="auto">{_escape(answer.answer)}</pre></td></tr>'
        for answer in (answers[i] for i in chosen)
    )
    hidden = len(answers) - len(chosen)
    note = f'<p class="note">{hidden} answers between are not shown.</p>' if hidden else ""
    return f'<div class="prompt"><pre dir="auto">{_escape(prompt)}</pre><table>{rows}</table>{note}</div>'


def _pairs(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    if not pairs:
        return ""
    rows = "".join(f"<dt>{_escape(label)}</dt><dd>{_escape(value)}</dd>" for label, value in pairs)
    return f'<h3>{title}</h3><dl class="pairs">{rows}</dl>'


def _recipe(recipe: str) -> str:
    if not recipe:
        return ""
    return f'<button type="button" id="copy">Copy</button><pre id="recipe-text">{_escape(recipe)}</pre>'


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
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #ffffff; --text: #1d2126; --quiet: #646c76; --rule: #e3e6ea; --axis: #9aa2ac;
  --mark: #fdf0c4; --mark-rule: #b98900; --code: #f6f7f9;
  --c0: #2563a8; --c1: #c2410c; --c2: #0f7b6c; --c3: #8a4f9e; --c4: #8a6d00; --c5: #5c6470;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1a1e23; --text: #e4e7eb; --quiet: #98a1ad; --rule: #2c323a; --axis: #58616d;
    --mark: #43390f; --mark-rule: #d9ab2e; --code: #1a1e23;
    --c0: #7ab0ea; --c1: #f59e6c; --c2: #5cc8b4; --c3: #c99ae0; --c4: #d8b84a; --c5: #a9b2c0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 0 24px 64px; max-width: 1120px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
h1 { margin: 36px 0 4px; font-size: 26px; font-weight: 600; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 48px 0 16px; padding-top: 16px; border-top: 1px solid var(--rule); font-size: 18px; font-weight: 600; }
h3 { margin: 24px 0 8px; font-size: 14px; font-weight: 600; }
nav { display: flex; flex-wrap: wrap; gap: 0 16px; }
nav a { color: var(--quiet); font-size: 14px; text-decoration: none; }
nav a:hover { color: var(--text); text-decoration: underline; }
.tiles { display: flex; flex-wrap: wrap; gap: 16px 48px; margin: 28px 0 0; }
.tiles dt, .tiles small, .note { color: var(--quiet); font-size: 13px; }
.tiles dd { margin: 0; font-size: 24px; font-weight: 500; line-height: 1.3; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 32px 40px; }
.chart { margin: 0; min-width: 0; }
.chart:first-child { grid-column: 1 / -1; }
.chart:first-child .plot { height: 300px; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 16px; font-size: 14px; }
figcaption b { font-weight: 600; }
.key { color: var(--quiet); white-space: nowrap; }
.key svg { margin-right: 6px; vertical-align: middle; }
.plot { height: 190px; margin: 26px 8px 30px 52px; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; }
.grid { stroke: var(--rule); } .axis { stroke: var(--axis); }
.tick { fill: var(--quiet); font-size: 12px; }
.curve, .raw {
  fill: none; stroke: currentColor; stroke-width: 1.75; stroke-linejoin: round; vector-effect: non-scaling-stroke;
}
.raw { stroke-width: 1; opacity: .3; }
.dot { fill: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.hit { opacity: 0; } .hit:hover { opacity: 1; }
.hit rect { fill: transparent; } .hit line { stroke: var(--axis); stroke-dasharray: 3 3; }
.hit text { fill: var(--text); font-size: 12px; white-space: pre; } .hit .value { fill: currentColor; }
.hit * { pointer-events: none; } .hit rect { pointer-events: all; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th { font-weight: 500; text-align: left; }
th, td { padding: 6px 20px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; white-space: nowrap; }
thead th { color: var(--quiet); font-size: 13px; font-weight: 400; }
.number { text-align: right; } .reason { min-width: 160px; white-space: normal; }
.data { width: 100%; }
.bars { display: block; width: 150px; height: 30px; } .bars rect { fill: var(--c0); }
.bars .hit-area { fill: transparent; }
.chart table { width: 100%; margin-top: 12px; } .chart td { text-align: right; }
.share { width: 40%; padding-right: 0; }
.share svg { display: block; width: 100%; height: 12px; margin-top: 5px; } .share rect { fill: var(--c0); }
pre {
  margin: 0; font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
}
.sample pre, .prompt > pre, #recipe-text {
  padding: 12px 14px; max-height: 480px; overflow: auto; background: var(--code); border: 1px solid var(--rule);
  border-radius: 6px;
}
.sample, .prompt { margin-bottom: 28px; }
.sample .note { margin: 0 0 6px; }
mark { background: var(--mark); color: inherit; box-shadow: inset 0 -1px var(--mark-rule); }
.partial { box-shadow: inset 0 -1px var(--page), inset 0 -2px var(--mark-rule); }
.prompt table { width: 100%; } .prompt td { width: 100%; white-space: normal; }
.prompt th { color: var(--quiet); font-size: 13px; }
.pairs { display: grid; grid-template-columns: max-content 1fr; gap: 4px 24px; margin: 0; font-size: 14px; }
.pairs dt { color: var(--quiet); } .pairs dd { margin: 0; overflow-wrap: anywhere; }
#recipe { position: relative; }
button {
  position: absolute; right: 0; top: 14px; padding: 3px 12px; font: inherit; font-size: 13px; cursor: pointer;
  color: var(--text); background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
}
button:hover { border-color: var(--axis); }
@media (max-width: 560px) {
  body { padding: 0 16px 48px; }
  .tiles { gap: 16px 32px; } .tiles dd { font-size: 20px; }
  .chart:first-child .plot { height: 220px; }
  .pairs { grid-template-columns: 1fr; gap: 0; } .pairs dd { margin-bottom: 8px; }
  .prompt th, .prompt td { display: block; text-align: left; border: 0; padding: 4px 0; }
}
@media print { nav, button { display: none; } .sample pre, .prompt > pre, #recipe-text { max-height: none; } }
"""
