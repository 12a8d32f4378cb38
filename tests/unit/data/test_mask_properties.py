# ruff: noqa: RUF001 (letters that nobody else writes in)
"""Generated conversations under a handful of templates: whose characters are trained, whatever the texts hold.

Assistants write in letters that nobody else and no template writes in, others in letters that no assistant does; both
mix them with markers, white space, combining marks and emoji. Template x kind by hand is test_templates.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_cases import FAMILIES, TOOLS, Pair, family_pair, reference

from burnish.data.chat import Encoded, Selection, TurnRow, turn_rows
from burnish.types import Conversation, Message, RowError, ToolCall

NAMES = (
    "Qwen-Qwen3-0.6B",
    "meta-llama-Llama-3.1-8B-Instruct",
    "GLM-4.6",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "openai-gpt-oss-120b",
    "deepseek-ai-DeepSeek-V3.1",
    "NVIDIA-Nemotron-Nano-v2",
    "minimind",
)
OWN_LETTERS, OTHERS_LETTERS = "αβγω", "бвгж"
OWN_PARTS = [
    *OWN_LETTERS,
    "α\u0301",
    "👩\u200d👩\u200d👧",
    "🇬🇷",
]  # an acute, a joiner and flags are the assistants' alone
OTHERS_PARTS = [*OTHERS_LETTERS, "б\u0308", "👍🏽", "שלום"]
OWN = frozenset("".join(OWN_PARTS))
OTHERS = frozenset("".join(OTHERS_PARTS))
MARKERS = sorted({text for name in NAMES for text in (FAMILIES[name].markers, FAMILIES[name].ask, FAMILIES[name].eos)})
SHARED = [" ", "\n", "\t", "  \n", "'", '"', "{{ x }}", "{% x %}", "\\", "<think>", "\r\n", "\u00a0"]


def texts(parts: list[str], markers: bool) -> st.SearchStrategy[str]:
    pieces = st.sampled_from(parts) | st.sampled_from(SHARED)
    if markers:
        pieces |= st.sampled_from([*MARKERS, "</think>", "<tool_response>"])
    return st.lists(pieces, max_size=6).map("".join)


THEIRS = texts(OTHERS_PARTS, markers=True)
MINE = texts(OWN_PARTS, markers=False)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Roles in an order that every template of NAMES takes: users and assistants by turns, calls with their results."""
    messages = [Message("system", draw(THEIRS))] if draw(st.booleans()) else []
    with_tools = draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(THEIRS)))
        if with_tools and draw(st.booleans()):
            call = ToolCall("get_weather", {"a": draw(MINE)}, "call00001")
            messages.append(Message("assistant", tool_calls=(call,)))
            messages.append(Message("tool", draw(THEIRS), name="get_weather", tool_call_id="call00001"))
        messages.append(Message("assistant", draw(MINE), reasoning=draw(st.none() | MINE)))
    if draw(st.booleans()):
        messages.append(Message("user", draw(THEIRS)))
    return Conversation(tuple(messages), TOOLS if with_tools else None)


bounded = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def characters(pair: Pair, encoded: Encoded, text: str) -> np.ndarray:
    """For each character of `text` whether a trained token holds any of it; offsets are the tokenizer's own."""
    trained = np.zeros(len(text), bool)
    offsets = pair.backend.encode(text, add_special_tokens=False).offsets
    assert len(offsets) == len(encoded.tokens)
    for (start, end), weight in zip(offsets, encoded.loss_weights.tolist(), strict=True):
        trained[start:end] |= weight > 0
    return trained


def encoded_or_empty(pair: Pair, chat: Conversation, text: str) -> Encoded | None:
    """None where nothing is trained because the template writes no assistant turn at all."""
    try:
        return pair.ours.encode(chat)
    except RowError as error:
        assert str(error) == "no trained token"  # noqa: PT017 (other conversations have some)
        assert not by_whom(text, OWN).any()
        return None


def by_whom(text: str, whose: frozenset[str]) -> np.ndarray:
    return np.array([character in whose for character in text], bool)


@pytest.mark.parametrize("name", NAMES)
@bounded
@given(chat=conversations())
def test_assistants_characters_are_trained_and_no_others(shared: Path, name: str, chat: Conversation) -> None:
    pair, family = family_pair(shared, name), FAMILIES[name]
    text, ids = reference(pair, chat.messages, chat.tools)
    encoded = encoded_or_empty(pair, chat, text)
    if encoded is None:
        return
    assert encoded.tokens.tolist() == ids
    assert encoded.text == text
    assert encoded.loss_weights[0] == 0
    trained = characters(pair, encoded, text)
    assert not (trained & by_whom(text, OTHERS)).any()
    assert trained[by_whom(text, OWN)].all()
    # The end of every closed turn: the first end-of-turn token behind an assistant's letters.
    own = np.flatnonzero(by_whom(text, OWN))
    for last in own.tolist():
        ended = family.end_pattern.search(text, last)
        assert ended is not None
        if ended.group():
            assert trained[last : ended.end()].all()
            assert ended.end() == len(text) or not text[ended.end() :].isspace() or not trained[ended.end() :].any()


@pytest.mark.parametrize("name", NAMES)
@bounded
@given(chat=conversations())
def test_spans_say_who_wrote_each_character(shared: Path, name: str, chat: Conversation) -> None:
    pair = family_pair(shared, name)
    encoded = encoded_or_empty(pair, chat, reference(pair, chat.messages, chat.tools)[0])
    if encoded is None:
        return
    assert [span.start for span in encoded.spans] == [0, *(span.end for span in encoded.spans[:-1])]
    assert encoded.spans[-1].end == len(encoded.tokens)
    offsets = pair.backend.encode(encoded.text, add_special_tokens=False).offsets
    for span in encoded.spans:
        written = {encoded.text[n] for start, end in offsets[span.start : span.end] for n in range(start, end)}
        if written & OWN:
            assert span.origin.startswith("assistant:")
        if written & OTHERS:
            assert span.origin.startswith(("system:", "user:", "tool:"))
        if written & (OWN | OTHERS) and span.message is not None:
            assert span.origin.split(":")[0] == chat.messages[span.message].role


@pytest.mark.parametrize("name", NAMES)
@bounded
@given(chat=conversations(), reasoning=st.booleans(), tool_calls=st.booleans())
def test_a_choice_only_takes_away(
    shared: Path, name: str, chat: Conversation, reasoning: bool, tool_calls: bool
) -> None:
    pair = family_pair(shared, name)
    whole = encoded_or_empty(pair, chat, reference(pair, chat.messages, chat.tools)[0])
    if whole is None:
        return
    try:
        chosen = pair.ours.encode(chat, Selection(reasoning=reasoning, tool_calls=tool_calls))
    except RowError as error:
        assert "no trained token" in str(error)  # noqa: PT017 (other choices leave some)
        return
    assert chosen.tokens.tolist() == whole.tokens.tolist()
    assert not ((chosen.loss_weights > 0) & (whole.loss_weights == 0)).any()
    if reasoning and tool_calls:
        assert chosen.loss_weights.tolist() == whole.loss_weights.tolist()


@pytest.mark.parametrize("name", NAMES)
@bounded
@given(chat=conversations())
def test_a_turn_of_its_own_has_the_prompt_of_inference(shared: Path, name: str, chat: Conversation) -> None:
    pair = family_pair(shared, name)
    for row in turn_rows(chat, Selection()):
        assert isinstance(row, TurnRow)
        asked, prompt = reference(pair, chat.messages[: row.number], chat.tools, prompt=True)
        written, _ = reference(pair, chat.messages[: row.number + 1], chat.tools)
        try:
            encoded = pair.ours.encode(row)
        except RowError as error:
            # A template may ask for a turn with an empty think block and write one with a full one, or write none.
            assert any(words in str(error) for words in ("inference asks for the turn with", "does not write it"))  # noqa: PT017
            assert not written.startswith(asked)
            continue
        first = int(np.flatnonzero(encoded.loss_weights)[0])
        assert encoded.tokens[:first].tolist() == prompt
        trained = pair.backend.decode(encoded.tokens[encoded.loss_weights > 0].tolist(), skip_special_tokens=False)
        assert not set(trained) & OTHERS
