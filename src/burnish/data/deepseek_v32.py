"""DeepSeek-V3.2's prompts, which the model ships as code instead of a Jinja template (`data.renderer: deepseek_v32`).

Writes what the encoding published with the model writes, and says of each stretch who wrote it. Knows characters only,
and does not read answers back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.data.messages import to_tools
from burnish.types import Origin, RowError

Stretch = tuple[str, Origin]
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

_BAR = "\uff5c"  # FULLWIDTH VERTICAL LINE, which editors and linters take for the ASCII one
BOS = f"<{_BAR}begin▁of▁sentence{_BAR}>"
EOS = f"<{_BAR}end▁of▁sentence{_BAR}>"
USER = f"<{_BAR}User{_BAR}>"
ASSISTANT = f"<{_BAR}Assistant{_BAR}>"
THINK = "<think>"
END_THINK = "</think>"
DSML = f"{_BAR}DSML{_BAR}"

# With the blank lines of the model's own encoding and its test data; the copies in sglang 0.5.7 and vLLM lack them.
_BEFORE_SCHEMAS = (
    "## Tools\n\n"
    "You have access to a set of tools you can use to answer the user's question.\n"
    f'You can invoke functions by writing a "<{DSML}function_calls>" block like the following '
    "as part of your reply to the user:\n"
    f"<{DSML}function_calls>\n"
    f'<{DSML}invoke name="$FUNCTION_NAME">\n'
    f'<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f'<{DSML}invoke name="$FUNCTION_NAME2">\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f"</{DSML}function_calls>\n\n"
    "String and scalar parameters should be specified as is without any escaping or quotes, "
    'while lists and objects should use JSON format. The "string" attribute should be set to "true" '
    'for string type parameters and "false" for other types (numbers, booleans, arrays, objects).\n\n'
    "If the thinking_mode is enabled, then after function results you should strongly consider "
    "outputting a thinking block. Here is an example:\n\n"
    f"<{DSML}function_calls>\n"
    "...\n"
    f"</{DSML}function_calls>\n\n"
    "<function_results>\n"
    "...\n"
    "</function_results>\n\n"
    f"{THINK}...thinking about results{END_THINK}\n\n"
    "Here are the functions available in JSONSchema format:\n"
    "<functions>\n"
)
_AFTER_SCHEMAS = "\n</functions>\n"
_BEFORE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
_BEFORE_DEVELOPER = "\n\n# The user's message is: "


def render(messages: Messages, tools: Tools | None, kwargs: Mapping[str, Any]) -> list[Stretch]:
    """The conversation's text in stretches, none of them empty; see `burnish.types.Renderer`.

    Of `kwargs`, `thinking`, `enable_thinking` (true or false) and `thinking_mode` (thinking or chat) say the same: chat
    is the default, as servers have it. `drop_thinking` (default true) and `add_default_bos_token` (default true) are
    the published encoding's, `add_generation_prompt` (default false) is ours: that encoding always ends a prompt with
    the next assistant turn's header. The header stands in the assistant's turn, or in none where no assistant answers.

    In chat mode no reasoning is written; in thinking mode that of turns behind the last user or developer message is,
    whatever `drop_thinking` says. `tools` stand behind the text of a first system message, else before all messages;
    system and developer messages may bring `tools` and a `response_format` of their own.

    Raises RowError for unknown or contradicting kwargs and for what the published encoding refuses: tool results
    without a call, an empty developer message, in thinking mode an answer behind the last user message that neither
    reasons nor calls, or with `drop_thinking` a developer message before it.
    """
    options = _options(kwargs)
    last_user = max((i for i, m in enumerate(messages) if m["role"] in ("user", "developer")), default=-1)
    stretches: list[Stretch] = []
    if options.bos:
        stretches.append((BOS, Origin(None, "template")))
    in_system = bool(messages) and messages[0]["role"] == "system"
    if tools and not in_system:
        stretches += _schemas(tools, None)
    for number, message in enumerate(messages):
        thinks = options.thinking and number >= last_user
        if message["role"] == "developer" and options.thinking and options.drop_thinking and number < last_user:
            raise RowError(
                f"messages[{number}]: in thinking mode the encoding has no developer message before the last user "
                "message; set data.chat_template_kwargs.drop_thinking: false, or make it a user message"
            )
        stretches += _turn(messages, number, tools if in_system and number == 0 else None, thinks)
        is_last = number == len(messages) - 1
        if not is_last or options.generation_prompt:
            answered = not is_last and messages[number + 1]["role"] == "assistant"
            origin = Origin(number + 1 if answered else None, "template")
            stretches.append((_header(messages, number, thinks), origin))
    return [(text, origin) for text, origin in stretches if text]


# --- arguments ---


@dataclass(frozen=True, slots=True)
class _Options:
    thinking: bool
    drop_thinking: bool
    bos: bool
    generation_prompt: bool


_SAYS = {
    "thinking": {True: True, False: False},
    "enable_thinking": {True: True, False: False},
    "thinking_mode": {"thinking": True, "chat": False},
    "drop_thinking": {True: True, False: False},
    "add_default_bos_token": {True: True, False: False},
    "add_generation_prompt": {True: True, False: False},
}
"""Every argument, its values and what they say. Null says nothing: a column of rows holds it for absent ones."""


def _options(kwargs: Mapping[str, Any]) -> _Options:
    said: dict[str, bool] = {}
    for name, value in kwargs.items():
        if value is None:
            continue
        if name not in _SAYS:
            raise RowError(
                f"chat_template_kwargs.{name}={value!r}: deepseek_v32 does not know {name}; it knows {', '.join(_SAYS)}"
            )
        if not isinstance(value, bool | str) or value not in _SAYS[name]:
            known = " or ".join(str(k).lower() for k in _SAYS[name])
            raise RowError(f"chat_template_kwargs.{name}={value!r} must be {known}")
        said[name] = _SAYS[name][value]
    modes = [name for name in ("thinking", "enable_thinking", "thinking_mode") if name in said]
    if len({said[name] for name in modes}) > 1:
        values = ", ".join(f"{name}={kwargs[name]!r}" for name in modes)
        raise RowError(f"chat_template_kwargs: {values} contradict each other; keep one")
    return _Options(
        thinking=any(said[name] for name in modes),
        drop_thinking=said.get("drop_thinking", True),
        bos=said.get("add_default_bos_token", True),
        generation_prompt=said.get("add_generation_prompt", False),
    )


# --- turns ---


def _turn(messages: Messages, number: int, tools: Tools | None, thinks: bool) -> Iterator[Stretch]:
    """Message `number` without the header of the turn that follows; `tools` are the row's, where it is to show them."""
    message = messages[number]
    text = message.get("content") or ""
    content, template = Origin(number, "content"), Origin(number, "template")
    match message["role"]:
        case "system":
            yield text, content
            yield from _instructions(message, number, tools)
        case "user":
            yield USER, template
            yield text, content
        case "developer":
            if not text:
                raise RowError(f"messages[{number}]: a developer message needs text")
            yield USER, template
            yield from _instructions(message, number, tools)
            yield _BEFORE_DEVELOPER, template
            yield text, content
        case "tool":
            order, count = _answered_call(messages, number)
            yield "\n\n<function_results>" if order == 1 else "", template
            yield "\n<result>", template
            yield text, content
            yield "</result>", template
            yield "\n</function_results>" if order == count else "", template
        case "assistant":
            calls = message.get("tool_calls") or ()
            if thinks:
                yield from _reasoning(message, number)
            yield text, content
            if calls:
                yield from _calls(calls, number)
            yield EOS, template
        case role:
            raise RowError(
                f"messages[{number}]: deepseek_v32 has no role {role!r}; "
                "its roles are system, developer, user, assistant and tool"
            )


def _header(messages: Messages, number: int, thinks: bool) -> str:
    """What the encoding writes behind message `number` to ask for the assistant; nothing behind most messages."""
    start = THINK if thinks else END_THINK
    match messages[number]["role"]:
        case "user" | "developer":
            return ASSISTANT + start
        case "tool":
            order, count = _answered_call(messages, number)
            return f"\n\n{start}" if order == count else ""
        case _:
            return ""


def _instructions(message: Mapping[str, Any], number: int, tools: Tools | None) -> Iterator[Stretch]:
    own = to_tools(message.get("tools"), f"messages[{number}].tools")
    if own and tools:
        raise RowError(f"tools stand both beside the messages and in messages[{number}]; keep one")
    shown = own or tools
    if shown:
        yield from _schemas(shown, number)
    if message.get("response_format"):
        yield f"\n\n{_BEFORE_FORMAT}", Origin(number, "template")
        yield _json(message["response_format"]), Origin(number, "content")


def _schemas(tools: Tools, number: int | None) -> Iterator[Stretch]:
    template = Origin(number, "template")
    yield f"\n\n{_BEFORE_SCHEMAS}", template
    yield "\n".join(_json(tool["function"]) for tool in tools), Origin(number, "tools")
    yield _AFTER_SCHEMAS, template


def _reasoning(message: Mapping[str, Any], number: int) -> Iterator[Stretch]:
    reasoning = message.get("reasoning_content") or ""
    if not reasoning and not message.get("tool_calls"):
        raise RowError(
            f"messages[{number}]: in thinking mode an answer behind the last user message needs reasoning or tool "
            "calls; give it reasoning_content, or set data.chat_template_kwargs.thinking: false"
        )
    yield reasoning, Origin(number, "reasoning")
    yield END_THINK, Origin(number, "template")


def _calls(calls: Sequence[Mapping[str, Any]], number: int) -> Iterator[Stretch]:
    template, written = Origin(number, "template"), Origin(number, "tool_calls")
    yield f"\n\n<{DSML}function_calls>\n", template
    for call in calls:
        yield f'<{DSML}invoke name="', template
        yield call["function"]["name"], written
        yield '">\n', template
        for order, (name, value) in enumerate(call["function"]["arguments"].items()):
            is_text = isinstance(value, str)
            yield "\n" if order else "", template
            yield f'<{DSML}parameter name="', template
            yield name, written
            yield f'" string="{"true" if is_text else "false"}">', template
            yield value if is_text else _json(value), written
            yield f"</{DSML}parameter>", template
        yield f"\n</{DSML}invoke>\n", template
    yield f"</{DSML}function_calls>", template


def _answered_call(messages: Messages, number: int) -> tuple[int, int]:
    """Which of its assistant's calls, from 1, tool message `number` answers by its place, and how many there are."""
    caller = number - 1
    while caller >= 0 and messages[caller]["role"] == "tool":
        caller -= 1
    is_assistant = caller >= 0 and messages[caller]["role"] == "assistant"
    count = len(messages[caller].get("tool_calls") or ()) if is_assistant else 0
    if number - caller > count:
        raise RowError(
            f"messages[{number}]: result {number - caller} of the {count} tool calls before it; "
            "each tool message must answer a call of the assistant message before"
        )
    return number - caller, count


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
