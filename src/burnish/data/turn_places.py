"""Where a turn stands in a rendered conversation: its place, the header that inference would write, and its end.

Knows characters and their authors; what of a turn is trained is `turns.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from burnish.data.template import Rendering, Run, Template, common_prefix
from burnish.types import Conversation, Message, RowError

BLANK = re.compile(r"\s*")


class Notice(NamedTuple):
    """Something about a row that its owner should see; `kind` is one of a few words, to count by."""

    kind: str
    text: str


@dataclass(frozen=True)
class Stops:
    """Texts of the tokens that end a turn: `declared` by tokenizer and generation config, `written` by the template.

    A template writes other special tokens too, so `declared` ones are preferred where a turn ends in several.
    """

    declared: frozenset[str]
    written: frozenset[str]
    landmarks: re.Pattern[str]
    """The tokenizer's added tokens and line ends, at which a generation prompt may be cut."""

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        texts = sorted(self.declared | self.written, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def find(self, text: str, start: int, end: int, said: str = "", is_sure: bool = True) -> tuple[int, int] | None:
        """The first declared stop in characters [start, end), else the last written one.

        What closes a mark that the turn before `start`, `said`, opened (`</think>`) ends a part and no turn. Where it
        is not sure that all of the characters are the turn's, a written one may begin the next turn and does not count.
        """
        found = [match.span() for match in self._pattern.finditer(text, start, end)]
        declared = next((span for span in found if text[slice(*span)] in self.declared), None)
        if declared is not None or not is_sure:
            return declared
        closing = {"</" + token[1:] for token in self.written if token.startswith("<") and token in said}
        return next((span for span in reversed(found) if text[slice(*span)] not in closing), None)

    def has_declared(self, text: str, start: int, end: int) -> bool:
        """Whether a declared stop stands in characters [start, end)."""
        return any(match.group() in self.declared for match in self._pattern.finditer(text, start, end))

    def declared_at(self, text: str, start: int) -> tuple[int, int] | None:
        """The declared stop that begins at `start`."""
        match = self._pattern.match(text, start)
        return match.span() if match is not None and match.group() in self.declared else None


@dataclass(frozen=True)
class Chat:
    """A conversation with the template and arguments that write it."""

    template: Template
    conversation: Conversation
    kwargs: Mapping[str, Any]

    @property
    def remedy(self) -> str:
        """What may bring the prompt and the turn together."""
        names = ", ".join(self.template.arguments)
        if not names:
            return "this template has no arguments that could make them agree"
        return f"set data.chat_template_kwargs so that both agree (this template reads {names})"

    def with_messages(self, messages: Sequence[Message]) -> Chat:
        return replace(self, conversation=replace(self.conversation, messages=tuple(messages)))

    def until(self, number: int) -> Chat:
        """The chat up to message `number`, that one not included."""
        return self.with_messages(self.conversation.messages[:number])

    def trace(self, **more: Any) -> Rendering:
        return self.template.trace(self.conversation, {**self.kwargs, **more})

    def prompt(self, number: int) -> str:
        """The whole prompt that asks the model for message `number`."""
        return self.template.prompt(self.conversation, number, self.kwargs)

    def prompt_or_none(self, number: int) -> str | None:
        """That prompt, None where the template refuses it."""
        try:
            return self.prompt(number)
        except RowError:
            return None

    def prompt_behind(self, number: int, rendering: Rendering, start: int) -> str:
        """What of that prompt stands behind the history, which ends at `start`; where that is refused, `asked`."""
        try:
            return self.template.generation_prompt(self.conversation, number, self.kwargs, rendering.text[:start])
        except RowError:
            asked = self.asked(rendering)
            if asked is None:
                raise
            return asked

    def asked(self, rendering: Rendering) -> str | None:
        """What asking for a turn adds behind a message that is no assistant's; None where that is not sure."""
        messages = self.conversation.messages
        behind = [n for n, message in enumerate(messages, 1) if message.role != "assistant"]
        answered = (n for n in behind if n in rendering.placed and n in rendering.turns)
        number = next(answered, behind[-1] if behind else None)
        if number is None:
            return None
        is_known = number in rendering.placed and number in rendering.turns
        before = rendering.text[: rendering.runs[rendering.turns[number][0]].start] if is_known else "\0"
        try:
            return self.template.generation_prompt(self.conversation, number, self.kwargs, before)
        except RowError:
            return None


class Header(NamedTuple):
    """How a turn begins: `length` characters of it that the generation prompt would write."""

    length: int
    is_whole: bool
    """Whether it is all of the generation prompt."""
    notices: tuple[Notice, ...] = ()


class TurnPlace(NamedTuple):
    """Where a turn stands: characters [start, end) in runs `first` to `last`, both inclusive.

    `header` is known of a turn of which the template says no more than the text, as outside any loop.
    """

    start: int
    end: int
    first: int
    last: int
    header: Header | None = None


def find_place(chat: Chat, rendering: Rendering, number: int, stops: Stops) -> TurnPlace | None:
    """Where message `number` stands, without the template's white space behind it; None where it is not written.

    Raises RowError where it stands in several places, or where another message stands amid it.
    """
    text, runs = rendering.text, rendering.runs
    is_bare = number not in rendering.placed
    own = [i for i in rendering.turns.get(number, ()) if not (is_template(runs[i]) and is_blank(text, runs[i]))]
    if not own:
        return _unmarked_place(chat, rendering, number)
    first, last = own[0], own[-1]
    for run in runs[first:last]:
        may_be_own = is_bare and run.turn is None and is_template(run)
        if run.turn != number and not may_be_own and not is_blank(text, run):
            other = "text of no message" if run.turn is None else f"messages[{run.turn}]"
            raise unsure(number, f"the chat template writes it in several places, with {other} between them")
    if is_bare:
        return _bare_place(chat, rendering, number, first, last, stops)
    if first and runs[first - 1].turn == number:
        first -= 1  # white space that may be the header's
    end = runs[last].end
    if is_template(runs[last]):
        end = runs[last].start + len(text[runs[last].start : end].rstrip())
    return TurnPlace(runs[first].start, end, first, last)


def _bare_place(chat: Chat, rendering: Rendering, number: int, first: int, last: int, stops: Stops) -> TurnPlace:
    """Where a turn stands whose text alone is known to be its own, in runs `first` to `last`.

    The words of no turn around it are the template's. It begins where inference would have it generated: behind what
    the prompt for it and the text have in common, or behind the prompt that any turn gets at such a place.
    """
    text, runs = rendering.text, rendering.runs
    while first and runs[first - 1].turn is None and is_template(runs[first - 1]):
        first -= 1
    words = next(run.start for run in runs[first:] if run.turn == number)
    value = next((run.start for run in runs[first : last + 1] if is_text_of(run, number)), words)
    prompt = chat.prompt_or_none(number) or ""
    shared = common_prefix(text, prompt)
    is_whole = shared == len(prompt)
    if not is_whole:
        marks = [match.end() for match in stops.landmarks.finditer(text, runs[first].start, shared)]
        shared = max(0, *marks[-1:], value if value <= shared else 0)
    if shared <= runs[first].start:
        asked = chat.asked(rendering)
        if not asked or not text.endswith(asked, runs[first].start, value):
            raise unsure(number, "the chat template writes it in no loop over the messages, and not behind its prompt")
        shared, is_whole = value, True
    while last + 1 < len(runs) and runs[last + 1].turn is None and is_template(runs[last + 1]):
        last += 1
    end = runs[last].end
    if is_template(runs[last]):
        end = runs[last].start + len(text[runs[last].start : end].rstrip())
    start = runs[first].start
    return TurnPlace(start, max(end, shared), first, last, Header(shared - start, is_whole))


def _unmarked_place(chat: Chat, rendering: Rendering, number: int) -> TurnPlace | None:
    """Where a turn of which no run tells stands: behind its prompt if it has no text, else nowhere."""
    text = rendering.text
    message = chat.conversation.messages[number]
    words = [part.strip() for part in (message.content, message.reasoning or "") if part.strip()]
    if words or message.tool_calls:
        of_template = [text[run.start : run.end] for run in rendering.runs if run.origin is None or is_template(run)]
        if any(run.origin is None for run in rendering.runs) or any(w in said for w in words for said in of_template):
            raise unsure(number, "the chat template makes its text anew, of several texts at once")
        return None
    prompt = chat.prompt_or_none(number)
    if number in rendering.placed or not prompt or not text.startswith(prompt) or len(prompt) == len(text):
        return None
    at = run_at(rendering, 0, len(prompt))
    run = rendering.runs[at]
    if run.turn is not None or not is_template(run):
        return None
    end = len(prompt) + len(text[len(prompt) : run.end].rstrip())
    return TurnPlace(run.start, end, at, at, Header(len(prompt) - run.start, True))


def run_at(rendering: Rendering, first: int, position: int) -> int:
    """The run, from `first` on, that holds the character at `position`."""
    return next(i for i in range(first, len(rendering.runs)) if rendering.runs[i].end > position)


def find_header(
    chat: Chat, rendering: Rendering, number: int, place: TurnPlace, runs: Sequence[Run], stops: Stops
) -> Header:
    """Characters at the start of a turn that the generation prompt would write: their longest common prefix.

    Where that ends within the prompt, it counts up to the last token of its own, line end or end of the template's own
    words: what follows may be the assistant's words that begin as the prompt goes on (`<th` of <think> and <that>).
    """
    start = place.start
    turn, prompt = rendering.text[start : place.end], chat.prompt_behind(number, rendering, start)
    header = common_prefix(turn, prompt)
    own = next((run.start for run in runs if is_text_of(run, number)), place.end) - start
    if header == len(prompt):
        return Header(header, True, () if prompt or not turn[:own].strip() else (_no_header(number, turn, prompt),))
    blank = len(turn) - len(turn.lstrip())
    # Words that belong to no turn may stand before the header, and the one may begin with a line end the other lacks.
    prompt = prompt.lstrip()
    at = turn.rfind(prompt, 0, own)
    if at >= 0:
        return Header(at + len(prompt), True)
    if header <= blank:
        header = blank + common_prefix(turn[blank:], prompt)
    ends = [match.end() for match in stops.landmarks.finditer(turn, 0, header) if match.end() > blank]
    header = max(0, *ends[-1:], own if blank < own <= header else 0)
    if header:
        return Header(header, False)
    if prompt.split()[0] in turn[:own]:
        raise unsure(
            number, f"the chat template begins the turn with {turn[:20]!r}, and asks for one with {prompt[:20]!r}"
        )
    return Header(0, False, (_no_header(number, turn, prompt),))


def _no_header(number: int, turn: str, prompt: str) -> Notice:
    asked = f"for one with {prompt[:20]!r}" if prompt else "with no words at all"
    begins = f"messages[{number}]: the chat template begins the turn with {turn[:20]!r}, and inference asks {asked}"
    return Notice("no_header", f"{begins}; all of the turn is trained")


def next_stop(rendering: Rendering, place: TurnPlace, stops: Stops) -> tuple[int, int] | None:
    """The declared stop that begins the next turn, in the template's own words, and so ends this one (GLM)."""
    match = BLANK.match(rendering.text, place.end)
    assert match is not None, "white space matches everywhere"
    start = match.end()
    if start == len(rendering.text):
        return None
    following = run_at(rendering, place.last, start)
    if not all(is_template(run) for run in rendering.runs[place.last + 1 : following + 1]):
        return None
    return stops.declared_at(rendering.text, start)


def is_blank(text: str, run: Run) -> bool:
    return text[run.start : run.end].isspace()


def is_template(run: Run) -> bool:
    """Whether a run is the template's own words."""
    return run.origin is not None and run.origin.part == "template"


def is_text_of(run: Run, number: int) -> bool:
    """Whether a run is what message `number` says."""
    return run.origin is not None and run.origin.message == number and run.origin.part != "template"


def unsure(number: int, reason: str) -> RowError:
    """The error of a turn of which it cannot be known what to train."""
    return RowError(f"messages[{number}] (assistant): cannot be sure what to train: {reason}")
