"""`burnish inspect` as a user runs it: what it shows is what training takes, and it needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import Workshop, make_rows, write_jsonl

from burnish.components import Components
from burnish.data.prepare import Rejected
from burnish.recipe import read_recipe
from burnish.types import Sample

WITHOUT_TORCH = """
import sys
from burnish.cli import main
status = main(sys.argv[1:])
print(status, [name for name in ("torch", "transformers", "datasets") if name in sys.modules], file=sys.stderr)
"""


def python(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"train_on": {"last_n": 1}, "max_length": 40, "over_long": "truncate", "truncate_side": "left"},
        {"max_length": 45, "over_long": "drop", "train_on": {"roles": ["user", "assistant"]}},
        {"turn_per_sample": True, "max_length": 30, "over_long": "truncate", "truncate_side": "turns"},
        {"train_reasoning": False},
    ],
)
def test_a_recipes_rows_are_those_that_training_takes(workshop: Workshop, data: dict[str, Any]) -> None:
    rows = make_rows(40, seed=3)
    rows[3]["messages"][-1]["weight"] = 0.25
    rows[5] = {"messages": [{"role": "user", "content": "nobody answers"}]}
    rows[7]["messages"][-1]["content"] = "caf\u00e9 \U0001f600"
    write_jsonl(workshop.folder / "train.jsonl", rows)
    recipe = workshop.recipe(data={**data, "train": [{"path": "train.jsonl"}], "validation": ["held.jsonl"]})
    command = ("inspect", recipe.name, "--format", "json", "--out", "rows.jsonl")
    workshop.burnish(*command, status=3)
    shown = [json.loads(line) for line in (workshop.folder / "rows.jsonl").read_text().splitlines()]

    before = Path.cwd()
    os.chdir(workshop.folder)
    try:
        parts = Components(read_recipe(recipe), workshop.folder / "runs/a")
        with parts.feed(None) as feed:
            expected = [found for index in (0, 1) for found in feed.rows(index)]
    finally:
        os.chdir(before)
    prepared = [one for row in expected for one in (row if isinstance(row, list) else [row])]
    assert [row["index"] for row in shown] == [one.index for one in prepared]
    for row, one in zip(shown, prepared, strict=True):
        assert row["source"] == one.source
        if isinstance(one, Rejected):
            # What the recipe chose to drop needs no remedy.
            assert row["error"].removesuffix(" (data.over_long=drop)") == one.message.partition("; raise that")[0]
            continue
        assert isinstance(one, Sample)
        assert row["input_ids"] == one.tokens.tolist()
        np.testing.assert_array_equal(np.array(row["loss_weights"], np.float32), one.loss_weights)


def test_no_torch_for_local_files(workshop: Workshop) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = make_rows(8)
    (workshop.folder / "rows.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), workshop.folder / "rows.parquet")
    for name in ("train.jsonl", "rows.json", "rows.parquet"):
        for arguments in ((), ("--format", "json"), ("--format", "html", "--out", "page.html")):
            found = python(WITHOUT_TORCH, "inspect", name, "--tokenizer", "tokenizer", *arguments, cwd=workshop.folder)
            assert found.stderr.splitlines()[-1] == "0 []", found.stderr
    recipe = workshop.recipe()
    found = python(WITHOUT_TORCH, "inspect", recipe.name, cwd=workshop.folder)
    assert found.stderr.splitlines()[-1] == "0 []", found.stderr
    assert "256 (batch.tokens_per_micro_batch), 512 (the model's max_position_embeddings)" in found.stdout


def test_real_rows_and_tokenizers(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name in ("gpt2-chatml", "minimind"):
        folder = shared / "tokenizers" / name
        found = python(
            WITHOUT_TORCH, "inspect", f"{shared}/data/gsm8k_train.jsonl@[100:120]", "prompt_key=question",
            "response_key=answer", "--tokenizer", folder, "--format", "json", cwd=tmp_path,
        )  # fmt: skip
        assert found.stderr.splitlines()[-1] == "0 []"
        rows = [json.loads(line) for line in found.stdout.splitlines()]
        assert [row["index"] for row in rows] == list(range(100, 120))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        lines = (shared / "data/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
        for row, line in zip(rows, lines[100:120], strict=True):
            told = json.loads(line)
            turns = [
                {"role": "user", "content": told["question"]},
                {"role": "assistant", "content": told["answer"]},
            ]
            assert row["input_ids"] == tokenizer.apply_chat_template(turns, return_dict=False)
            assert row["text"] == tokenizer.apply_chat_template(turns, tokenize=False)
            assert [end for end in row["spans"] if end[2] == "template:end"][-1][3] == 1.0


def piped(workshop: Workshop, rest: str) -> subprocess.CompletedProcess[str]:
    """`burnish inspect` of many rows with `rest` behind it, and on the last line its own exit status."""
    write_jsonl(workshop.folder / "many.jsonl", make_rows(96) * 40)
    command = f"{sys.executable} -m burnish inspect many.jsonl --tokenizer tokenizer {rest}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
        cwd=workshop.folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("options", ["--format json", "--limit 3000"])
def test_a_reader_that_went_away(workshop: Workshop, options: str) -> None:
    found = piped(workshop, f"{options} | head -n 1 >/dev/null")
    assert (found.stdout, found.stderr) == ("141\n", "")


@pytest.mark.parametrize("format", ["terminal", "json", "html"])
def test_a_full_disk_behind_standard_output(workshop: Workshop, format: str) -> None:
    found = piped(workshop, f"--limit 20 --format {format} >/dev/full")
    message = "burnish: error: standard output cannot be written: No space left on device; name another file with --out"
    assert (found.stdout, found.stderr) == ("2\n", f"{message}\n")
