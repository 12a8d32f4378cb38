"""`data.renderer`: functions in place of chat templates, held to the rules of templates."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from burnish.data.chat import TextTokenizer, TurnRow
from burnish.data.renderer import load_renderer
from burnish.data.turns import ASSISTANT_TURNS, Selection
from burnish.types import Conversation, Message, ToolCall, UserError

GOOD = """
    from burnish.types import Origin, RowError

    def render(messages, tools, kwargs):
        for i, message in enumerate(messages):
            if "forbidden" in message["content"]:
                raise RowError("no such talk")
            yield f"<|im_start|>{message['role']}\\n", Origin(i, "template")
            if message.get("reasoning_content"):
                yield f"({message['reasoning_content']})", Origin(i, "reasoning")
            yield message["content"], Origin(i, "content")
            yield kwargs.get("end", "<|im_end|>") + "\\n", Origin(i, "template")
        if kwargs["add_generation_prompt"]:
            yield "<|im_start|>assistant\\n", Origin(None, "template")

    def wrong_part(messages, tools, kwargs):
        return [("a", (0, "headline"))]

    def wrong_message(messages, tools, kwargs):
        return [("a", (7, "content"))]

    def three_values(messages, tools, kwargs):
        return [("a", (0, "content"), 1)]

    def a_text(messages, tools, kwargs):
        return "a"

    def nothing(messages, tools, kwargs):
        return None

    def a_texts_number(messages, tools, kwargs):
        return [("a", ("0", "content"))]

    def editing(messages, tools, kwargs):
        for message in messages:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"].clear()
        return render(messages, tools, kwargs)

    number = 3
"""
END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
"""DeepSeek's end of a turn."""
CHAT = Conversation((Message("user", "Hello."), Message("assistant", "Hi.", reasoning="hm"), Message("user", "So?")))


@pytest.fixture
def plain(chatml_tokenizer: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(chatml_tokenizer)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"renderers_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(GOOD))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def tokenizer(plain: PreTrainedTokenizerFast, renderer: str, **options: str) -> TextTokenizer:
    return TextTokenizer.from_transformers(plain, renderer=renderer, template_kwargs=options)


def trained(ours: TextTokenizer, row: Conversation | TurnRow, selection: Selection = ASSISTANT_TURNS) -> str:
    encoded = ours.encode(row, selection)
    return ours.decode(encoded.tokens[encoded.loss_weights > 0])


def test_a_turn_is_trained_behind_its_header_through_its_end(plain: PreTrainedTokenizerFast, module: str) -> None:
    ours = tokenizer(plain, f"{module}.render")
    assert trained(ours, CHAT) == "(hm)Hi.<|im_end|>"
    assert trained(ours, CHAT, Selection(reasoning=False)) == "Hi.<|im_end|>"
    assert trained(ours, TurnRow(CHAT, 1)) == "(hm)Hi.<|im_end|>"
    origins = [span.origin for span in ours.encode(CHAT).spans]
    assert origins.count("user:content") == 2
    assert {"assistant:content", "assistant:reasoning", "template", "template:end"} <= set(origins)


def test_arguments_and_refusals_go_through(plain: PreTrainedTokenizerFast, module: str) -> None:
    ours = tokenizer(plain, f"{module}.render", end="!<|im_end|>")
    assert trained(ours, CHAT) == "(hm)Hi.!<|im_end|>"
    with pytest.raises(UserError, match="no such talk"):
        ours.encode(Conversation((Message("user", "forbidden"), Message("assistant", "Hi."))))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wrong_part", r"it must give stretches \(text, Origin\(message, part\)\), with a part of"),
        ("wrong_message", "names message 7 of 3; it must be 0 to 2"),
        ("three_values", "it must give stretches"),
        ("a_text", "gives str; it must give stretches"),
        ("nothing", "gives NoneType; it must give stretches"),
        ("a_texts_number", "names message '0' of 3"),
        ("number", "is no function"),
        ("absent", "name a function by its dotted path"),
    ],
)
def test_a_wrong_renderer_is_told(plain: PreTrainedTokenizerFast, module: str, function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenizer(plain, f"{module}.{function}").encode(CHAT)


@pytest.mark.parametrize("name", ["no_such_module.render", "render", ""])
def test_a_path_that_leads_nowhere_is_told(name: str) -> None:
    with pytest.raises(UserError, match=f"data.renderer={name}"):
        load_renderer(name)


def test_a_changed_renderer_is_another_one(plain: PreTrainedTokenizerFast, module: str, tmp_path: Path) -> None:
    before = tokenizer(plain, f"{module}.render").fingerprint
    assert tokenizer(plain, f"{module}.render").fingerprint == before
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(GOOD) + "\nother = 1\n")
    assert tokenizer(plain, f"{module}.render").fingerprint != before


def test_deepseek_v32_trains_what_the_model_would_generate(plain: PreTrainedTokenizerFast) -> None:
    plain.add_special_tokens({"eos_token": END})
    ours = tokenizer(plain, "deepseek_v32", thinking_mode="thinking")
    call = Message("assistant", "", reasoning="look it up", tool_calls=(ToolCall("f", {"x": "1"}),))
    chat = Conversation(
        (Message("user", "Weather?"), call, Message("tool", "rain"), Message("assistant", "Wet.", reasoning="so")),
        ({"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}},),
    )
    text = trained(ours, chat)
    assert text.startswith("look it up</think>")
    assert text.endswith(f"so</think>Wet.{END}")
    assert "rain" not in text
    assert "Weather" not in text
    without = trained(ours, chat, Selection(reasoning=False, tool_calls=False))
    assert without == f"{END}Wet.{END}"
    for number in (1, 3):
        encoded = ours.encode(TurnRow(chat, number))
        first = int(encoded.loss_weights.argmax())
        assert ours.decode(encoded.tokens[:first]).endswith("<think>")


def test_a_renderer_cannot_change_the_row(plain: PreTrainedTokenizerFast, module: str) -> None:
    call = ToolCall("f", {"x": 1})
    tokenizer(plain, f"{module}.editing").encode(
        Conversation((Message("user", "a"), Message("assistant", "b", tool_calls=(call,))))
    )
    assert call.arguments == {"x": 1}


def test_a_renderer_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lying_here.py").write_text(textwrap.dedent(GOOD))
    monkeypatch.chdir(tmp_path)
    assert callable(load_renderer("lying_here.render"))


def test_deepseeks_marks_go_with_their_part(plain: PreTrainedTokenizerFast) -> None:
    plain.add_special_tokens({"eos_token": END})
    ours = tokenizer(plain, "deepseek_v32", thinking_mode="thinking")
    call = Message("assistant", "", reasoning="look it up", tool_calls=(ToolCall("f", {"x": "1"}),))
    chat = Conversation((Message("user", "Weather?"), call))
    without_calls = trained(ours, chat, Selection(tool_calls=False))
    assert without_calls.startswith("look it up</think>")
    assert without_calls.endswith(END)
    assert "DSML" not in without_calls
    without_reasoning = trained(ours, chat, Selection(reasoning=False))
    assert "think" not in without_reasoning
    assert without_reasoning.count("invoke") == 2
