"""The newcomer's first command: what examples/quickstart.py makes, and its run, cut short."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import quickstart  # noqa: E402


def run_quickstart(folder: Path, *overrides: str) -> str:
    """What examples/quickstart.py prints when it is run in `folder`, with the examples beside it."""
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(EXAMPLES)
    command = [sys.executable, "examples/quickstart.py", *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def held_out_losses(output: str) -> tuple[float, float]:
    found = re.search(r"^Held-out loss: ([\d.]+) before training, ([\d.]+) after", output, re.MULTILINE)
    assert found, output
    return float(found[1]), float(found[2])


def test_rows_are_distinct_and_the_same_every_time() -> None:
    rows = quickstart.make_rows(400, seed=1)
    assert rows == quickstart.make_rows(400, seed=1)
    assert rows != quickstart.make_rows(400, seed=2)
    assert len({json.dumps(row) for row in rows}) == 400


def test_rows_have_system_turns_tools_calls_and_many_turns() -> None:
    rows = quickstart.make_rows(400, seed=1)
    with_tools = [row for row in rows if row["tools"]]
    assert 0.6 < len(with_tools) / len(rows) < 0.9
    assert all((row["messages"][0]["role"] == "system") == bool(row["tools"]) for row in rows)
    assert any(sum(message["role"] == "user" for message in row["messages"]) == 3 for row in rows)
    names = {schema["function"]["name"] for schema in quickstart.TOOLS}
    calls = [(row, call) for row in rows for message in row["messages"] for call in message.get("tool_calls", ())]
    assert {call["function"]["name"] for _, call in calls} == names
    assert all(row["tools"] and isinstance(json.loads(call["function"]["arguments"]), dict) for row, call in calls)


def test_answers_follow_from_what_stands_before_them() -> None:
    for row in quickstart.make_rows(400, seed=1):
        messages = row["messages"]
        for result, answer in pairwise(messages):
            if result["role"] == "tool":
                (number,) = json.loads(result["content"]).values()
                assert str(number) in answer["content"] if number else "sold out" in answer["content"]


def test_prepared_folder_is_used_again_until_its_maker_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "NUM_TRAIN", 60)
    monkeypatch.setattr(quickstart, "NUM_HELD_OUT", 10)
    assert quickstart.prepare(tmp_path)
    train, held_out = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("train", "heldout"))
    assert (len(train), len(held_out)) == (60, 10)
    assert not set(train) & set(held_out)
    assert not quickstart.prepare(tmp_path)
    (tmp_path / "made-by.sha256").write_text("another maker")
    assert quickstart.prepare(tmp_path)


def test_tokenizer_knows_the_marks_of_chat_and_renders_calls(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows = quickstart.make_rows(200, seed=1)
    quickstart.train_tokenizer(rows, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = quickstart.model_config(len(tokenizer))
    assert len(tokenizer) == quickstart.VOCAB_SIZE
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (config["eos_token_id"], config["pad_token_id"])
    row = next(row for row in rows if any("tool_calls" in message for message in row["messages"]))
    text = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
    calls = re.findall(r"<tool_call>(.*?)</tool_call>", text)
    assert [json.loads(call)["name"] for call in calls] == [
        call["function"]["name"] for message in row["messages"] for call in message.get("tool_calls", ())
    ]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    asked = tokenizer.apply_chat_template(
        row["messages"][:2], tools=row["tools"], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(asked)


def test_run_learns_says_where_things_lie_and_is_not_run_twice(tmp_path: Path) -> None:
    short = ("train.steps=24", "evaluate.every=null", "checkpoint.every=null")
    few = ("data.validation=runs/quickstart-data/heldout.jsonl@[:40]", "data.workers=1")
    output = run_quickstart(tmp_path, *short, *few)
    before, after = held_out_losses(output)
    assert before > 6
    assert after < before - 2
    model = tmp_path / "runs" / "quickstart" / "hf" / "step-24"
    for place in (model, model.parents[1] / "report.html", model.parents[1] / "metrics.jsonl"):
        assert place.exists()
        assert str(place.relative_to(tmp_path)) in output
    assert output.count("before:") == output.count("after:") == 3

    written = (tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_bytes()
    again = run_quickstart(tmp_path, *short, *few)
    assert "1. Found" in again
    assert held_out_losses(again) == (before, after)
    assert (tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_bytes() == written


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_run_learns_the_shop(tmp_path: Path) -> None:
    output = run_quickstart(tmp_path)
    before, after = held_out_losses(output)
    assert before > 6
    assert after < 0.3
    assert "On Monday we open at eight." in output
    assert "You find the plums in the box under the table." in output
    assert "I have no price list here. Please ask at the till." in output
