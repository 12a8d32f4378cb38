"""Which characters of a rendered conversation are trained: the turns of assistants, from header to end-of-turn.

A turn's trained characters are what the model would generate there: all behind the generation prompt through the
end-of-turn token, whoever wrote it. Knows characters and their authors; tokens are `chat.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from burnish.config import LastTurns, Roles, TrainOn
from burnish.data.template import Rendering, Run, Template, common_prefix, reasoning_end
from burnish.types import Conversation, Message, Origin, RowError

_BLANK = re.compile(r"\s*")

OpenTurns = Literal["report", "close", "error"]


@dataclass(frozen=True)
class Selection:
    """What of a chat is trained: `train_on`, `train_reasoning`, `train_tool_calls` and `open_turns` of a recipe."""

    train_on: TrainOn = "assistant"
    reasoning: bool = True
    tool_calls: bool = True
    open_turns: OpenTurns = "report"

    @cached_property
    def left_out(self) -> frozenset[str]:
        """The parts of a turn that are not trained."""
        trained = {"reasoning": self.reasoning, "tool_calls": self.tool_calls}
        return frozenset(part for part, is_trained in trained.items() if not is_trained)


ASSISTANT_TURNS = Selection()
"""Every assistant turn, as a recipe trains by default."""


class Notice(NamedTuple):
    """Something about a row that its owner should see; `kind` is one of a few words, to count by."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Turn:
    """A message's turn in a rendering, characters.

    It stands in [start, end) and `trained` are its trained stretches, in order, with weight `weight`. Of an assistant,
    [start, text_start) is the header that the generation prompt writes and `stop` the end-of-turn token.
    """

    message: int
    start: int
    text_start: int
    end: int
    trained: tuple[tuple[int, int], ...]
    weight: float
    stop: tuple[int, int] | None = None
    is_asked: bool = True
    """Whether the header is all of the generation prompt, so that inference would have the same text generated."""
    notices: tuple[Notice, ...] = ()


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

    def find(
        self, text: str, start: int, end: int, header: str = "", said: str = "", is_sure: bool = True
    ) -> tuple[int, int] | None:
        """The first declared stop in characters [start, end), else the last written one.

        What stands in the turn's `header` begins a turn and ends none; what closes a mark that the turn before `start`,
        `said`, opened (`</think>`) ends a part. Where it is not sure that all of the characters are the turn's, it is
        the last of the first written ones that stand side by side.
        """
        found = [match.span() for match in self._pattern.finditer(text, start, end)]
        declared = next((span for span in found if text[slice(*span)] in self.declared), None)
        if declared is not None:
            return declared
        closing = {"</" + token[1:] for token in self.written if token.startswith("<") and token in said}
        written = [span for span in found if text[slice(*span)] not in header and text[slice(*span)] not in closing]
        apart = (i for i, (one, other) in enumerate(pairwise(written)) if one[1] != other[0])
        return written[-1 if is_sure else next(apart, -1)] if written else None

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


def message_weights(messages: Sequence[Message], train_on: TrainOn) -> tuple[float, ...]:
    """The weight with which each message is trained.

    `train_on` names the roles and, of the silent messages of those roles, the trained ones; a message's own weight
    decides for itself, but never makes another role trained. Raises RowError where no message has such a role.
    """
    if train_on == "all":
        return tuple(1.0 if message.weight is None else message.weight for message in messages)
    roles = train_on.roles if isinstance(train_on, Roles) else ("assistant",)
    candidates = [number for number, message in enumerate(messages) if message.role in roles]
    if not candidates:
        raise RowError("no assistant turn" if roles == ("assistant",) else f"no message of role {' or '.join(roles)}")
    num_last = train_on.last_n if isinstance(train_on, LastTurns) else 1 if train_on == "last" else len(candidates)
    trained = candidates[-num_last:]
    own = {number: messages[number].weight for number in candidates}
    return tuple(
        0.0 if number not in own else float(number in trained) if own[number] is None else float(own[number] or 0)
        for number in range(len(messages))
    )


def trained_turns(chat: Chat, rendering: Rendering, selection: Selection, stops: Stops) -> list[Turn]:
    """The turns of which something is trained, by `message_weights`.

    Raises RowError where it cannot be known which characters the model would generate.
    """
    turns = []
    messages = chat.conversation.messages
    for number, weight in enumerate(message_weights(messages, selection.train_on)):
        if weight == 0:
            continue
        if messages[number].role == "assistant":
            turn = _assistant_turn(chat, rendering, number, weight, selection, stops)
            if turn is not None:
                turns.append(turn)
        else:
            own = [run for run in rendering.runs if run.origin == (number, "content")]
            if own:
                spans = tuple((run.start, run.end) for run in own)
                turns.append(Turn(number, own[0].start, own[0].start, own[-1].end, spans, weight))
    return turns


def weighted_turns(rendering: Rendering, messages: Sequence[Message]) -> list[Turn]:
    """The turns, headers included, of the messages that have a weight of their own, where all else is trained."""
    turns = []
    for number, message in enumerate(messages):
        spans = _merged((rendering.runs[i].start, rendering.runs[i].end) for i in rendering.turns.get(number, ()))
        if message.weight is not None and spans:
            turns.append(Turn(number, spans[0][0], spans[0][0], spans[-1][1], spans, message.weight))
    return turns


def untrained_stops(
    rendering: Rendering, messages: Sequence[Message], turns: Sequence[Turn], stops: Stops
) -> list[tuple[tuple[int, int], int]]:
    """The end-of-turn tokens, characters, of assistants' turns that are not among `turns`, each with its message."""
    known = {turn.message for turn in turns}
    found = []
    for number, message in enumerate(messages):
        own = [rendering.runs[i] for i in rendering.turns.get(number, ())]
        if message.role != "assistant" or number in known or not own:
            continue
        closing = max([own[0].start, *(run.end for run in own if _is_text_of(run, number))])
        stop = stops.find(rendering.text, closing, own[-1].end)
        if stop is not None:
            found.append((stop, number))
    return found


def single_turn(chat: Chat, number: int, weight: float, selection: Selection, stops: Stops) -> tuple[Rendering, Turn]:
    """Turn `number` under exactly the prompt that inference gives it, as it would be written were it the last.

    Raises RowError where the template does not write the turn as going on from that prompt.
    """
    messages = chat.conversation.messages
    prompt = chat.until(number).trace(add_generation_prompt=True)
    written = chat.until(number + 1).trace()
    turn = _assistant_turn(chat.until(number + 1), written, number, weight, selection, stops)
    if turn is None:
        raise _unsure(number, "the chat template does not write it")
    start = len(prompt.text) if written.text.startswith(prompt.text) else turn.text_start if turn.is_asked else -1
    if not turn.start <= start <= turn.end:
        raise _unsure(
            number,
            f"inference asks for the turn with {prompt.text[-30:]!r}, and the chat template writes "
            f"{written.text[turn.start : turn.start + 40]!r}, which does not go on from there; {chat.remedy}, or set "
            "data.turn_per_sample to false",
        )
    shift = len(prompt.text) - start
    runs = [*prompt.runs, *(_clipped(run, max(run.start, start), run.end) for run in written.runs if run.end > start)]
    for i in range(len(prompt.runs), len(runs)):
        runs[i] = runs[i]._replace(start=runs[i].start + shift, end=runs[i].end + shift)
    trained = tuple((max(first, start) + shift, last + shift) for first, last in turn.trained if last > start)
    moved = replace(
        turn,
        start=min(turn.start + shift, len(prompt.text)),
        text_start=len(prompt.text),
        end=turn.end + shift,
        trained=trained,
        stop=None if turn.stop is None else (turn.stop[0] + shift, turn.stop[1] + shift),
    )
    rendering = replace(written, text=prompt.text + written.text[start:], runs=tuple(runs))
    following = messages[number + 1] if number + 1 < len(messages) else None
    stop = None if following is None else closing_stop(chat.until(number + 1), stops, following)
    return (rendering, moved) if moved.stop is not None or stop is None else ended(rendering, moved, stop)


def ended(rendering: Rendering, turn: Turn, stop: str) -> tuple[Rendering, Turn]:
    """An open turn, the last of its rendering, with `stop` behind its text."""
    text = rendering.text[: turn.end] + stop
    runs = [_clipped(run, run.start, min(run.end, turn.end)) for run in rendering.runs if run.start < turn.end]
    place = (turn.end, len(text))
    runs.append(Run(*place, turn.message, Origin(turn.message, "template"), True))
    notices = tuple(notice for notice in turn.notices if notice.kind != "open_turn")
    closed = replace(turn, end=len(text), stop=place, trained=_merged((*turn.trained, place)), notices=notices)
    return replace(rendering, text=text, runs=tuple(runs)), closed


def closed_last(
    chat: Chat, rendering: Rendering, turns: Sequence[Turn], stops: Stops, eos: str | None
) -> tuple[Rendering, list[Turn]]:
    """`turns` with the last one ended where it is open and the conversation's last.

    It ends with the token by which the template would begin the turn behind it, where that is a declared stop, else
    with `eos`. Raises RowError where there is neither.
    """
    messages = chat.conversation.messages
    if not turns or turns[-1].stop is not None or turns[-1].message != len(messages) - 1:
        return rendering, list(turns)
    stop = closing_stop(chat, stops, Message("tool" if messages[-1].tool_calls else "user", "?")) or eos
    if stop is None:
        raise RowError(
            "data.open_turns=close: no stop token is known to end the last turn with; name one in "
            "generation_config.json's eos_token_id"
        )
    rendering, last = ended(rendering, turns[-1], stop)
    return rendering, [*turns[:-1], last]


def closing_stop(chat: Chat, stops: Stops, following: Message) -> str | None:
    """The declared stop by which the template begins a message behind the last; None where it is none, or refused."""
    messages = chat.conversation.messages
    try:
        rendering = chat.with_messages((*messages, following)).trace()
    except RowError:
        return None
    number = len(messages)
    start = next((rendering.runs[i].start for i in rendering.turns.get(number, ())), len(rendering.text))
    match = _BLANK.match(rendering.text, start)
    assert match is not None, "white space matches everywhere"
    stop = stops.declared_at(rendering.text, match.end())
    return None if stop is None else rendering.text[slice(*stop)]


def _assistant_turn(
    chat: Chat,
    rendering: Rendering,
    number: int,
    weight: float,
    selection: Selection,
    stops: Stops,
) -> Turn | None:
    """Turn `number`; None where the template drops it."""
    place = _place(chat, rendering, number, stops)
    if place is None:
        return None
    text, start, end = rendering.text, place.start, place.end
    runs = rendering.runs[place.first : place.last + 1]
    header = place.header or _header(chat, rendering, number, place, runs, stops)
    text_start = start + header.length
    notices = list(header.notices)
    closing = max([text_start, *(run.end for run in runs if _is_text_of(run, number))])
    is_sure = place.header is None
    header_text, said = text[start:text_start], text[text_start:closing]
    stop = stops.find(text, closing, end, header_text, said, is_sure) or _next_stop(rendering, place, stops)
    if stop is None:
        end = end if is_sure else closing
        notices.append(_open_turn(text, number, closing, end, stops, selection))
    elif stop[1] > end:
        runs = (*runs, _clipped(rendering.runs[_run_at(rendering, place.last, stop[0])], end, stop[1]))
    elif text[slice(*stop)] not in stops.declared:
        notices.append(_undeclared(text[slice(*stop)], number))
    end = end if stop is None else stop[1]
    notices += _content_notices(chat.conversation.messages[number], number, runs, text, text_start, closing, stops)
    _check_authors(runs, text, number, text_start, end)
    spans: tuple[tuple[int, int], ...] = ((text_start, end),)
    if selection.left_out or rendering.has_blocks:
        inside = [_clipped(r, max(r.start, text_start), min(r.end, end)) for r in runs]
        inside = [run for run in inside if run.start < run.end]
        trained = _without(selection.left_out, inside, text, number, stop, stops)
        if rendering.has_blocks:
            notices += _block_notices(number, text, inside, runs, text_start, end, stop)
            trained = _in_blocks(trained, stop)
        spans = _merged((run.start, run.end) for run in trained)
    return Turn(number, start, text_start, end, spans, weight, stop, header.is_whole, tuple(notices))


class _Header(NamedTuple):
    length: int
    is_whole: bool
    """Whether it is all of the generation prompt."""
    notices: tuple[Notice, ...] = ()


class _Place(NamedTuple):
    """Where a turn stands: characters [start, end) in runs `first` to `last`, both inclusive.

    `header` is known of a turn of which the template says no more than the text, as outside any loop.
    """

    start: int
    end: int
    first: int
    last: int
    header: _Header | None = None


def _place(chat: Chat, rendering: Rendering, number: int, stops: Stops) -> _Place | None:
    """Where message `number` stands, without the template's white space behind it; None where it is not written.

    Raises RowError where it stands in several places, or where another message stands amid it.
    """
    text, runs = rendering.text, rendering.runs
    is_bare = number not in rendering.placed
    own = [i for i in rendering.turns.get(number, ()) if not (_is_template(runs[i]) and _is_blank(text, runs[i]))]
    if not own:
        return _unmarked_place(chat, rendering, number)
    first, last = own[0], own[-1]
    for run in runs[first:last]:
        may_be_own = is_bare and run.turn is None and _is_template(run)
        if run.turn != number and not may_be_own and not _is_blank(text, run):
            other = "text of no message" if run.turn is None else f"messages[{run.turn}]"
            raise _unsure(number, f"the chat template writes it in several places, with {other} between them")
    if is_bare:
        return _bare_place(chat, rendering, number, first, last, stops)
    if first and runs[first - 1].turn == number:
        first -= 1  # white space that may be the header's
    end = runs[last].end
    if _is_template(runs[last]):
        end = runs[last].start + len(text[runs[last].start : end].rstrip())
    return _Place(runs[first].start, end, first, last)


def _bare_place(chat: Chat, rendering: Rendering, number: int, first: int, last: int, stops: Stops) -> _Place:
    """Where a turn stands whose text alone is known to be its own, in runs `first` to `last`.

    The words of no turn around it are the template's. It begins where inference would have it generated: behind what
    the prompt for it and the text have in common, or behind the prompt that any turn gets at such a place.
    """
    text, runs = rendering.text, rendering.runs
    while first and runs[first - 1].turn is None and _is_template(runs[first - 1]):
        first -= 1
    words = next(run.start for run in runs[first:] if run.turn == number)
    value = next((run.start for run in runs[first : last + 1] if _is_text_of(run, number)), words)
    prompt = chat.prompt_or_none(number) or ""
    shared = common_prefix(text, prompt)
    is_whole = shared == len(prompt)
    if not is_whole:
        marks = [match.end() for match in stops.landmarks.finditer(text, runs[first].start, shared)]
        shared = max(0, *marks[-1:], value if value <= shared else 0)
    if shared <= runs[first].start:
        asked = chat.asked(rendering)
        if not asked or not text.endswith(asked, runs[first].start, value):
            raise _unsure(number, "the chat template writes it in no loop over the messages, and not behind its prompt")
        shared, is_whole = value, True
    while last + 1 < len(runs) and runs[last + 1].turn is None and _is_template(runs[last + 1]):
        last += 1
    end = runs[last].end
    if _is_template(runs[last]):
        end = runs[last].start + len(text[runs[last].start : end].rstrip())
    start = runs[first].start
    return _Place(start, max(end, shared), first, last, _Header(shared - start, is_whole))


def _unmarked_place(chat: Chat, rendering: Rendering, number: int) -> _Place | None:
    """Where a turn of which no run tells stands: behind its prompt if it has no text, else nowhere."""
    text = rendering.text
    message = chat.conversation.messages[number]
    words = [part.strip() for part in (message.content, message.reasoning or "") if part.strip()]
    if words or message.tool_calls:
        of_template = [text[run.start : run.end] for run in rendering.runs if run.origin is None or _is_template(run)]
        if any(run.origin is None for run in rendering.runs) or any(w in said for w in words for said in of_template):
            raise _unsure(number, "the chat template makes its text anew, of several texts at once")
        return None
    prompt = chat.prompt_or_none(number)
    if number in rendering.placed or not prompt or not text.startswith(prompt) or len(prompt) == len(text):
        return None
    at = _run_at(rendering, 0, len(prompt))
    run = rendering.runs[at]
    if run.turn is not None or not _is_template(run):
        return None
    end = len(prompt) + len(text[len(prompt) : run.end].rstrip())
    return _Place(run.start, end, at, at, _Header(len(prompt) - run.start, True))


def _run_at(rendering: Rendering, first: int, position: int) -> int:
    """The run, from `first` on, that holds the character at `position`."""
    return next(i for i in range(first, len(rendering.runs)) if rendering.runs[i].end > position)


def _header(chat: Chat, rendering: Rendering, number: int, place: _Place, runs: Sequence[Run], stops: Stops) -> _Header:
    """Characters at the start of a turn that the generation prompt would write: their longest common prefix.

    Where that ends within the prompt, it counts up to the last token of its own, line end or end of the template's own
    words: what follows may be the assistant's words that begin as the prompt goes on (`<th` of <think> and <that>).
    """
    start = place.start
    turn, prompt = rendering.text[start : place.end], chat.prompt_behind(number, rendering, start)
    header = common_prefix(turn, prompt)
    own = next((run.start for run in runs if _is_text_of(run, number)), place.end) - start
    if header == len(prompt):
        return _Header(header, True, () if prompt or not turn[:own].strip() else (_no_header(number, turn, prompt),))
    blank = len(turn) - len(turn.lstrip())
    # Words that belong to no turn may stand before the header, and the one may begin with a line end the other lacks.
    prompt = prompt.lstrip()
    at = turn.rfind(prompt, 0, own)
    if at >= 0:
        return _Header(at + len(prompt), True)
    if header <= blank:
        header = blank + common_prefix(turn[blank:], prompt)
    ends = [match.end() for match in stops.landmarks.finditer(turn, 0, header) if match.end() > blank]
    header = max(0, *ends[-1:], own if blank < own <= header else 0)
    if header:
        return _Header(header, False)
    if prompt.split()[0] in turn[:own]:
        raise _unsure(
            number, f"the chat template begins the turn with {turn[:20]!r}, and asks for one with {prompt[:20]!r}"
        )
    return _Header(0, False, (_no_header(number, turn, prompt),))


def _no_header(number: int, turn: str, prompt: str) -> Notice:
    asked = f"for one with {prompt[:20]!r}" if prompt else "with no words at all"
    begins = f"messages[{number}]: the chat template begins the turn with {turn[:20]!r}, and inference asks {asked}"
    return Notice("no_header", f"{begins}; all of the turn is trained")


def _next_stop(rendering: Rendering, place: _Place, stops: Stops) -> tuple[int, int] | None:
    """The declared stop that begins the next turn, in the template's own words, and so ends this one (GLM)."""
    match = _BLANK.match(rendering.text, place.end)
    assert match is not None, "white space matches everywhere"
    start = match.end()
    if start == len(rendering.text):
        return None
    following = _run_at(rendering, place.last, start)
    if not all(_is_template(run) for run in rendering.runs[place.last + 1 : following + 1]):
        return None
    return stops.declared_at(rendering.text, start)


def _open_turn(text: str, number: int, closing: int, end: int, stops: Stops, selection: Selection) -> Notice:
    names = ", ".join(map(repr, sorted(stops.declared | stops.written))) or "none"
    said = f"with {text[closing:end]!r}" if closing < end else "with its text alone"
    reason = f"the chat template ends the turn {said} and no end-of-turn token (known: {names})"
    if selection.open_turns == "error":
        raise RowError(
            f"messages[{number}] (assistant): {reason}; declare the token in generation_config.json's eos_token_id, or "
            "set data.open_turns to report or, for a last turn, close"
        )
    return Notice("open_turn", f"messages[{number}]: {reason}")


def _undeclared(stop: str, number: int) -> Notice:
    return Notice(
        "undeclared_stop",
        f"messages[{number}]: the turn ends with {stop!r}, which neither eos_token nor generation_config.json's "
        "eos_token_id names, so that generation may run on behind it",
    )


def _content_notices(
    message: Message, number: int, runs: Sequence[Run], text: str, start: int, closing: int, stops: Stops
) -> Iterator[Notice]:
    """What the template leaves out of a turn's message, and a stop that stands amid what is trained of it."""
    written = {run.origin.part for run in runs if run.origin is not None and run.origin.message == number}
    if "reasoning" not in written and (message.reasoning or message.content[: reasoning_end(message)]).strip():
        yield Notice("dropped_reasoning", f"messages[{number}]: its reasoning is not in the rendering")
    if message.tool_calls and not any(call.name in text[start:closing] for call in message.tool_calls):
        yield Notice("dropped_tool_calls", f"messages[{number}]: its tool calls are not in the rendering")
    for run in runs:
        if _is_template(run) and start < run.end < closing and stops.has_declared(text, max(run.start, start), run.end):
            yield Notice(
                "stop_amid_turn", f"messages[{number}]: a stop token stands amid the turn, where generation ends"
            )
            break


def _check_authors(runs: Sequence[Run], text: str, number: int, start: int, end: int) -> None:
    """Raises RowError where characters [start, end) of a turn hold what nobody or another message wrote."""
    for run in runs:
        if run.start >= end or run.end <= start:
            continue
        if run.origin is None:
            shown = text[run.start : run.end][:30]
            raise _unsure(number, f"the chat template makes {shown!r} of several texts at once")
        if run.origin.message != number and not _is_template(run) and not _is_blank(text, run):
            other = "a tool's schema" if run.origin.message is None else f"messages[{run.origin.message}]"
            raise _unsure(number, f"the chat template writes {other} into the same turn")


def _first_mark(text: str, run: Run, stops: Stops) -> int:
    """Where the first mark of a run ends, with the white space behind it: an added token, a tag, or else a word."""
    token = stops.landmarks.match(text, _BLANK.match(text, run.start).end(), run.end)  # pyright: ignore[reportOptionalMemberAccess]
    mark = token or _MARK.match(text, run.start, run.end)
    return run.start if mark is None else _BLANK.match(text, mark.end(), run.end).end()  # pyright: ignore[reportOptionalMemberAccess]


_MARK = re.compile(r"\s*(?:<[^<>]*>|\[[^\[\]]*\]|\S+)")


def _without(
    left_out: frozenset[str], runs: Sequence[Run], text: str, number: int, stop: tuple[int, int] | None, stops: Stops
) -> list[Run]:
    """`runs` of a turn without the parts `left_out`. The template's words go with the part that they open or close.

    Between reasoning and tool calls the first mark closes the reasoning; what stands behind the last part closes it,
    but for the end-of-turn token.
    """
    kept: list[Run] = []
    parts = [run.origin.part if run.origin is not None and _is_text_of(run, number) else None for run in runs]
    for i, (run, part) in enumerate(zip(runs, parts, strict=True)):
        if part is not None:
            kept += [] if part in left_out else [run]
            continue
        before = next((p for p in reversed(parts[:i]) if p is not None), None)
        after = next((p for p in parts[i + 1 :] if p is not None), None)
        cut = run.end
        if before == "reasoning" and after == "tool_calls":
            cut = _first_mark(text, run, stops)
        elif before in (None, "content"):
            cut = run.start
        if after is None and stop is not None:
            cut = min(max(cut, run.start), max(stop[0], run.start)) if before not in (None, "content") else run.start
        if before not in left_out and run.start < cut:
            kept.append(_clipped(run, run.start, cut))
        if (after not in left_out or after is None) and cut < run.end:
            kept.append(_clipped(run, cut, run.end))
    return kept


def _clipped(run: Run, start: int, end: int) -> Run:
    return run if (start, end) == (run.start, run.end) else Run(start, end, run.turn, run.origin, run.is_generated)


def _in_blocks(runs: Sequence[Run], stop: tuple[int, int] | None) -> list[Run]:
    """What of `runs` stands in generation blocks, and the end-of-turn token wherever it stands."""
    kept = []
    for run in runs:
        if run.is_generated:
            kept.append(run)
        elif stop is not None:
            kept.append(_clipped(run, max(run.start, stop[0]), min(run.end, stop[1])))
    return kept


def _block_notices(
    number: int,
    text: str,
    inside: Sequence[Run],
    runs: Sequence[Run],
    text_start: int,
    end: int,
    stop: tuple[int, int] | None,
) -> Iterator[Notice]:
    """Where the template's generation blocks and what the model would generate differ by more than white space."""
    last = end if stop is None else stop[0]
    left_out = [text[run.start : min(run.end, last)] for run in inside if not run.is_generated]
    if stop is not None and not any(run.is_generated and run.end > stop[0] for run in inside):
        shown = text[slice(*stop)]
        yield Notice(
            "generation_block",
            f"messages[{number}]: the template's generation block leaves out the end {shown!r}; it is trained",
        )
    beyond = [text[run.start : min(run.end, text_start)] for run in runs if run.is_generated]
    beyond += [text[max(run.start, end) : run.end] for run in runs if run.is_generated]
    for pieces, says in (
        (left_out, "leaves out {}, which the model would generate; it"),
        (beyond, "holds {}, which it would not; that"),
    ):
        shown = next((piece for piece in pieces if piece.strip()), None)
        if shown is not None:
            yield Notice(
                "generation_block",
                f"messages[{number}]: the template's generation block {says.format(repr(shown[:40]))} is not trained",
            )


def _merged(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if start >= end:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return tuple(found)


def _is_blank(text: str, run: Run) -> bool:
    return text[run.start : run.end].isspace()


def _is_template(run: Run) -> bool:
    return run.origin is not None and run.origin.part == "template"


def _is_text_of(run: Run, number: int) -> bool:
    return run.origin is not None and run.origin.message == number and run.origin.part != "template"


def _unsure(number: int, reason: str) -> RowError:
    return RowError(f"messages[{number}] (assistant): cannot be sure what to train: {reason}")
