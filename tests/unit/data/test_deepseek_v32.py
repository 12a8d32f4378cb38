"""DeepSeek-V3.2's prompts, character for character, and who wrote each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.deepseek_v32 import render
from burnish.types import Origin, RowError

BOS = "<\uff5cbegin▁of▁sentence\uff5c>"
EOS = "<\uff5cend▁of▁sentence\uff5c>"
USER = "<\uff5cUser\uff5c>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
DSML = "\uff5cDSML\uff5c"

Row = dict[str, Any]

SYSTEM: Row = {"role": "system", "content": "Be brief."}
QUESTION: Row = {"role": "user", "content": "hello"}
ANSWER: Row = {"role": "assistant", "content": "Hello!", "reasoning_content": "a greeting"}
AGAIN: Row = {"role": "user", "content": "1+1=?"}
TWO: Row = {"role": "assistant", "content": "2", "reasoning_content": "easy"}
TOOLS = [
    {"type": "function", "function": {"name": "f"}},
    {"type": "function", "function": {"name": "é", "strict": True}},
]


def call(name: str, **arguments: Any) -> Row:
    return {"type": "function", "id": "c1", "function": {"name": name, "arguments": arguments}}


def calls(*made: Row, **more: Any) -> Row:
    return {"role": "assistant", "content": "", "tool_calls": list(made), **more}


def result(content: str) -> Row:
    return {"role": "tool", "content": content, "tool_call_id": "c1"}


def text(messages: Sequence[Row], tools: Sequence[Row] | None = None, **kwargs: Any) -> str:
    return "".join(piece for piece, _ in render(messages, tools, kwargs))


def merged(messages: Sequence[Row], tools: Sequence[Row] | None = None, **kwargs: Any) -> list[tuple[str, Origin]]:
    """The stretches, with neighbours of one origin as one."""
    stretches: list[tuple[str, Origin]] = []
    for piece, origin in render(messages, tools, kwargs):
        if stretches and stretches[-1][1] == origin:
            stretches[-1] = (stretches[-1][0] + piece, origin)
        else:
            stretches.append((piece, origin))
    return stretches


def written(messages: Sequence[Row], number: int | None, part: str, **kwargs: Any) -> str:
    return "".join(piece for piece, origin in render(messages, None, kwargs) if origin == (number, part))


def refusal(messages: Sequence[Row], tools: Sequence[Row] | None = None, **kwargs: Any) -> str:
    with pytest.raises(RowError) as caught:
        render(messages, tools, kwargs)
    return str(caught.value)


# The two modes


def test_chat_mode_is_the_default_and_closes_thinking_before_each_answer() -> None:
    expected = f"{BOS}Be brief.{USER}hello{ASSISTANT}</think>Hello!{EOS}{USER}1+1=?{ASSISTANT}</think>2{EOS}"
    assert text([SYSTEM, QUESTION, ANSWER, AGAIN, TWO]) == expected


def test_thinking_mode_writes_reasoning_behind_the_last_user_message_alone() -> None:
    expected = f"{BOS}Be brief.{USER}hello{ASSISTANT}</think>Hello!{EOS}{USER}1+1=?{ASSISTANT}<think>easy</think>2{EOS}"
    assert text([SYSTEM, QUESTION, ANSWER, AGAIN, TWO], thinking=True) == expected
    assert text([SYSTEM, QUESTION, ANSWER, AGAIN, TWO], thinking=True, drop_thinking=False) == expected


def test_the_example_of_the_model_card() -> None:
    expected = f"{BOS}{USER}hello{ASSISTANT}</think>Hello!{EOS}{USER}1+1=?{ASSISTANT}<think>"
    assert text([QUESTION, ANSWER, AGAIN], thinking_mode="thinking", add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    ("messages", "mode", "added"),
    [
        ([QUESTION], "chat", f"{ASSISTANT}</think>"),
        ([QUESTION], "thinking", f"{ASSISTANT}<think>"),
        ([{"role": "developer", "content": "hi"}], "thinking", f"{ASSISTANT}<think>"),
        ([QUESTION, calls(call("f")), result("1")], "chat", "\n\n</think>"),
        ([QUESTION, calls(call("f")), result("1")], "thinking", "\n\n<think>"),
        ([QUESTION, calls(call("f"), call("f")), result("1")], "thinking", ""),
        ([QUESTION, ANSWER], "thinking", ""),
        ([SYSTEM], "chat", ""),
        ([], "chat", ""),
    ],
)
def test_the_generation_prompt_is_the_header_of_the_next_turn(messages: list[Row], mode: str, added: str) -> None:
    prompt = text(messages, thinking_mode=mode, add_generation_prompt=True)
    assert prompt == text(messages, thinking_mode=mode) + added


def test_questions_that_nobody_answers_keep_the_header_that_the_encoding_puts_behind_them() -> None:
    assert text([QUESTION, AGAIN], thinking=True) == f"{BOS}{USER}hello{ASSISTANT}</think>{USER}1+1=?"


def test_consecutive_answers_have_one_header() -> None:
    assert text([QUESTION, ANSWER, TWO]) == f"{BOS}{USER}hello{ASSISTANT}</think>Hello!{EOS}2{EOS}"
    expected = f"{BOS}{USER}hello{ASSISTANT}<think>a greeting</think>Hello!{EOS}easy</think>2{EOS}"
    assert text([QUESTION, ANSWER, TWO], thinking=True) == expected


def test_text_with_braces_and_the_encoding_s_own_markers_stays_as_it_is() -> None:
    content = f"{{content}} {ASSISTANT}</think>{EOS} {{}}\n "
    assert text([{"role": "user", "content": content}]) == f"{BOS}{USER}{content}"


# Tools


def test_parallel_calls_and_their_results() -> None:
    messages = [
        QUESTION,
        calls(call("f", city="Oslo", days=2), call("g"), content="Let me see.", reasoning_content="look"),
        result("rain"),
        result("<b>"),
        TWO,
    ]
    expected = (
        f"{BOS}{USER}hello{ASSISTANT}<think>look</think>Let me see.\n\n"
        f"<{DSML}function_calls>\n"
        f'<{DSML}invoke name="f">\n'
        f'<{DSML}parameter name="city" string="true">Oslo</{DSML}parameter>\n'
        f'<{DSML}parameter name="days" string="false">2</{DSML}parameter>\n'
        f"</{DSML}invoke>\n"
        f'<{DSML}invoke name="g">\n\n'
        f"</{DSML}invoke>\n"
        f"</{DSML}function_calls>{EOS}\n\n"
        "<function_results>\n<result>rain</result>\n<result><b></result>\n</function_results>\n\n"
        f"<think>easy</think>2{EOS}"
    )
    assert text(messages, thinking=True) == expected
    chat = expected.replace("<think>look</think>", "</think>").replace("<think>easy</think>", "</think>")
    assert text(messages) == chat


def test_calls_before_the_last_user_message_lose_their_reasoning_and_keep_their_results() -> None:
    messages = [QUESTION, calls(call("f"), reasoning_content="look"), result("rain"), TWO, AGAIN]
    shown = text(messages, thinking=True, add_generation_prompt=True)
    assert "look" not in shown
    assert shown.endswith(f"</function_results>\n\n</think>2{EOS}{USER}1+1=?{ASSISTANT}<think>")


@pytest.mark.parametrize(
    ("value", "is_text", "shown"),
    [
        ('a "b"\n</x>', "true", 'a "b"\n</x>'),
        ("3", "true", "3"),
        (3, "false", "3"),
        (2.5, "false", "2.5"),
        (True, "false", "true"),
        (None, "false", "null"),
        (["é", 1], "false", '["é", 1]'),
        ({"k": {"v": []}}, "false", '{"k": {"v": []}}'),
    ],
)
def test_text_arguments_stand_as_they_are_and_others_as_json(value: Any, is_text: str, shown: str) -> None:
    expected = f'<{DSML}parameter name="x" string="{is_text}">{shown}</{DSML}parameter>'
    assert expected in text([QUESTION, calls(call("f", x=value))])


def test_results_that_are_missing_leave_their_block_open_and_ask_for_nothing() -> None:
    messages = [QUESTION, calls(call("f"), call("g")), result("1"), TWO]
    assert text(messages).endswith(f"\n\n<function_results>\n<result>1</result>2{EOS}")


def test_the_text_about_tools_is_the_published_one() -> None:
    block = text([QUESTION], TOOLS[:1]).removeprefix(f"{BOS}\n\n").removesuffix(f"{USER}hello")
    assert block.startswith("## Tools\n\nYou have access to a set of tools")
    assert block.endswith('JSONSchema format:\n<functions>\n{"name": "f"}\n</functions>\n')
    digest = "43f2a7f14f6c2475f294b15f179353ddbcb13cc1f057c98ad8c72bc9bc3073dd"
    assert hashlib.sha256(block.encode()).hexdigest() == digest


def test_tools_stand_behind_a_first_system_message_else_before_all() -> None:
    about = text([], TOOLS).removeprefix(BOS)
    assert about.endswith('\n<functions>\n{"name": "f"}\n{"name": "é", "strict": true}\n</functions>\n')
    assert text([SYSTEM, QUESTION], TOOLS) == f"{BOS}Be brief.{about}{USER}hello"
    assert text([QUESTION], TOOLS) == f"{BOS}{about}{USER}hello"
    assert text([QUESTION, SYSTEM], TOOLS) == f"{BOS}{about}{USER}hello{ASSISTANT}</think>Be brief."
    assert text([{**SYSTEM, "tools": TOOLS}, QUESTION]) == f"{BOS}Be brief.{about}{USER}hello"


def test_a_response_format_stands_behind_the_tools() -> None:
    about = text([], TOOLS).removeprefix(BOS)
    wanted = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
    system = {**SYSTEM, "response_format": {"type": "é"}}
    assert text([system], TOOLS) == f'{BOS}Be brief.{about}{wanted}{{"type": "é"}}'


def test_a_developer_message_brings_its_tools_before_its_text() -> None:
    about = text([], TOOLS).removeprefix(BOS)
    developer = {"role": "developer", "content": "Search.", "tools": TOOLS}
    expected = f"{BOS}{USER}{about}\n\n# The user's message is: Search.{ASSISTANT}<think>easy</think>2{EOS}"
    assert text([developer, TWO], thinking=True) == expected


def test_a_developer_message_asks_as_a_user_message_does() -> None:
    developer = {"role": "developer", "content": "Search."}
    expected = (
        f"{BOS}{USER}hello{ASSISTANT}</think>Hello!{EOS}{USER}\n\n# The user's message is: Search.{ASSISTANT}<think>"
    )
    assert text([QUESTION, ANSWER, developer], thinking=True, add_generation_prompt=True) == expected
    about = text([], TOOLS).removeprefix(BOS)
    assert text([developer], TOOLS) == f"{BOS}{about}{USER}\n\n# The user's message is: Search."


# Who wrote it


def test_every_stretch_of_a_call_and_its_result_has_its_origin() -> None:
    messages = [SYSTEM, QUESTION, calls(call("f", city="Oslo", n=[1]), reasoning_content="look"), result("rain"), TWO]
    assert merged(messages, thinking=True) == [
        (BOS, (None, "template")),
        ("Be brief.", (0, "content")),
        (USER, (1, "template")),
        ("hello", (1, "content")),
        (f"{ASSISTANT}<think>", (2, "template")),
        ("look", (2, "reasoning")),
        (f'</think>\n\n<{DSML}function_calls>\n<{DSML}invoke name="', (2, "template")),
        ("f", (2, "tool_calls")),
        (f'">\n<{DSML}parameter name="', (2, "template")),
        ("city", (2, "tool_calls")),
        ('" string="true">', (2, "template")),
        ("Oslo", (2, "tool_calls")),
        (f'</{DSML}parameter>\n<{DSML}parameter name="', (2, "template")),
        ("n", (2, "tool_calls")),
        ('" string="false">', (2, "template")),
        ("[1]", (2, "tool_calls")),
        (f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}function_calls>{EOS}", (2, "template")),
        ("\n\n<function_results>\n<result>", (3, "template")),
        ("rain", (3, "content")),
        ("</result>\n</function_results>", (3, "template")),
        ("\n\n<think>", (4, "template")),
        ("easy", (4, "reasoning")),
        ("</think>", (4, "template")),
        ("2", (4, "content")),
        (EOS, (4, "template")),
    ]


def test_tools_and_a_response_format_belong_to_the_message_that_shows_them() -> None:
    schemas = '{"name": "f"}\n{"name": "é", "strict": true}'
    assert (schemas, (None, "tools")) in merged([QUESTION], TOOLS)
    assert (schemas, (0, "tools")) in merged([SYSTEM, QUESTION], TOOLS)
    developer = {"role": "developer", "content": "Search.", "tools": TOOLS, "response_format": {"a": 1}}
    stretches = merged([QUESTION, developer])
    assert (schemas, (1, "tools")) in stretches
    assert ('{"a": 1}', (1, "content")) in stretches
    assert ("Search.", (1, "content")) in stretches
    assert {number for _, (number, _) in merged([QUESTION], TOOLS)} == {None, 0}


def test_a_header_belongs_to_the_turn_that_answers_else_to_none() -> None:
    answered = merged([QUESTION, ANSWER])
    assert (f"{ASSISTANT}</think>", (1, "template")) in answered
    asked = merged([QUESTION], add_generation_prompt=True)
    assert asked[-1] == (f"{ASSISTANT}</think>", (None, "template"))
    assert (f"{ASSISTANT}</think>", (None, "template")) in merged([QUESTION, AGAIN])


def pieces(*choices: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(choices), max_size=4).map("".join)


# Letters that the encoding itself never writes tell whose text it is; markers are in both.
THEIRS = pieces("ü", " ", "\n", USER, ASSISTANT, EOS, "<think>", "</think>", "</result>")
OURS = pieces("å", " ", "\n", USER, ASSISTANT, EOS, "<think>", "</think>", f"</{DSML}parameter>")
ARGUMENTS = st.dictionaries(OURS, OURS | st.integers(0, 9) | st.lists(OURS, max_size=2), max_size=3)


@st.composite
def exchanges(draw: st.DrawFn) -> list[Row]:
    """A question, calls with their results, and mostly an answer."""
    turn: list[Row] = [{"role": "user", "content": draw(THEIRS)}]
    for count in draw(st.lists(st.integers(1, 3), max_size=2)):
        made = [call(draw(OURS), **draw(ARGUMENTS)) for _ in range(count)]
        turn.append(calls(*made, content=draw(OURS), reasoning_content=draw(OURS)))
        turn += [result(draw(THEIRS)) for _ in range(count)]
    if draw(st.integers(0, 3)):
        turn.append({"role": "assistant", "content": draw(OURS), "reasoning_content": "å" + draw(OURS)})
    return turn


@st.composite
def conversations(draw: st.DrawFn) -> list[Row]:
    opening = [{"role": "system", "content": draw(THEIRS)}] if draw(st.booleans()) else []
    return opening + [message for turn in draw(st.lists(exchanges(), min_size=1, max_size=3)) for message in turn]


def last_question(messages: Sequence[Mapping[str, Any]]) -> int:
    return max(number for number, message in enumerate(messages) if message["role"] == "user")


@settings(deadline=None)
@given(conversations(), st.booleans())
def test_each_message_is_written_whole_under_its_own_number(messages: list[Row], thinking: bool) -> None:
    for number, message in enumerate(messages):
        assert written(messages, number, "content", thinking=thinking) == message["content"]
        behind = thinking and number > last_question(messages)
        reasoning = message.get("reasoning_content", "") if behind else ""
        assert written(messages, number, "reasoning", thinking=thinking) == reasoning


@settings(deadline=None)
@given(conversations(), st.booleans())
def test_nobody_s_text_is_told_as_another_s(messages: list[Row], thinking: bool) -> None:
    for piece, (number, part) in render(messages, TOOLS, {"thinking": thinking}):
        role = None if number is None else messages[number]["role"]
        if "ü" in piece:
            assert (role in ("system", "user", "tool"), part) == (True, "content")
        if "å" in piece:
            assert (role, part == "template") == ("assistant", False)


@settings(deadline=None)
@given(conversations(), st.booleans())
def test_a_turn_is_one_stretch_that_ends_in_the_end_of_sentence(messages: list[Row], thinking: bool) -> None:
    stretches = render(messages, None, {"thinking": thinking})
    owners = [number for _, (number, _) in stretches if number is not None]
    assert owners == sorted(owners)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            own = [(piece, part) for piece, (owner, part) in stretches if owner == number]
            assert own[-1] == (EOS, "template")


@settings(deadline=None)
@given(conversations(), st.booleans())
def test_the_prompt_of_a_turn_is_how_the_whole_begins(messages: list[Row], thinking: bool) -> None:
    whole = text(messages, TOOLS, thinking=thinking)
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and (not thinking or number > last_question(messages)):
            prompt = text(messages[:number], TOOLS, thinking=thinking, add_generation_prompt=True)
            assert whole.startswith(prompt)
            header = prompt.removeprefix(text(messages[:number], TOOLS, thinking=thinking))
            own = "".join(
                piece for piece, (owner, _) in render(messages, TOOLS, {"thinking": thinking}) if owner == number
            )
            assert own.startswith(header)


# Arguments


@pytest.mark.parametrize(
    "kwargs",
    [
        {"thinking": True},
        {"enable_thinking": True},
        {"thinking_mode": "thinking"},
        {"thinking": True, "enable_thinking": True, "thinking_mode": "thinking"},
        {"thinking": True, "enable_thinking": None},
    ],
)
def test_thinking_is_asked_for_in_the_words_of_every_server(kwargs: dict[str, Any]) -> None:
    assert text([QUESTION, ANSWER], **kwargs) == f"{BOS}{USER}hello{ASSISTANT}<think>a greeting</think>Hello!{EOS}"


def test_the_first_token_can_be_left_to_others() -> None:
    assert text([QUESTION], add_default_bos_token=False) == f"{USER}hello"


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"think": True}, ["think=True", "thinking, enable_thinking, thinking_mode, drop_thinking"]),
        ({"context": []}, ["deepseek_v32 does not know context"]),
        ({"thinking": "yes"}, ["thinking='yes'", "true or false"]),
        ({"drop_thinking": []}, ["drop_thinking=[]", "true or false"]),
        ({"thinking_mode": "on"}, ["thinking_mode='on'", "thinking or chat"]),
        ({"thinking": True, "thinking_mode": "chat"}, ["thinking=True, thinking_mode='chat'", "keep one"]),
    ],
)
def test_arguments_that_say_nothing_certain_are_refused(kwargs: dict[str, Any], words: list[str]) -> None:
    told = refusal([QUESTION], **kwargs)
    assert [word for word in words if word not in told] == []


# What the encoding refuses


@pytest.mark.parametrize(
    ("messages", "kwargs", "words"),
    [
        ([QUESTION, {"role": "assistant", "content": "2"}], {"thinking": True}, ["messages[1]", "reasoning_content"]),
        ([QUESTION, ANSWER, result("1")], {}, ["messages[2]", "result 1 of the 0 tool calls"]),
        ([QUESTION, calls(call("f")), result("1"), result("2")], {}, ["messages[3]", "result 2 of the 1 tool calls"]),
        ([QUESTION, result("1")], {}, ["messages[1]", "result 1 of the 0 tool calls"]),
        ([result("1"), calls(call("f"))], {}, ["messages[0]", "result 1 of the 0 tool calls"]),
        ([{"role": "developer", "content": ""}], {}, ["messages[0]", "needs text"]),
        ([{"role": "critic", "content": "x"}], {}, ["messages[0]", "'critic'", "system, developer, user"]),
    ],
)
def test_what_the_encoding_refuses_is_a_row_error(messages: list[Row], kwargs: Row, words: list[str]) -> None:
    told = refusal(messages, **kwargs)
    assert [word for word in words if word not in told] == []


def test_a_developer_message_of_the_past_needs_drop_thinking_off_in_thinking_mode() -> None:
    messages = [{"role": "developer", "content": "Search."}, TWO, AGAIN]
    assert "drop_thinking: false" in refusal(messages, thinking=True)
    kept = f"{BOS}{USER}\n\n# The user's message is: Search.{ASSISTANT}</think>2{EOS}{USER}1+1=?"
    assert text(messages) == text(messages, thinking=True, drop_thinking=False) == kept


def test_tools_of_the_row_and_of_its_system_message_are_refused_together() -> None:
    assert "keep one" in refusal([{**SYSTEM, "tools": TOOLS}], TOOLS)
