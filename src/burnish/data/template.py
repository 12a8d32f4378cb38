"""A model's own chat template: rendered as transformers renders it, and with every message's place in the text known.

Places come from the template's syntax tree, not from a list of known templates: each `for` body gets a mark at both
ends that names the message bound to the loop variable. Knows characters only; tokens and weights are `chat.py`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from burnish.types import Conversation, Message, RowError, UserError

MARK = "\U0010fffd"
"""The last private-use character: stands before and after every mark, and nowhere in a row that can be traced."""

Variables = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Characters [start, end) of a rendering, written by one pass of a loop whose variable was message `message`.

    Numbers from the count of messages on stand for the conversation's tools.
    """

    message: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation and where its messages stand.

    `places` are the passes that wrote more than white space, by start. `texts` are the contents of messages that are
    no assistant's, as they stand in the rendering: anywhere, in a loop or not.
    """

    text: str
    places: tuple[Place, ...]
    texts: tuple[Place, ...]


class ChatTemplate:
    """A compiled template; besides rows it sees `special_tokens` (bos_token, ...) and, by `strftime_now`, `day`."""

    def __init__(self, source: str, special_tokens: Variables, day: date) -> None:
        environment = _environment(day)
        try:
            tree = environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None
        self._special_tokens = special_tokens
        self._prompt_reads = _prompt_reads(tree)
        self._prompts: dict[tuple[str, ...], str] = {}
        self._plain = environment.from_string(source)
        _add_marks(tree)
        tree.set_environment(environment)
        self._marked = environment.from_string(tree)

    def render(
        self, messages: Sequence[Variables], tools: Sequence[Variables] | None, kwargs: Variables, **more: Any
    ) -> str:
        """The text that `apply_chat_template(tokenize=False)` gives. Raises RowError where the template refuses."""
        return self._run(self._plain, messages, tools, {"add_generation_prompt": False, **kwargs, **more})

    def trace(self, conversation: Conversation, kwargs: Variables) -> Rendering:
        """The rendering and every message's place in it.

        Raises RowError where the template refuses the conversation, or where it works on a turn's text in a way that
        marks do not survive, so that places cannot be known.
        """
        plain = self.render([message_dict(m) for m in conversation.messages], conversation.tools, kwargs)
        if MARK in plain:
            raise RowError(f"the text holds {MARK!a}, a private-use character that burnish keeps for itself; remove it")
        messages = [_quoted(number, m) for number, m in enumerate(conversation.messages)]
        marker = _Marker([*messages, *(conversation.tools or ())])
        functions = {"burnish_begin": marker.begin, "burnish_end": marker.end}
        variables = {"add_generation_prompt": False, **kwargs, **functions}
        marked = self._run(self._marked, messages, conversation.tools, variables)
        return _read_marks(marked, plain, conversation.messages)

    def generation_prompt(
        self,
        messages: Sequence[Variables],
        number: int,
        tools: Sequence[Variables] | None,
        kwargs: Variables,
        before: str,
    ) -> str:
        """What stands behind `before`, the text of `messages[:number]`, when the model is asked for message `number`.

        Where the template writes that history otherwise when it comes last, it is what `add_generation_prompt` adds.
        Raises RowError where the template refuses the history, or changes it when asked for the prompt.
        """
        if self._prompt_reads is None:
            return self._prompt_behind(messages[:number], tools, kwargs, before)
        key = tuple(repr(kwargs.get(name)) for name in self._prompt_reads)
        if key not in self._prompts:
            self._prompts[key] = self._prompt_behind(messages, tools, kwargs, None)
        # A template may close the last message of a history otherwise than one amid it. Such a closing cannot be
        # taken for the start of a constant prompt; of an empty prompt it is all that there is.
        return self._prompts[key] or self._prompt_behind(messages[:number], tools, kwargs, before)

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

    def _run(
        self, template: jinja2.Template, messages: Sequence[Variables], tools: Any, variables: Mapping[str, Any]
    ) -> str:
        values = {"messages": messages, "tools": None if tools is None else list(tools), "documents": None}
        # The template is the model's code at work on the user's data, so whatever it raises is about this row.
        try:
            return template.render({**self._special_tokens, **values, **variables})
        except jinja2.TemplateError as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from error
        except Exception as error:
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
    def getattr(self, obj: Any, attribute: str) -> Any:
        # What the sandbox gives too, without its search for an attribute first, which takes most of a rendering's time.
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)


_DICT_ATTRIBUTES = frozenset(dir(dict))


def _environment(day: date) -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.combine(day, time()).strftime(form)

    # Jinja's own filter escapes HTML.
    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": _PublicDict(),
        "namespace": _PublicNamespace,
    }
    return environment


# --- marks ---


class _Marker:
    """Writes the marks of one rendering; knows messages and tools by identity, so that equal ones are not confused."""

    def __init__(self, objects: Sequence[Any]) -> None:
        self._numbers = {id(thing): number for number, thing in enumerate(objects)}
        self._open: list[int | None] = []

    def begin(self, *bound: Any) -> str:
        numbers = (self._numbers.get(id(thing)) for thing in bound)
        self._open.append(next((number for number in numbers if number is not None), None))
        return _mark("b", self._open[-1])

    def end(self) -> str:
        return _mark("e", self._open.pop())


def _mark(kind: str, number: int | None) -> str:
    return "" if number is None else f"{MARK}{kind}{number}{MARK}"


def _quoted(number: int, message: Message) -> dict[str, Any]:
    """The message with a mark amid its content where no assistant wrote it, to see where the template puts it.

    Amid, because templates look at how a text begins and ends, and strip it.
    """
    shaped = message_dict(message)
    if message.role != "assistant" and not _is_blank(message.content):
        middle = _middle(message.content)
        shaped["content"] = message.content[:middle] + _mark("q", number) + message.content[middle:]
    return shaped


def _middle(content: str) -> int:
    return len(content) - len(content.lstrip()) + len(content.strip()) // 2


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _add_marks(tree: nodes.Template) -> None:
    """Put a call at both ends of every `for` body of `tree`."""
    for loop in list(tree.find_all(nodes.For)):
        names = [loop.target] if isinstance(loop.target, nodes.Name) else loop.target.find_all(nodes.Name)
        bound: list[nodes.Expr] = [nodes.Name(name.name, "load") for name in names]
        loop.body = [_call("burnish_begin", bound), *_ending_marked(loop.body), _call("burnish_end", [])]
        for node in loop.body:
            node.set_lineno(loop.lineno)


def _call(function: str, arguments: list[nodes.Expr]) -> nodes.Output:
    return nodes.Output([nodes.Call(nodes.Name(function, "load"), arguments, [], None, None)])


def _ending_marked(body: list[nodes.Node]) -> list[nodes.Node]:
    """`body` with an end mark before each `continue` and `break` that leaves it."""
    marked: list[nodes.Node] = []
    for node in body:
        if isinstance(node, nodes.Continue | nodes.Break):
            marked.append(_call("burnish_end", []))
        elif not isinstance(node, nodes.For):
            for field, value in node.iter_fields():
                if isinstance(value, list) and value and isinstance(value[0], nodes.Stmt):
                    setattr(node, field, _ending_marked(value))
        marked.append(node)
    return marked


def _read_marks(marked: str, plain: str, messages: Sequence[Message]) -> Rendering:
    pieces = marked.split(MARK)
    if "".join(pieces[::2]) != plain or not all(re.fullmatch(r"[beq]\d+", mark) for mark in pieces[1::2]):
        raise RowError(
            "cannot be sure what to train: the chat template works on a turn's text after writing it, "
            "or decides by more of a text than its beginning and end"
        )
    places: list[Place] = []
    texts: list[Place] = []
    opened: list[tuple[int, int]] = []
    for kind, number, position in _positions(pieces):
        if kind == "b":
            opened.append((number, position))
        elif kind == "q":
            texts.append(_content_place(number, position, plain, messages[number].content))
        elif not opened or opened[-1][0] != number:
            raise RowError(
                "cannot be sure what to train: the chat template moves parts of a turn's text after writing it"
            )
        else:
            _, start = opened.pop()
            if not _is_blank(plain[start:position]):
                places.append(Place(number, start, position))
    if opened:
        raise RowError("cannot be sure what to train: the chat template cuts off a turn's text after writing it")
    return Rendering(plain, tuple(sorted(places, key=lambda p: (p.start, -p.end))), tuple(texts))


def _positions(pieces: list[str]) -> Iterator[tuple[str, int, int]]:
    """(kind, number, position in the text without marks) of each mark."""
    position = 0
    for text, mark in zip(pieces[::2], pieces[1::2], strict=False):
        position += len(text)
        yield mark[0], int(mark[1:]), position


def _content_place(number: int, position: int, text: str, content: str) -> Place:
    """Where the content around a mark stands, as far as the template kept it (it may strip, escape or cut it)."""
    middle = _middle(content)
    before = common_prefix(text[max(0, position - middle) : position][::-1], content[:middle][::-1])
    after = common_prefix(text[position : position + len(content) - middle], content[middle:])
    return Place(number, position - before, position + after)


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
