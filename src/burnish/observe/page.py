"""The frame of every page of ours: one self-contained document, its style, and text that stays text.

A page asks the network for nothing; a content security policy forbids it to, and forbids any script but the page's own,
should text from the data ever pass for markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Controls but for tab and newline, separators of lines, what turns the direction of text around, byte order marks.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]")


class Section(NamedTuple):
    """A part of a page: its anchor, its heading and its markup. One without markup is left out."""

    name: str
    heading: str
    body: str


def document(title: str, top: str, sections: Sequence[Section], style: str, script: str) -> str:
    """A page of these sections: under its title stand links to them, then `top` (markup).

    `style` goes on after what all pages share; `script` is the only one that may run. What has no UTF-8, a lone
    surrogate, is shown as a question mark.
    """
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#{section.name}">{section.heading}</a>' for section in shown)
    bodies = "".join(f'<section id="{name}"><h2>{heading}</h2>{body}</section>' for name, heading, body in shown)
    style = _STYLE + style
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    whole = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} - burnish</title><style>{style}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1><nav>{links}</nav>{top}</header>\n"
        f"<main>{bodies}</main>\n<script>{script}</script></body></html>\n"
    )
    return whole.encode(errors="replace").decode()


def escape(text: str) -> str:
    """Text as HTML, in elements and attributes alike; what cannot be seen is made `visible`."""
    return html.escape(visible(text), quote=True)


def visible(text: str) -> str:
    """Text with control characters as their pictures, and other characters without a shape by their number.

    Some of these HTML cannot hold; others, such as marks of direction, would let text look like what it is not.
    """
    return _UNSEEN.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"⟦U+{code:04X}⟧"


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """The figures that one looks for first, as (label, value, note)."""
    drawn = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd><small>{escape(note)}</small></div>"
        for label, value, note in figures
    )
    return f'<dl class="tiles">{drawn}</dl>'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Labels and values, one pair a line."""
    drawn = "".join(f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in rows)
    return f'<dl class="pairs">{drawn}</dl>' if drawn else ""


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
.dot { fill: currentColor; } .bar { fill: var(--c0); }
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
mark { padding-bottom: 2px; background: var(--mark); color: inherit; box-shadow: inset 0 -1px var(--mark-rule); }
.partial { box-shadow: inset 0 -1px var(--page), inset 0 -2px var(--mark-rule); }
.pairs { display: grid; grid-template-columns: max-content 1fr; gap: 4px 24px; margin: 0; font-size: 14px; }
.pairs dt { color: var(--quiet); } .pairs dd { margin: 0; overflow-wrap: anywhere; }
button {
  padding: 3px 12px; font: inherit; font-size: 13px; cursor: pointer; color: var(--text); background: var(--card);
  border: 1px solid var(--rule); border-radius: 6px;
}
button:hover { border-color: var(--axis); }
@media (max-width: 560px) {
  body { padding: 0 16px 48px; }
  .tiles { gap: 16px 32px; } .tiles dd { font-size: 20px; }
  .chart:first-child .plot { height: 220px; }
  .pairs { grid-template-columns: 1fr; gap: 0; } .pairs dd { margin-bottom: 8px; }
}
@media print { nav, button { display: none; } }
"""
