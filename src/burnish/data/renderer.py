"""`data.renderer`: a function that writes conversations in place of a chat template, for prompts that Python builds."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from burnish.data.template import Rendering, Run, Template, message_dict, reasoning_end
from burnish.types import Conversation, Message, Origin, Renderer, UserError


def renderer_digest(name: str) -> str:
    """SHA-256 of the file that holds the function, so that rows prepared by another version of it are not taken."""
    file = inspect.getsourcefile(load_renderer(name))
    return hashlib.sha256(b"" if file is None else Path(file).read_bytes()).hexdigest()


class FunctionTemplate(Template):
    """A renderer: a function of (messages, tools, kwargs) in place of a chat template."""

    def __init__(self, function: Renderer, name: str) -> None:
        self._function = function
        self._name = name

    def render(self, conversation: Conversation, kwargs: Mapping[str, Any], **more: Any) -> str:
        return self.trace(conversation, {**kwargs, **more}).text

    def trace(self, conversation: Conversation, kwargs: Mapping[str, Any]) -> Rendering:
        messages = [copy.deepcopy(message_dict(message)) for message in conversation.messages]
        stretches = self._function(messages, conversation.tools, {"add_generation_prompt": False, **kwargs})
        if isinstance(stretches, str) or not isinstance(stretches, Iterable):
            raise UserError(f"data.renderer={self._name} gives {type(stretches).__name__}; {_RULE}")
        texts: list[str] = []
        runs: list[Run] = []
        position = 0
        for stretch in stretches:
            self._check(stretch, len(messages))
            for text, origin in _told_apart(*stretch, conversation.messages):
                end = position + len(text)
                if runs and runs[-1].origin == origin:
                    runs[-1] = runs[-1]._replace(end=end)
                elif text:
                    runs.append(Run(position, end, origin.message, origin))
                texts.append(text)
                position = end
        return Rendering("".join(texts), tuple(runs), frozenset(range(len(messages))))

    def may_write(self, token: str) -> bool:
        return True

    def _check(self, stretch: Any, num_messages: int) -> None:
        text, origin = stretch if isinstance(stretch, tuple) and len(stretch) == 2 else (None, None)
        if not isinstance(text, str) or not isinstance(origin, tuple) or len(origin) != 2 or origin[1] not in _PARTS:
            raise UserError(f"data.renderer={self._name} gives {stretch!r}; {_RULE}")
        message = origin[0]
        if message is not None and (type(message) is not int or not 0 <= message < num_messages):
            raise UserError(
                f"data.renderer={self._name} names message {message!r} of {num_messages}; it must be 0 to "
                f"{num_messages - 1}, or None between turns"
            )


_PARTS = ("content", "reasoning", "tool_calls", "tools", "template")
_RULE = f"it must give stretches (text, Origin(message, part)), with a part of {', '.join(_PARTS)}"


def _told_apart(text: str, origin: tuple[Any, Any], messages: Sequence[Message]) -> list[tuple[str, Origin]]:
    """A stretch; of an assistant's content what is reasoning stands apart, as in a chat template's rendering."""
    message, part = origin
    if part != "content" or message is None or messages[message].role != "assistant":
        return [(text, Origin(message, part))]
    end = reasoning_end(messages[message], text)
    return [(text[:end], Origin(message, "reasoning")), (text[end:], Origin(message, "content"))]


RENDERERS = {"deepseek_v32": "burnish.data.deepseek_v32.render"}
"""The renderers that burnish brings, by their names in a recipe."""


def load_renderer(name: str) -> Renderer:
    """The function at a dotted path, or the one that burnish brings. Raises UserError where there is none."""
    path = RENDERERS.get(name, name)
    if name not in RENDERERS and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a recipe's own modules lie; the installed command does not look there
    module, _, attribute = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"data.renderer={name}: {error}; name a function by its dotted path, such as my_module.render, in a "
            "module that Python finds or that lies in the working directory"
        ) from None
    if not callable(function):
        raise UserError(
            f"data.renderer={name} is no function; known ones are {', '.join(RENDERERS)}, or give a dotted path, such "
            "as my_module.render"
        )
    return cast(Renderer, function)
