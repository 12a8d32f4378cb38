"""A model's own chat template: rendered as transformers renders it, with the author of every character known.

The template runs on text that carries its origin (`origin.py`), and its syntax tree is marked so that each pass of a
loop names the message it is about. Knows characters only; which are trained is `turns.py`'s, tokens are `chat.py`'s.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cached_property
from types import BuiltinMethodType, MethodType
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_context

from burnish.data.origin import (
    GENERATION_ENDS,
    GENERATION_STARTS,
    HERE,
    OUTSIDE,
    TRACED_FILTERS,
    Author,
    Generation,
    Lost,
    Pass,
    PassMark,
    Traced,
    derived,
    formatted,
    joined,
    joined_if_traced,
    to_json,
    trace_text,
    trace_value,
)
from burnish.types import Conversation, Message, Origin, Renderer, RowError, UserError

Variables = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """Characters [start, end) of a rendering that stand in one turn and have one author.

    `turn` is the message in whose turn they stand, None between turns; `origin` says who wrote them, None that nobody
    can tell. `is_generated` is whether they stand in a `{% generation %}` block.
    """

    start: int
    end: int
    turn: int | None
    origin: Origin | None
    is_generated: bool = False


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation and its runs, in order and without gaps."""

    text: str
    runs: tuple[Run, ...]
    has_blocks: bool = False
    """Whether the template marks what the model generates by `{% generation %}` blocks."""

    @cached_property
    def turns(self) -> dict[int | None, list[int]]:
        """The numbers of the runs of each turn."""
        found: dict[int | None, list[int]] = {}
        for number, run in enumerate(self.runs):
            found.setdefault(run.turn, []).append(number)
        return found


class Template(ABC):
    """What writes conversations as text: a chat template, or a function in its place."""

    @abstractmethod
    def render(
        self, messages: Sequence[Variables], tools: Sequence[Variables] | None, kwargs: Variables, **more: Any
    ) -> str:
        """The text alone; `more` is arguments that win over `kwargs`. Raises RowError for what is refused."""

    @abstractmethod
    def trace(self, conversation: Conversation, kwargs: Variables) -> Rendering:
        """The rendering and the author of every character. Raises RowError for what is refused."""

    @abstractmethod
    def may_write(self, token: str) -> bool:
        """Whether a special token may be among its own words."""

    def generation_prompt(
        self,
        messages: Sequence[Variables],
        number: int,
        tools: Sequence[Variables] | None,
        kwargs: Variables,
        before: str,
    ) -> str:
        """What stands behind `before`, the text of `messages[:number]`, when the model is asked for message `number`.

        Where that history is written otherwise when it comes last, it is what `add_generation_prompt` adds. Raises
        RowError where the history is refused, or changes when asked for the prompt.
        """
        return self._prompt_behind(messages[:number], tools, kwargs, before)

    def _prompt_behind(self, messages: Sequence[Variables], tools: Any, kwargs: Variables, before: str | None) -> str:
        opened = self.render(messages, tools, kwargs, add_generation_prompt=True)
        if before is not None and opened.startswith(before):
            return opened[len(before) :]
        closed = self.render(messages, tools, kwargs)
        if not opened.startswith(closed):
            raise RowError(
                "cannot be sure what to train: the chat template writes the history otherwise when asked for a turn"
            )
        return opened[len(closed) :]


class ChatTemplate(Template):
    """A compiled template; besides rows it sees `special_tokens` (bos_token, ...) and, by `strftime_now`, `day`."""

    def __init__(self, source: str, special_tokens: Variables, day: date) -> None:
        plain, traced = _Environment(day), _TracedEnvironment(day)
        try:
            tree = traced.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None
        self._source = source
        self._special_tokens = special_tokens
        self._prompt_reads = _prompt_reads(plain.parse(source))
        self._prompts: dict[tuple[str, ...], str] = {}
        self._has_blocks = any(node.name == "burnish_generation" for node in tree.find_all(nodes.Filter))
        _add_marks(tree)
        tree.set_environment(traced)
        self._plain = plain.from_string(source)
        self._traced = traced.from_string(tree)
        # What the compiled template joins operands of `~` with.
        self._traced.root_render_func.__globals__.update(str_join=joined_if_traced)

    def render(
        self, messages: Sequence[Variables], tools: Sequence[Variables] | None, kwargs: Variables, **more: Any
    ) -> str:
        """The text that `apply_chat_template(tokenize=False)` gives. Raises RowError where the template refuses."""
        variables = self._variables(messages, tools, {"add_generation_prompt": False, **kwargs, **more})
        with _refusals():
            return self._plain.render(variables)

    def trace(self, conversation: Conversation, kwargs: Variables) -> Rendering:
        """The rendering and the author of every character. Raises RowError where the template refuses."""
        containers: dict[int, Origin] = {}
        messages = [_traced_message(number, m, containers) for number, m in enumerate(conversation.messages)]
        tools = conversation.tools
        if tools is not None:
            tools = trace_value(tools, Origin(None, "tools"), containers)
        numbers = {id(message): number for number, message in enumerate(messages)}
        tracing = _Tracing(numbers, containers)
        variables = self._variables(messages, tools, {"add_generation_prompt": False, **kwargs, _TRACING: tracing})
        HERE.now = OUTSIDE
        with _refusals():
            return self._read(self._traced.root_render_func(self._traced.new_context(variables)))

    def generation_prompt(
        self,
        messages: Sequence[Variables],
        number: int,
        tools: Sequence[Variables] | None,
        kwargs: Variables,
        before: str,
    ) -> str:
        if self._prompt_reads is None:
            return self._prompt_behind(messages[:number], tools, kwargs, before)
        key = tuple(repr(kwargs.get(name)) for name in self._prompt_reads)
        if key not in self._prompts:
            self._prompts[key] = self._prompt_behind(messages, tools, kwargs, None)
        # A template may close the last message of a history otherwise than one amid it. Such a closing cannot be
        # taken for the start of a constant prompt; of an empty prompt it is all that there is.
        return self._prompts[key] or self._prompt_behind(messages[:number], tools, kwargs, before)

    def may_write(self, token: str) -> bool:
        return token in self._source

    def _variables(self, messages: Sequence[Variables], tools: Any, variables: Variables) -> dict[str, Any]:
        values = {"messages": messages, "tools": None if tools is None else list(tools), "documents": None}
        return {**self._special_tokens, **values, **variables}

    def _read(self, outputs: Iterator[Any]) -> Rendering:
        """The outputs of a traced rendering, put together."""
        texts: list[str] = []
        pieces: list[tuple[int, Author, Pass]] = []
        now = OUTSIDE
        for output in outputs:
            kind = type(output)
            if kind is str:
                texts.append(output)
                pieces.append((len(output), None, now))
            elif kind is PassMark:
                now = output.entered
            elif kind is Traced:
                texts.append(output)
                if now is OUTSIDE:
                    pieces.extend(output._runs)
                else:
                    pieces.extend([run if run[2] is not OUTSIDE else (run[0], run[1], now) for run in output._runs])
            else:
                text = joined((output,))
                texts.append(text)
                pieces.extend(text._runs)  # pyright: ignore[reportAttributeAccessIssue] - joined text is Traced
        return Rendering("".join(texts), _resolve(pieces), self._has_blocks)


class FunctionTemplate(Template):
    """A renderer: a function of (messages, tools, kwargs) in place of a chat template."""

    def __init__(self, function: Renderer, name: str) -> None:
        self._function = function
        self._name = name

    def render(
        self, messages: Sequence[Variables], tools: Sequence[Variables] | None, kwargs: Variables, **more: Any
    ) -> str:
        variables = {"add_generation_prompt": False, **kwargs, **more}
        return "".join(text for text, _ in self._function(messages, tools, variables))

    def trace(self, conversation: Conversation, kwargs: Variables) -> Rendering:
        messages = [message_dict(message) for message in conversation.messages]
        texts: list[str] = []
        runs: list[Run] = []
        position = 0
        for text, origin in self._function(messages, conversation.tools, {"add_generation_prompt": False, **kwargs}):
            self._check(text, origin, len(messages))
            if text:
                texts.append(text)
                runs.append(Run(position, position + len(text), origin[0], Origin(*origin)))
                position += len(text)
        return Rendering("".join(texts), tuple(runs))

    def may_write(self, token: str) -> bool:
        return True

    def _check(self, text: Any, origin: Any, num_messages: int) -> None:
        parts = ("content", "reasoning", "tool_calls", "tools", "template")
        if not isinstance(text, str) or not isinstance(origin, tuple) or len(origin) != 2 or origin[1] not in parts:
            raise UserError(
                f"data.renderer={self._name} gives {(text, origin)!r}; it must give (text, Origin(message, part)) with "
                f"a part of {', '.join(parts)}"
            )
        if origin[0] is not None and not 0 <= origin[0] < num_messages:
            raise UserError(
                f"data.renderer={self._name} names message {origin[0]} of {num_messages}; it must be 0 to "
                f"{num_messages - 1}, or None between turns"
            )


RENDERERS = {"deepseek_v32": "burnish.data.deepseek_v32.render"}
"""The renderers that burnish brings, by their names in a recipe."""


def load_renderer(name: str) -> Renderer:
    """The function at a dotted path, or the one that burnish brings. Raises UserError where there is none."""
    path = RENDERERS.get(name, name)
    module, _, attribute = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"data.renderer={name}: {error}; name a function by its dotted path, such as my_module.render"
        ) from None
    if not callable(function):
        raise UserError(
            f"data.renderer={name} is no function; known ones are {', '.join(RENDERERS)}, or give a dotted path, such "
            "as my_module.render"
        )
    return cast(Renderer, function)


def _resolve(pieces: Sequence[tuple[int, Author, Pass]]) -> tuple[Run, ...]:
    """Runs of a whole rendering: passes become the messages whose turns they write.

    A pass that its loop does not name is about the one message whose text it prints; the text of a message that stands
    in no such pass is in that message's own turn.
    """
    found: dict[Pass, set[int | None]] = {}
    for length, author, in_pass in pieces:
        if length and in_pass is not OUTSIDE and not in_pass.is_named and isinstance(author, Origin):
            place: Pass | None = in_pass
            while place is not None and place is not OUTSIDE and not place.is_named:
                found.setdefault(place, set()).add(author.message)
                place = place.parent
    turns = {place: next(iter(messages)) if len(messages) == 1 else None for place, messages in found.items()}
    runs: list[Run] = []
    position = depth = 0
    last: tuple[int | None, Origin | None, bool] | None = None
    for length, author, in_pass in pieces:
        if not length:
            if type(author) is Generation:
                depth += 1 if author.is_start else -1
            continue
        turn = in_pass.message if in_pass.is_named else turns.get(in_pass)
        if type(author) is Origin:
            if turn is None and not in_pass.is_named:
                turn = author.message
            origin = author
        else:
            origin = None if type(author) is Lost else Origin(turn, "template")
        key = (turn, origin, depth > 0)
        if key == last:
            runs[-1] = Run(runs[-1].start, position + length, *key)
        else:
            runs.append(Run(position, position + length, *key))
            last = key
        position += length
    if depth:
        raise RowError("cannot be sure what to train: the chat template cuts a {% generation %} block in two")
    return tuple(runs)


class _refusals:
    """Within, what a template raises is about the row: it is the model's code at work on the user's data."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, jinja2.TemplateError):
            raise RowError(f"the chat template refuses the conversation: {error}") from error
        if isinstance(error, Exception) and not isinstance(error, RowError):
            raise RowError(f"the chat template fails on the conversation: {type(error).__name__}: {error}") from error


def message_dict(message: Message) -> dict[str, Any]:
    """A message in the shape that chat templates expect; keys without a value are left out."""
    shaped: dict[str, Any] = {**message.extra, "role": message.role, "content": message.content}
    if message.reasoning is not None:
        # gpt-oss reads `thinking`; transformers passes both.
        shaped["reasoning_content"] = shaped["thinking"] = message.reasoning
    if message.tool_calls:
        shaped["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            | ({} if call.id is None else {"id": call.id})
            for call in message.tool_calls
        ]
    if message.name is not None:
        shaped["name"] = message.name
    if message.tool_call_id is not None:
        shaped["tool_call_id"] = message.tool_call_id
    return shaped


def _traced_message(number: int, message: Message, containers: dict[int, Origin]) -> dict[str, Any]:
    """`message_dict` with origins; keys and the role, by which templates decide, are the template's own words."""
    content = Origin(number, "content")
    shaped = message_dict(message)
    for key, value in shaped.items():
        if key == "content":
            shaped[key] = _traced_content(message, content)
        elif key == "tool_calls":
            calls = [dict(call) for call in value]
            origin = Origin(number, "tool_calls")
            for call in calls:
                for part in ("function", "id"):
                    if part in call:
                        call[part] = trace_value(call[part], origin, containers)
                containers[id(call)] = origin
            containers[id(calls)] = origin
            shaped[key] = calls
        elif key in ("reasoning_content", "thinking"):
            shaped[key] = trace_text(value, Origin(number, "reasoning"))
        elif key != "role":
            shaped[key] = trace_value(value, content, containers)
    return shaped


def _traced_content(message: Message, origin: Origin) -> str:
    """The content; an assistant's up to `</think>` is reasoning, where the row has no reasoning beside it."""
    content = message.content
    if message.role == "assistant" and message.reasoning is None and _THINKING_ENDS in content:
        end = content.index(_THINKING_ENDS) + len(_THINKING_ENDS)
        thinking = (end, Origin(origin.message, "reasoning"), OUTSIDE)
        return Traced(content, (thinking, (len(content) - end, origin, OUTSIDE)))
    return trace_text(content, origin)


_THINKING_ENDS = "</think>"

# --- the environment: what transformers' `_compile_jinja_template` sets up ---


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
        # What the sandbox gives too, without its search for an attribute first, which takes most of a rendering's time.
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)


_DICT_ATTRIBUTES = frozenset(dir(dict))


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

_TRACING = "burnish_tracing"
"""The variable under which a traced rendering's filters find its `_Tracing`."""


@dataclass(frozen=True, slots=True)
class _Tracing:
    """Messages by identity, so that equal ones are not confused, and the origins of the row's lists and dicts."""

    numbers: Mapping[int, int]
    containers: Mapping[int, Origin]


@pass_context
def _begin_pass(context: Context, bound: Sequence[Any]) -> PassMark:
    """Enter a pass of a loop that bound these values; a list with an index stands for that item of it."""
    tracing: _Tracing = context.parent[_TRACING]
    outer = HERE.now
    message, is_named = outer.message, outer.is_named
    for thing in bound:
        if type(thing) is tuple and len(thing) == 2 and type(thing[0]) is list and isinstance(thing[1], int):
            items, index = thing
            thing = items[index] if -len(items) <= index < len(items) else None
        number = tracing.numbers.get(id(thing))
        if number is not None:
            message, is_named = number, True
            break
        if tracing.containers.get(id(thing), _NO_TOOL).part == "tools":
            message, is_named = None, True
            break
    HERE.now = Pass(message, outer, is_named)
    return _pass_mark(HERE.now)


_NO_TOOL = Origin(None, "template")


@pass_context
def _end_pass(context: Context, _: Any) -> PassMark:
    outer = HERE.now.parent
    assert outer is not None, "a pass ends that was not begun"
    HERE.now = outer
    return _pass_mark(outer)


def _pass_mark(entered: Pass) -> PassMark:
    mark = PassMark()
    mark.entered = entered
    return mark


@pass_context
def _traced_json(context: Context, value: Any, *arguments: Any, **options: Any) -> str:
    names = ("ensure_ascii", "indent", "separators", "sort_keys")
    options = {"ensure_ascii": False, **dict(zip(names, arguments, strict=False)), **options}
    return to_json(value, context.parent[_TRACING].containers, **options)


def _generation_mark(is_start: bool) -> Traced:
    return Traced("", ((0, GENERATION_STARTS if is_start else GENERATION_ENDS, OUTSIDE),))


class _TracedGenerationTag(jinja2.ext.Extension):
    """`{% generation %}` with a mark at both ends."""

    tags = {"generation"}  # noqa: RUF012 (as above)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marked = [_filtered("burnish_generation", nodes.Const(True)), *body]
        return nodes.Scope([*marked, _filtered("burnish_generation", nodes.Const(False))]).set_lineno(line)


class _TracedEnvironment(_Environment):
    """The same sandbox for text that carries its origin."""

    generation_tag = _TracedGenerationTag
    concat = staticmethod(joined)
    intercepted_binops = frozenset({"%"})

    def __init__(self, day: date) -> None:
        super().__init__(day)
        marks = {"burnish_begin": _begin_pass, "burnish_end": _end_pass, "burnish_generation": _generation_filter}
        self.filters |= {**TRACED_FILTERS, **marks, "tojson": _traced_json}

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Methods of text are safe, and most of what templates call; they see no variables of Jinja's.
        if isinstance(__obj, BuiltinMethodType | MethodType) and isinstance(__obj.__self__, str):
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            if type(__obj.__self__) is not str:
                return __obj(*args, **kwargs)
            return _traced_method(__obj, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        result = super().call_binop(context, operator, left, right)
        return derived(result, left, right) if type(result) is str else result

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is None:
            return None
        form, formatter = value.__self__, SandboxedFormatter(self)
        if value.__name__ == "format_map":
            return lambda named, /: formatted(formatter, form, (), named)
        return lambda *values, **named: formatted(formatter, form, values, named)


@pass_context
def _generation_filter(context: Context, is_start: bool) -> Traced:
    return _generation_mark(is_start)


def _traced_method(method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A method of the template's own text; where a row's text goes in, the result says so."""
    if method.__name__ == "join" and args:
        args = (list(args[0]),)
    involved = list(args[0]) if method.__name__ == "join" and args else args
    if any(type(value) is Traced for value in involved):
        return getattr(Traced(method.__self__, ((len(method.__self__), None, HERE.now),)), method.__name__)(
            *args, **kwargs
        )
    return method(*args, **kwargs)


def _add_marks(tree: nodes.Template) -> None:
    """Put a mark at both ends of every `for` body of `tree`, with what the loop binds."""
    for loop in list(tree.find_all(nodes.For)):
        targets = [loop.target] if isinstance(loop.target, nodes.Name) else list(loop.target.find_all(nodes.Name))
        names = {target.name for target in targets}
        bound: list[nodes.Expr] = [nodes.Name(name, "load") for name in sorted(names)]
        indexed = {
            item.node.name: item.arg
            for statement in loop.body
            for item in statement.find_all(nodes.Getitem)
            if isinstance(item.node, nodes.Name) and _is_index(item.arg, names)
        }
        bound += [nodes.Tuple([nodes.Name(name, "load"), index], "load") for name, index in indexed.items()]
        begin = _filtered("burnish_begin", nodes.Tuple(bound, "load"))
        loop.body = [begin, *_ending_marked(loop.body), _filtered("burnish_end", nodes.Const(None))]
        for node in loop.body:
            node.set_lineno(loop.lineno)


def _is_index(node: nodes.Node, names: set[str]) -> bool:
    """Whether it is a loop's variable, or its `loop.index0`."""
    if isinstance(node, nodes.Getattr):
        return node.attr == "index0" and isinstance(node.node, nodes.Name) and node.node.name == "loop"
    return isinstance(node, nodes.Name) and node.name in names


def _filtered(name: str, value: nodes.Expr) -> nodes.Output:
    return nodes.Output([nodes.Filter(value, name, [], [], None, None)])


def _ending_marked(body: list[nodes.Node]) -> list[nodes.Node]:
    """`body` with an end mark before each `continue` and `break` that leaves it."""
    marked: list[nodes.Node] = []
    for node in body:
        if isinstance(node, nodes.Continue | nodes.Break):
            marked.append(_filtered("burnish_end", nodes.Const(None)))
        elif not isinstance(node, nodes.For):
            for field, value in node.iter_fields():
                if isinstance(value, list) and value and isinstance(value[0], nodes.Stmt):
                    setattr(node, field, _ending_marked(value))
        marked.append(node)
    return marked


def common_prefix(first: str, second: str) -> int:
    """Length of the longest common prefix, in characters."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i in range(shorter) if first[i] != second[i])


# --- the generation prompt ---


def _prompt_reads(tree: nodes.Template) -> tuple[str, ...] | None:
    """The variables that decide what `add_generation_prompt` adds; None where it may also depend on the messages.

    They are known where the whole use of `add_generation_prompt` is top-level `{% if add_generation_prompt %}` blocks
    that read nothing the template itself sets, and set nothing.
    """
    blocks = [node for node in tree.body if isinstance(node, nodes.If) and _is_prompt_name(node.test)]
    names = list(tree.find_all(nodes.Name))
    if any(block.elif_ or block.else_ for block in blocks):
        return None
    if len(blocks) != sum(_is_prompt_name(name) for name in names):
        return None
    inside = [name for block in blocks for statement in block.body for name in statement.find_all(nodes.Name)]
    own = {name.name for name in names if name.ctx != "load"} | {macro.name for macro in tree.find_all(nodes.Macro)}
    reads = {name.name for name in inside}
    if any(name.ctx != "load" for name in inside) or any(block.find(nodes.NSRef) for block in blocks):
        return None
    return None if reads & (own | {"messages", "tools", "documents"}) else tuple(sorted(reads))


def _is_prompt_name(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "add_generation_prompt"
