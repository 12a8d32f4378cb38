"""Runs whose rows give a sample for each trained turn: epochs, counts, and a resume that begins within a row."""

from __future__ import annotations

import html
import json
import random
import re
from typing import Any

import pytest
import torch
from workshop import Workshop, weights, write_jsonl

from burnish.train.checkpoint import read_state

SECTIONS = {
    "data": {"turn_per_sample": True, "over_long": "drop", "max_length": 200},
    "batch": {"samples": 7, "tokens_per_micro_batch": 256},
    "checkpoint": {"every": 2, "keep": None},
    "run": {"dir": "runs/whole", "trackers": []},
}


def make_chats(num: int, seed: int) -> list[dict[str, Any]]:
    """Chats of one to four turns, some untrained or of half weight; each fifth ends with one that is too long."""
    generator = random.Random(seed)
    chats = []
    for number in range(num):
        messages: list[dict[str, Any]] = []
        for _ in range(generator.choice([1, 2, 3, 4])):
            a, b = generator.randrange(50), generator.randrange(50)
            messages.append({"role": "user", "content": f"{a} and {b}"})
            messages.append({"role": "assistant", "content": f"the answer is {a + b}", "weight": 1})
        if len(messages) > 2:
            messages[1]["weight"] = generator.choice([0, 0.5])
        if number % 5 == 0:
            messages += [{"role": "user", "content": "go"}, {"role": "assistant", "content": "over " * 200}]
        chats.append({"messages": messages})
    return chats


def num_turns(chats: list[dict[str, Any]]) -> int:
    """Turns to train, too long ones among them."""
    return sum(m["role"] == "assistant" and m.get("weight") != 0 for chat in chats for m in chat["messages"])


@pytest.fixture
def chats(workshop: Workshop) -> dict[str, list[dict[str, Any]]]:
    made = {"train": make_chats(30, 0), "held": make_chats(10, 1)}
    for name, rows in made.items():
        write_jsonl(workshop.folder / f"{name}.jsonl", rows)
    return made


def test_epochs_counts_and_a_resume_within_a_row(workshop: Workshop, chats: dict[str, list[dict[str, Any]]]) -> None:
    recipe = str(workshop.recipe(train={"epochs": 2}, **SECTIONS))
    output = workshop.burnish("sft", recipe)
    found = json.loads((workshop.folder / "runs" / "whole" / "summary.json").read_text())
    train, held = num_turns(chats["train"]), num_turns(chats["held"])
    kept = train - 6
    assert found["rows"] == {"train": {"rows": 60, "samples": 2 * train, "kept": 2 * kept, "over_long": 12}}
    assert found["held_out_rows"] == {"held": {"rows": 10, "samples": held, "kept": held - 2, "over_long": 2}}
    assert found["total_steps"] == found["step"] == 2 * -(-kept // 7)
    assert found["total_samples"] == 2 * kept
    assert "over-long" in output
    facts = json.loads((workshop.folder / "runs" / "whole" / "data.json").read_text())
    assert facts["train"][0]["counts"] == found["rows"]["train"]

    checkpoints = sorted((workshop.folder / "runs" / "whole" / "checkpoints").glob("iter_*"))
    within = [path for path in checkpoints if read_state(path)["cursor"]["offset"]]
    assert within, "batches end within rows"
    workshop.burnish("sft", recipe, "run.dir=runs/resumed", f"checkpoint.resume={within[len(within) // 2]}")
    step = int(within[len(within) // 2].name.removeprefix("iter_"))
    whole = [line["loss"] for line in workshop.metrics("runs/whole") if "loss" in line and line["step"] > step]
    assert [line["loss"] for line in workshop.metrics("runs/resumed") if "loss" in line] == whole
    again = json.loads((workshop.folder / "runs" / "resumed" / "summary.json").read_text())
    assert again["rows"] == found["rows"]
    first, second = weights(workshop.folder / "runs" / "whole"), weights(workshop.folder / "runs" / "resumed")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("prepare", ["ahead", "first"])
def test_why_samples_were_dropped_is_said_once_a_start_and_written_down(workshop: Workshop, prepare: str) -> None:
    exchange = [{"role": "user", "content": "1 and 2"}, {"role": "assistant", "content": "the answer is 3"}]
    broken = [*exchange, {"role": "user", "content": "and"}, {"role": "assistant", "content": 5}]
    rows = [exchange * 2] * 3 + [broken] * 12 + [exchange * 2] * 25
    write_jsonl(workshop.folder / "train.jsonl", [{"messages": messages} for messages in rows])
    data = {**SECTIONS["data"], "bad_rows": "drop", "prepare": prepare, "shuffle": False}
    recipe = str(workshop.recipe(train={"steps": 8}, **{**SECTIONS, "data": data}))
    output = workshop.burnish("sft", recipe)
    run = workshop.folder / "runs" / "whole"
    found = json.loads((run / "summary.json").read_text())
    reason = found["first_of_kind"]["train"]["bad"]
    assert reason.startswith("train.jsonl:4: messages[3]"), reason
    assert output.count(f"train: first bad: {reason}\n") == 1
    dropped, total = found["rows"]["train"]["bad"], sum(found["rows"]["train"][kind] for kind in ("bad", "kept"))
    assert f"warning: train: dropped {dropped} of {total} samples; first: {reason}\n" in output
    assert f"train: first bad: {reason}\n" in (run / "logs" / "rank-0.log").read_text()
    assert json.loads((run / "data.json").read_text())["train"][0]["first_of_kind"] == {"bad": reason}
    assert html.escape(f"bad, first: {reason}") in (run / "report.html").read_text()

    checkpoint = run / "checkpoints" / "iter_0000004"
    assert read_state(checkpoint)["cursor"]["first_of_kind"] == {"train": {"bad": reason}}
    resumed = workshop.burnish("sft", recipe, "run.dir=runs/resumed", f"checkpoint.resume={checkpoint}")
    assert resumed.count(f"train: first bad: {reason}\n") == 1
    again = json.loads((workshop.folder / "runs" / "resumed" / "summary.json").read_text())
    assert (again["rows"], again["first_of_kind"]) == (found["rows"], found["first_of_kind"])


def test_a_run_that_breaks_leaves_the_counts_of_rows_prepared_first(
    workshop: Workshop, chats: dict[str, list[dict[str, Any]]]
) -> None:
    broken = {**SECTIONS, "data": {**SECTIONS["data"], "prepare": "first"}, "optim": {"lr": 1e30, "clip_norm": None}}
    workshop.burnish("sft", str(workshop.recipe(**broken)), status=1)
    facts = json.loads((workshop.folder / "runs" / "whole" / "data.json").read_text())
    for part, name, too_long in (("train", "train", 6), ("validation", "held", 2)):
        turns = num_turns(chats[name])
        counts = {"rows": len(chats[name]), "samples": turns, "kept": turns - too_long, "over_long": too_long}
        assert facts[part][0]["counts"] == counts
        assert re.match(rf"{name}\.jsonl:1, messages\[\d\]: \d+ tokens", facts[part][0]["first_of_kind"]["over_long"])


def test_a_stream_of_turns_is_cut_by_samples(workshop: Workshop, chats: dict[str, list[dict[str, Any]]]) -> None:
    stream = {**SECTIONS["data"], "train": [{"path": "train.jsonl", "streaming": True}], "validation": []}
    recipe = str(workshop.recipe(train={"steps": 14}, **{**SECTIONS, "data": stream}))
    workshop.burnish("sft", recipe)
    assert [line["samples"] for line in workshop.metrics("runs/whole")] == [7] * 14
    checkpoint = workshop.folder / "runs" / "whole" / "checkpoints" / "iter_0000006"
    workshop.burnish("sft", recipe, "run.dir=runs/resumed", f"checkpoint.resume={checkpoint}")
    losses = [[line["loss"] for line in workshop.metrics(run)] for run in ("runs/whole", "runs/resumed")]
    assert losses[1] == losses[0][6:]
