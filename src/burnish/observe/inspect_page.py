"""The page of `burnish inspect --format html`: rows with what is trained of them, and tables of the whole data set.

It draws an `Inspection` and computes nothing but sums of it. Tokens are written as runs of one weight and origin, with
their ids and lengths beside the text; the page's script takes a run apart when someone looks at its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from burnish.observe.chart import bars, histogram
from burnish.observe.inspection import DataWarning, InspectedRow, Inspection, PackingFill, SourceStatistics, plural
from burnish.observe.page import Section, document, escape, pairs, tiles, visible
from burnish.observe.report import LengthDistribution
from burnish.observe.units import count_text

_MAX_ROWS = 500
_MAX_TOKENS = 1_000_000  # of all rows, evenly; a browser is still quick with their text
_MAX_ROW_TOKENS = 20_000
_MIN_ROW_TOKENS = 2_000
_MAX_PIECE_CHARACTERS = 1_000  # an unknown token's text can be a whole row's
_ROLES = ("system", "user", "tool", "assistant", "tools", "template")


def render(inspection: Inspection) -> str:
    """The page as text, which has a UTF-8 whatever the rows hold."""
    shown = inspection.rows[:_MAX_ROWS]
    num_rows = sum(source.rows for source in inspection.sources)
    sections = [
        Section("warnings", "Warnings", _warnings(inspection, shown)),
        Section("data", "Data", _data(inspection)),
        Section("set-up", "Set-up", pairs(inspection.facts)),
        Section("rows", "Rows", _rows(shown, num_rows)),
    ]
    return document(inspection.title, _highlights(inspection), sections, _STYLE, _SCRIPT)


def _highlights(inspection: Inspection) -> str:
    """The figures one looks for first."""
    sources = inspection.sources
    num_rows, num_counted = sum(source.rows for source in sources), inspection.num_counted
    num_errors, num_dropped = sum(source.errors for source in sources), sum(source.dropped for source in sources)
    num_tokens, num_trained = sum(s.tokens for s in sources), sum(s.trained_tokens for s in sources)
    figures = [
        ("Rows", f"{num_rows:,}", plural(len(sources), "source")),
        ("Errors", f"{num_errors:,}", f"{_share(num_errors, num_counted)} of the {inspection.unit}s"),
        ("Tokens", count_text(num_tokens), f"{_share(num_trained, num_tokens)} trained"),
        ("Warnings", f"{len(inspection.warnings):,}", ""),
    ]
    if num_dropped:
        share = f"{_share(num_dropped, num_counted)} of the {inspection.unit}s"
        figures.insert(2, ("Dropped", f"{num_dropped:,}", share))
    if inspection.packing:
        packing = inspection.packing
        figures.append(
            ("Packing", f"{packing.fill:.1%}", f"{plural(packing.packs, 'pack')} of {packing.budget:,} tokens")
        )
    return tiles(figures)


def _warnings(inspection: Inspection, shown: Sequence[InspectedRow]) -> str:
    warnings = inspection.warnings
    if not warnings:
        return '<p class="note">None.</p>'
    whole = plural(inspection.num_counted, inspection.unit)
    anchors: dict[tuple[str, int], str] = {}
    for number, row in enumerate(shown):
        anchors.setdefault((row.source, row.index), f"row-{number}")  # a row can be several: its turns
    return f'<ul class="warnings">{"".join(_warning(warning, anchors, whole) for warning in warnings)}</ul>'


def _warning(warning: DataWarning, anchors: Mapping[tuple[str, int], str], whole: str) -> str:
    """`whole` is all of what is counted: 12 rows."""
    listed = _by_source((row, f'<a href="#{anchors[row]}">{row[1]:,}</a>') for row in warning.rows if row in anchors)
    hidden = _by_source((row, f"{row[1]:,}") for row in warning.rows if row not in anchors)
    left_out = warning.count - len(warning.rows)
    places = [f"Rows of {listed}." if listed else "", f"Not shown below: rows of {hidden}." if hidden else ""]
    places += [f"{left_out:,} more are not listed."] if left_out > 0 else []
    count = f'<span class="count">{warning.count:,} of {whole}</span>' if warning.count else ""
    note = f'<p class="note">{" ".join(filter(None, places))}</p>' if any(places) else ""
    return f"<li><b>{escape(warning.kind)}</b>{count}<p>{escape(warning.text)}</p>{note}</li>"


def _by_source(rows: Iterable[tuple[tuple[str, int], str]]) -> str:
    """Rows with the markup of their numbers, as `gsm8k 1, 2; alpaca 7`."""
    numbers: dict[str, list[str]] = {}
    for (source, _), number in rows:
        numbers.setdefault(source, []).append(number)
    return "; ".join(f"{escape(source)} {', '.join(of)}" for source, of in numbers.items())


def _data(inspection: Inspection) -> str:
    sources = inspection.sources
    if not sources:
        return ""
    lengths = LengthDistribution.of(np.concatenate([source.lengths for source in sources]))
    plot = ""
    if lengths:
        note = f"tokens a row: median {lengths.median:,}, p95 {lengths.percentile_95:,}, longest {lengths.longest:,}"
        plot = f'<div class="charts">{histogram("Lengths", note, lengths.edges, lengths.counts, "tokens")}</div>'
    return _sources(sources) + _roles(sources) + plot + (_packing(inspection.packing) if inspection.packing else "")


def _sources(sources: Sequence[SourceStatistics]) -> str:
    lines = [_source(source.name, source.split, [source], sources) for source in sources]
    if len(sources) > 1:
        lines.append(_source("All", "", sources, sources))
    head = "".join(f'<th class="number">{name}</th>' for name in _numbers(sources, sources))
    return (
        f'<div class="scroll"><table class="data"><thead><tr><th>Source</th><th>Split</th>{head}'
        f"<th>Lengths in tokens</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _numbers(sources: Sequence[SourceStatistics], every: Sequence[SourceStatistics]) -> dict[str, str]:
    """The sums of `sources`, by the head of their column; what none of `every` has needs no column."""
    lengths = LengthDistribution.of(np.concatenate([source.lengths for source in sources]))
    tokens, trained = sum(s.tokens for s in sources), sum(s.trained_tokens for s in sources)
    numbers = {"Rows": f"{sum(s.rows for s in sources):,}"}
    if any(s.samples != s.rows for s in every):
        numbers["Samples"] = f"{sum(s.samples for s in sources):,}"
    numbers["Errors"] = f"{sum(s.errors for s in sources):,}"
    if any(s.dropped for s in every):
        numbers["Dropped"] = f"{sum(s.dropped for s in sources):,}"
    numbers |= {
        "Tokens": count_text(tokens),
        "Trained": _share(trained, tokens),
        "Duplicates": f"{sum(s.duplicates for s in sources):,}",
        "Cut": f"{sum(s.truncated for s in sources):,}",
    }
    if any(s.truncated for s in every):
        numbers["Tokens cut off"] = f"{sum(s.tokens_cut for s in sources):,}"
    return numbers | {
        "Median": f"{lengths.median:,}" if lengths else "",
        "p95": f"{lengths.percentile_95:,}" if lengths else "",
        "Longest": f"{lengths.longest:,}" if lengths else "",
    }


def _source(name: str, split: str, sources: Sequence[SourceStatistics], every: Sequence[SourceStatistics]) -> str:
    """A line of the table: the sum of `sources`."""
    lengths = LengthDistribution.of(np.concatenate([source.lengths for source in sources]))
    cells = "".join(f'<td class="number">{number}</td>' for number in _numbers(sources, every).values())
    chart = bars(lengths.edges, lengths.counts, "tokens") if lengths else ""
    return f"<tr><th>{escape(name)}</th><td>{escape(split)}</td>{cells}<td>{chart}</td></tr>"


def _roles(sources: Sequence[SourceStatistics]) -> str:
    """A table of source by role: how much of the role's tokens is trained."""
    present = {role for source in sources for role, (tokens, _) in source.roles.items() if tokens}
    roles = [role for role in _ROLES if role in present] + sorted(present.difference(_ROLES))
    if not roles:
        return ""
    head = "".join(f'<th class="number">{escape(role)}</th>' for role in roles)
    lines = [(source.name, source.split, [source.roles]) for source in sources]
    if len(sources) > 1:
        lines.append(("All", "", [source.roles for source in sources]))
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(split)}</td>{''.join(_role(role, of) for role in roles)}</tr>"
        for name, split, of in lines
    )
    return (
        '<h3>Trained share of what each role wrote</h3><div class="scroll"><table><thead><tr><th>Source</th>'
        f"<th>Split</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _role(role: str, counts: Sequence[Mapping[str, tuple[int, int]]]) -> str:
    tokens, trained = (sum(of.get(role, (0, 0))[part] for of in counts) for part in (0, 1))
    whole = f' <small class="note">of {count_text(tokens)}</small>' if tokens else ""
    return f'<td class="number">{_share(trained, tokens)}{whole}</td>'


def _packing(packing: PackingFill) -> str:
    return (
        f"<h3>Packing</h3><p>All training rows fill {plural(packing.packs, 'pack')} of {packing.budget:,} tokens to "
        f'{packing.fill:.1%}.</p><svg class="fill" role="img" aria-label="{packing.fill:.1%} filled">'
        f'<rect class="room" width="100%" height="100%"/><rect width="{100 * packing.fill:.1f}%" height="100%"/></svg>'
    )


def _rows(rows: Sequence[InspectedRow], num_rows: int) -> str:
    if not rows:
        return ""
    limit = min(max(_MAX_TOKENS // len(rows), _MIN_ROW_TOKENS), _MAX_ROW_TOKENS)
    sources = list(dict.fromkeys(row.source for row in rows))
    kinds = sorted({kind for row in rows for kind, _ in row.warnings})
    flags = [_flags(row, kinds) for row in rows]
    of_all = f" of {num_rows:,}" if num_rows > len(rows) else ""
    drawn = "".join(
        _row(f"row-{number}", row, sources.index(row.source), flags[number], limit) for number, row in enumerate(rows)
    )
    return (
        f'<p class="legend">{plural(len(rows), "row")}{of_all} in detail. {_LEGEND}</p>'
        f"{_toolbar(sources, kinds, Counter(flag for of in flags for flag in of))}{drawn}"
        '<div id="tip" role="tooltip" hidden></div>'
    )


def _flags(row: InspectedRow, kinds: Sequence[str]) -> list[str]:
    """What the row can be filtered by."""
    is_error = row.error is not None and not row.dropped
    states = {"error": is_error, "dropped": row.dropped, "cut": bool(row.truncated), "warning": bool(row.warnings)}
    return [name for name, holds in states.items() if holds] + sorted(
        f"warning-{kinds.index(kind)}" for kind in {kind for kind, _ in row.warnings}
    )


def _toolbar(sources: Sequence[str], kinds: Sequence[str], counts: Mapping[str, int]) -> str:
    """What the script serves; hidden where none runs."""
    named = [("error", "errors"), ("dropped", "dropped"), ("cut", "cut rows"), ("warning", "any warning")]
    named += [(f"warning-{number}", f"warning: {kind}") for number, kind in enumerate(kinds)]
    shown = [(flag, f"{name} ({counts[flag]:,})") for flag, name in named if counts.get(flag)]
    named_sources = [(str(number), name) for number, name in enumerate(sources)] if len(sources) > 1 else []
    return (
        f'<div id="toolbar" hidden>{_choice("source", "all sources", named_sources)}'
        f"{_choice('flag', 'all rows', shown)}"
        '<label><input type="checkbox" id="bounds"> token boundaries <kbd>b</kbd></label>'
        '<span class="step"><button type="button" id="previous">Previous <kbd>k</kbd></button> '
        '<button type="button" id="next">Next <kbd>j</kbd></button></span>'
        '<span class="note" id="count" role="status"></span></div>'
    )


def _choice(name: str, everything: str, options: Sequence[tuple[str, str]]) -> str:
    if not options:
        return ""
    drawn = "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in options)
    return f'<select id="{name}" aria-label="Show"><option value="">{everything}</option>{drawn}</select>'


def _row(anchor: str, row: InspectedRow, source: int, flags: Sequence[str], limit: int) -> str:
    if row.error is not None:
        word = "Dropped" if row.dropped else "Error"
        facts, body = [row.where], f'<p class="{word.lower()}"><b>{word}</b> {escape(row.error)}</p>'
    else:
        num_tokens, num_trained = len(row.tokens), int(np.count_nonzero(row.loss_weights))
        roles = ", ".join(f"{role} {trained:,} of {n:,}" for role, (n, trained) in row.roles.items() if trained)
        share = f"{num_trained:,} trained ({_share(num_trained, num_tokens)})" + (f": {roles}" if roles else "")
        facts = [row.where, plural(num_tokens, "token"), share]
        facts += [f"{row.truncated:,} tokens were cut off"] if row.truncated else []
        body = f'<pre tabindex="0">{_tokens(row, limit)}</pre>'
    notes = "".join(f"<li><b>{escape(kind)}</b> {escape(text)}</li>" for kind, text in row.warnings)
    notes = f'<ul class="notes">{notes}</ul>' if notes else ""
    return (
        f'<article class="row" id="{anchor}" tabindex="-1" data-source="{source}" data-flags="{" ".join(flags)}">'
        f"<h3>{escape(row.name)}</h3>"
        f'<p class="note">{escape(" · ".join(filter(None, facts)))}</p>'
        f"{notes}{body}</article>"
    )


def _tokens(row: InspectedRow, limit: int) -> str:
    """The row's runs; of a row of more than `limit` tokens the start and, a quarter of what is shown, the end."""
    num_tokens = len(row.tokens)
    if num_tokens <= limit:
        return _runs(row, 0, num_tokens)
    head, tail = limit - limit // 4, num_tokens - limit // 4
    gap = f'<span class="gap">… {tail - head:,} tokens are not shown …</span>'
    return _runs(row, 0, head) + gap + _runs(row, tail, num_tokens)


def _runs(row: InspectedRow, first: int, last: int) -> str:
    """The runs of tokens [first, last); a weight is written out where it changes."""
    drawn, before = [], 0.0
    for start, end, origin, weight in row.spans:
        if start < last and end > first:
            drawn.append(_run(row, max(start, first), min(end, last), origin, weight, labelled=weight != before))
            before = weight
    return "".join(drawn)


def _run(row: InspectedRow, start: int, end: int, origin: str, weight: float, labelled: bool) -> str:
    """Tokens [start, end) in units that can be seen: a token, or several that are parts of one character."""
    texts: list[str] = []
    ids: list[str] = []
    for token, piece in zip(row.tokens[start:end].tolist(), row.pieces[start:end], strict=True):
        if piece or not texts:
            texts.append(_shown(piece or "⋯", weight))
            ids.append(str(token))
        else:
            ids[-1] += f"+{token}"
    classes = ["run", *_weight_classes(weight, labelled)]
    classes += ["end"] if origin == "template:end" else ["frame"] if origin in ("template", "tools") else []
    element = "mark" if weight else "span"
    return (
        f'<{element} class="{" ".join(classes)}" data-start="{start}" data-ids="{" ".join(ids)}" '
        f'data-lengths="{" ".join(map(_length, texts))}" data-origin="{escape(origin)}" data-weight="{weight:g}">'
        f"{escape(''.join(texts))}</{element}>"
    )


def _length(text: str) -> str:
    """In UTF-16 units, as the page's script counts them."""
    return str(len(text) if text.isascii() else len(text.encode("utf-16-le", "replace")) // 2)


def _shown(piece: str, weight: float) -> str:
    if len(piece) > _MAX_PIECE_CHARACTERS:
        hidden = len(piece) - _MAX_PIECE_CHARACTERS
        piece = f"{piece[:_MAX_PIECE_CHARACTERS]} … {hidden:,} characters of this token are not shown … "
    text = visible(piece)
    return text.replace("\n", "↵\n") if weight else text


def _weight_classes(weight: float, labelled: bool) -> list[str]:
    """A shade for each quarter below 1; any weight but 0 and 1 can be written out too."""
    if weight in (0, 1):
        return []
    return ["over" if weight > 1 else f"partial shade-{int(4 * weight)}"] + ["labelled"] * labelled


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


_LEGEND = (
    "<mark>Marked text</mark> is trained, "
    '<mark class="partial shade-2 labelled" data-weight="0.5">this</mark> with half the weight; '
    '<mark class="end">a framed token</mark> ends a turn, <span class="end">dashed</span> where it is not trained. '
    '<span class="frame">Quiet text</span> is the template\'s. ↵ is a trained line break. Point at a token for its id, '
    "weight and origin."
)

_SCRIPT = """
const rows = [...document.querySelectorAll(".row")];
const [toolbar, source, flag, bounds, count, tip] =
  ["toolbar", "source", "flag", "bounds", "count", "tip"].map((id) => document.getElementById(id));
let current = null;

// A run's tokens become elements when they are first looked at.
const split = (run) => {
  if (run.firstElementChild) return;
  const text = run.textContent, parts = document.createDocumentFragment();
  let at = 0;
  for (const length of run.dataset.lengths.split(" ")) {
    const part = document.createElement("i");
    part.textContent = text.slice(at, at += Number(length));
    parts.append(part);
  }
  run.replaceChildren(parts);
};

const describe = (part) => {
  const run = part.parentElement, at = [...run.children].indexOf(part), ids = run.dataset.ids.split(" ");
  const own = ids[at].split("+");
  const number = Number(run.dataset.start) + ids.slice(0, at).reduce((sum, unit) => sum + unit.split("+").length, 0);
  const which = own.length > 1 ? `tokens ${number} to ${number + own.length - 1}, ids ${own.join(" ")}`
    : `token ${number}, id ${own[0]}`;
  const text = [...part.textContent].slice(0, 60).join("");
  return `${JSON.stringify(text)}\\n${which}\\nweight ${run.dataset.weight}, ${run.dataset.origin}`;
};

const point = (event) => {
  tip.hidden = true;
  const run = event.target.closest?.(".run[data-ids]");
  if (!run) return;
  split(run);
  const part = document.elementFromPoint(event.clientX, event.clientY)?.closest(".run > i");
  if (!part) return;
  tip.textContent = describe(part);
  tip.hidden = false;
  const lines = [...part.getClientRects()];
  const box = lines.find((line) => line.top <= event.clientY && event.clientY <= line.bottom) ?? lines[0];
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? box.bottom + 6 : box.top - 6 - tip.offsetHeight}px`;
};

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((one) => one.isIntersecting)) {
    entry.target.querySelectorAll(".run").forEach(split);
    seen.unobserve(entry.target);
  }
}, {rootMargin: "400px"});

const showBounds = () => {
  document.getElementById("rows").classList.toggle("bounded", bounds.checked);
  seen.disconnect();
  if (bounds.checked) rows.forEach((row) => seen.observe(row));
};

const filter = () => {
  for (const row of rows) {
    const ofSource = !source?.value || row.dataset.source === source.value;
    row.hidden = !ofSource || (flag?.value && !row.dataset.flags.split(" ").includes(flag.value));
  }
  const shown = rows.filter((row) => !row.hidden).length;
  count.textContent = shown === rows.length ? "" : `${shown} of ${rows.length} rows`;
};

const go = (step) => {
  const shown = rows.filter((row) => !row.hidden), top = toolbar.offsetHeight;
  const inView = (row) => {
    const box = row.getBoundingClientRect();
    return box.bottom > top && box.top < innerHeight;
  };
  let at = shown.indexOf(current);
  if (at < 0 || !inView(current)) {
    at = shown.findIndex((row) => row.getBoundingClientRect().bottom > top);
    if (step > 0 && at >= 0 && shown[at].getBoundingClientRect().top > top + 24) at -= 1;
  }
  const row = shown[Math.max(0, Math.min(shown.length - 1, at + step))];
  if (!row) return;
  current = row;
  row.scrollIntoView();
  row.focus({preventScroll: true});
};

const follow = () => {
  const row = rows.find((one) => `#${one.id}` === location.hash);
  if (!row) return;
  if (row.hidden) {
    for (const choice of [source, flag]) if (choice) choice.value = "";
    filter();
  }
  current = row;
  // Rows that come into view get their real heights, which moves the target: once more when they have them.
  row.scrollIntoView();
  requestAnimationFrame(() => requestAnimationFrame(() => row.scrollIntoView()));
};

const keys = {j: () => go(1), k: () => go(-1), b: () => bounds.click()};

if (toolbar) {
  toolbar.hidden = false;
  for (const choice of [source, flag]) choice?.addEventListener("change", filter);
  bounds.addEventListener("change", showBounds);
  document.getElementById("next").addEventListener("click", () => go(1));
  document.getElementById("previous").addEventListener("click", () => go(-1));
  document.addEventListener("keydown", (event) => {
    const act = event.ctrlKey || event.metaKey || event.altKey ? null : keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  document.addEventListener("pointerover", point);
  document.addEventListener("scroll", () => { tip.hidden = true; }, {capture: true, passive: true});
  addEventListener("hashchange", follow);
  filter();
  showBounds();
  follow();
}
"""

_STYLE = """
[hidden] { display: none !important; }
main small.note { font-size: 12px; }
.warnings, .notes { margin: 0; padding: 0; list-style: none; }
.warnings li { padding: 10px 0 10px 14px; border-left: 3px solid var(--mark-rule); margin-bottom: 14px; }
.warnings b, .notes b { font-weight: 600; } .warnings p { margin: 2px 0 0; overflow-wrap: anywhere; }
.count { margin-left: 12px; color: var(--quiet); }
.warnings a { color: var(--c0); }
.charts { margin-top: 28px; }
.chart:first-child .plot { height: 200px; }
.fill { display: block; width: 100%; max-width: 420px; height: 12px; } .fill rect { fill: var(--c0); }
.fill .room { fill: var(--rule); }
.legend { font-size: 13px; }
#toolbar {
  position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; align-items: center; gap: 8px 20px;
  padding: 10px 0; font-size: 13px; background: var(--page); border-bottom: 1px solid var(--rule);
}
#toolbar select { max-width: 100%; padding: 3px 6px; font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--rule); border-radius: 6px; }
#toolbar input { vertical-align: -2px; }
kbd { padding: 0 4px; font: 11px ui-monospace, monospace; color: var(--quiet); border: 1px solid var(--rule);
  border-radius: 3px; }
.row { padding: 6px 0 18px; scroll-margin-top: 48px; content-visibility: auto; contain-intrinsic-size: auto 420px; }
.row:focus { outline: none; } .row:focus h3, .row:target h3 { text-decoration: underline; }
.row h3 { margin: 14px 0 0; overflow-wrap: anywhere; } .row > .note { margin: 0 0 8px; overflow-wrap: anywhere; }
.row pre {
  padding: 12px 14px; max-height: 75vh; overflow: auto; background: var(--code); border: 1px solid var(--rule);
  border-radius: 6px; unicode-bidi: plaintext;
}
.notes { margin-bottom: 8px; font-size: 14px; overflow-wrap: anywhere; }
.notes li, .error, .dropped { padding-left: 10px; border-left: 3px solid var(--mark-rule); }
.dropped { margin: 0; overflow-wrap: anywhere; }
.error { margin: 0; overflow-wrap: anywhere; color: var(--c1); border-color: var(--c1); }
.run > i { font-style: normal; } .run > i:hover { outline: 2px solid var(--c0); }
.bounded .run > i { box-shadow: inset 1px 0 var(--axis); }
.bounded mark.run > i { box-shadow: inset 1px 0 var(--mark-rule); }
.frame:not(mark) { color: var(--quiet); }
/* Markers keep their shape in lines that run from right to left. */
.frame, .end { direction: ltr; unicode-bidi: isolate; }
.gap { display: block; margin: 8px 0; color: var(--quiet); }
.end { border: 1px dashed var(--axis); border-radius: 3px; box-shadow: none; }
mark.end { border: 1px solid var(--mark-rule); }
.shade-0 { background: color-mix(in srgb, var(--mark) 30%, transparent); }
.shade-1 { background: color-mix(in srgb, var(--mark) 45%, transparent); }
.shade-2 { background: color-mix(in srgb, var(--mark) 60%, transparent); }
.shade-3 { background: color-mix(in srgb, var(--mark) 80%, transparent); }
.over { box-shadow: inset 0 -3px var(--mark-rule); }
.labelled::before {
  content: attr(data-weight); margin-right: 3px; color: var(--quiet); font-size: 10px; line-height: 0;
  vertical-align: super;
}
#tip {
  position: fixed; z-index: 2; max-width: min(420px, calc(100vw - 16px)); padding: 6px 10px; pointer-events: none;
  font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; color: var(--page); background: var(--text); border-radius: 6px;
}
@media (max-width: 560px) {
  #toolbar { gap: 6px 12px; } .row { scroll-margin-top: 84px; } .row pre { padding: 10px; }
  kbd { display: none; }
}
@media print { #toolbar { display: none; } .row pre { max-height: none; } }
"""
