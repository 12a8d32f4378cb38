"""A folder to train in: rows, tokenizer and model configuration of our own, and the command line as a user runs it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_config

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def make_rows(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chats of one or two turns about sums, some with a system turn: easy to learn, of uneven length."""
    generator = random.Random(seed)
    rows = []
    for _ in range(num):
        messages = [{"role": "system", "content": "add"}] if generator.random() < 0.3 else []
        for _ in range(generator.choice([1, 1, 2])):
            a, b = generator.randrange(50), generator.randrange(50)
            messages.append({"role": "user", "content": f"{a} and {b}"})
            messages.append(
                {"role": "assistant", "content": f"the answer is {a + b}" + " over" * generator.randrange(4)}
            )
        rows.append({"messages": messages})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass
class Workshop:
    """Writes recipes and runs `burnish` in a folder of its own."""

    folder: Path

    def recipe(self, name: str = "recipe.yaml", **sections: Mapping[str, Any]) -> Path:
        """A recipe for a tiny model and 96 rows, 12 steps; `sections` are merged over it."""
        tree: dict[str, Any] = {
            "model": {"init": "model/config.json", "tokenizer": "tokenizer"},
            "data": {"train": [{"path": "train.jsonl"}], "validation": [{"path": "held.jsonl"}], "workers": 1},
            "batch": {"samples": 8, "tokens_per_micro_batch": 256},
            "optim": {"lr": 5e-3, "warmup_ratio": 0.1},
            "precision": {"compute": "fp32"},
            "evaluate": {"every": 6},
            "checkpoint": {"every": 4},
            "run": {"dir": "runs/a"},
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        path = self.folder / name
        path.write_text(yaml.safe_dump(tree))
        return path

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "burnish", *arguments],
            cwd=self.folder,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def burnish(self, *arguments: str, status: int = 0, timeout: float = 120) -> str:
        """Run a command to its end; returns what it printed. Asserts the exit status."""
        process = self.start(*arguments)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == status, f"exit status {process.returncode}:\n{output}"
        return output

    def metrics(self, run: str = "runs/a") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def workshop(tmp_path: Path, chatml_tokenizer: Path) -> Workshop:
    shutil.copytree(chatml_tokenizer, tmp_path / "tokenizer")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(tiny_config("qwen3")))
    write_jsonl(tmp_path / "train.jsonl", make_rows(96))
    write_jsonl(tmp_path / "held.jsonl", make_rows(24, seed=1))
    return Workshop(tmp_path)
