"""What `burnish inspect` finds in rows, and how it shows them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from tiny import CHATML, tiny_config
from workshop import write_jsonl

from burnish.cli import main
from burnish.config import RecipeError
from burnish.data.chat import TextTokenizer
from burnish.data.prepare import Rejected
from burnish.inspect import Request, as_json, requested_recipe
from burnish.inspector import Inspector
from burnish.observe.inspect_page import render
from burnish.observe.inspect_terminal import Terminal, harmless
from burnish.observe.inspection import DataWarning, InspectedRow, Inspection
from burnish.parts import Parts, open_tokenizer, read_model_facts
from burnish.types import Sample, UserError


def chat(*turns: str, **first: Any) -> dict[str, Any]:
    """A row whose turns are a user's and an assistant's by turns; `first` are keys of the first answer."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)
    ]
    messages[1] |= first
    return {"messages": messages}


def inspector(target: Path, tokenizer: Path, *overrides: str, **options: Any) -> Inspector:
    request = Request(str(target), overrides, tokenizer=str(tokenizer), **options)
    return Inspector(Parts(requested_recipe(request), request.is_recipe), request.target)


def inspected(target: Path, tokenizer: Path, *overrides: str) -> tuple[list[InspectedRow], Inspection]:
    found = inspector(target, tokenizer, *overrides)
    rows = list(found.rows(None))
    return rows, found.inspection(rows)


def warnings_of(row: InspectedRow) -> set[str]:
    return {kind for kind, _ in row.warnings}


def gathered(found: Inspection, kind: str) -> DataWarning:
    (warning,) = (warning for warning in found.warnings if warning.kind == kind)
    return warning


def test_rows_are_those_that_training_prepares(tmp_path: Path, chatml_tokenizer: Path) -> None:
    rows = [
        chat("the quick", "brown fox", "jumps", "over", weight=0.5),
        chat("a", "\u00e9 \U0001f600 dog"),
        {"messages": []},
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows, chat("x " * 40, "y " * 40)])
    keys = ("data.max_length=64", "data.over_long=truncate", "data.truncate_side=left", "data.train_on=last")
    found = inspector(file, chatml_tokenizer, *keys)
    shown = list(found.rows(None))
    preparer = found.parts.preparer
    streamed = list(found.parts.sources[0].read(0, None))
    for row, (prepared,) in zip(shown, preparer.prepare(streamed), strict=True):
        if isinstance(prepared, Rejected):
            assert f"{row.where}: {row.error}" == prepared.message
            continue
        assert isinstance(prepared, Sample)
        np.testing.assert_array_equal(row.tokens, prepared.tokens)
        np.testing.assert_array_equal(row.loss_weights, prepared.loss_weights)
        assert [start for start, *_ in row.spans] == [0, *(end for _, end, *_ in row.spans[:-1])]
        assert row.spans[-1][1] == len(row.tokens) == len(row.pieces)
        for start, end, _, weight in row.spans:
            assert (row.loss_weights[start:end] == np.float32(weight)).all()
    assert shown[2].error is not None
    assert [row.truncated > 0 for row in shown] == [False, False, False, True]
    assert "".join(shown[1].pieces) == shown[1].text
    assert shown[1].pieces.count("") >= 3  # the emoji's bytes are tokens of their own, and the first shows all of it


def test_turns_as_samples(tmp_path: Path, chatml_tokenizer: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b", "c", "d e f")])
    keys = ("data.turn_per_sample=true", "data.max_length=16")
    rows, found = inspected(file, chatml_tokenizer, *keys)
    assert [(row.index, row.where, row.message) for row in rows] == [(0, "rows.jsonl:1", 1), (0, "rows.jsonl:1", 3)]
    (source,) = found.sources
    assert (source.rows, source.samples, len(source.lengths), source.errors) == (1, 2, 1, 1)
    assert (found.unit, found.num_counted) == ("sample", 2)
    first, second = map(as_json, rows)
    assert list(first)[:4] == ["index", "source", "message", "input_ids"]
    assert (list(second), second["message"]) == (["index", "source", "message", "error"], 3)
    assert second["error"].startswith("rows.jsonl:1, messages[3]: ")
    assert "messages[1]: " in as_json(replace(rows[1], error="messages[1]: no"))["error"]
    assert as_json(replace(rows[1], error="messages[3]: no"))["error"] == "rows.jsonl:1: messages[3]: no"
    screen = io.StringIO()
    Terminal(screen).row(rows[0])
    Terminal(screen).summary(found, 1)
    assert "== rows 0 messages[1] | rows.jsonl:1 |" in screen.getvalue()
    assert "1 row read\n" in screen.getvalue()
    assert "! 1 sample gives no sample (rows 0)" in screen.getvalue()
    assert re.search(r"source +rows +samples +errors", screen.getvalue())
    page = render(found)
    assert "<h3>rows, row 0, messages[1]</h3>" in page
    assert "1 of 2 samples" in page


def test_what_is_dropped_by_choice(tmp_path: Path, chatml_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b"), {"messages": []}, chat("x " * 40, "y " * 40)])
    keys = ("data.max_length=64", "data.over_long=drop", "data.bad_rows=drop")
    rows, found = inspected(file, chatml_tokenizer, *keys)
    assert [row.dropped for row in rows] == [False, True, True]
    assert [row.dropped for row in inspected(file, chatml_tokenizer, *keys[:2])[0]] == [False, False, True]
    assert [row.dropped for row in inspected(file, chatml_tokenizer, keys[0], keys[2])[0]] == [False, True, False]
    assert (rows[2].error or "").endswith(" tokens, more than data.max_length=64 (data.over_long=drop)")
    assert (rows[1].error or "").endswith("(data.bad_rows=drop)")
    assert (found.sources[0].errors, found.sources[0].dropped) == (0, 2)
    assert [warning.kind for warning in found.warnings] == ["dropped"]
    status, out, err = run(capsys, file, "--tokenizer", chatml_tokenizer, *keys, "--format", "json")
    assert status == 3
    assert [list(json.loads(line)) for line in out.splitlines()[1:]] == [["index", "source", "error"]] * 2
    assert "warning: 2 rows are dropped" in err
    _, out, _ = run(capsys, file, "--tokenizer", chatml_tokenizer, *keys)
    assert "dropped: " in out
    assert "error: " not in out
    _, out, _ = run(capsys, file, "--tokenizer", chatml_tokenizer, *keys, "--format", "html")
    assert "<b>Dropped</b>" in out
    assert "<b>Error</b>" not in out


def test_shares_are_of_all_tokens(tmp_path: Path, chatml_tokenizer: Path) -> None:
    ids = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [5] * 20, "labels": [-100] + [5] * 19}])
    assert "high_share" not in warnings_of(inspected(ids, chatml_tokenizer)[0][0])  # 19 of 20 are 95 %, not more
    long = write_jsonl(tmp_path / "long.jsonl", [chat("a", "the lazy dog " * 100)])
    assert "high_share" in warnings_of(inspected(long, chatml_tokenizer)[0][0])
    assert "high_share" not in warnings_of(inspected(long, chatml_tokenizer, "data.train_on=all")[0][0])


def test_token_ids_that_no_tokenizer_gave(tmp_path: Path, chatml_tokenizer: Path) -> None:
    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5, 9999], "labels": [5, 9999]}]
    shown, found = inspected(write_jsonl(tmp_path / "ids.jsonl", rows), chatml_tokenizer)
    assert "outside_embedding" not in warnings_of(shown[0])
    assert "token id 9999 is none of the tokenizer's" in dict(shown[1].warnings)["outside_embedding"]
    assert gathered(found, "outside_embedding").text == "has token ids that are none of the tokenizer's"


def test_rows_held_out_as_a_fraction(tmp_path: Path, chatml_tokenizer: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    facts = dict(inspector(file, chatml_tokenizer, "data.validation=0.05").parts.facts)
    assert facts["held out"] == "5% of the training rows, which stand among those here"
    assert "held out" not in inspector(file, chatml_tokenizer).parts.facts


def test_a_narrow_terminal_goes_without_columns(tmp_path: Path, chatml_tokenizer: Path) -> None:
    file = write_jsonl(tmp_path / "a_rather_long_name.jsonl", [chat("a", "b")])
    _, found = inspected(file, chatml_tokenizer)
    heads = []
    for width in (120, 60, 40):
        screen = io.StringIO()
        terminal = Terminal(screen)
        terminal._console.width = width
        terminal.summary(found, 1)
        heads.append(next(line.split() for line in screen.getvalue().splitlines() if line.startswith("source")))
        assert "a_rather_long_name" in screen.getvalue()
    assert heads[0][1:] == ["rows", "errors", "cut", "duplicates", "tokens", "trained", "median", "longest"]
    assert heads[1][1:] == ["rows", "errors", "cut", "tokens", "trained"]
    assert heads[2][1:] == ["rows", "errors"]


def test_warnings_of_rows(tmp_path: Path, chatml_tokenizer: Path) -> None:
    rows = {
        "fine": chat("the quick brown", "fox"),
        "empty_turn": chat("", "fox"),
        "duplicate": chat("the quick brown", "fox"),
        "low_share": chat("the lazy dog " * 100, "x"),
        "high_share": chat("", "the lazy dog " * 100),
    }
    file = write_jsonl(tmp_path / "rows.jsonl", list(rows.values()))
    shown, found = inspected(file, chatml_tokenizer)
    for (kind, _), row in zip(rows.items(), shown, strict=True):
        assert (warnings_of(row) - {"empty_turn"} if kind == "high_share" else warnings_of(row)) == {kind} - {"fine"}
    assert gathered(found, "duplicate").rows == (("rows", 2),)
    assert "rows 0" in dict(shown[2].warnings)["duplicate"]
    assert gathered(found, "empty_turn").count == 2
    assert found.sources[0].duplicates == 1


def test_a_cut_row_without_its_end_of_turn(tmp_path: Path, chatml_tokenizer: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("the", "quick brown fox jumps over")])
    (whole,), _ = inspected(file, chatml_tokenizer)
    keys = (f"data.max_length={len(whole.tokens) - 3}", "data.over_long=truncate")
    (row,), _ = inspected(file, chatml_tokenizer, *keys)
    assert warnings_of(whole) == set()
    assert warnings_of(row) == {"no_end_of_turn"}
    assert row.truncated == 3
    file = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    (row,), _ = inspected(file, chatml_tokenizer)
    assert "no_end_of_turn" in warnings_of(row)
    assert row.text == "".join(row.pieces)


def test_tokenizers_that_warn(tmp_path: Path, chatml_tokenizer: Path) -> None:
    shutil.copytree(chatml_tokenizer, tmp_path / "tokenizer")
    settings = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    settings |= {
        "pad_token": "<|im_end|>", "bos_token": "<s>", "extra_special_tokens": ["<tool>"],
        "chat_template": "{{ bos_token }}{{ bos_token }}" + CHATML,
    }  # fmt: skip
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    config = {**tiny_config(), "vocab_size": 400, "max_position_embeddings": None}
    config["text_config"] = {"vocab_size": 321, "max_position_embeddings": 90}
    (tmp_path / "tokenizer/config.json").write_text(json.dumps(config))
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a <tool>", "b"), chat("a", "b"), chat("a " * 60, "b " * 60)])
    found = inspector(file, tmp_path / "tokenizer")
    rows = list(found.rows(None))
    assert found.parts.limits == {"the model's max_position_embeddings": 90}
    assert rows[0].error is not None
    assert "outside the model's embedding of 321 rows" in rows[0].error
    assert "max_position_embeddings=90" in str(rows[2].error)
    assert {"pad_equals_eos", "double_bos"} <= warnings_of(rows[1])
    whole = found.inspection(rows)
    assert "<tool>" in gathered(whole, "outside_embedding").text
    assert gathered(whole, "error").count == whole.sources[0].errors == 2

    (tmp_path / "tokenizer/config.json").unlink()
    _, whole = inspected(file, tmp_path / "tokenizer")
    never = gathered(whole, "never_trained")
    assert never.text.endswith(": <tool>")
    assert never.rows == (("rows", 0),)


def test_prompts_that_inference_would_not_give(tmp_path: Path, chatml_tokenizer: Path) -> None:
    shutil.copytree(chatml_tokenizer, tmp_path / "tokenizer")
    settings = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    settings["chat_template"] = CHATML.replace(
        "'<|im_start|>assistant\\n' }}{%- endif %}", "'<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    )
    assert settings["chat_template"] != CHATML
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    (row,), found = inspected(file, tmp_path / "tokenizer")
    assert warnings_of(row) == {"prompt_mismatch"}
    assert "turn_per_sample" in gathered(found, "prompt_mismatch").text


def test_statistics(tmp_path: Path, chatml_tokenizer: Path) -> None:
    write_jsonl(tmp_path / "one.jsonl", [chat("a", "b"), {"messages": []}, chat("c d", "e f")])
    write_jsonl(tmp_path / "two.jsonl", [chat("g", "h")])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(tiny_config()))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{init: {tmp_path}/model, tokenizer: {chatml_tokenizer}}}\n"
        f"data:\n  train: [{tmp_path}/one.jsonl, {{path: {tmp_path}/two.jsonl, name: second}}]\n"
        f"  validation: [{tmp_path}/two.jsonl]\nbatch: {{tokens_per_micro_batch: 48}}\n"
    )
    request = Request(str(recipe))
    found = Inspector(Parts(requested_recipe(request)), str(recipe))
    rows = list(found.rows(None))
    whole = found.inspection(rows)
    assert [(s.name, s.split, s.rows, s.errors) for s in whole.sources] == [
        ("one", "train", 3, 1), ("second", "train", 1, 0), ("two", "validation", 1, 0),
    ]  # fmt: skip
    one = whole.sources[0]
    assert one.lengths.tolist() == [len(row.tokens) for row in rows if row.source == "one" and row.error is None]
    assert one.tokens == one.lengths.sum() == sum(tokens for tokens, _ in one.roles.values())
    assert one.trained_tokens == sum(trained for _, trained in one.roles.values())
    assert one.roles["user"][1] == 0 < one.roles["user"][0]
    assert whole.packing is not None
    lengths = [len(row.tokens) for row in rows if row.source != "two" and row.error is None]
    assert (whole.packing.budget, whole.packing.packs) == (48, 2)
    assert whole.packing.fill == pytest.approx(sum(lengths) / 96)
    assert found.quotas(2) == [1, 1, 0]
    assert found.quotas(4) == [2, 1, 1]
    assert found.quotas(None) == [None] * 3


def test_rows_of_every_kind_of_file(tmp_path: Path, chatml_tokenizer: Path) -> None:
    rows = [chat("a", "b"), {**chat("c", "d"), "tools": None}, chat("e", "f", weight=0.5)]
    files = [write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "rows.json", tmp_path / "rows.parquet"]
    files[1].write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), files[2], row_group_size=2)
    found = [inspected(file, chatml_tokenizer)[0] for file in files]
    for other in found[1:]:
        assert [row.tokens.tolist() for row in other] == [row.tokens.tolist() for row in found[0]]
        assert [row.loss_weights.tolist() for row in other] == [row.loss_weights.tolist() for row in found[0]]
    for file in files:
        sliced, _ = inspected(Path(f"{file}@[1:]"), chatml_tokenizer)
        assert [row.index for row in sliced] == [1, 2]
        assert sliced[1].tokens.tolist() == found[0][2].tokens.tolist()
    streamed, _ = inspected(files[0], chatml_tokenizer, "streaming=true", "slice=1:3")
    assert [(row.index, row.tokens.tolist()) for row in streamed] == [
        (row.index, row.tokens.tolist()) for row in found[0][1:]
    ]


def test_a_models_facts(tmp_path: Path) -> None:
    assert read_model_facts(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    facts = read_model_facts(tmp_path)
    assert facts is not None
    assert (facts.num_embeddings, facts.config["max_position_embeddings"], facts.generation) == (512, 512, None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    facts = read_model_facts(tmp_path)
    assert facts is not None
    assert facts.num_embeddings == 50257  # the default of its class in transformers
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        read_model_facts(tmp_path)


def test_a_tokenizer_that_transformers_must_read(tmp_path: Path, chatml_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(chatml_tokenizer, tmp_path / "tokenizer")
    settings = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "GPT2Tokenizer"
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    opened = open_tokenizer(str(tmp_path / "tokenizer"))
    expected = TextTokenizer.from_transformers(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    assert opened.backend == expected.backend
    assert opened.facts.eos == 2


# --- the command ---


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_json_lines(tmp_path: Path, chatml_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat("a\u202e\x1b", "b", weight=0.1), {"messages": []}, chat("", "c")]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    status, out, err = run(capsys, file, "--tokenizer", chatml_tokenizer, "--format", "json")
    assert status == 3
    first, second, third = map(json.loads, out.splitlines())
    assert list(first) == ["index", "source", "input_ids", "loss_weights", "text", "spans", "warnings"]
    assert set(first["loss_weights"]) == {0.0, 0.1}
    assert len(first["input_ids"]) == len(first["loss_weights"]) == first["spans"][-1][1]
    assert {origin for _, _, origin, _ in first["spans"]} == {
        "template", "user:content", "assistant:content", "template:end",
    }  # fmt: skip
    assert "\x1b" in first["text"]
    assert "\x1b" not in out
    assert set(second) == {"index", "source", "error"}
    assert second["error"].startswith("rows.jsonl:2: ")
    assert third["warnings"] == [{"kind": "empty_turn", "text": "messages[0] (user) is empty"}]
    assert "warning: 1 row gives no sample" in err
    target = tmp_path / "out.jsonl"
    options = ("--tokenizer", chatml_tokenizer, "--format", "json", "--limit", "1", "--out", target)
    assert run(capsys, file, *options)[:2] == (0, "")
    assert target.read_text() == out.splitlines(keepends=True)[0]


def test_a_page(tmp_path: Path, chatml_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat("a", f"row {number}") for number in range(12)]
    rows[9]["messages"][0]["content"] = ""
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ("--tokenizer", chatml_tokenizer, "--format", "html")
    status, out, _ = run(capsys, file, *options, "--limit", "2", "--out", tmp_path / "page.html")
    assert (status, out) == (0, f"{tmp_path / 'page.html'}\n")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = [number for number in range(12) if re.search(rf"row {number}\b|row.{{0,60}}{number}\b.*im_end", page)]
    assert {0, 1, 9} <= set(shown)
    status, out, _ = run(capsys, file, *options, "data.train_on=last")
    assert out.startswith("<!doctype html>") or out.lower().startswith("<!doctype html")


def test_terminal_without_colour(tmp_path: Path, chatml_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat("a \x1b[31m\u202e\x07", "b\nc", "d", "e", weight=0.5), {"messages": []}]
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows, *(chat("f", "g") for _ in range(8))])
    status, out, _ = run(capsys, file, "--tokenizer", chatml_tokenizer, "data.max_length=100")
    assert status == 3
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "\u202e" not in out
    assert "a \u241b[31m<U+202E>\u2407<|im_end|>" in out
    assert "{+0.5:b\nc<|im_end|>[end]+}" in out
    assert "{+e<|im_end|>[end]+}" in out
    assert "== rows 0 | rows.jsonl:1 |" in out
    assert "error: " in out
    assert "5 of 10 rows read; --limit N reads more" in out
    _, out, _ = run(capsys, file, "--tokenizer", chatml_tokenizer, "--tokens", "--limit", "3")
    assert re.search(r"\{\+g\u2502<\|im_end\|>\[end\]\u2502\+\}", out)


class FakeScreen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_in_colour(tmp_path: Path, chatml_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a\x1b[2J", "b\nc", "d", "e", weight=0.5)])
    rows, found = inspected(file, chatml_tokenizer)
    screen = FakeScreen()
    terminal = Terminal(screen)
    terminal.row(rows[0])
    terminal.summary(found, 1)
    shown = screen.getvalue()
    assert "{+" not in shown
    assert "\x1b[2J" not in shown
    assert "0.5\u00d7" in shown
    assert re.search(r"\x1b\[1;33mb\u21b5", shown)
    assert re.search(r"\x1b\[1;32me\x1b\[0m\x1b\[1;7;32m<\|im_end\|>", shown)
    monkeypatch.setenv("NO_COLOR", "1")
    screen = FakeScreen()
    Terminal(screen).row(rows[0])
    assert "{+e<|im_end|>[end]+}" in screen.getvalue()


def test_harmless_text() -> None:
    assert harmless("a\tb\nc") == "a\tb\nc"
    assert harmless("\r\x00\x7f\x9b\ud800\u2028") == "\u240d\u2400\u2421<U+009B><U+D800><U+2028>"
    assert harmless("\u00e9\u4e2d\U0001f468\u200d\U0001f469") == "\u00e9\u4e2d\U0001f468\u200d\U0001f469"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--tokenizer is missing"),
        (("--tokenizer", "TOKENIZER", "promt_key=x"), 'promt_key="x": no such key; did you mean prompt_key?'),
        (("--tokenizer", "TOKENIZER", "data.trian_on=last"), "did you mean data.train_on?"),
        (("--tokenizer", "TOKENIZER", "--chat-template", "nowhere.jinja"), "nowhere.jinja: no such file"),
        (("--tokenizer", "TOKENIZER", "--chat-template-kwargs", "{"), "not JSON"),
        (("--tokenizer", "TOKENIZER", "--chat-template-kwargs", "[]"), "must be a JSON object"),
        (("--tokenizer", "TOKENIZER", "--out", "/nowhere/file"), "--out=/nowhere/file cannot be written"),
        (("--tokenizer", "TOKENIZER", "slice=8:9"), "its slice keeps none of 1 rows"),
        (("--tokenizer", "TOKENIZER", "query_key=x"), "error: query_key=x: no row has this column"),
        (("b.jsonl", "--tokenizer", "TOKENIZER"), "b.jsonl: one target is inspected"),
        (("--tokenizer", "TOKENIZER", "b.jsonl"), "b.jsonl: one target is inspected"),
    ],
)
def test_unusable_arguments(
    tmp_path: Path, chatml_tokenizer: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    filled = [str(chatml_tokenizer) if argument == "TOKENIZER" else argument for argument in arguments]
    status, _, err = run(capsys, file, *filled)
    assert status == 2
    assert message in err


def test_missing_rows_and_bad_options(capsys: pytest.CaptureFixture[str], chatml_tokenizer: Path) -> None:
    status, _, err = run(capsys, "nowhere.jsonl", "--tokenizer", chatml_tokenizer)
    assert (status, "nowhere.jsonl: there is no file" in err) == (2, True)
    status, _, err = run(capsys, "nowhere.yaml")
    assert (status, "recipe nowhere.yaml does not exist" in err) == (2, True)
    for options in (("--limit", "0"), ("--limit", "-1"), ("--format", "xml"), ("--limt", "3")):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", "rows.jsonl", *options])
        assert stopped.value.code == 2


def test_usage_errors_name_what_was_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, messages in {
        ("rows.jsonl", "--tokenzer", "x"): (
            "unknown argument '--tokenzer'; did you mean --tokenizer?", "`burnish inspect --help`"
        ),
        (): ("required: RECIPE.yaml|DATA\n", "`burnish inspect --help`"),
    }.items():  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *arguments])
        err = capsys.readouterr().err
        assert stopped.value.code == 2
        assert all(message in err for message in messages), err
    status, _, err = run(capsys, "recipe.yaml", "prompt_key=x")
    assert (status, "did you mean data.train.0.prompt_key=x?" in err) == (2, True)


def test_options_reach_the_recipe(tmp_path: Path) -> None:
    request = Request(
        "rows.jsonl",
        ("prompt_key=question", "data.train_on=all", "batch.tokens_per_micro_batch=9"),
        tokenizer="folder",
        chat_template="a b.jinja",
        chat_template_kwargs='{"enable_thinking": false}',
    )
    recipe = requested_recipe(request)
    assert recipe.data.train[0].prompt_key == "question"
    assert (recipe.data.train_on, recipe.data.chat_template) == ("all", "a b.jinja")
    assert recipe.data.chat_template_kwargs == {"enable_thinking": False}
    assert recipe.model.tokenizer == "folder"
    with pytest.raises(RecipeError, match="tokenizer is missing"):
        requested_recipe(Request("rows.jsonl"))


def test_a_row_is_ready_before_the_next_is_read(
    tmp_path: Path, chatml_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")] * 50)
    encoded: list[int] = []
    encode = TextTokenizer.encode_batch

    def counted(self: TextTokenizer, rows: Any, *rest: Any) -> Any:
        encoded.append(len(rows))
        return encode(self, rows, *rest)

    monkeypatch.setattr(TextTokenizer, "encode_batch", counted)
    rows = inspector(file, chatml_tokenizer).rows(None)
    next(rows)
    assert encoded == [1]
    assert len(list(rows)) == 49


def test_an_end_of_turn_that_stands_in_no_message(tmp_path: Path, chatml_tokenizer: Path) -> None:
    template = tmp_path / "outside.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|im_end|>{% endif %}"
    )
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b"), chat("a", "b", "c", "d")])
    rows = list(inspector(file, chatml_tokenizer, chat_template=str(template)).rows(None))
    assert rows[0].spans[-1][2:] == ("template:end", 1.0)
    assert warnings_of(rows[0]) == set()
    assert warnings_of(rows[1]) == {"open_turn"}
    assert "messages[1]" in dict(rows[1].warnings)["open_turn"]


# --- what is written ---


def test_out_that_names_what_is_read(
    tmp_path: Path, chatml_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chatml_tokenizer, tmp_path / "tokenizer")
    write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    (tmp_path / "template.jinja").write_text(CHATML)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{init: {tmp_path}/config.json, tokenizer: {tmp_path}/tokenizer}}\n"
        f"data:\n  train: ['{tmp_path}/*.jsonl']\n  chat_template: {tmp_path}/template.jinja\n"
    )
    names = ("recipe.yaml", "rows.jsonl", "link.jsonl", "template.jinja", "tokenizer/tokenizer.json", "config.json")
    for name in names:
        before = (tmp_path / name).read_bytes()
        for format in ("json", "html"):
            status, _, err = run(capsys, recipe, "--format", format, "--out", tmp_path / name)
            assert (status, "is a file that is read; name another" in err) == (2, True), name
        assert (tmp_path / name).read_bytes() == before
    target = tmp_path / "out.json"
    target.write_text("kept")
    status, _, _ = run(capsys, tmp_path / "rows.jsonl", "--tokenizer", tmp_path, "--format", "json", "--out", target)
    assert (status, target.read_text()) == (2, "kept")


def test_where_a_page_is_written(tmp_path: Path, chatml_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    options = ("--tokenizer", chatml_tokenizer, "--format", "html", "--out")
    (tmp_path / "target.html").write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "target.html")
    assert run(capsys, file, *options, tmp_path / "link.html")[0] == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "target.html").read_text(encoding="utf-8").lower().startswith("<!doctype html")

    os.mkfifo(tmp_path / "pipe")
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text(encoding="utf-8")))
    reader.start()
    assert run(capsys, file, *options, tmp_path / "pipe")[0] == 0
    reader.join()
    assert received == [(tmp_path / "target.html").read_text(encoding="utf-8")]
    assert (tmp_path / "pipe").is_fifo()

    assert run(capsys, file, *options, "/dev/null")[0] == 0
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("format", ["terminal", "json", "html"])
@pytest.mark.parametrize("out", ["/dev/full", ".", "/nowhere/file"])
def test_faults_of_writing(
    tmp_path: Path, chatml_tokenizer: Path, capsys: pytest.CaptureFixture[str], format: str, out: str
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    status, _, err = run(capsys, file, "--tokenizer", chatml_tokenizer, "--format", format, "--out", out)
    assert status == 2
    assert re.fullmatch(rf"burnish: error: --out={out} cannot be written: [^\n]*; name another file with --out\n", err)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty; write a"), (b" \n", "is empty"), (b"\xff{{ messages }}", "not UTF-8 text")],
)
def test_templates_that_are_none(
    tmp_path: Path, chatml_tokenizer: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    (tmp_path / "a.jinja").write_bytes(content)
    options = ("--tokenizer", chatml_tokenizer, "--chat-template", tmp_path / "a.jinja")
    status, out, err = run(capsys, file, *options)
    assert (status, out, err.count("\n"), message in err) == (2, "", 1, True)


@pytest.mark.parametrize("content", [b"", b"PAR1 is no parquet PAR1", b"cut"])
def test_broken_parquet(
    tmp_path: Path, chatml_tokenizer: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    if content == b"cut":
        pq.write_table(pa.Table.from_pylist([chat("a" * 500, "b" * 500)]), tmp_path / "whole.parquet")
        content = (tmp_path / "whole.parquet").read_bytes()[:-50]
    (tmp_path / "rows.parquet").write_bytes(content)
    status, out, err = run(capsys, tmp_path / "rows.parquet", "--tokenizer", chatml_tokenizer)
    assert (status, out, err.count("\n"), "cannot be read as .parquet" in err) == (2, "", 1, True)


def test_parquet_without_rows(tmp_path: Path, chatml_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    status, _, err = run(capsys, tmp_path / "rows.parquet", "--tokenizer", chatml_tokenizer)
    assert (status, err.count("\n"), "it holds no rows" in err) == (2, 1, True)


def test_names_of_tokenizers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    (tmp_path / "Qwen3-tiny").mkdir()
    for name, messages in {
        "./Qwen3-tine": (f"there is no folder {tmp_path}/Qwen3-tine (near it is Qwen3-tiny); give",),
        "Qwen3-tine": ("there is no folder", "(near it is Qwen3-tiny), and as a hub id it is not in the cache"),
        "rows.jsonl": ("that is a file",),
        "Qwen3-tiny": ("the folder holds no tokenizer.json",),
    }.items():
        status, out, err = run(capsys, file, "--tokenizer", name)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert all(message in err for message in messages), err


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(url: str, **options: Any) -> None:
        asked.append(url)
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(UserError, match=r"the hub cannot be reached \(no network\); correct the name$"):
        open_tokenizer("nosuch/tokenizer")
    assert len(asked) == 1


def test_boundaries_are_the_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    for format in ("json", "html"):
        status, _, err = run(capsys, "x.jsonl", "--tokenizer", "t", "--tokens", "--format", format, "--out", "y")
        assert (status, "--tokens is for --format terminal" in err) == (2, True)
