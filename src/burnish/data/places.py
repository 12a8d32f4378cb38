"""Where the tokens of a row stand in its text, and who wrote each: for looking at rows, cutting and weighing them.

What takes all offsets of a row is done when it is first asked for, so that training, which needs few, does not pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

from burnish.data.template import Rendering
from burnish.data.turn_places import Stops
from burnish.data.turns import Turn, untrained_stops
from burnish.types import Message, RowError

_ROLES = {"developer": "system"}
"""Roles that go by another's name in origins."""


class Span(NamedTuple):
    """Tokens [start, end) that have one origin and stand in one turn, that of `message` (None: between turns).

    `origin` is system, user, tool or assistant with :content, :reasoning or :tool_calls, or tools, template, or
    template:end for an end-of-turn token.
    """

    start: int
    end: int
    origin: str
    message: int | None


TokenOrigin = tuple[str, int | None]
"""`origin` and `message` of one token's span."""


@dataclass(frozen=True)
class ChatPlaces:
    """Of a chat. `in_order` is whether each character has its token and tokens stand in the order of characters, by
    what the tokenizer is made of; else that is checked, and RowError raised where it is not so."""

    encoding: Encoding
    rendering: Rendering
    messages: Sequence[Message]
    num_tokens: int
    in_order: bool
    stops: Stops

    @cached_property
    def offsets(self) -> np.ndarray:
        """Characters [start, end) of each token, int32 [L, 2]."""
        offsets = np.fromiter(chain.from_iterable(self.encoding.offsets), np.int32, 2 * self.num_tokens).reshape(-1, 2)
        # The bytes of one character share its place; a token that adds nothing still has one.
        np.maximum(offsets[:, 1], offsets[:, 0] + 1, out=offsets[:, 1])
        if (np.diff(offsets, axis=0) < 0).any():
            raise RowError("cannot be sure what to train: the tokenizer's offsets are not in order")
        return offsets

    def first_token(self, character: int) -> int:
        """The first token that holds a character at or behind `character`."""
        if character >= len(self.rendering.text):
            return self.num_tokens
        if self.in_order:
            found = self.encoding.char_to_token(character)
            if found is not None:
                return found
        return int(np.searchsorted(self.offsets[:, 1], character, "right"))

    def characters(self, token: int) -> tuple[int, int]:
        """Characters [start, end) of a token; of the one behind the last, the end of the text."""
        if token >= self.num_tokens:
            return len(self.rendering.text), len(self.rendering.text)
        if self.in_order:
            found = self.encoding.token_to_chars(token)
            if found is not None:
                return found
        start, end = self.offsets[token].tolist()
        return start, end

    def origins(self, turns: Sequence[Turn]) -> list[TokenOrigin]:
        """Of each token, that of its first character which the template did not write; else the template."""
        runs = self.rendering.runs
        stops = [(turn.stop, turn.message) for turn in turns if turn.stop is not None]
        stops = sorted([*stops, *untrained_stops(self.rendering, self.messages, turns, self.stops)])
        first_run = np.searchsorted([run.end for run in runs], self.offsets[:, 0], "right").tolist()
        next_stop = np.searchsorted([stop[1] for stop, _ in stops], self.offsets[:, 0], "right").tolist()
        found = []
        for (start, end), first, ending in zip(self.offsets.tolist(), first_run, next_stop, strict=True):
            if ending < len(stops) and stops[ending][0][0] <= start:
                found.append(("template:end", stops[ending][1]))
                continue
            held = first
            while runs[held].end < end and self._name(held) == "template":
                held += 1
            if self._name(held) == "template":
                held = first
            found.append((self._name(held), runs[held].turn))
        return found

    def turn_ends(self) -> tuple[int, ...]:
        """Token counts at which a message ends."""
        runs = self.rendering.runs
        ends = [
            run.end
            for run, following in zip(runs, (*runs[1:], None), strict=True)
            if run.turn is not None and (following is None or following.turn != run.turn)
        ]
        return tuple(sorted({int(n) for n in np.searchsorted(self.offsets[:, 0], ends, "left")} - {0}))

    def prefix(self) -> int:
        """Tokens at the start that hold the system turn and the tools."""
        runs = self.rendering.runs
        starts = (
            run.start
            for run in runs
            if run.turn is not None and self.messages[run.turn].role not in ("system", "developer")
        )
        return int(np.searchsorted(self.offsets[:, 0], next(starts, 0), "left"))

    def _name(self, run: int) -> str:
        origin = self.rendering.runs[run].origin
        if origin is None or origin.part in ("template", "tools"):
            return "template" if origin is None else origin.part
        assert origin.message is not None, "a message's text has a message"
        role = self.messages[origin.message].role
        return f"{_ROLES.get(role, role)}:{origin.part}"


@dataclass(frozen=True)
class TextPlaces:
    """Of raw text of `length` characters: a prompt, of no characters perhaps, and a completion from `completion` on.

    The tokenizer's own tokens stand around them: `num_before`, and `num_after` that end the text.
    """

    encoding: Encoding
    completion: int
    num_before: int
    num_after: int
    length: int

    @cached_property
    def offsets(self) -> np.ndarray:
        inner = np.array(self.encoding.offsets, np.int32).reshape(-1, 2)
        before = np.zeros((self.num_before, 2), np.int32)
        return np.concatenate([before, inner, np.full((self.num_after, 2), self.length, np.int32)])

    @property
    def seam(self) -> int:
        """The first token of the completion, which may begin in the prompt."""
        ends = np.maximum(self.offsets[:, 1], self.offsets[:, 0] + 1)[self.num_before :]
        return int(np.searchsorted(ends, self.completion, "right")) + self.num_before

    def origins(self, turns: Sequence[Turn]) -> list[TokenOrigin]:
        num_tokens, seam = len(self.offsets), self.seam
        names = ["user:content"] * seam + ["assistant:content"] * (num_tokens - seam)
        names[: self.num_before] = ["template"] * self.num_before
        names[num_tokens - self.num_after :] = ["template:end"] * self.num_after
        return [(name, None) for name in names]

    def turn_ends(self) -> tuple[int, ...]:
        return tuple(sorted({self.seam, len(self.offsets)} - {0}))

    def prefix(self) -> int:
        return 0


Places = ChatPlaces | TextPlaces


def spans_of(origins: Sequence[TokenOrigin]) -> tuple[Span, ...]:
    """Tokens by origin, as spans."""
    starts = [i for i in range(len(origins)) if not i or origins[i] != origins[i - 1]]
    return tuple(
        Span(start, end, *origins[start]) for start, end in zip(starts, [*starts[1:], len(origins)], strict=True)
    )
