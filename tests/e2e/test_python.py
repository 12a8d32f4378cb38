"""The same from Python: recipe, model, data set and tokenizer may be objects."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from workshop import Workshop, make_rows

import burnish
from burnish.config import RecipeError


@pytest.fixture
def recipe(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(workshop.folder)
    return {
        "batch": {"samples": 8, "tokens_per_micro_batch": 256},
        "optim": {"lr": 5e-3},
        "precision": {"compute": "fp32"},
        "evaluate": {"every": None},
        "data": {"workers": 0},
        "run": {"dir": "runs/python", "trackers": []},
    }


def make_model(family: str = "qwen3") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config(family)))


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_objects_are_trained_on_evaluated_and_exported(recipe: dict[str, Any], kind: str, tmp_path: Path) -> None:
    model, tokenizer = make_model(), AutoTokenizer.from_pretrained("tokenizer")
    rows, held = make_rows(48), make_rows(16, seed=1)
    dataset = {"train": rows, "validation": held}
    if kind == "datasets":
        dataset = {"train": Dataset.from_list(rows), "validation": Dataset.from_list(held)}
    sft = burnish.SFT(recipe, model=model, dataset=dataset, tokenizer=tokenizer)
    before = sft.evaluate()["eval/loss"]
    result = sft.train()
    assert result.summary["step"] == 6
    assert result.summary["rows"] == {"train": {"kept": 48}}
    assert sft.evaluate()["eval/loss"] < before - 0.5
    assert sft.evaluate()["eval/loss"] == pytest.approx(result.summary["final_eval_loss"], rel=1e-6)
    folder = sft.export(tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(20)[None]
    # fp32 weights are shared with the model passed in; the export rounds them to bf16.
    assert torch.allclose(exported(tokens).logits, model(tokens).logits, atol=0.05)
    assert not torch.equal(exported.get_input_embeddings().weight, make_model().get_input_embeddings().weight)
    # The finished run is recognised, and can be refused.
    assert burnish.SFT(recipe, model=model, dataset=dataset, tokenizer=tokenizer).train().summary == result.summary
    with pytest.raises(RecipeError, match=r"checkpoint\.resume=never"):
        burnish.SFT(recipe, model=model, dataset=dataset, tokenizer=tokenizer).train(resume=False)


def test_a_recipe_file_needs_nothing_else(recipe: dict[str, Any], workshop: Workshop) -> None:
    path = workshop.recipe(
        run={"dir": "runs/file", "trackers": []}, data={"train": [{"path": "train.jsonl"}], "workers": 0}
    )
    assert os.path.samefile(Path.cwd(), workshop.folder)
    result = burnish.SFT(path).train()
    assert result.export == Path("runs/file/hf/step-12")
    assert result.export.is_dir()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cluster": {"devices_per_node": 2}}, "the recipe's cluster and parallel have several ranks"),
        ({"parallel": {"offload": "parameters"}}, "parallel.offload=parameters reads weights piece by piece"),
    ],
)
def test_a_model_in_this_process_is_refused_where_ranks_read_their_own_parts(
    recipe: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=f"a model that is passed in lies in this process, and {message}"):
        burnish.SFT({**recipe, **keys}, model=make_model(), dataset=make_rows(8))


def test_what_is_no_data_set_is_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(burnish.types.UserError, match="must be a list of rows"):
        burnish.SFT(recipe, model=make_model(), dataset=7, tokenizer=AutoTokenizer.from_pretrained("tokenizer")).train()


def test_without_data_the_recipe_is_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"data\.train is empty"):
        burnish.SFT(recipe, model=make_model(), tokenizer=AutoTokenizer.from_pretrained("tokenizer")).train()


def test_a_finished_run_gives_its_trained_weights_again(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop.folder)
    path = workshop.recipe(run={"dir": "runs/file", "trackers": []}, data={"workers": 0})
    first = burnish.SFT(path)
    trained, first_export = first.train(), first.export("first")
    again = burnish.SFT(path)
    assert again.train().summary == trained.summary
    assert again.evaluate()["eval/loss"] == pytest.approx(trained.summary["final_eval_loss"], rel=1e-6)
    second_export = again.export("second")
    assert (first_export / "model.safetensors").read_bytes() == (second_export / "model.safetensors").read_bytes()
    assert (first_export / "README.md").read_text() == (second_export / "README.md").read_text()


def test_training_in_another_thread(recipe: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    sft = burnish.SFT(recipe, model=make_model(), dataset=make_rows(16), tokenizer=tokenizer)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(sft.train).result().summary["step"] == 2


def test_rows_passed_in_leave_no_source_of_the_recipe_unread(recipe: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    sliced = {"path": "a.jsonl", "slice": "0:3"}
    for sources, message in [(["a.jsonl", "b.jsonl"], "names 2 sources"), ([sliced], r"data\.train\.0\.slice is set")]:
        changed = recipe | {"data": recipe["data"] | {"train": sources}}
        with pytest.raises(RecipeError, match=message):
            burnish.SFT(changed, model=make_model(), dataset=make_rows(16), tokenizer=tokenizer).train()
    with pytest.raises(burnish.types.UserError, match="holds no rows"):
        burnish.SFT(recipe, model=make_model(), dataset=[], tokenizer=tokenizer).train()
