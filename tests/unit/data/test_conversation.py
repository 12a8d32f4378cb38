"""Every shape of row becomes what it says; what it cannot say becomes an error that tells why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.config import SourceConfig
from burnish.data.conversation import Format, recognise, row_facts, to_conversation
from burnish.data.rows import MemoryRows, open_rows
from burnish.types import Conversation, Message, RawText, RowError, TokenRow, ToolCall, UserError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
CHAT = [USER, ANSWER]


def source(**keys: Any) -> SourceConfig:
    return SourceConfig(path="rows.jsonl", **keys)


def recognised(*rows: dict[str, Any], **keys: Any) -> Format:
    return recognise(MemoryRows(rows).schema, source(**keys))


def read(row: dict[str, Any], **keys: Any) -> Any:
    """The row as the shape that it is recognised to have alone."""
    return to_conversation(row, recognised(row, **keys), source(**keys))


def messages(raw: list[Any], **columns: Any) -> tuple[Message, ...]:
    return read({"messages": raw, **columns}).messages


def reason(row: dict[str, Any], format: Format = Format.MESSAGES, **keys: Any) -> str:
    with pytest.raises(RowError) as caught:
        to_conversation(row, format, source(**keys))
    return str(caught.value)


def refusal(*rows: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        recognised(*rows, **keys)
    return str(caught.value)


# Which shape


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        ({"messages": CHAT}, {}, "messages"),
        ({"chat": CHAT}, {"messages_key": "chat"}, "messages"),
        ({"conversations": CHAT}, {"messages_key": "conversations"}, "messages"),
        ({"messages": CHAT, "prompt": "hi"}, {}, "messages"),
        ({"messages": CHAT, "prompt": [USER]}, {}, "messages"),
        ({"messages": CHAT, "prompt": "hi", "completion": "hello"}, {}, "prompt"),
        ({"messages": CHAT, "prompt": "hi", "completion": None}, {}, "messages"),
        ({"prompt": "hi", "completion": "hello"}, {}, "prompt"),
        ({"question": "hi", "completion": "hello"}, {"prompt_key": "question"}, "prompt"),
        ({"prompt": "hi", "completion": "a"}, {"prompt_key": "prompt", "response_key": "completion"}, "instruction"),
        ({"instruction": "hi", "output": "hello"}, {}, "instruction"),
        ({"instruction": "hi", "input": "", "output": "hello"}, {}, "instruction"),
        ({"q": "hi", "a": "hello"}, {"prompt_key": "q", "response_key": "a"}, "instruction"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, {}, "sharegpt"),
        ({"text": "hi"}, {}, "text"),
        ({"input_ids": [1, 2]}, {}, "tokens"),
        ({"instruction": "hi", "output": "a", "text": "hi a"}, {"format": "text"}, "text"),
        ({"instruction": "hi", "input": "x", "output": "hello"}, {"format": "instruction"}, "instruction"),
    ],
)
def test_the_shape_follows_from_the_columns(row: dict[str, Any], keys: dict[str, Any], expected: str) -> None:
    assert recognised(row, **keys) == expected


def test_the_shape_is_that_of_all_rows_not_of_the_first() -> None:
    broken = {"messages": None, "prompt": None}
    assert recognised(broken, *[{"messages": CHAT}] * 3) is Format.MESSAGES
    mixed = refusal({"messages": CHAT}, {"messages": CHAT}, {"text": "hi"})
    assert "the rows fit more than one shape: messages (2 rows), text (1 rows)" in mixed
    assert "set data.train.format to one" in mixed


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ({"question": "hi", "answer": "a"}, {}, "the columns are question (1 rows), answer (1 rows)"),
        ({"question": "hi", "answer": "a"}, {}, "Set prompt_key=question and response_key=answer"),
        ({"a": "b"}, {}, "messages needs messages; prompt needs prompt and completion; instruction needs"),
        ({"a": "b"}, {"format": "messages"}, "data.train.format=messages: no row has the column messages"),
        ({"question": "hi", "output": "a"}, {"prompt_key": "qestion"}, "did you mean prompt_key=question?"),
        ({"messages": CHAT}, {"tools_key": "functions"}, "data.train.tools_key=functions: no row has this column"),
        ({"messages": CHAT, "text": "hi"}, {}, "more than one shape: messages (1 rows), text (1 rows)"),
        ({"instruction": "hi", "input": "x", "output": "a"}, {}, "set data.train.query_key=input to use it, or"),
        ({"instruction": "hi", "output": "a", "system": "s"}, {}, "set data.train.system_key=system to use it, or"),
        ({"conversations": CHAT, "system": "s"}, {}, "data.train.format=sharegpt to leave it out"),
        ({"instruction": "hi", "output": "a", "history": [["a", "b"]]}, {}, "column history holds earlier turns"),
    ],
)
def test_what_is_not_certain_is_refused(row: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    assert message in refusal(row, **keys)


def test_a_source_without_a_readable_row_says_so() -> None:
    with pytest.raises(UserError, match="no row could be read as an object with columns"):
        recognise(MemoryRows([3]).schema, source())  # type: ignore[list-item]


# Chats


def test_messages() -> None:
    tool = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    row = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi", "name": "Ann", "weight": None},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "think",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1.0, "y": null}'}},
                    {"name": "g", "arguments": {"z": [1]}},
                    {"function": {"name": "h", "arguments": ""}},
                ],
            },
            {"role": "tool", "content": "7", "tool_call_id": "c1"},
            {"role": "assistant", "content": "seven", "weight": 0.5, "mood": "glad"},
        ],
        "tools": [tool, {"type": "function", "function": tool}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    wrapped = {"type": "function", "function": tool}
    assert read(row) == Conversation(
        messages=(
            Message("system", "be brief"),
            Message("user", "hi", name="Ann"),
            Message(
                "assistant",
                reasoning="think",
                tool_calls=(
                    ToolCall("f", {"x": 1.0, "y": None}, "c1"),
                    ToolCall("g", {"z": [1]}),
                    ToolCall("h", {}),
                ),
            ),
            Message("tool", "7", tool_call_id="c1"),
            Message("assistant", "seven", weight=0.5, extra={"mood": "glad"}),
        ),
        tools=(wrapped, wrapped),
        template_kwargs={"enable_thinking": False},
    )


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools(tools: Any) -> None:
    assert read({"messages": CHAT, "tools": tools}).tools is None


def test_tools_keep_the_order_of_their_keys() -> None:
    wrapped = '{"function": {"parameters": {"b": 1, "a": null}, "name": "f"}, "type": "function"}'
    flat = '{"type": "function", "name": "g"}'
    tools = read({"messages": CHAT, "tools": f"[{wrapped}, {flat}]"}).tools
    assert [json.dumps(tool) for tool in tools] == [wrapped, '{"type": "function", "function": {"name": "g"}}']


def test_sharegpt() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "3"},
        {"from": "function_call", "value": json.dumps([call, call | {"arguments": '{"x": 2}'}])},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "done"},
    ]
    assert read({"conversations": turns}).messages == (
        Message("system", "s"),
        Message("user", "hi"),
        Message("assistant", tool_calls=(ToolCall("f", {"x": 1}),)),
        Message("tool", "3"),
        Message("assistant", tool_calls=(ToolCall("f", {"x": 1}), ToolCall("f", {"x": 2}))),
        Message("tool", "4"),
        Message("assistant", "done"),
    )
    assert read({"conversations": CHAT}).messages == read({"messages": CHAT}).messages
    assert read({"conversations": CHAT, "system": "s"}, system_key="system").messages[0] == Message("system", "s")


def test_content_in_parts() -> None:
    parts = [
        {"type": "reasoning", "value": "think "},
        {"type": "thinking", "thinking": "more"},
        {"type": "text", "text": "a", "image_url": None},
        "b",
        {"type": "text", "value": "c"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'},
        {"type": "tool_call", "name": "g", "arguments": {"x": 1}},
    ]
    (_, message) = messages([USER, {"role": "assistant", "content": parts}])
    calls = (ToolCall("f", {}), ToolCall("g", {"x": 1}))
    assert message == Message("assistant", "abc", reasoning="think more", tool_calls=calls)


def test_a_legacy_function_call() -> None:
    raw = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    assert messages([USER, raw])[1].tool_calls == (ToolCall("f", {"x": 1}),)


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({}, None),
        ({"weight": None, "train": None}, None),
        ({"weight": 2}, 2.0),
        ({"train": True}, 1.0),
        ({"train": False}, 0.0),
        ({"loss": False}, 0.0),
        ({"step_loss_mask": 0}, 0.0),
    ],
)
def test_the_weight_of_a_message(keys: dict[str, Any], weight: float | None) -> None:
    assert messages([USER, ANSWER | keys])[1].weight == weight


def test_instruction_rows_join_the_query_as_roll_does() -> None:
    keys = {"query_key": "input", "system_key": "system"}
    row = {"instruction": "add", "input": "1 2", "output": "3", "system": "s"}
    expected = (Message("system", "s"), Message("user", "add\n1 2"), Message("assistant", "3"))
    assert read(row, **keys).messages == expected
    assert read(row | {"input": "", "system": None}, **keys).messages[0] == Message("user", "add")


def test_only_the_completion_of_a_prompt_in_messages_is_trained() -> None:
    prompt = [USER, ANSWER, ANSWER | {"weight": 2.0}, USER]
    row = {"prompt": prompt, "completion": [ANSWER], "system": "s"}
    read_row = read(row, system_key="system")
    assert [message.role for message in read_row.messages] == [
        "system",
        "user",
        "assistant",
        "assistant",
        "user",
        "assistant",
    ]
    assert [message.weight for message in read_row.messages] == [0.0, 0.0, 0.0, 2.0, 0.0, None]


def test_raw_text() -> None:
    assert read({"prompt": "hi", "completion": " there"}) == RawText("hi", " there")
    assert read({"text": "hi there"}) == RawText("", "hi there")


# Tokens


@pytest.mark.parametrize(
    ("columns", "weights"),
    [
        ({}, [0, 1, 1, 1]),
        ({"labels": [-100, -100, 7, 8]}, [0, 0, 1, 1]),
        ({"labels": [5, 6, 7, 8]}, [0, 1, 1, 1]),
        ({"loss_mask": [0, 0, 1, 1], "labels": None}, [0, 0, 1, 1]),
        ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [False, False, False, True]}, [0, 0, 0, 1]),
        ({"loss_weights": [0, 0.5, 0, 2]}, [0, 0.5, 0, 2]),
    ],
)
def test_rows_that_come_tokenised(columns: dict[str, Any], weights: list[float]) -> None:
    row = read({"input_ids": [5, 6, 7, 8], **columns})
    assert isinstance(row, TokenRow)
    assert (row.tokens.dtype, row.loss_weights.dtype) == (np.int32, np.float32)
    assert row.tokens.tolist() == [5, 6, 7, 8]
    assert row.loss_weights.tolist() == weights


def test_padding_is_left_out() -> None:
    row = read({"input_ids": [0, 5, 6, 0], "labels": [-100, 5, 6, -100], "attention_mask": [0, 1, 1, 0]})
    assert (row.tokens.tolist(), row.loss_weights.tolist()) == ([5, 6], [0, 1])


# Facts


def test_label_and_metadata() -> None:
    row = {"answer": 3, "metadata": {"level": 1}, "text": "x"}
    assert row_facts(row, source(label_key="answer")) == (3, {"level": 1})
    assert row_facts(row | {"metadata": "easy"}, source()) == (None, {"metadata": "easy"})
    assert row_facts({"text": "x", "metadata": None}, source()) == (None, {})


# Broken rows, each with its message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, "column messages is null; the row has messages"),
        ("hi", "messages is text, not a list of messages"),
        ([], "messages is an empty list"),
        ([USER], "the conversation has no assistant turn, so there is nothing to train"),
        (["hi", ANSWER], "messages[0] is text, not a message with role and content"),
        ([{"content": "hi"}, ANSWER], "messages[0]: the message has no role"),
        (
            [{"role": "critic", "content": "hi"}, ANSWER],
            "messages[0]: unknown role 'critic'; the known ones are system,",
        ),
        ([{"role": "User", "content": "hi"}, ANSWER], "messages[0]: unknown role 'User'; did you mean user? the known"),
        ([{"role": ["user"], "content": "hi"}], "messages[0]: the role is a list, not text"),
        (
            [{"role": "user", "from": "gpt", "content": "a"}],
            "messages[0]: role and from say different things; keep one",
        ),
        ([{"role": "user", "content": 3}, ANSWER], "messages[0]: the content is a number; it must be text or a list"),
        ([{"role": "user"}, ANSWER], "messages[0]: the user message has no content"),
        ([USER, {"role": "assistant", "content": None}], "messages[1]: the assistant message has no content"),
        ([USER, ANSWER | {"weight": True}], "messages[1]: weight=True must be a finite number, 0 or more"),
        ([USER, ANSWER | {"weight": -1}], "messages[1]: weight=-1 must be a finite number, 0 or more"),
        ([USER, ANSWER | {"weight": float("nan")}], "messages[1]: weight=nan must be a finite number, 0 or more"),
        ([USER, ANSWER | {"weight": "1"}], "messages[1]: weight='1' must be a finite number, 0 or more"),
        ([USER, ANSWER | {"train": 1}], "messages[1]: train=1 must be true or false; a number goes under weight"),
        ([USER, ANSWER | {"train": True, "weight": 0}], "messages[1]: weight and train both say how the message is"),
        ([USER, ANSWER | {"reasoning": 3}], "messages[1]: the reasoning is a number, not text"),
        ([USER | {"reasoning": "r"}, ANSWER], "messages[0]: a user message reasons; only an assistant's can"),
        ([USER | {"tool_calls": [{"name": "f"}]}, ANSWER], "messages[0]: a user message calls tools; only an assist"),
        ([USER, ANSWER | {"tool_calls": 3}], "messages[1].tool_calls is a number; it must be a tool call or a list"),
        ([USER, ANSWER | {"tool_calls": [{}]}], "messages[1].tool_calls: a tool call without a name"),
        (
            [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": '{"x": '}]}],
            "messages[1].tool_calls: the arguments of f: broken JSON: Expecting value at column 7",
        ),
        (
            [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "3"}]}],
            "messages[1].tool_calls: the arguments of f are a number, not an object",
        ),
        (
            [USER, ANSWER | {"tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}],
            "messages[1]: tool calls stand both in tool_calls and in function_call; keep one",
        ),
        ([{"from": "function_call", "value": "f(x)"}], "messages[0].function_call: broken JSON: Expecting value at"),
        ([{"from": "function_call", "value": "[]"}], "messages[0]: the assistant message has no content"),
        (
            [{"role": "user", "content": [{"type": "image"}]}, ANSWER],
            "messages[0].content[0]: image in the content; mul",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": {"url": "u"}}]}, ANSWER],
            "messages[0].content[0]: image_url in the content; multimodal rows are not supported yet",
        ),
        ([{"role": "user", "content": [{"type": "table"}]}], "messages[0].content[0]: unknown type of part 'table'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]: the text part has no text"),
        (
            [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}],
                },
            ],
            "messages[1].content[1]: reasoning behind text; chat templates write reasoning, then text, then tool calls",
        ),
    ],
)
def test_broken_messages(raw: Any, message: str) -> None:
    assert reason({"messages": raw}).startswith(message)


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("messages", {"text": "hi"}, "column messages is missing; the row has text"),
        ("messages", {"messages": CHAT, "tools": "{"}, "tools: broken JSON: Expecting property name"),
        (
            "messages",
            {"messages": CHAT, "tools": {"name": "f"}},
            "tools is an object; it must be a list of tool schemas",
        ),
        ("messages", {"messages": CHAT, "tools": [{"type": "function"}]}, "tools[0]: a tool schema without a name"),
        ("messages", {"messages": CHAT, "tools": [3]}, "tools[0] is a number, not a tool schema"),
        (
            "messages",
            {"messages": CHAT, "chat_template_kwargs": "x"},
            "column chat_template_kwargs is text, not an object",
        ),
        (
            "messages",
            {"messages": CHAT, "images": ["a.png"]},
            "column images is not empty; multimodal rows are not supp",
        ),
        ("instruction", {"instruction": "a", "output": None}, "column output is null; the row has instruction, output"),
        ("instruction", {"instruction": ["a"], "output": "b"}, "column instruction is a list, not text"),
        (
            "prompt",
            {"prompt": "a", "completion": [ANSWER]},
            "prompt is text and completion a list; both must be text or",
        ),
        ("prompt", {"prompt": [USER], "completion": [USER]}, "column completion has no assistant turn"),
        ("text", {"text": ""}, "column text is empty"),
        ("text", {"text": 3}, "column text is a number, not text"),
        ("tokens", {"input_ids": "1 2"}, 'column input_ids must be a flat list of whole numbers, and it is "1 2"'),
        (
            "tokens",
            {"input_ids": [1, 2.5]},
            "column input_ids must be a flat list of whole numbers, and it is [1, 2.5]",
        ),
        ("tokens", {"input_ids": [[1], [2, 3]]}, "column input_ids must be a flat list of whole numbers"),
        (
            "tokens",
            {"input_ids": [1, None]},
            "column input_ids must be a flat list of whole numbers, and it is [1, null]",
        ),
        ("tokens", {"input_ids": [1, -2]}, "column input_ids holds -2 to 1; an id is 0 or more and below 2^31"),
        ("tokens", {"input_ids": [1, 2], "labels": [1]}, "column labels has 1 values for 2 input_ids"),
        (
            "tokens",
            {"input_ids": [1, 2], "labels": [2, -100]},
            "labels[0]=2 is neither -100 nor input_ids[0]=1; labels",
        ),
        (
            "tokens",
            {"input_ids": [1, 2], "loss_mask": [0, 0.5]},
            "column loss_mask must be a flat list of whole numbers",
        ),
        ("tokens", {"input_ids": [1, 2], "loss_mask": [0, 2]}, "column loss_mask holds 0 to 2; a mask holds 0 and 1"),
        (
            "tokens",
            {"input_ids": [1, 2], "loss_weights": [0, -1]},
            "column loss_weights holds -1 to 0; a weight is a fin",
        ),
        ("tokens", {"input_ids": [1, 2], "labels": [1, -100]}, "no token is trained"),
        ("tokens", {"input_ids": []}, "no token is trained"),
    ],
)
def test_broken_rows(format: str, row: dict[str, Any], message: str) -> None:
    assert reason(row, Format(format)).startswith(message)


def test_a_system_turn_given_twice_or_to_raw_text() -> None:
    chat = {"messages": [{"role": "system", "content": "a"}, *CHAT], "system": "b"}
    assert "column system and the first message both are a system turn" in reason(chat, system_key="system")
    raw = {"prompt": "a", "completion": "b", "system": "s"}
    assert "raw text, which has no system turn" in reason(raw, Format.PROMPT, system_key="system")


# Real files


@pytest.mark.parametrize(
    ("name", "keys", "format", "facts"),
    [
        ("gsm8k_test.jsonl", {"prompt_key": "question", "response_key": "answer"}, "instruction", {"user": 1_319}),
        ("alpaca_en.json", {"query_key": "input"}, "instruction", {"user": 999, "assistant": 999}),
        ("glaive_toolcall_en.json", {}, "sharegpt", {"tool": 211, "calls": 211, "tools": 191}),
        (
            "reason_tool_use.jsonl",
            {},
            "messages",
            {"system": 50, "tool": 42, "calls": 68, "reasoning": 112, "tools": 48},
        ),
    ],
)
def test_real_files(shared: Path, name: str, keys: dict[str, Any], format: str, facts: dict[str, int]) -> None:
    config = SourceConfig(path=str(shared / "data" / name), **keys)
    rows = open_rows(config)
    chosen = recognise(rows.schema, config)
    assert chosen == format
    found: Counter[str] = Counter()
    for number in range(len(rows)):
        conversation = to_conversation(rows[number], chosen, config)
        assert isinstance(conversation, Conversation)
        found["tools"] += conversation.tools is not None
        for message in conversation.messages:
            found.update(
                {message.role: 1, "calls": len(message.tool_calls), "reasoning": message.reasoning is not None}
            )
    assert {name: found[name] for name in facts} == facts


def test_a_file_of_broken_rows_says_where_and_why(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines: list[Any] = [{"messages": CHAT}, {"messages": [USER]}, {"messages": []}, [1], {"messages": CHAT, "tools": 3}]
    path.write_text("\n".join([*map(json.dumps, lines), '{"messages": ', json.dumps({"messages": CHAT})]))
    config = SourceConfig(path=str(path))
    rows = open_rows(config)
    chosen = recognise(rows.schema, config)

    def outcome(read: Callable[[], Any]) -> str:
        try:
            read()
        except RowError as error:
            return str(error)
        return "ok"

    found = {rows.where(i): outcome(lambda i=i: to_conversation(rows[i], chosen, config)) for i in range(len(rows))}
    assert found == {
        "rows.jsonl:1": "ok",
        "rows.jsonl:2": "the conversation has no assistant turn, so there is nothing to train",
        "rows.jsonl:3": "messages is an empty list",
        "rows.jsonl:4": "the row is a list, not a JSON object",
        "rows.jsonl:5": "tools is a number; it must be a list of tool schemas, or the JSON text of one",
        "rows.jsonl:6": "broken JSON: Expecting value at column 14",
        "rows.jsonl:7": "ok",
    }
