"""`data.renderer`: a function that writes conversations in place of a chat template, for prompts that Python builds."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from burnish.data.template import Rendering, Run, Template, message_dict
from burnish.types import Conversation, Origin, Renderer, UserError


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
        return Rendering("".join(texts), tuple(runs), frozenset(range(len(messages))))

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
