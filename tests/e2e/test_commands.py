"""The commands beside `sft`, on what a run leaves."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from workshop import Workshop


def test_what_a_run_leaves_can_be_evaluated_exported_and_asked(workshop: Workshop) -> None:
    workshop.burnish("sft", str(workshop.recipe(checkpoint={"every": 6, "export_dtype": "fp32"})))
    export = workshop.folder / "runs/a/hf/step-12"
    last = workshop.metrics()[-1]

    found = json.loads(workshop.burnish("evaluate", "runs/a/hf/step-12", "held.jsonl", "--json"))
    assert found["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert found["eval/accuracy"] == pytest.approx(last["eval/accuracy"])
    shown = workshop.burnish("evaluate", "runs/a/hf/step-12", "held.jsonl", "slice=:4", "data.max_length=300")
    assert "eval/perplexity" in shown
    refused = workshop.burnish("evaluate", "runs/a/hf/step-12", "held.jsonl", "data.max_length=5", status=1)
    assert "held.jsonl:1: " in refused
    assert "data.max_length=5" in refused

    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "| data | train (96 rows) |" in (export / "README.md").read_text()
    card = (export / "README.md").read_text()
    assert f"| held-out loss | {last['eval/loss']:.4f} |" in card

    # What the run began with may be gone, and the folder elsewhere.
    (workshop.folder / "train.jsonl").unlink()
    (workshop.folder / "model" / "config.json").unlink()
    (workshop.folder / "runs").rename(workshop.folder / "moved")
    workshop.burnish("export", "moved/a", "--step", "6", "--out", "six")
    workshop.burnish("export", "moved/a", "--out", "twelve")
    six, twelve = (AutoModelForCausalLM.from_pretrained(workshop.folder / name) for name in ("six", "twelve"))
    tokens = torch.arange(30)[None]
    assert torch.equal(twelve(tokens).logits, model(tokens).logits)
    assert not torch.allclose(six(tokens).logits, model(tokens).logits, atol=1e-3)
    assert "there are: iter_0000006, iter_0000012" in workshop.burnish("export", "moved/a", "--step", "7", status=1)
    assert "is no run folder" in workshop.burnish("export", "tokenizer", status=1)

    workshop.burnish("generate", "moved/a/hf/step-12", "1 and 2", "--max-new-tokens", "4")
    assert "moved/a/hf/step-12" in workshop.burnish("generate", "moved/a", "hi", status=1)


def test_help_names_every_key(workshop: Workshop) -> None:
    output = workshop.burnish("sft", "--help")
    for key in ("tokens_per_micro_batch", "warmup_ratio", "early_stopping", "keep_best", "chat_template_kwargs"):
        assert key in output
    schema = json.loads(workshop.burnish("schema"))
    assert schema["$defs"]["BatchConfig"]["properties"]["tokens_per_micro_batch"]["default"] == 16384
