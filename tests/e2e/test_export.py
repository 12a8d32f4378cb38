"""Exports by the command line: the bytes of the end of training, whatever was trained, under whatever layout."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
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


def write_base(folder: Path, config: dict[str, Any], seed: int = 3) -> None:
    """A base model as `transformers` writes it, in bf16."""
    torch.manual_seed(seed)
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


LAYOUTS: dict[str, dict[str, Any]] = {
    "shards": {"parallel": {"dp_shard": 2}},
    "tensors": {"parallel": {"tp": 2}, "lora": {**LORA, "merge": True}},
    "stages": {"parallel": {"pp": 2}},
    "experts": {"parallel": {"ep": 2}},
    "transformers": {"parallel": {"dp_shard": 2}, "model": {"implementation": "transformers"}},
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_exports_the_same_bytes(workshop: Workshop, layout: str) -> None:
    config = tiny_config("qwen3_moe") if layout == "experts" else tiny_config("qwen3")
    write_base(workshop.folder / "base", config)
    short(workshop, LAYOUTS[layout])
    workshop.burnish("sft", "recipe.yaml", world=2)
    workshop.burnish("export", "runs/a", "--out", "out")
    trained, exported = (contents(workshop.folder / name) for name in ("runs/a/hf/step-2", "out"))
    assert exported.keys() == trained.keys()
    assert [name for name in trained if exported[name] != trained[name]] == []


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_of_adapters_saves_them_alone_and_goes_on_beside_its_base(workshop: Workshop, world: int) -> None:
    write_base(workshop.folder / "base", tiny_config("qwen3"))
    short(workshop, {"lora": LORA}, train={"steps": 4}, checkpoint={"every": 2, "keep": 9})
    workshop.burnish("sft", "recipe.yaml", world=world)
    whole = contents(workshop.folder / "runs/a/hf/step-4")["adapter_model.safetensors"]
    saved = SavedTensors(checkpoint_folder(workshop.folder / "runs/a/checkpoints", 2))
    weights = [name for name in saved if name.startswith("model.")]
    assert weights
    assert all(".lora_" in name or name.endswith("norm.weight") for name in weights)

    changes = ("checkpoint.step=2", "run.dir=runs/b", "checkpoint.resume=runs/a")
    workshop.burnish("sft", "recipe.yaml", *changes, world=world)
    short(
        workshop, {"lora": LORA}, train={"steps": 4}, checkpoint={"resume": "runs/a", "step": 2}, run={"dir": "runs/b"}
    )
    again = contents(workshop.folder / "runs/b/hf/step-4")["adapter_model.safetensors"]
    assert again == whole


def test_adapters_do_not_go_on_beside_another_base(workshop: Workshop) -> None:
    write_base(workshop.folder / "base", tiny_config("qwen3"))
    short(workshop, {"lora": LORA}, checkpoint={"export": "never"})
    workshop.burnish("sft", "recipe.yaml")
    shutil.move(workshop.folder / "base", workshop.folder / "moved")
    workshop.burnish("sft", "recipe.yaml", "model.path=moved", "run.dir=runs/b", "checkpoint.resume=runs/a")
    write_base(workshop.folder / "base", tiny_config("qwen3"), seed=4)
    said = workshop.burnish("sft", "recipe.yaml", "run.dir=runs/c", "checkpoint.resume=runs/a", status=2)
    assert "inputs: base weights" in said


def test_merging_needs_the_base_and_says_so_where_it_is_gone(workshop: Workshop) -> None:
    write_base(workshop.folder / "base", tiny_config("qwen3"))
    short(workshop, {"lora": LORA})
    workshop.burnish("sft", "recipe.yaml", "checkpoint.export=never", "lora.merge=true")
    (workshop.folder / "base").rename(workshop.folder / "elsewhere")
    said = workshop.burnish("export", "runs/a", status=1)
    assert "holds adapters alone" in said
    assert "base is no folder here" in said
    assert not (workshop.folder / "runs/a/hf").exists()


def test_adapters_are_exported_where_their_base_is_gone(workshop: Workshop) -> None:
    write_base(workshop.folder / "base", tiny_config("qwen3"))
    short(workshop, {"lora": LORA})
    workshop.burnish("sft", "recipe.yaml")
    shutil.rmtree(workshop.folder / "base")
    workshop.burnish("export", "runs/a", "--step", "1", "--out", "out")
    assert (workshop.folder / "out" / "adapter_model.safetensors").is_file()


def test_a_folder_of_adapters_answers_and_is_evaluated_as_the_merged_model(workshop: Workshop) -> None:
    write_base(workshop.folder / "base", tiny_config("qwen3"))
    short(workshop, {"lora": {**LORA, "kind": "dora"}}, checkpoint={"export_dtype": "fp32"}, optim={"lr": 0.1})
    workshop.burnish("sft", "recipe.yaml")
    workshop.burnish("sft", "recipe.yaml", "lora.merge=true", "run.dir=runs/b")
    adapters, merged = "runs/a/hf/step-2", "runs/b/hf/step-2"
    assert (workshop.folder / adapters / "adapter_config.json").is_file()
    assert (workshop.folder / merged / "config.json").is_file()
    # The first line is the loss; the perplexity shows the sums' last digits.
    folders = (adapters, merged, "base")
    losses = [workshop.burnish("evaluate", folder, "held.jsonl").splitlines()[0] for folder in folders]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    # Behind what peft warns of.
    answers = [workshop.burnish("generate", folder, "3 and 4").splitlines()[-1] for folder in (adapters, merged)]
    assert answers[0] == answers[1]


def test_adapters_as_a_model_to_train_are_refused_with_what_to_set(workshop: Workshop) -> None:
    (workshop.folder / "base").mkdir()
    (workshop.folder / "base" / "adapter_config.json").write_text("{}")
    short(workshop, {})
    assert "base holds adapters and no model; set model.path" in workshop.burnish("sft", "recipe.yaml", status=1)
