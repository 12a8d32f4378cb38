"""Raw chat messages and tools, as the data sets of the world write them, to ours. Knows no columns and no templates.

What has no certain meaning is a RowError that says where and why, never a guess.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from burnish.data.json_files import json_kind
from burnish.types import Message, RowError, ToolCall

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Roles as rows write them, and ours."""

_CALL_ROLES = ("function_call", "tool_call")
"""Roles whose content is the JSON text of tool calls (ShareGPT)."""

_ROLE = ("role", "from")
_CONTENT = ("content", "value")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("tool_calls", "function_call")
_WEIGHT = ("weight", "step_loss_mask", "train", "loss")
_PLAIN = frozenset({*_ROLE, *_CONTENT})
_KNOWN = _PLAIN | {*_REASONING, *_CALLS, *_WEIGHT, "name", "tool_call_id"}

_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning": "reasoning",
    "thinking": "reasoning",
    "tool_call": "tool_call",
    "function_call": "tool_call",
}
"""Types of content parts as rows write them, and ours, in the order in which chat templates write a turn."""
_ORDER = ("reasoning", "text", "tool_call")
_MEDIA = {
    f"{pre}{name}{post}"
    for name in ("image", "audio", "video", "file")
    for pre in ("", "input_")
    for post in ("", "_url")
}


def to_messages(value: Any, column: str) -> tuple[Message, ...]:
    """The messages of a column: mappings with role and content, or ShareGPT's from and value.

    A null stands for an absent key. An assistant's `function_call` (OpenAI's old form) and the JSON text of a message
    whose role is function_call become tool calls. Keys that have no meaning here go to `Message.extra`.
    Raises RowError.
    """
    if not isinstance(value, list):
        raise RowError(f"{column} is {json_kind(value)}, not a list of messages")
    if not value:
        raise RowError(f"{column} is an empty list")
    return tuple(_message(raw, f"{column}[{number}]") for number, raw in enumerate(value))


def to_tools(value: Any, column: str) -> tuple[dict[str, Any], ...] | None:
    """Tool schemas from a list or the JSON text of one, each as {"type": "function", "function": {...}}; None for none.

    Raises RowError.
    """
    if value is None or value == "":
        return None
    tools = _from_json(value, column)
    if not isinstance(tools, list):
        raise RowError(f"{column} is {json_kind(tools)}; it must be a list of tool schemas, or the JSON text of one")
    return tuple(_tool(tool, f"{column}[{number}]") for number, tool in enumerate(tools)) or None


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, Mapping):
        raise RowError(f"{where} is {json_kind(raw)}, not a message with role and content")
    raw = {key: value for key, value in raw.items() if value is not None}
    role = _one(raw, _ROLE, where)
    content = _one(raw, _CONTENT, where)
    if isinstance(content, str) and role not in _CALL_ROLES and _PLAIN.issuperset(raw):
        return Message(_role(role, where), content)  # what most messages are, without a look for anything else
    if role in _CALL_ROLES:
        raw, content = {**raw, "function_call": content}, None
    role = _role(role, where)
    parts = _parts(content, where)
    reasoning = _reasoning(raw, parts["reasoning"], where)
    calls = _all_calls(raw, parts["tool_call"], where)
    _check_complete(role, content, reasoning, calls, where)
    return Message(
        role=role,
        content="".join(parts["text"]),
        reasoning=reasoning,
        tool_calls=calls,
        weight=_weight(raw, where),
        name=_optional_text(raw, "name", where),
        tool_call_id=_optional_text(raw, "tool_call_id", where),
        extra={key: value for key, value in raw.items() if key not in _KNOWN},
    )


def _role(given: Any, where: str) -> str:
    if given is None:
        raise RowError(f"{where}: the message has no role")
    if _text(given, f"{where}: the role") not in ROLES:
        near = difflib.get_close_matches(given.lower(), ROLES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RowError(f"{where}: unknown role {given!r}; {hint}the known ones are {', '.join(ROLES)}")
    return ROLES[given]


def _check_complete(role: str, content: Any, reasoning: str | None, calls: Sequence[ToolCall], where: str) -> None:
    if role != "assistant" and (reasoning or calls):
        what = "calls tools" if calls else "reasons"
        raise RowError(f"{where}: a {role} message {what}; only an assistant's can")
    if content is None and not reasoning and not calls:
        raise RowError(f"{where}: the {role} message has no content")


def _parts(content: Any, where: str) -> dict[str, list[Any]]:
    """Content by kind. Raises RowError where its parts stand in an order that no chat template writes."""
    found: dict[str, list[Any]] = {kind: [] for kind in _ORDER}
    if content is None:
        return found
    if isinstance(content, str):
        return found | {"text": [content]}
    if not isinstance(content, list):
        raise RowError(f"{where}: the content is {json_kind(content)}; it must be text or a list of parts")
    last = _ORDER[0]
    for number, part in enumerate(content):
        kind, value = _part(part, f"{where}.content[{number}]")
        if _ORDER.index(kind) < _ORDER.index(last):
            raise RowError(
                f"{where}.content[{number}]: {kind} behind {last}; chat templates write reasoning, then text, then "
                "tool calls: split the turn into messages in that order"
            )
        found[kind].append(value)
        last = kind
    return found


def _part(part: Any, where: str) -> tuple[str, Any]:
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, Mapping):
        raise RowError(f"{where} is {json_kind(part)}, not a content part")
    part = {key: value for key, value in part.items() if value is not None}
    named = _text(part.get("type", "text" if "text" in part else ""), f"{where}: the type")
    media = {named, *(key for key in part if part[key])} & _MEDIA
    if media:
        raise RowError(f"{where}: {min(media)} in the content; multimodal rows are not supported yet")
    if named not in _PARTS:
        known = ", ".join(_PARTS)
        raise RowError(f"{where}: unknown type of part {named!r}; the known ones are {known}")
    kind = _PARTS[named]
    keys = [key for key in (named, kind, "text", "value", "content") if key in part]
    if kind == "tool_call":
        return kind, part[keys[0]] if keys else {key: value for key, value in part.items() if key != "type"}
    if not keys:
        raise RowError(f"{where}: the {named} part has no text; it belongs under {named!r} or 'value'")
    return kind, _text(part[keys[0]], where)


def _reasoning(raw: Mapping[str, Any], parts: Sequence[str], where: str) -> str | None:
    given = _one(raw, _REASONING, where)
    if given is not None and parts:
        raise RowError(f"{where}: reasoning stands both beside the content and in its parts; keep one")
    if parts:
        return "".join(parts)
    return None if given is None else _text(given, f"{where}: the reasoning")


def _all_calls(raw: Mapping[str, Any], parts: Sequence[Any], where: str) -> tuple[ToolCall, ...]:
    places = {key: _calls(raw[key], f"{where}.{key}") for key in _CALLS if key in raw}
    if parts:
        places["its content parts"] = tuple(call for part in parts for call in _calls(part, f"{where}.content"))
    filled = [name for name, calls in places.items() if calls]
    if len(filled) > 1:
        raise RowError(f"{where}: tool calls stand both in {filled[0]} and in {filled[1]}; keep one")
    return places[filled[0]] if filled else ()


def _calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    """Tool calls from a list, a single call, or the JSON text of either."""
    calls = _from_json(value, where)
    if isinstance(calls, Mapping):
        return (_call(calls, where),)
    if not isinstance(calls, list):
        raise RowError(f"{where} is {json_kind(calls)}; it must be a tool call or a list of them")
    return tuple(_call(call, f"{where}[{number}]" if len(calls) > 1 else where) for number, call in enumerate(calls))


def _call(raw: Any, where: str) -> ToolCall:
    """One call, with or without OpenAI's wrapper. Arguments that were not given, or null, are none."""
    if not isinstance(raw, Mapping):
        raise RowError(f"{where}: {json_kind(raw)}, not a tool call with name and arguments")
    function = raw["function"] if isinstance(raw.get("function"), Mapping) else raw
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowError(f"{where}: a tool call without a name")
    given = function.get("arguments")
    arguments = {} if given is None or given == "" else _from_json(given, f"{where}: the arguments of {name}")
    if not isinstance(arguments, Mapping):
        raise RowError(f"{where}: the arguments of {name} are {json_kind(arguments)}, not an object")
    return ToolCall(name, dict(arguments), _optional_text(raw, "id", where))


def _tool(raw: Any, where: str) -> dict[str, Any]:
    tool = _from_json(raw, where)
    if not isinstance(tool, Mapping):
        raise RowError(f"{where} is {json_kind(tool)}, not a tool schema")
    if not isinstance(tool.get("function"), Mapping):
        tool = {"function": {key: value for key, value in tool.items() if key != "type"}}
    if not isinstance(tool["function"].get("name"), str):
        raise RowError(f"{where}: a tool schema without a name")
    return dict(tool) if "type" in tool else {"type": "function", **tool}


def _weight(raw: Mapping[str, Any], where: str) -> float | None:
    """A message's own weight: `weight` (slime: `step_loss_mask`) is a number, `train` (ms-swift: `loss`) a boolean."""
    given = [key for key in _WEIGHT if key in raw]
    if not given:
        return None
    if len(given) > 1:
        raise RowError(f"{where}: {given[0]} and {given[1]} both say how the message is trained; keep one")
    key, value = given[0], raw[given[0]]
    if key in ("train", "loss"):
        if not isinstance(value, bool):
            raise RowError(f"{where}: {key}={value!r} must be true or false; a number goes under weight")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RowError(f"{where}: {key}={value!r} must be a finite number, 0 or more")
    return float(value)


def _one(raw: Mapping[str, Any], keys: Iterable[str], where: str) -> Any:
    """The value under whichever of the keys is there. Raises RowError where two of them disagree."""
    given = [key for key in keys if key in raw]
    if len(given) > 1 and any(raw[key] != raw[given[0]] for key in given[1:]):
        raise RowError(f"{where}: {' and '.join(given)} say different things; keep one")
    return raw[given[0]] if given else None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{where} is {json_kind(value)}, not text")
    return value


def _optional_text(raw: Mapping[str, Any], key: str, where: str) -> str | None:
    value = raw.get(key)
    return None if value is None else _text(value, f"{where}: {key}")


def _from_json(value: Any, where: str) -> Any:
    """`value`, parsed where it is text. Raises RowError with the parser's own words."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"{where}: broken JSON: {error.msg} at column {error.pos + 1}") from None
