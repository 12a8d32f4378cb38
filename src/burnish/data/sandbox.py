"""The Jinja environment that transformers renders chat templates in, and the same for text that carries its origins.

A template compiled in the second has a mark at both ends of each loop's body that says which message the pass is about.
Knows nothing of turns and tokens.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from types import BuiltinMethodType, MethodType
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_context
from markupsafe import Markup

from burnish.data.origin import (
    GENERATION_ENDS,
    GENERATION_STARTS,
    HERE,
    OUTSIDE,
    Pass,
    Traced,
    as_text,
    derived,
    enter,
    formatted,
    is_traced,
    joined,
    joined_if_traced,
    marked_up,
    numbered,
    percent,
    to_json,
)
from burnish.types import Origin


def compile_plain(source: str, day: date) -> jinja2.Template:
    """The template as transformers compiles it; `strftime_now` gives `day`. Raises TemplateSyntaxError."""
    return _with_flat_globals(_Environment(day).from_string(source))


def compile_traced(source: str, day: date) -> jinja2.Template:
    """The template for text with origins: its context needs a `Tracing` under TRACING. Raises TemplateSyntaxError."""
    environment = _TracedEnvironment(day)
    tree = environment.parse(source)
    _add_marks(tree)
    tree.set_environment(environment)
    template = environment.from_string(tree)
    # What the compiled template calls to join the operands of `~`, to print, and to escape.
    template.root_render_func.__globals__.update(
        str_join=joined_if_traced, str=as_text, escape=_TRACED_FILTERS["escape"], Markup=_TRACED_FILTERS["safe"]
    )
    return _with_flat_globals(template)


def _with_flat_globals(template: jinja2.Template) -> jinja2.Template:
    """Jinja keeps them as a ChainMap, of which every rendering makes a dict, item by item."""
    template.globals = dict(template.globals)
    return template


def parse(source: str, day: date) -> nodes.Template:
    """The template's syntax tree. Raises TemplateSyntaxError."""
    return _Environment(day).parse(source)


def has_generation_blocks(tree: nodes.Template) -> bool:
    """Whether the template marks what the model generates by `{% generation %}`."""
    return any(node.name == "_body" for node in tree.find_all(nodes.ExtensionAttribute))


TRACING = "burnish_tracing"
"""The variable under which a traced rendering's filters find its `Tracing`."""


class Tracing(NamedTuple):
    """Messages by identity, so that equal ones are not confused, and the origins of the row's lists and dicts."""

    numbers: Mapping[int, int]
    containers: Mapping[int, Origin]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`: renders its body, in a scope of its own as transformers does."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain class attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _PublicNamespace(Namespace):
    """`namespace()` without underscored names, which lead templates out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is positional only, so that it may be a name too
        for name in dict(*args[1:], **kwargs):
            _check_public(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the underscored name {name!r}")


class _PublicDict:
    """`dict()` and `dict.fromkeys()`, and nothing else of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox that transformers renders chat templates in, on the day `day`."""

    def __init__(self, day: date) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[self.generation_tag, jinja2.ext.loopcontrols]
        )
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.combine(day, time()).strftime(form),
            "dict": _PublicDict(),
            "namespace": _PublicNamespace,
        }

    generation_tag: type[jinja2.ext.Extension] = _GenerationTag

    def getattr(self, obj: Any, attribute: str) -> Any:
        # What the sandbox gives too, without its search and checks, which take most of a rendering's time.
        kind = type(obj)
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if attribute in _SAFE_ATTRIBUTES.get(kind, ()):
            return getattr(obj, attribute)
        if kind is _PublicNamespace:
            held = object.__getattribute__(obj, "_Namespace__attrs").get(attribute)
            if type(held) in _PLAIN_KINDS:
                return held
        return super().getattr(obj, attribute)


_METHODS = (BuiltinMethodType, MethodType)
_DICT_ATTRIBUTES = frozenset(dir(dict))
_PLAIN_KINDS = frozenset({str, Traced, bool, int, list, dict})
_STR_METHODS = frozenset(name for name in dir(str) if name[0] != "_") - {"format", "format_map"}
_SAFE_ATTRIBUTES: Mapping[type, frozenset[str]] = {
    str: _STR_METHODS,
    Traced: _STR_METHODS,
    LoopContext: frozenset(name for name in dir(LoopContext) if name[0] != "_"),
}


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


# Jinja's own filter escapes HTML.
def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# --- tracing ---


RECURSIVE = "recursive"
"""Stands first among what a recursive loop binds: a pass within a pass of it is about another message."""


@pass_context
def _begin_pass(context: Context, bound: Sequence[Any]) -> Pass:
    """Enter a pass of a loop that bound these values; a list with an index stands for that item of it."""
    tracing: Tracing = context.parent[TRACING]
    outer = HERE.now
    if outer.is_named and bound[0] != RECURSIVE:
        return enter(outer.message, outer, True)  # a loop within a message's turn writes that turn
    found = {_message_of(thing, tracing) for thing in bound} - {None}
    if len(found) == 1:
        (message,) = found
        return enter(None if message == _TOOL else message, outer, True)
    return enter(None, outer, False)


_TOOL = -1


def _message_of(thing: Any, tracing: Tracing) -> int | None:
    """The number of the message that a loop bound, _TOOL for a tool's schema, None for anything else."""
    if type(thing) is tuple and len(thing) == 2 and type(thing[0]) is list and isinstance(thing[1], int):
        items, index = thing
        thing = items[index] if -len(items) <= index < len(items) else None
    message = tracing.numbers.get(id(thing))
    if message is None and id(thing) in tracing.containers and tracing.containers[id(thing)].part == "tools":
        return _TOOL
    return message


@pass_context
def _end_pass(context: Context, _: Any) -> Pass:
    outer = HERE.now.parent
    assert outer is not None, "a pass ends that was not begun"
    HERE.now = outer
    return outer


@pass_context
def _traced_json(context: Context, value: Any, *arguments: Any, **options: Any) -> str:
    names = ("ensure_ascii", "indent", "separators", "sort_keys")
    options = {"ensure_ascii": False, **dict(zip(names, arguments, strict=False)), **options}
    return to_json(value, context.parent[TRACING].containers, **options)


class _TracedGenerationTag(jinja2.ext.Extension):
    """`{% generation %}` with a mark at both ends."""

    tags = {"generation"}  # noqa: RUF012 (as above)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marked = [_filtered("burnish_generation", nodes.Const(True)), *body]
        return nodes.Scope([*marked, _filtered("burnish_generation", nodes.Const(False))]).set_lineno(line)


def _following(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose text has, where it lost its origins, the author of what went in."""

    @functools.wraps(function)
    def follow(*arguments: Any, **options: Any) -> Any:
        return derived(function(*arguments, **options), *arguments, *options.values())

    return follow


def _marking_up(function: Callable[[Any], Markup]) -> Callable[[Any], Any]:
    """A filter that makes Markup."""

    @functools.wraps(function)
    def mark_up(value: Any) -> Any:
        return value if type(value) is Pass else marked_up(function(value), value)

    return mark_up


def _join(evaluation: Any, values: Iterable[Any], between: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        return derived(_JINJA_JOIN(evaluation, values, between, attribute), *values)
    pieces = [as_text(value) for value in values]
    separated: list[Any] = [as_text(between)] * max(2 * len(pieces) - 1, 0)
    separated[::2] = pieces
    return joined_if_traced(separated)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if isinstance(text, Markup):
        return FILTERS["indent"](text, width, first, blank)
    indention = width if isinstance(width, str) else " " * width
    lines = joined_if_traced((text, "\n")).splitlines()
    pieces = [indention] if first else []
    for number, line in enumerate(lines):
        pieces += ["\n" if number else "", indention if number and (line or blank) else "", line]
    return joined_if_traced(pieces)


def _format(value: str, *arguments: Any, **named: Any) -> str:
    if arguments and named:
        return FILTERS["format"](value, *arguments, **named)  # raises what Jinja raises
    return percent(value, named or arguments)


def _numbering(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes a number."""

    @functools.wraps(function)
    def number(value: Any, *arguments: Any, **options: Any) -> Any:
        return numbered(function(value, *arguments, **options), value)

    return number


_JINJA_JOIN = FILTERS["join"]
_FOLLOWED = (
    "capitalize", "center", "filesizeformat", "pprint", "replace", "striptags",
    "title", "truncate", "urlencode", "urlize", "wordwrap", "xmlattr",
)  # fmt: skip

_TRACED_FILTERS: Mapping[str, Callable[..., Any]] = {
    **{name: _following(FILTERS[name]) for name in _FOLLOWED},
    **{name: _marking_up(FILTERS[name]) for name in ("e", "escape", "forceescape", "safe")},
    **{name: _numbering(FILTERS[name]) for name in ("int", "float", "abs", "round")},
    "string": as_text,
    "format": _format,
    "join": functools.wraps(_JINJA_JOIN)(_join),
    "indent": _indent,
}
"""Filters by Jinja's names, with origins; the others keep them as they are."""


class _TracedEnvironment(_Environment):
    """The same sandbox for text that carries its origin."""

    generation_tag = _TracedGenerationTag
    concat = staticmethod(joined)
    intercepted_binops = frozenset({"%"})

    def __init__(self, day: date) -> None:
        super().__init__(day)
        marks = {"burnish_begin": _begin_pass, "burnish_end": _end_pass, "burnish_generation": _generation_mark}
        self.filters |= {**_TRACED_FILTERS, **marks, "tojson": _traced_json}

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Methods of text are safe, and most of what templates call; they see no variables of Jinja's.
        if isinstance(__obj, _METHODS) and isinstance(__obj.__self__, str):
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            if type(__obj.__self__) is not str:
                return __obj(*args, **kwargs)
            return _traced_method(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if type(result) is str and isinstance(__obj, BuiltinMethodType) and isinstance(__obj.__self__, bytes):
            return Traced(result)  # nothing follows bytes
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str) and not isinstance(left, Markup):
            return percent(left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is None:
            return None
        form, formatter = value.__self__, SandboxedFormatter(self)
        if value.__name__ == "format_map":
            return lambda named, /: formatted(formatter, form, (), named)
        return lambda *values, **named: formatted(formatter, form, values, named)


@pass_context
def _generation_mark(context: Context, is_start: bool) -> Traced:
    # It takes the context so that Jinja does not work it out while it compiles.
    return Traced("", ((0, GENERATION_STARTS if is_start else GENERATION_ENDS, OUTSIDE),))


def _traced_method(method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A method of the template's own text; where a row's text goes in, the result says so."""
    if method.__name__ == "join" and args:
        args = (list(args[0]),)
    if is_traced((*args, *kwargs.values())):
        words = Traced(method.__self__, ((len(method.__self__), None, HERE.now),))
        return getattr(words, method.__name__)(*args, **kwargs)
    return method(*args, **kwargs)


_WRITING = (nodes.Output, nodes.AssignBlock, nodes.CallBlock, nodes.FilterBlock, nodes.Add, nodes.Concat, nodes.Mod)
"""What puts text beside other text: a loop without it needs no marks."""


def _add_marks(tree: nodes.Template) -> None:
    """Put a mark at both ends of every `for` body of `tree`, with what the loop binds."""
    for loop in list(tree.find_all(nodes.For)):
        if not any(isinstance(node, _WRITING) or any(node.find_all(_WRITING)) for node in loop.body):
            continue
        targets = [loop.target] if isinstance(loop.target, nodes.Name) else list(loop.target.find_all(nodes.Name))
        names = {target.name for target in targets}
        bound: list[nodes.Expr] = [nodes.Name(name, "load") for name in sorted(names)]
        indexed = {name: arg for name, arg in _items(loop.body) if _is_index(arg, names)}
        printed = [node for statement in loop.body for node in _outputs(statement)]
        several = {name for name, arg in _items(printed) if _is_reckoned(arg, names)}
        pairs = ((name, index) for name, index in indexed.items() if name not in several)
        bound += [nodes.Tuple([nodes.Name(name, "load"), index], "load") for name, index in pairs]
        if loop.recursive:
            bound.insert(0, nodes.Const(RECURSIVE))
        begin = _filtered("burnish_begin", nodes.Tuple(bound, "load"))
        loop.body = [begin, *_ending_marked(loop.body), _filtered("burnish_end", nodes.Const(None))]
        for node in loop.body:
            node.set_lineno(loop.lineno)


def _items(statements: Sequence[nodes.Node]) -> Iterator[tuple[str, nodes.Expr]]:
    """Each `name[index]` in them: the name and the index."""
    for statement in statements:
        for item in statement.find_all(nodes.Getitem):
            if isinstance(item.node, nodes.Name):
                yield item.node.name, item.arg


def _outputs(statement: nodes.Node) -> list[nodes.Node]:
    return [statement] if isinstance(statement, nodes.Output) else list(statement.find_all(nodes.Output))


def _is_index(node: nodes.Node, names: set[str]) -> bool:
    """Whether it is a loop's variable, or its `loop.index0`."""
    if isinstance(node, nodes.Getattr):
        return node.attr == "index0" and isinstance(node.node, nodes.Name) and node.node.name == "loop"
    return isinstance(node, nodes.Name) and node.name in names


def _is_reckoned(node: nodes.Node, names: set[str]) -> bool:
    """Whether it is reckoned from an index, as `i + 1`: a pass that prints such an item is about several messages."""
    parts = [*node.find_all(nodes.Name), *node.find_all(nodes.Getattr)]
    return not _is_index(node, names) and any(_is_index(part, names) for part in parts)


def _filtered(name: str, value: nodes.Expr) -> nodes.Output:
    return nodes.Output([nodes.Filter(value, name, [], [], None, None)])


def _ending_marked(body: list[nodes.Node]) -> list[nodes.Node]:
    """`body` with an end mark before each `continue` and `break` that leaves it."""
    marked: list[nodes.Node] = []
    for node in body:
        if isinstance(node, nodes.Continue | nodes.Break):
            marked.append(_filtered("burnish_end", nodes.Const(None)))
        for field, value in node.iter_fields():
            # What leaves an inner loop's own pass is marked with that loop; its `else` is no pass of it.
            is_of_loop = isinstance(node, nodes.For) and field == "body"
            if not is_of_loop and isinstance(value, list) and value and isinstance(value[0], nodes.Stmt):
                setattr(node, field, _ending_marked(value))
        marked.append(node)
    return marked
