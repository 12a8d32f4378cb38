"""Text that knows who wrote each of its characters, through whatever a template does to it.

`Traced` is a str that carries its characters' origins through slices, joins and every other method of str; the
functions below do the same for joining, printing, `%`, `format`, JSON and Markup. Knows no template and no chat.
"""

from __future__ import annotations

import json
import operator
import re
import string
import threading
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any, NoReturn

from jinja2.runtime import Undefined
from jinja2.utils import Namespace
from markupsafe import Markup

from burnish.types import Origin


class Pass(str):
    """One pass of a loop: an empty output which says that the output behind it belongs to the pass.

    `message` is the message that it is about; None where the loop does not say (`is_named` is false), or where it is
    about none. `own` is the origin of the template's own words in it.
    """

    __slots__ = ("is_named", "message", "own", "parent")
    message: int | None
    parent: Pass | None
    is_named: bool
    own: Origin
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __str__(self) -> str:
        return self


def enter(message: int | None, parent: Pass | None, is_named: bool) -> Pass:
    """A new pass within `parent`, and from now on the pass that the template is at."""
    entered = Pass()
    entered.message, entered.parent, entered.is_named = message, parent, is_named
    entered.own = Origin(message, "template")
    HERE.now = entered
    return entered


class Lost:
    """The author of text that was made from several authors' texts in a way that nothing follows."""


class Generation:
    """Stands, at no width, where a `{% generation %}` block begins or ends."""

    __slots__ = ("is_start",)

    def __init__(self, is_start: bool) -> None:
        self.is_start = is_start


LOST = Lost()
GENERATION_STARTS, GENERATION_ENDS = Generation(True), Generation(False)

Author = Origin | Lost | Generation | None
"""Who wrote a run of characters; None is the template."""
Run = tuple[int, Author, Pass]
"""Characters, their author, and the pass in which they were first put beside other text (OUTSIDE: in none yet)."""


OUTSIDE = Pass()
OUTSIDE.message, OUTSIDE.parent, OUTSIDE.is_named, OUTSIDE.own = None, None, False, Origin(None, "template")


class _Here(threading.local):
    """The pass that the template is at, of the rendering under way in this thread."""

    now: Pass = OUTSIDE


HERE = _Here()


class Traced(str):
    """A str with the origin of each character: `_runs` are its runs in order, whose lengths sum to its own.

    Every method of str that returns text is here. Where characters cannot be followed one by one, all of the result has
    the one author that the method's texts have in common, or is LOST where they have several.
    """

    __slots__ = ("_runs",)
    _runs: tuple[Run, ...]

    def __new__(cls, text: object = "", runs: tuple[Run, ...] | None = None) -> Traced:
        made = str.__new__(cls, text)
        made._runs = runs if runs is not None else ((len(made), LOST, OUTSIDE),)
        return made

    def __str__(self) -> str:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("traced text belongs to one rendering")

    def __add__(self, other: Any) -> Any:
        if type(other) is str:
            return _make(str.__add__(self, other), (*_settled(self._runs), (len(other), None, HERE.now)))
        if type(other) is Traced:
            return _make(str.__add__(self, other), (*_settled(self._runs), *_settled(other._runs)))
        if isinstance(other, Markup) or not isinstance(other, str):
            return NotImplemented
        return joined((self, other))

    def __radd__(self, other: Any) -> Any:
        if type(other) is str:
            return _make(str.__add__(other, self), ((len(other), None, HERE.now), *_settled(self._runs)))
        return NotImplemented

    def __mul__(self, count: Any) -> Any:
        if not isinstance(count, int):
            return NotImplemented
        return _make(str.__mul__(self, count), self._runs * max(count, 0))

    def __rmul__(self, count: Any) -> Any:
        return self * count

    def __mod__(self, values: Any) -> Any:
        return percent(self, values)

    def __rmod__(self, other: Any) -> Any:
        return percent(other, self) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: Any) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return _cut(self, start, max(start, stop))
            if step == -1 and str.__getitem__(self, key) == str.__getitem__(self, slice(None, None, -1)):
                return _make(str.__getitem__(self, key), self._runs[::-1])
            return derived(str.__getitem__(self, key), self)
        place = operator.index(key)
        character = str.__getitem__(self, place)
        start = place % len(self)
        return _cut(self, start, start + len(character))

    def __iter__(self) -> Iterator[str]:
        return (_cut(self, i, i + 1) for i in range(len(self)))

    def strip(self, characters: str | None = None, /) -> str:
        text = str.strip(self, characters)
        if len(text) == len(self):
            return self
        start = len(self) - len(str.lstrip(self, characters))
        return _cut(self, start, start + len(text))

    def lstrip(self, characters: str | None = None, /) -> str:
        return _cut(self, len(self) - len(str.lstrip(self, characters)), len(self))

    def rstrip(self, characters: str | None = None, /) -> str:
        return _cut(self, 0, len(str.rstrip(self, characters)))

    def removeprefix(self, prefix: str, /) -> str:
        return _cut(self, len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        return _cut(self, 0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return _cut_into(self, str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return _cut_into(self, str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines, start = [], 0
        for kept, whole in zip(str.splitlines(self, keepends), str.splitlines(self, True), strict=True):
            lines.append(_cut(self, start, start + len(kept)))
            start += len(whole)
        return lines

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        first, found, last = _cut_into(self, list(str.partition(self, sep)), "")
        return first, found, last

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        first, found, last = _cut_into(self, list(str.rpartition(self, sep)), "")
        return first, found, last

    def replace(self, old: str, new: str, count: Any = -1, /) -> str:
        if not old:
            return derived(str.replace(self, old, new, count), self, new)
        if old not in self:
            return self
        pieces = self.split(old, count)
        between = [pieces[0]]
        place = len(pieces[0])
        for piece in pieces[1:]:
            between += [_in_place_of(_cut(self, place, place + len(old)), new), piece]
            place += len(old) + len(piece)
        return joined(between)

    def join(self, texts: Iterable[str], /) -> str:
        pieces = list(texts)
        between: list[Any] = [self] * max(2 * len(pieces) - 1, 0)
        between[::2] = pieces
        for piece in pieces:
            if not isinstance(piece, str):
                return str.join(self, pieces)  # raises what str raises
        return joined(between)

    def upper(self) -> str:
        return _by_run(self, str.upper)

    def lower(self) -> str:
        return _by_run(self, str.lower)

    def casefold(self) -> str:
        return _by_run(self, str.casefold)

    def swapcase(self) -> str:
        return _by_run(self, str.swapcase)

    def translate(self, table: Any, /) -> str:
        if is_traced(table):
            return derived(str.translate(self, table), self, table)
        return _by_run(self, lambda text: str.translate(text, table))

    def capitalize(self) -> str:
        return derived(str.capitalize(self), self)

    def title(self) -> str:
        return derived(str.title(self), self)

    def expandtabs(self, tabsize: Any = 8) -> str:
        return derived(str.expandtabs(self, tabsize), self)

    def center(self, width: Any, fill: str = " ", /) -> str:
        return derived(str.center(self, width, fill), self, fill)

    def ljust(self, width: Any, fill: str = " ", /) -> str:
        return joined((self, derived(str.ljust(self, width, fill)[len(self) :], fill)))

    def rjust(self, width: Any, fill: str = " ", /) -> str:
        text = str.rjust(self, width, fill)
        return joined((derived(text[: len(text) - len(self)], fill), self))

    def zfill(self, width: Any, /) -> str:
        return derived(str.zfill(self, width), self)


class TracedMarkup(Markup):
    """What `|safe` and `|escape` make of text: Jinja's Markup, which escapes what is added to it, with origins.

    Whatever else Markup's own methods make of it is LOST.
    """

    __slots__ = ("_runs",)
    _runs: tuple[Run, ...]

    def __new__(cls, text: object = "", *arguments: Any) -> TracedMarkup:
        made = super().__new__(cls, text, *arguments)
        made._runs = ((len(made), LOST, OUTSIDE),)
        return made

    def __str__(self) -> str:
        return _make(str.__str__(self), self._runs)

    def __add__(self, other: Any) -> Any:
        whole = super().__add__(other)
        if isinstance(whole, TracedMarkup):
            whole._runs = (*_settled(self._runs), *_settled(_runs_of(other, len(whole) - len(self))))
        return whole

    def __radd__(self, other: Any) -> Any:
        whole = super().__radd__(other)
        if isinstance(whole, TracedMarkup):
            whole._runs = (*_settled(_runs_of(other, len(whole) - len(self))), *_settled(self._runs))
        return whole


def _runs_of(text: Any, length: int) -> tuple[Run, ...]:
    """The runs of `text`, which escaping may have made `length` characters."""
    known = as_text(text)
    if isinstance(known, Traced) and len(known) == length:
        return known._runs
    kept = derived("x" * length, known)
    return kept._runs if isinstance(kept, Traced) else ((length, None, HERE.now),)


class _TracedInt(int):
    _origin: Origin

    def __str__(self) -> str:
        return _make(int.__repr__(self), ((len(int.__repr__(self)), self._origin, OUTSIDE),))


class _TracedFloat(float):
    _origin: Origin

    def __str__(self) -> str:
        return _make(float.__repr__(self), ((len(float.__repr__(self)), self._origin, OUTSIDE),))


def _make(text: str, runs: tuple[Run, ...]) -> Traced:
    made = str.__new__(Traced, text)
    made._runs = runs
    return made


def trace_text(text: str, origin: Origin) -> str:
    """`text` by `origin`, in no pass yet."""
    return _make(text, ((len(text), origin, OUTSIDE),))


def trace_value(value: Any, origin: Origin, containers: dict[int, Origin]) -> Any:
    """A copy of a JSON value whose text and numbers are by `origin`; its lists and dicts go into `containers`."""
    kind = type(value)
    if kind is str:
        return _make(value, ((len(value), origin, OUTSIDE),))
    if kind is dict:
        copy = {trace_value(k, origin, containers): trace_value(v, origin, containers) for k, v in value.items()}
        containers[id(copy)] = origin
        return copy
    if kind is list or kind is tuple:
        items = [trace_value(item, origin, containers) for item in value]
        containers[id(items)] = origin
        return items
    if kind is int or kind is float:
        number = _TracedInt(value) if kind is int else _TracedFloat(value)
        number._origin = origin
        return number
    return value


def _settled(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """`runs` as put beside other text here and now: what was in no pass yet is in this one."""
    now = HERE.now
    if now is OUTSIDE:
        return runs
    if len(runs) == 1:
        run = runs[0]
        return runs if run[2] is not OUTSIDE else ((run[0], run[1], now),)
    return tuple([run if run[2] is not OUTSIDE else (run[0], run[1], now) for run in runs])


def _cut(text: Traced, start: int, stop: int) -> str:
    """Characters [start, stop) of `text`."""
    runs = text._runs
    if len(runs) == 1:
        return _make(str.__getitem__(text, slice(start, stop)), ((stop - start, runs[0][1], runs[0][2]),))
    if stop - start == len(text):
        return text
    kept: list[Run] = []
    position = 0
    for length, author, in_pass in runs:
        first, last = max(position, start), min(position + length, stop)
        position += length
        if first < last or (not length and start <= position <= stop):
            kept.append((last - first if length else 0, author, in_pass))
    return _make(str.__getitem__(text, slice(start, stop)), tuple(kept))


def _cut_into(text: Traced, pieces: list[str], separator: str | None) -> list[str]:
    """The pieces of `text` that a split gave; `separator` stood between them, None for any white space."""
    found, position = [], 0
    for piece in pieces:
        if separator is None:
            position = str.find(text, piece, position)
        found.append(_cut(text, position, position + len(piece)))
        position += len(piece) + len(separator or "")
    return found


def _by_run(text: Traced, change: Callable[[str], str]) -> str:
    """`change` of `text`, run by run where that comes to the same as at once."""
    changed = change(str.__str__(text)) if len(text._runs) > 1 else change(text)
    if len(text._runs) == 1:
        return _make(changed, ((len(changed), *text._runs[0][1:]),))
    parts, position = [], 0
    for length, _, _ in text._runs:
        parts.append(change(str.__getitem__(text, slice(position, position + length))))
        position += length
    if "".join(parts) != changed:
        return derived(changed, text)
    return _make(changed, tuple((len(part), *run[1:]) for part, run in zip(parts, text._runs, strict=True)))


def joined(pieces: Iterable[Any]) -> Traced:
    """`"".join(map(str, pieces))` with origins. Marks of passes among them say where the pieces behind them stand."""
    texts: list[str] = []
    runs: list[Run] = []
    now = HERE.now
    for piece in pieces:
        kind = type(piece)
        if kind is str:
            if piece:
                texts.append(piece)
                runs.append((len(piece), None, now))
            continue
        if kind is Pass:
            now = piece
            continue
        text = piece if kind is Traced else as_text(piece)
        if type(text) is not Traced:
            texts.append(text)
            runs.append((len(text), None, now))
            continue
        texts.append(text)
        if now is OUTSIDE:
            runs.extend(text._runs)
        else:
            runs.extend([run if run[2] is not OUTSIDE else (run[0], run[1], now) for run in text._runs])
    return _make("".join(texts), tuple(runs))


def marked_up(result: Markup, value: Any) -> TracedMarkup:
    """Markup that was made of `value`, with the origins of text that it leaves as it is."""
    if isinstance(value, TracedMarkup):
        return value
    text, plain = as_text(value), str.__str__(result)
    kept = text if str.__eq__(text, plain) else derived(plain, text)
    made = TracedMarkup(result)
    made._runs = kept._runs if isinstance(kept, Traced) else ((len(made), None, HERE.now),)
    return made


def as_text(value: Any) -> str:
    """`str(value)` with origins."""
    kind = type(value)
    if kind is Traced or kind is str or kind is Pass:
        return value
    text = str(value)
    if kind in _OWN_WORDS or type(text) is not str:
        return text
    if isinstance(value, (*_SEARCHED, Namespace)):
        return derived(text, value)
    return _make(text, ((len(text), LOST, OUTSIDE),))


def is_traced(value: Any) -> bool:
    """Whether there is text of a known or lost author in a value."""
    if type(value) is str:
        return False
    return bool(authors_of(value))


def joined_if_traced(pieces: Iterable[Any]) -> str:
    """`joined`, or a plain str where no piece has an origin: what a template makes of its own words alone."""
    texts = [piece if type(piece) is str else as_text(piece) for piece in pieces]
    for text in texts:
        if type(text) is not str:
            return joined(texts)
    return "".join(texts)


def derived(result: Any, *sources: Any) -> Any:
    """`result`, which was made of `sources` in a way that is not followed: by their one author, else LOST."""
    return _by_authors_of(sources, result, None) if type(result) is str else result


def to_json(value: Any, containers: Mapping[int, Origin], **options: Any) -> str:
    """`json.dumps` with the origin of what was dumped; `containers` are those of `trace_value`."""
    return _by_authors_of(value, json.dumps(value, **options), containers)


def numbered(number: Any, source: Any) -> Any:
    """A number that was made of `source`, by its one author."""
    authors = authors_of(source)
    author = next(iter(authors)) if len(authors) == 1 else None
    return trace_value(number, author, {}) if isinstance(author, Origin) and type(number) in (int, float) else number


def authors_of(value: Any, containers: Mapping[int, Origin] | None = None) -> set[Author]:
    """Who wrote the text in a value, the template's own words aside."""
    authors = set[Author]()
    _collect(value, authors, containers)
    return authors - {None}


def _by_authors_of(source: Any, text: str, containers: Mapping[int, Origin] | None) -> str:
    authors = authors_of(source, containers)
    if not authors:
        return text
    author = next(iter(authors)) if len(authors) == 1 else _common(authors)
    return _make(text, ((len(text), author, OUTSIDE),))


def _common(authors: set[Author]) -> Author:
    """One message's content where all authors are that message, else LOST."""
    messages = {author.message if isinstance(author, Origin) else author for author in authors}
    if len(messages) == 1 and all(isinstance(a, Origin) and a.part != "tools" for a in authors):
        (message,) = messages
        return Origin(message, "content")  # pyright: ignore[reportArgumentType]
    return LOST


def _collect(value: Any, authors: set[Author], containers: Mapping[int, Origin] | None) -> None:
    """Add the authors of all text in a value; containers made by `trace_value` are not searched."""
    if isinstance(value, Traced | TracedMarkup):
        authors.update(author for length, author, _ in value._runs if length)
    elif isinstance(value, Markup | bytes):
        authors.add(LOST)
    elif isinstance(value, _TracedInt | _TracedFloat):
        authors.add(value._origin)
    elif containers is not None and id(value) in containers:
        authors.add(containers[id(value)])
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(key, authors, containers)
            _collect(item, authors, containers)
    elif isinstance(value, Namespace):
        _collect(object.__getattribute__(value, "_Namespace__attrs"), authors, containers)
    elif isinstance(value, _SEARCHED):
        for item in value:
            _collect(item, authors, containers)


_OWN_WORDS = frozenset({int, float, bool, complex, type(None), range, Undefined})
"""Types of values whose text is the template's own."""
_SEARCHED = (list, tuple, set, frozenset, Mapping, KeysView, ValuesView, ItemsView)
"""Types of values that may hold texts, which are found there."""


def _in_place_of(old: str, new: str) -> str:
    """`new` where `old` stood: its own author's, or by the author of what it replaces, if only one of them has any."""
    return derived(str.__str__(new), old, new) if authors_of(old) else new


_CONVERSION = re.compile(r"%(?:\((?P<name>[^)]*)\))?(?P<form>[#0\- +]*[\d*]*(?:\.[\d*]*)?[hlL]?)(?P<kind>.)", re.DOTALL)


def percent(form: str, values: Any) -> str:
    """`form % values` with origins; a field with a width or another kind than %s has the author of its value."""
    whole = str.__mod__(form, values)
    remaining = list(values) if isinstance(values, tuple) else [values]
    pieces: list[Any] = []
    place = 0
    for match in _CONVERSION.finditer(form):
        pieces.append(form[place : match.start()])
        place = match.end()
        if match["kind"] == "%":
            pieces.append("%")
            continue
        if "*" in match["form"]:
            return derived(whole, form, values)
        named: Any = values
        value = named[match["name"]] if match["name"] is not None else remaining.pop(0)
        if match["kind"] == "s" and not match["form"]:
            pieces.append(as_text(value))
        else:
            pieces.append(derived(f"%{match['form']}{match['kind']}" % (value,), value))
    text = joined_if_traced([*pieces, form[place:]])
    return text if text == whole else derived(whole, form, values)


def formatted(formatter: string.Formatter, form: str, values: Sequence[Any], named: Mapping[str, Any]) -> str:
    """`str.format` with origins; a field with a conversion or a specification has the author of its value."""
    whole = formatter.vformat(str.__str__(form), values, named)
    pieces: list[Any] = []
    numbered = 0
    for literal, field, specification, conversion in formatter.parse(form):
        # The literal with its braces undoubled is no slice of `form`, so its author is that of what stands there.
        pieces.append(derived(literal, form))
        if field is None:
            continue
        if "{" in (specification or ""):
            return derived(whole, form, values, named)
        if not field or field[0] in ".[":
            field, numbered = f"{numbered}{field}", numbered + 1
        value, _ = formatter.get_field(field, values, named)
        if conversion or specification:
            text = formatter.vformat(f"{{0{'!' + conversion if conversion else ''}:{specification}}}", (value,), {})
            pieces.append(derived(str.__str__(text), value))
        else:
            pieces.append(as_text(value))
    text = joined_if_traced(pieces)
    return text if text == whole else derived(whole, form, values, named)
