"""Rows of every shape, mixtures, streams, bad rows and lengths, through the whole command."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workshop import Workshop, make_rows, wait_for_step, weights, write_jsonl

QUIET = {"evaluate": {"every": None}, "run": {"dir": "runs/a", "trackers": []}}


def summary(workshop: Workshop, run: str = "runs/a") -> dict[str, Any]:
    return json.loads((workshop.folder / run / "summary.json").read_text())


def test_rows_of_every_shape_in_one_run(workshop: Workshop) -> None:
    folder = workshop.folder
    pq.write_table(pa.Table.from_pylist(make_rows(10)), folder / "chat.parquet")
    (folder / "inst.json").write_text(
        json.dumps([{"instruction": "add", "input": str(i), "output": "x"} for i in range(9)])
    )
    write_jsonl(folder / "text.jsonl", [{"text": f"fox {i}"} for i in range(8)])
    write_jsonl(folder / "pairs.jsonl", [{"prompt": f"{i} is ", "completion": str(i)} for i in range(7)])
    turns = [{"from": "human", "value": "say it"}, {"from": "gpt", "value": "it"}]
    (folder / "sharegpt.json").write_text(json.dumps([{"conversations": turns, "n": i} for i in range(6)]))
    write_jsonl(folder / "ids.jsonl", [{"input_ids": [5, 6, 7 + i], "labels": [-100, 6, 7 + i]} for i in range(5)])
    sources = [
        "chat.parquet",
        {"path": "inst.json", "query_key": "input"},
        "text.jsonl",
        "pairs.jsonl",
        "sharegpt.json",
        "ids.jsonl",
    ]
    workshop.burnish("sft", str(workshop.recipe(data={"train": sources, "validation": []}, **QUIET)))
    kept = {name: counts["kept"] for name, counts in summary(workshop)["rows"].items()}
    assert kept == {"chat": 10, "inst": 9, "text": 8, "pairs": 7, "sharegpt": 6, "ids": 5}
    lines = workshop.metrics()
    assert sum(line.get("tokens/ids", 0) for line in lines) == 15
    assert sum(line.get("trained_tokens/ids", 0) for line in lines) == 10
    assert any("loss/ids" in line for line in lines)


def test_a_weighted_source_keeps_its_share(workshop: Workshop) -> None:
    write_jsonl(workshop.folder / "text.jsonl", [{"text": f"fox {i}"} for i in range(5)])
    sources = ["train.jsonl", {"path": "text.jsonl", "weight": 0.25}]
    workshop.burnish("sft", str(workshop.recipe(data={"train": sources, "validation": []}, **QUIET)))
    assert summary(workshop)["rows"] == {"train": {"kept": 96}, "text": {"kept": 32}}
    assert summary(workshop)["step"] == 16


def test_a_killed_stream_goes_on_at_its_row(workshop: Workshop) -> None:
    write_jsonl(workshop.folder / "text.jsonl", [{"text": f"fox {i} " + "over " * (i % 5)} for i in range(40)])
    sources = [
        {"path": "train.jsonl", "weight": 2, "streaming": True},
        {"path": "text.jsonl", "weight": 1, "streaming": True},
    ]
    sections = {
        "data": {"train": sources, "validation": []},
        "train": {"steps": 14},
        "checkpoint": {"every": 3},
        **QUIET,
    }
    recipe = str(workshop.recipe(**sections))
    workshop.burnish("sft", recipe, "run.dir=runs/whole")
    command = workshop.start("sft", recipe, "run.dir=runs/killed")
    wait_for_step(workshop.folder / "runs" / "killed", 7, command)
    command.kill()
    workshop.burnish("sft", recipe, "run.dir=runs/killed")
    losses = [[line["loss"] for line in workshop.metrics(run)] for run in ("runs/whole", "runs/killed")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 14
    assert summary(workshop, "runs/killed")["rows"] == summary(workshop, "runs/whole")["rows"]


def test_batches_by_tokens_keep_their_bound(workshop: Workshop) -> None:
    recipe = workshop.recipe(batch={"samples": None, "tokens": 200}, data={"validation": []}, **QUIET)
    workshop.burnish("sft", str(recipe))
    lines = workshop.metrics()
    assert max(line["tokens"] for line in lines) <= 200
    assert min(line["tokens"] for line in lines[:-1]) > 100
    assert lines[-1]["total_samples"] == 96


@pytest.mark.parametrize(
    ("policy", "rows"), [("drop", {"kept": 95, "over_long": 1}), ("truncate", {"kept": 96, "cut": 1})]
)
def test_over_long_rows_are_counted(workshop: Workshop, policy: str, rows: dict[str, int]) -> None:
    long = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "over " * 200}]
    write_jsonl(workshop.folder / "train.jsonl", [*make_rows(95), {"messages": long}])
    recipe = workshop.recipe(data={"validation": [], "over_long": policy, "max_length": 100}, **QUIET)
    refused = workshop.burnish("sft", str(recipe), "data.over_long=error", "data.prepare=first", status=1)
    assert "train.jsonl:96" in refused
    assert "data.max_length=100" in refused
    output = workshop.burnish("sft", str(recipe))
    assert summary(workshop)["rows"] == {"train": rows}
    assert "dropped or cut" in output
    assert workshop.metrics()[-1]["step"] == 12


def test_a_fraction_is_held_out_of_training(workshop: Workshop) -> None:
    recipe = workshop.recipe(data={"validation": 0.25, "prepare": "first"})
    workshop.burnish("sft", str(recipe))
    found = summary(workshop)
    assert found["rows"] == {"train": {"kept": 72}}
    assert found["held_out_rows"] == {"train": {"kept": 24}}
    facts = json.loads((workshop.folder / "runs" / "a" / "data.json").read_text())
    assert facts["train"][0]["files"][0]["rows"] == 96


def test_a_cache_serves_a_second_run(workshop: Workshop) -> None:
    recipe = str(workshop.recipe(data={"cache": "cache"}))
    workshop.burnish("sft", recipe, "run.dir=runs/first")
    stores = {file: file.stat().st_size for file in (workshop.folder / "cache").rglob("rows.bin")}
    assert len(stores) == 2
    workshop.burnish("sft", recipe, "run.dir=runs/second")
    assert {file: file.stat().st_size for file in (workshop.folder / "cache").rglob("rows.bin")} == stores
    first, second = weights(workshop.folder / "runs" / "first"), weights(workshop.folder / "runs" / "second")
    assert all(bool((first[name] == second[name]).all()) for name in first)


def test_a_held_out_source_of_which_nothing_is_left_is_said_and_left_out(workshop: Workshop) -> None:
    write_jsonl(workshop.folder / "silent.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    held = ["held.jsonl", "silent.jsonl"]
    output = workshop.burnish("sft", str(workshop.recipe(data={"validation": held, "bad_rows": "drop"})))
    assert "no held-out row of silent is left" in output
    assert "silent (held out): 1 bad" in output
    assert summary(workshop)["held_out_rows"] == {"held": {"kept": 24}, "silent": {"bad": 1}}
    assert not any("eval/silent/loss" in line for line in workshop.metrics())
    refused = workshop.burnish(
        "sft",
        str(workshop.recipe(data={"validation": ["silent.jsonl"], "bad_rows": "drop"})),
        "run.dir=runs/b",
        status=1,
    )
    assert "no held-out row is left: 1 bad" in refused
