"""Which characters of a rendered conversation are trained: the turns of assistants, from header to end-of-turn.

A turn's trained characters are what the model would generate there: all behind the generation prompt through the
end-of-turn token, whoever wrote it. Where a turn stands is `turn_places.py`'s; tokens are `chat.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from burnish.config import LastTurns, Roles, TrainOn
from burnish.data.template import Rendering, Run, reasoning_end
from burnish.data.turn_places import (
    BLANK,
    Chat,
    Notice,
    Stops,
    find_header,
    find_place,
    is_blank,
    is_template,
    is_text_of,
    next_stop,
    run_at,
    unsure,
)
from burnish.types import Message, Origin, RowError

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
        closing = max([own[0].start, *(run.end for run in own if is_text_of(run, number))])
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
        raise unsure(number, "the chat template does not write it")
    start = len(prompt.text) if written.text.startswith(prompt.text) else turn.text_start if turn.is_asked else -1
    if not turn.start <= start <= turn.end:
        raise unsure(
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
    match = BLANK.match(rendering.text, start)
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
    place = find_place(chat, rendering, number, stops)
    if place is None:
        return None
    text, start, end = rendering.text, place.start, place.end
    runs = rendering.runs[place.first : place.last + 1]
    header = place.header or find_header(chat, rendering, number, place, runs, stops)
    text_start = start + header.length
    notices = list(header.notices)
    closing = max([text_start, *(run.end for run in runs if is_text_of(run, number))])
    is_sure = place.header is None
    stop = stops.find(text, closing, end, text[text_start:closing], is_sure) or next_stop(rendering, place, stops)
    if stop is None:
        end = end if is_sure else closing
        notices.append(_open_turn(text, number, closing, end, stops, selection))
    elif stop[1] > end:
        runs = (*runs, _clipped(rendering.runs[run_at(rendering, place.last, stop[0])], end, stop[1]))
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
        if is_template(run) and start < run.end < closing and stops.has_declared(text, max(run.start, start), run.end):
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
            raise unsure(number, f"the chat template makes {shown!r} of several texts at once")
        if run.origin.message != number and not is_template(run) and not is_blank(text, run):
            other = "a tool's schema" if run.origin.message is None else f"messages[{run.origin.message}]"
            raise unsure(number, f"the chat template writes {other} into the same turn")


def _first_mark(text: str, run: Run, stops: Stops) -> int:
    """Where the first mark of a run ends, with the white space behind it: an added token, a tag, or else a word."""
    token = stops.landmarks.match(text, BLANK.match(text, run.start).end(), run.end)  # pyright: ignore[reportOptionalMemberAccess]
    mark = token or _MARK.match(text, run.start, run.end)
    return run.start if mark is None else BLANK.match(text, mark.end(), run.end).end()  # pyright: ignore[reportOptionalMemberAccess]


_MARK = re.compile(r"\s*(?:<[^<>]*>|\[[^\[\]]*\]|\S+)")


def _without(
    left_out: frozenset[str], runs: Sequence[Run], text: str, number: int, stop: tuple[int, int] | None, stops: Stops
) -> list[Run]:
    """`runs` of a turn without the parts `left_out`. The template's words go with the part that they open or close.

    Between reasoning and tool calls the first mark closes the reasoning; what stands behind the last part closes it,
    but for the end-of-turn token.
    """
    kept: list[Run] = []
    parts = [run.origin.part if run.origin is not None and is_text_of(run, number) else None for run in runs]
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
