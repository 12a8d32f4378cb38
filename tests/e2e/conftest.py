"""Fixtures of whole-command tests."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import tiny_config
from workshop import Workshop, make_rows, write_jsonl


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Read when the fork server starts, which is at the first command.
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def workshop(tmp_path: Path, chatml_tokenizer: Path) -> Workshop:
    shutil.copytree(chatml_tokenizer, tmp_path / "tokenizer")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(tiny_config("qwen3")))
    write_jsonl(tmp_path / "train.jsonl", make_rows(96))
    write_jsonl(tmp_path / "held.jsonl", make_rows(24, seed=1))
    return Workshop(tmp_path)
