"""Exports of a checkpoint by the command line: the same bytes as at the end of training, whatever was trained and how."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM
from workshop import Workshop

from burnish.train.checkpoint import SavedTensors, checkpoint_folder

LORA = {"rank": 4, "targets": ["q_proj", "down_proj"], "modules_to_save": ["norm"]}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "tied": {},
    "transformers": {"model": {"implementation": "transformers"}},
    "adapters": {"lora": LORA},
    "merged": {"lora": {**LORA, "merge": True}},
    "merged DoRA": {"lora": {**LORA, "kind": "dora", "merge": True}},
    "merged, transformers": {"lora": {**LORA, "merge": True}, "model": {"implementation": "transformers"}},
}


def write_base(folder: Path, config: dict[str, Any]) -> None:
    """A base model as `transformers` writes it, in bf16."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16).save_pretrained(folder)
    for file in (folder.parent / "tokenizer").iterdir():
        shutil.copy(file, folder)


def short(workshop: Workshop, kind: dict[str, dict[str, Any]], **sections: Any) -> None:
    """A recipe of two steps on the base of this folder."""
    model = {"init": None, "tokenizer": None, "path": "base", **kind.get("model", {})}
    workshop.recipe(
        **{
            "train": {"steps": 2},
            "checkpoint": {"every": 1},
            "evaluate": {"every": None},
            **kind,
            "model": model,
            **sections,
        }
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_checkpoint_exports_to_the_bytes_of_the_end_of_training(workshop: Workshop, kind: str) -> None:
    write_base(workshop.folder / "base", tiny_config("qwen3"))
    short(workshop, KINDS[kind])
    workshop.burnish("sft", "recipe.yaml")
    workshop.burnish("export", "runs/a", "--out", "out")
    trained, exported = (contents(workshop.folder / name) for name in ("runs/a/hf/step-2", "out"))
    assert exported.keys() == trained.keys()
    assert [name for name in trained if exported[name] != trained[name]] == []
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (workshop.folder / "out").iterdir()}
    assert modes == {stat.S_IMODE((workshop.folder / "recipe.yaml").stat().st_mode)}
