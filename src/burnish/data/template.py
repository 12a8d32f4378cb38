"""A model's own chat template: rendered as transformers renders it, with the author of every character known.

The template runs on text that carries its origin (`origin.py`), and its syntax tree is marked so that each pass of a
loop names the message it is about. Knows characters only; which are trained is `turns.py`'s, tokens are `chat.py`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from jinja2 import nodes

from burnish.data.origin import HERE, OUTSIDE, Author, Generation, Pass, Traced, joined, trace_text, trace_value
from burnish.data.origin import Run as TracedRun
from burnish.data.sandbox import TRACING, Tracing, compile_plain, compile_traced, has_generation_blocks, parse
from burnish.types import Conversation, Message, Origin, RowError, UserError

Variables = Mapping[str, Any]


class Run(NamedTuple):
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
    placed: frozenset[int] = frozenset()
    """The messages whose turns are known with the template's own words in them; of others the texts alone are."""
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
    def render(self, conversation: Conversation, kwargs: Variables, **more: Any) -> str:
        """The text alone; `more` is arguments that win over `kwargs`. Raises RowError for what is refused."""

    @abstractmethod
    def trace(self, conversation: Conversation, kwargs: Variables) -> Rendering:
        """The rendering and the author of every character. Raises RowError for what is refused."""

    arguments: tuple[str, ...] = ()
    """The names of the arguments that it reads, as far as they are known."""

    @abstractmethod
    def may_write(self, token: str) -> bool:
        """Whether a special token may be among its own words."""

    def generation_prompt(self, conversation: Conversation, number: int, kwargs: Variables, before: str) -> str:
        """What stands behind `before`, the text of the messages before `number`, when the model is asked for that one.

        Where that history is written otherwise when it comes last, it is what `add_generation_prompt` adds. Raises
        RowError where the history is refused, or changes when asked for the prompt.
        """
        return self._prompt_behind(_history(conversation, number), kwargs, before)

    def prompt(self, conversation: Conversation, number: int, kwargs: Variables) -> str:
        """The whole prompt that asks the model for message `number`. Raises RowError where the history is refused."""
        return self.render(_history(conversation, number), kwargs, add_generation_prompt=True)

    def _prompt_behind(self, history: Conversation, kwargs: Variables, before: str | None) -> str:
        opened = self.render(history, kwargs, add_generation_prompt=True)
        if before is not None and opened.startswith(before):
            return opened[len(before) :]
        closed = self.render(history, kwargs)
        if not opened.startswith(closed):
            raise RowError(
                "cannot be sure what to train: the chat template writes the history otherwise when asked for a turn"
            )
        return opened[len(closed) :]


def _history(conversation: Conversation, number: int) -> Conversation:
    return replace(conversation, messages=conversation.messages[:number])


class ChatTemplate(Template):
    """A compiled template; besides rows it sees `special_tokens` (bos_token, ...) and, by `strftime_now`, `day`."""

    def __init__(self, source: str, special_tokens: Variables, day: date) -> None:
        self._source = source
        self._special_tokens = special_tokens
        try:
            self._plain, self._traced = compile_plain(source, day), compile_traced(source, day)
            tree = parse(source, day)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None
        self.arguments = tuple(sorted(jinja2.meta.find_undeclared_variables(tree) - _GIVEN - set(special_tokens)))
        self._prompt_reads = _prompt_reads(tree)
        self._prompts: dict[tuple[str, ...], str] = {}
        self._has_blocks = has_generation_blocks(tree)

    def render(self, conversation: Conversation, kwargs: Variables, **more: Any) -> str:
        """The text that `apply_chat_template(tokenize=False)` gives. Raises RowError where the template refuses."""
        messages = [message_dict(message) for message in conversation.messages]
        # The template is the model's code at work on the user's data, so whatever it raises is about this row.
        try:
            return self._plain.render(self._variables(messages, conversation.tools, kwargs, more))
        except jinja2.TemplateError as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from error
        except Exception as error:
            raise RowError(f"the chat template fails on the conversation: {type(error).__name__}: {error}") from error

    def trace(self, conversation: Conversation, kwargs: Variables) -> Rendering:
        """The rendering and the author of every character. Raises RowError where the template refuses."""
        try:
            return self._traced_rendering(conversation, kwargs)
        except RecursionError:
            raise RowError("the row holds values that are nested deeper than they can be followed") from None
        except RowError:
            raise
        except Exception:
            self.render(conversation, kwargs)  # tells in the template's own words what fails there too
            raise  # what fails only here is a fault of ours

    def _traced_rendering(self, conversation: Conversation, kwargs: Variables) -> Rendering:
        containers: dict[int, Origin] = {}
        messages = [_traced_message(number, m, containers) for number, m in enumerate(conversation.messages)]
        tools = conversation.tools
        if tools is not None:
            tools = trace_value(tools, Origin(None, "tools"), containers)
        numbers = {id(message): number for number, message in enumerate(messages)}
        variables = self._variables(messages, tools, kwargs, {TRACING: Tracing(numbers, containers)})
        HERE.now = OUTSIDE
        text = joined(self._traced.root_render_func(self._traced.new_context(variables)))
        passes = {in_pass for _, _, in_pass in text._runs}
        placed = frozenset(in_pass.message for in_pass in passes if in_pass.message is not None)
        return Rendering(str.__str__(text), _resolve(text._runs), placed, self._has_blocks)

    def generation_prompt(self, conversation: Conversation, number: int, kwargs: Variables, before: str) -> str:
        if self._prompt_reads is None:
            return super().generation_prompt(conversation, number, kwargs, before)
        key = tuple(repr(kwargs.get(name)) for name in self._prompt_reads)
        if key not in self._prompts:
            self._prompts[key] = self._prompt_behind(conversation, kwargs, None)
        # A template may close the last message of a history otherwise than one amid it. Such a closing cannot be
        # taken for the start of a constant prompt; of an empty prompt it is all that there is.
        return self._prompts[key] or super().generation_prompt(conversation, number, kwargs, before)

    def may_write(self, token: str) -> bool:
        return token in self._source

    def _variables(
        self, messages: Sequence[Variables], tools: Sequence[Variables] | None, kwargs: Variables, more: Variables
    ) -> dict[str, Any]:
        values = {"messages": messages, "tools": None if tools is None else list(tools), "documents": None}
        return {**self._special_tokens, **values, "add_generation_prompt": False, **kwargs, **more}


_GIVEN = {
    *("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"),
    *("raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner"),
}
"""Variables that every template has, or that are no arguments."""


def _resolve(pieces: Sequence[TracedRun]) -> tuple[Run, ...]:
    """Runs of a whole rendering: passes become the messages whose turns they write.

    A pass that its loop does not name is about the one message whose text it prints; the text of a message that stands
    in no such pass is in that message's own turn.
    """
    turns = _unnamed_turns(pieces)
    runs: list[Run] = []
    start = position = depth = 0
    last_turn: int | None = None
    last_origin: Origin | None = None
    last_generated = False
    last_author: Author = None
    last_pass: Pass | None = None
    for length, author, in_pass in pieces:
        if not length:
            if type(author) is Generation:
                depth += 1 if author.is_start else -1
                last_pass = None
            continue
        if in_pass is last_pass and author is last_author:
            position += length
            continue
        last_author, last_pass = author, in_pass
        turn, origin = in_pass.message, in_pass.own
        if not in_pass.is_named and turns:
            turn = turns.get(in_pass)
            origin = Origin(turn, "template")
        if turn is None and type(author) is Origin:
            turn = author.message
        if author is not None:
            origin = author if type(author) is Origin else None
        is_generated = depth > 0
        is_same = origin is last_origin or origin == last_origin
        if not is_same or turn != last_turn or is_generated is not last_generated or not position:
            if position:
                runs.append(Run(start, position, last_turn, last_origin, last_generated))
            start, last_turn, last_origin, last_generated = position, turn, origin, is_generated
        position += length
    if position:
        runs.append(Run(start, position, last_turn, last_origin, last_generated))
    if depth:
        raise RowError("cannot be sure what to train: the chat template cuts a {% generation %} block in two")
    return tuple(runs)


def _unnamed_turns(pieces: Sequence[TracedRun]) -> dict[Pass, int | None]:
    """The one message whose text stands in each pass that its loop does not name, None where there are several."""
    if all(in_pass.is_named or in_pass is OUTSIDE for in_pass in {in_pass for _, _, in_pass in pieces}):
        return {}
    found: dict[Pass, set[int | None]] = {}
    for length, author, in_pass in pieces:
        place: Pass | None = in_pass
        while length and type(author) is Origin and place is not None and place is not OUTSIDE and not place.is_named:
            found.setdefault(place, set()).add(author.message)
            place = place.parent
    return {place: next(iter(messages)) if len(messages) == 1 else None for place, messages in found.items()}


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
    end = reasoning_end(message)
    if end:
        thinking = (end, Origin(origin.message, "reasoning"), OUTSIDE)
        return Traced(content, (thinking, (len(content) - end, origin, OUTSIDE)))
    return trace_text(content, origin)


def reasoning_end(message: Message, text: str | None = None) -> int:
    """Characters of an assistant's content, or of a `text` of it, that are reasoning: up to `</think>`.

    0 where the row has reasoning beside the content.
    """
    text = message.content if text is None else text
    if message.role != "assistant" or message.reasoning is not None or _THINKING_ENDS not in text:
        return 0
    return text.index(_THINKING_ENDS) + len(_THINKING_ENDS)


_THINKING_ENDS = "</think>"


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
