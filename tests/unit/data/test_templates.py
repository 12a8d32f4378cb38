# ruff: noqa: RUF001 (the bars and letters in the markers are the templates' own)
"""Every shared chat template against every kind of conversation: ids, what is trained, spans, prompts and open turns.

Expectations come from transformers, from each template's markers (template_cases.py) and from the table of exact texts
below, which was written by hand from the templates; none is computed by burnish.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from template_cases import (
    FAMILIES,
    KINDS,
    TOOLS,
    WORD,
    Chat,
    check_spans,
    check_words,
    conversation,
    family_pair,
    reference,
    refusal,
    shown,
    tokens_in,
    trained_texts,
    trained_words,
    turns_and_mask,
    turns_of,
    word,
    words_in,
    words_of,
)

from burnish.config import LastTurns, Roles
from burnish.data.chat import Selection, TurnRow, turn_rows
from burnish.types import Conversation, Message, RowError, ToolCall

STOPLESS = ("Apertus-8B-Instruct", "GLM-4.6", "GLM-4.7-Flash")
"""Templates that leave the last turn open."""


# --- the table ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_is_trained_from_behind_the_prompt_through_its_end(shared: Path, name: str, kind: str) -> None:
    pair, family = family_pair(shared, name), FAMILIES[name]
    chat = conversation(family, kind)
    refused = refusal(pair, chat)
    if refused is not None:
        with pytest.raises(RowError) as error:
            pair.ours.encode(chat)
        assert refused in str(error.value)
        return
    ids, turns, mask = turns_and_mask(pair, family, chat)
    encoded = pair.ours.encode(chat)
    assert encoded.tokens.tolist() == ids
    assert encoded.loss_weights[0] == 0
    assert shown(pair, ids, encoded.loss_weights) == shown(pair, ids, mask)
    assert set(encoded.loss_weights.tolist()) == {0.0, 1.0}
    check_words(pair, chat, encoded)
    check_spans(pair, chat, encoded, turns)


@pytest.mark.parametrize("kind", ["many turns", "tools", "think text", "markers", "white space", "non-Latin"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("gpt2-chatml", "minimind")])
def test_another_vocabulary_gives_the_same_turns(shared: Path, name: str, kind: str) -> None:
    pair, family = family_pair(shared, name, "minimind"), FAMILIES[name]
    chat = conversation(family, kind)
    if refusal(pair, chat) is not None:
        return
    ids, _, mask = turns_and_mask(pair, family, chat)
    encoded = pair.ours.encode(chat)
    assert encoded.tokens.tolist() == ids
    assert shown(pair, ids, encoded.loss_weights) == shown(pair, ids, mask)


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "GLM-4.6", "Apertus-8B-Instruct", "NVIDIA-Nemotron-Nano-v2"])
def test_an_end_belongs_to_the_turn_that_it_ends(shared: Path, name: str) -> None:
    pair, family = family_pair(shared, name), FAMILIES[name]
    chat = conversation(family, "many turns")
    closed = [turn.message for turn in turns_and_mask(pair, family, chat)[1] if turn.closed]
    assert [span.message for span in pair.ours.encode(chat).spans if span.origin == "template:end"] == closed


# --- the exact texts, by hand ---


def user(content: str) -> Message:
    return Message("user", content)


def answer(content: str = "", **more: Any) -> Message:
    return Message("assistant", content, **more)


WEATHER = ToolCall("get_weather", {"city": "Köln"}, "call00001")
TWO = (user("hello"), answer("Hi."), user("again"), answer("Yes."))
CALL = (
    user("a"),
    answer(tool_calls=(WEATHER,)),
    Message("tool", "sunny", name="get_weather", tool_call_id="call00001"),
    answer("Sun."),
)
ARGUMENTS = '{"city": "Köln"}'
JSON_CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
END = "<|im_end|>"
EOT = "<|eot_id|>"
DEEPSEEK = "<｜end▁of▁sentence｜>"
CHATML_TWO = ["Hi." + END, "Yes." + END]
CHATML_CALL = [JSON_CALL + END, "Sun." + END]
EMPTY_THINK = "<think>\n\n</think>\n\n"
EXACT: dict[str, tuple[list[str], list[str] | None]] = {
    "Apertus-8B-Instruct": (
        ["Hi.<|assistant_end|>", "Yes."],
        [f'<|tools_prefix|>[{{"get_weather": {ARGUMENTS}}}]<|tools_suffix|>', "Sun."],
    ),
    "ByteDance-Seed-OSS": (
        ["Hi.<seed:eos>", "Yes.<seed:eos>"],
        [
            "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Köln</parameter>\n</function>\n"
            "</seed:tool_call><seed:eos>",
            "Sun.<seed:eos>",
        ],
    ),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": (
        [f"<|START_RESPONSE|>{text}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" for text in ("Hi.", "Yes.")],
        [
            '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
            + ARGUMENTS
            + "}\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>",
            "<|START_RESPONSE|>Sun.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ],
    ),
    "GLM-4.6": (
        ["\n<think></think>\nHi.<|user|>", "\n<think></think>\nYes."],
        [
            "\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n"
            "</tool_call><|observation|>",
            "\n<think></think>\nSun.",
        ],
    ),
    "GLM-4.7-Flash": (
        ["</think>Hi.<|user|>", "</think>Yes."],
        [
            "</think><tool_call>get_weather<arg_key>city</arg_key><arg_value>Köln</arg_value></tool_call><|observation|>",
            "</think>Sun.",
        ],
    ),
    "GigaChat3-10B-A1.8B": (
        ["Hi.<|message_sep|>", "Yes.<|message_sep|>"],
        [
            '<|message_sep|>\n\nfunction call<|role_sep|>\n{"name": "get_weather", "arguments": '
            + ARGUMENTS
            + "}<|message_sep|>",
            "Sun.<|message_sep|>",
        ],
    ),
    "HuggingFaceTB-SmolLM3-3B": (CHATML_TWO, [END, "Sun." + END]),  # it drops the calls
    "LFM2-8B-A1B": (CHATML_TWO, [END, "Sun." + END]),  # so does this
    "MiniMax-M2": (
        ["Hi.[e~[", "Yes.[e~["],
        [
            # The first line break is the header's, and one token with the turn's own.
            '\n\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Köln</parameter>\n</invoke>\n'
            "</minimax:tool_call>[e~[",
            "Sun.[e~[",
        ],
    ),
    "NVIDIA-Nemotron-Nano-v2": (
        ["Hi.\n<SPECIAL_12>", "Yes.\n<SPECIAL_12>"],
        [
            f'<TOOLCALL>[{{"name": "get_weather", "arguments": {ARGUMENTS}}}]</TOOLCALL>\n<SPECIAL_12>',
            "Sun.\n<SPECIAL_12>",
        ],
    ),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": (CHATML_TWO, CHATML_CALL),
    "Qwen-QwQ-32B": (CHATML_TWO, CHATML_CALL),
    "Qwen-Qwen2.5-7B-Instruct": (CHATML_TWO, CHATML_CALL),
    "Qwen-Qwen3-0.6B": (
        ["Hi." + END, EMPTY_THINK + "Yes." + END],
        [JSON_CALL + END, EMPTY_THINK + "Sun." + END],
    ),
    "Qwen3-Coder": (
        CHATML_TWO,
        [
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</tool_call>"
            + END,
            "Sun." + END,
        ],
    ),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": (
        ["Hi." + DEEPSEEK, "Yes." + DEEPSEEK],
        [
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
            # The template goes on with a second, empty turn, which no model would be asked for.
            f"{ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{DEEPSEEK}",
            "Sun." + DEEPSEEK,
        ],
    ),
    "deepseek-ai-DeepSeek-V3.1": (
        ["Hi." + DEEPSEEK, "Yes." + DEEPSEEK],
        [
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
            f"<｜tool▁calls▁end｜>{DEEPSEEK}",
            "Sun." + DEEPSEEK,
        ],
    ),
    "fireworks-ai-llama-3-firefunction-v2": (
        ["Hi." + EOT, "Yes." + EOT],
        [f' functools[{{"name": "get_weather", "arguments": {ARGUMENTS}}}]{EOT}', "Sun." + EOT],
    ),
    "google-gemma-2-2b-it": (["Hi.<end_of_turn>", "Yes.<end_of_turn>"], None),
    "ibm-granite-granite-3.3-2B-Instruct": (
        ["Hi.<|end_of_text|>", "Yes.<|end_of_text|>"],
        ["<|end_of_text|>", "Sun.<|end_of_text|>"],  # it drops the calls
    ),
    "meetkai-functionary-medium-v3.1": (
        ["Hi." + EOT, "Yes." + EOT],
        [f"<function=get_weather>{ARGUMENTS}</function><|eom_id|>", "Sun." + EOT],
    ),
    "meta-llama-Llama-3.1-8B-Instruct": (
        ["Hi." + EOT, "Yes." + EOT],
        [f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}{EOT}', "Sun." + EOT],
    ),
    "microsoft-Phi-3.5-mini-instruct": (["Hi.<|end|>", "Yes.<|end|>"], ["<|end|>", "Sun.<|end|>"]),  # drops the calls
    "mistralai-Mistral-Nemo-Instruct-2407": (
        ["Hi.</s>", "Yes.</s>"],
        [f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ARGUMENTS}, "id": "call00001"}}]</s>', "Sun.</s>"],
    ),
    "moonshotai-Kimi-K2": (
        CHATML_TWO,
        [
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
            f"{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>{END}",
            "Sun." + END,
        ],
    ),
    "openai-gpt-oss-120b": (
        ["<|channel|>final<|message|>Hi.<|end|>", "<|channel|>final<|message|>Yes.<|return|>"],
        [
            f" to=functions.get_weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>",
            "<|channel|>final<|message|>Sun.<|return|>",
        ],
    ),
    "openbmb-MiniCPM5-1B": (
        CHATML_TWO,
        [f'<function name="get_weather"><param name="city">Köln</param></function>{END}', "Sun." + END],
    ),
    "stepfun-ai-Step-3.5-Flash": (
        # The prompt ends in <think> and a line break, which is one token with the turn's own.
        ["Hi." + END, "\n\n</think>\nYes." + END],
        [
            "\n\n</think>\n<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n"
            "</tool_call>" + END,
            "\n\n</think>\nSun." + END,
        ],
    ),
    "gpt2-chatml": (["Hi." + END, EMPTY_THINK + "Yes." + END], [JSON_CALL + END, EMPTY_THINK + "Sun." + END]),
    "minimind": (CHATML_TWO, CHATML_CALL),  # its prompt holds the empty think block
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_trained_text_of_two_turns_and_of_a_call_is_exact(shared: Path, name: str) -> None:
    pair = family_pair(shared, name)
    two, call = EXACT[name]
    tools = TOOLS if FAMILIES[name].always_tools else None
    assert trained_texts(pair, pair.ours.encode(Conversation(TWO, tools))) == two
    if call is None:
        with pytest.raises(RowError, match="Conversation roles must alternate"):
            pair.ours.encode(Conversation(CALL, TOOLS))
    else:
        assert trained_texts(pair, pair.ours.encode(Conversation(CALL, TOOLS))) == call


def test_all_shared_templates_are_in_the_table(shared: Path) -> None:
    shipped = {path.stem for path in (shared / "chat_templates").glob("*.jinja")}
    assert len(shipped) == 28
    assert set(FAMILIES) == set(EXACT) == shipped | {"gpt2-chatml", "minimind"}


def test_a_template_that_prints_the_day_sees_the_recipes(shared: Path) -> None:
    for name in ("Apertus-8B-Instruct", "openai-gpt-oss-120b"):
        assert "Current date: 2025-03-04" in family_pair(shared, name).ours.encode(Conversation(TWO)).text
    granite = family_pair(shared, "ibm-granite-granite-3.3-2B-Instruct").ours.encode(Conversation(TWO))
    assert "Today's Date: March 04, 2025" in granite.text


# --- choosing what to train ---


REASONED = Chat().user().answer(reasoning=True, calls=1).result().answer(reasoning=True).done(TOOLS)
THINKERS = {
    "Qwen-Qwen3-0.6B": "<think>\nqthink3x\n</think>\n\n",
    "GLM-4.6": "<think>qthink3x</think>",
    "ByteDance-Seed-OSS": "<seed:think>qthink3x</seed:think>",
    "minimind": "qthink3x\n</think>\n\n",
    "openbmb-MiniCPM5-1B": "<think>\nqthink3x\n</think>\n\n",
    "MiniMax-M2": "qthink3x\n</think>\n\n",
    "stepfun-ai-Step-3.5-Flash": "qthink3x\n</think>\n",
}


@pytest.mark.parametrize("name", THINKERS)
def test_reasoning_and_calls_can_be_left_out(shared: Path, name: str) -> None:
    pair = family_pair(shared, name)
    whole = pair.ours.encode(REASONED)
    own = {w for m in REASONED.messages if m.role == "assistant" for part in words_of(m).values() for w in part}
    assert trained_words(pair, whole) == own
    thoughts, calls = {"qthink1x", "qthink3x"}, {"qkey1ax", "qval1ax"}
    for reasoning, tool_calls in ((False, True), (True, False), (False, False)):
        encoded = pair.ours.encode(REASONED, Selection(reasoning=reasoning, tool_calls=tool_calls))
        assert encoded.tokens.tolist() == whole.tokens.tolist()
        left_out = (set() if reasoning else thoughts) | (set() if tool_calls else calls)
        assert trained_words(pair, encoded) == own - left_out
        assert not ((encoded.loss_weights > 0) & (whole.loss_weights == 0)).any()
        if FAMILIES[name].name not in STOPLESS:
            assert trained_texts(pair, encoded)[-1].endswith(FAMILIES[name].eos)


@pytest.mark.parametrize("name", THINKERS)
def test_the_marks_around_reasoning_are_left_out_with_it(shared: Path, name: str) -> None:
    pair = family_pair(shared, name)
    encoded = pair.ours.encode(REASONED, Selection(reasoning=False))
    trained = trained_texts(pair, encoded)
    assert any(THINKERS[name] in text for text in trained_texts(pair, pair.ours.encode(REASONED)))
    assert "think>" not in "".join(trained)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "Qwen-Qwen2.5-7B-Instruct",
            '<tool_call>\n{"name": "get_weather", "arguments": {"qkey1ax": "qval1ax"}}\n</tool_call>',
        ),
        ("moonshotai-Kimi-K2", "functions.get_weather:0"),
        ("mistralai-Mistral-Nemo-Instruct-2407", '{"name": "get_weather", "arguments": {"qkey1ax": "qval1ax"}'),
    ],
)
def test_the_marks_around_calls_are_left_out_with_them(shared: Path, name: str, call: str) -> None:
    pair = family_pair(shared, name)
    chat = Chat().user().answer("", calls=1).result().answer().done(TOOLS)
    assert any(call in text for text in trained_texts(pair, pair.ours.encode(chat)))
    without = "".join(trained_texts(pair, pair.ours.encode(chat, Selection(tool_calls=False))))
    assert not any(mark in without for mark in ("tool_call>", "get_weather", "tool_call_begin", "qkey", "qval"))
    assert "qasst3x" in without


LONG = Chat().add("system").user().answer().user().answer("", calls=1).result().answer().done(TOOLS)


@pytest.mark.parametrize(
    ("train_on", "messages"),
    [
        ("assistant", {2, 4, 6}),
        ("last", {6}),
        (LastTurns(last_n=2), {4, 6}),
        (Roles(roles=("user",)), {1, 3}),
        (Roles(roles=("tool", "system")), {0, 5}),
        (Roles(roles=("assistant", "tool")), {2, 4, 5, 6}),
        ("all", {0, 1, 2, 3, 4, 5, 6}),
    ],
)
@pytest.mark.parametrize(
    "name",
    ["Qwen-Qwen3-0.6B", "meta-llama-Llama-3.1-8B-Instruct", "GLM-4.6", "openai-gpt-oss-120b", "moonshotai-Kimi-K2"],
)
def test_train_on_chooses_messages(shared: Path, name: str, train_on: Any, messages: set[int]) -> None:
    pair = family_pair(shared, name)
    encoded = pair.ours.encode(LONG, Selection(train_on=train_on))
    own = {w for n in messages for part in words_of(LONG.messages[n]).values() for w in part}
    tools = {"qtoolsax", "qtoolsbx"} if train_on == "all" else set()
    assert trained_words(pair, encoded) == own | tools
    assert encoded.loss_weights[0] == 0
    if train_on == "all":
        assert (encoded.loss_weights[1:] == 1).all()


def test_a_fraction_is_the_weight_of_the_whole_turn(shared: Path) -> None:
    for name, family in FAMILIES.items():
        chat = Chat().user().answer(weight=0.25).user().answer().user().answer(weight=0.0).done()
        pair, chat = family_pair(shared, name), Conversation(chat.messages, TOOLS if family.always_tools else None)
        text, ids = reference(pair, chat.messages, chat.tools)
        quarter, whole, _ = (tokens_in(pair, text, [(turn.start, turn.end)]) for turn in turns_of(family, text, chat))
        encoded = pair.ours.encode(chat)
        assert encoded.tokens.tolist() == ids
        assert encoded.loss_weights.tolist() == (quarter * 0.25 + whole).tolist(), name


# --- turns that the template leaves open ---


@pytest.mark.parametrize("name", FAMILIES)
def test_an_open_turn_is_noticed_and_no_closed_one_is(shared: Path, name: str) -> None:
    pair, family = family_pair(shared, name), FAMILIES[name]
    chat = conversation(family, "many turns")
    noticed = [notice.kind for notice in pair.ours.encode(chat).notices]
    assert ("open_turn" in noticed) == (name in STOPLESS)


@pytest.mark.parametrize(
    ("name", "kind", "stop"),
    [
        ("GLM-4.6", "many turns", "<|user|>"),
        ("GLM-4.6", "call last", "<|observation|>"),
        ("GLM-4.7-Flash", "one turn", "<|user|>"),
        ("Apertus-8B-Instruct", "many turns", "<|assistant_end|>"),
    ],
)
def test_an_open_turn_is_closed_as_the_template_would_by_key(shared: Path, name: str, kind: str, stop: str) -> None:
    pair, family = family_pair(shared, name), FAMILIES[name]
    chat = conversation(family, kind)
    ids, _, mask = turns_and_mask(pair, family, chat)
    closed = pair.ours.encode(chat, Selection(open_turns="close"))
    assert closed.tokens.tolist() == [*ids, pair.backend.token_to_id(stop)]
    assert (closed.loss_weights > 0).tolist() == [*mask.tolist(), True]
    assert not [notice for notice in closed.notices if notice.kind == "open_turn"]
    assert closed.spans[-1].origin == "template:end"
    assert closed.spans[-1].end == len(closed.tokens)


@pytest.mark.parametrize("name", ["GLM-4.6", "Apertus-8B-Instruct", "Qwen-Qwen2.5-7B-Instruct"])
def test_an_open_turn_is_an_error_by_key(shared: Path, name: str) -> None:
    pair = family_pair(shared, name)
    chat = Chat().user().answer().done()
    if name not in STOPLESS:
        assert (
            pair.ours.encode(chat, Selection(open_turns="error")).tokens.tolist()
            == pair.ours.encode(chat).tokens.tolist()
        )
        return
    with pytest.raises(RowError, match="open_turns"):
        pair.ours.encode(chat, Selection(open_turns="error"))


def test_closing_changes_nothing_where_turns_are_closed(shared: Path) -> None:
    pair, chat = family_pair(shared, "Qwen-Qwen3-0.6B"), Chat().user().answer().user().done()
    assert np.array_equal(pair.ours.encode(chat, Selection(open_turns="close")).tokens, pair.ours.encode(chat).tokens)


# --- the prompt in training and in inference ---


@pytest.mark.parametrize("kind", ["many turns", "system", "reasoning", "tools", "think text", "consecutive"])
@pytest.mark.parametrize("name", FAMILIES)
def test_differences_from_the_prompt_of_inference_are_those_there_are(shared: Path, name: str, kind: str) -> None:
    pair, family = family_pair(shared, name), FAMILIES[name]
    chat = conversation(family, kind)
    if refusal(pair, chat) is not None:
        return
    text, ids = reference(pair, chat.messages, chat.tools)
    differing = set()
    for turn in turns_of(family, text, chat):
        first = int(np.flatnonzero(tokens_in(pair, text, [(turn.start, turn.end)]))[0])
        if ids[:first] != reference(pair, chat.messages[: turn.message], chat.tools, prompt=True)[1]:
            differing.add(turn.message)
    found = pair.ours.prompt_differences(chat, pair.ours.encode(chat))
    assert {number for number, _ in found} == differing
    assert all(words for _, words in found)


@pytest.mark.parametrize("kind", ["many turns", "system", "reasoning", "think text", "tools", "non-Latin"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_of_its_own_stands_under_the_prompt_of_inference(shared: Path, name: str, kind: str) -> None:
    pair, family = family_pair(shared, name), FAMILIES[name]
    chat = conversation(family, kind)
    if refusal(pair, chat) is not None:
        return
    rows = turn_rows(chat, Selection())
    assert [row.number for row in rows if isinstance(row, TurnRow)] == [
        n for n, m in enumerate(chat.messages) if m.role == "assistant"
    ]
    for row in rows:
        assert isinstance(row, TurnRow)
        asked, prompt = reference(pair, chat.messages[: row.number], chat.tools, prompt=True)
        history = Conversation(chat.messages[: row.number + 1], chat.tools)
        until, _ = reference(pair, history.messages, history.tools)
        start = next(turn.start for turn in turns_of(family, until, history) if turn.message == row.number)
        header = [match for match in family.header_pattern.finditer(until) if match.end() == start]
        if header and not asked.endswith(header[-1].group()):
            # The template asks for one kind of turn and writes another, such as none with an empty think block.
            with pytest.raises(RowError, match="inference asks for the turn with"):
                pair.ours.encode(row)
            continue
        encoded = pair.ours.encode(row)
        first = int(np.flatnonzero(encoded.loss_weights)[0])
        assert encoded.tokens[:first].tolist() == prompt
        own = {w for part in words_of(chat.messages[row.number]).values() for w in part}
        assert trained_words(pair, encoded) == own & words_in(until)
        assert len(trained_texts(pair, encoded)) == 1
        if name not in STOPLESS:
            last = int(np.flatnonzero(encoded.loss_weights)[-1])
            assert family.end_pattern.fullmatch(pair.backend.id_to_token(int(encoded.tokens[last])) or "")


def test_a_turn_of_its_own_keeps_the_stop_that_the_next_turn_brings(shared: Path) -> None:
    pair = family_pair(shared, "GLM-4.6")
    chat = Chat().user().answer("", calls=1).result().answer().user().answer().done(TOOLS)
    rows = turn_rows(chat, Selection())
    texts = [trained_texts(pair, pair.ours.encode(row)) for row in rows]
    assert [text.endswith(end) for (text,), end in zip(texts[:2], ("<|observation|>", "<|user|>"), strict=True)] == [
        True
    ] * 2
    closed = trained_texts(pair, pair.ours.encode(rows[2], Selection(open_turns="close")))
    assert closed[0].endswith("<|user|>")


def test_turns_of_their_own_are_the_trained_ones_with_their_weights(shared: Path) -> None:
    chat = Chat().user().answer(weight=0.5).user().answer(weight=0.0).user().answer().done()

    def numbers(selection: Selection) -> list[int]:
        return [row.number for row in turn_rows(chat, selection) if isinstance(row, TurnRow)]

    assert numbers(Selection()) == [1, 5]
    assert numbers(Selection(train_on="last")) == [1, 5]
    silent = Conversation(tuple(Message(m.role, m.content) for m in chat.messages))
    assert [r.number for r in turn_rows(silent, Selection(train_on="last")) if isinstance(r, TurnRow)] == [5]
    assert len(turn_rows(silent, Selection(train_on=LastTurns(last_n=2)))) == 2
    pair = family_pair(shared, "Qwen-Qwen3-0.6B")
    weights = [set(pair.ours.encode(row).loss_weights.tolist()) for row in turn_rows(chat, Selection())]
    assert weights == [{0.0, 0.5}, {0.0, 1.0}]


def test_words_are_unique_in_every_kind() -> None:
    """What the oracles rest on."""
    for kind in KINDS.values():
        for family in (FAMILIES["Qwen-Qwen3-0.6B"], FAMILIES["openai-gpt-oss-120b"]):
            words = [w for m in kind(family).messages for part in words_of(m).values() for w in part]
            assert len(words) == len(set(words))
    assert WORD.fullmatch(word("user", 1, "b"))
