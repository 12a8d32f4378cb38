"""Whole runs on a CUDA device: the kernels that a CPU cannot try."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config
from workshop import make_rows, write_jsonl

from burnish.parallel.offload import offload_activations
from burnish.recipe import recipe_from_dict
from burnish.sft import SFT, Result

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none here"),
]


@pytest.fixture
def folder(tmp_path: Path, chatml_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(chatml_tokenizer, tmp_path / "tokenizer")
    # Heads of 16, the least that flash attention takes.
    config = tiny_config("qwen3", hidden_size=64, head_dim=16)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_jsonl(tmp_path / "train.jsonl", make_rows(96))
    write_jsonl(tmp_path / "held.jsonl", make_rows(24, seed=1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*overrides: str) -> Result:
    tree: dict[str, Any] = {
        "model": {"init": "config.json", "tokenizer": "tokenizer"},
        "data": {"train": ["train.jsonl"], "validation": ["held.jsonl"], "workers": 1},
        "batch": {"samples": 8, "tokens_per_micro_batch": 256},
        "optim": {"lr": 5e-3},
        "run": {"dir": "runs/a", "trackers": []},
    }
    return SFT(recipe_from_dict(tree, overrides)).train()


@pytest.mark.usefixtures("folder")
def test_fp32_learns_as_on_the_cpu() -> None:
    cpu = train("run.dir=runs/cpu", "run.device=cpu", "precision.compute=fp32").summary
    cuda = train("run.dir=runs/cuda", "precision.compute=fp32", "train.compile=false").summary
    assert cuda["first_eval_loss"] == pytest.approx(cpu["first_eval_loss"], rel=1e-5)
    assert cuda["final_eval_loss"] == pytest.approx(cpu["final_eval_loss"], rel=1e-3)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "override",
    ["train.compile=false", "train.compile=true", "train.recompute=full", "train.recompute=selective",
     "model.attention=sdpa", "model.implementation=transformers", "precision.states=int8", "precision.states=bf16"],
)  # fmt: skip
def test_bf16_learns_with(override: str) -> None:
    found = train(override).summary
    assert found["final_eval_loss"] < found["first_eval_loss"] - 1


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "override",
    ["parallel.offload=optimizer", "parallel.offload=parameters", "train.offload_activations=true",
     "cluster.device_mapping=[0]"],
)  # fmt: skip
def test_what_lies_on_the_host_changes_no_number(override: str) -> None:
    common = ("precision.compute=fp32", "train.compile=false")
    plain = train("run.dir=runs/plain", *common).summary
    found = train("run.dir=runs/other", *common, override).summary
    assert found["first_eval_loss"] == pytest.approx(plain["first_eval_loss"], rel=1e-5)
    assert found["final_eval_loss"] == pytest.approx(plain["final_eval_loss"], rel=1e-3)


def test_activations_that_come_back_while_the_device_computes_are_whole() -> None:
    """Copies and products take about as long as each other, and memory is used again at once."""
    torch.manual_seed(0)
    x_TD = torch.randn(8192, 2048, device="cuda")
    found = []
    for is_offloaded in (False, True):
        torch.manual_seed(1)
        blocks = [torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.Tanh()).cuda() for _ in range(6)]
        if is_offloaded:
            offload_activations(blocks)
        for _ in range(4):
            hidden_TD = x_TD
            for block in blocks:
                hidden_TD = block(hidden_TD)
            hidden_TD.sum().backward()
        found.append([parameter.grad for block in blocks for parameter in block.parameters()])
    for plain, offloaded in zip(*found, strict=True):
        assert plain is not None
        assert offloaded is not None
        assert torch.equal(plain, offloaded)


@pytest.mark.parametrize("implementation", ["native", "transformers"])
def test_a_rank_with_its_weights_on_the_host_answers_as_one_process(implementation: str, folder: Path) -> None:
    """Corrections of routers, which our own experts have, are on the device, whatever is on the host."""
    if implementation == "native":
        config = tiny_config("glm4_moe_lite", hidden_size=64)
        del config["head_dim"]  # transformers takes it for that of the rotated part
        (folder / "config.json").write_text(json.dumps(config))
    common = (
        "precision.compute=fp32", "train.compile=false", "train.steps=1", "evaluate.prompts=[3 and 4]",
        "evaluate.max_new_tokens=4", f"model.implementation={implementation}",
    )  # fmt: skip
    train("run.dir=runs/plain", *common)
    train("run.dir=runs/rank", *common, "parallel.offload=parameters")
    first, second = (Path("runs", run, "generations.jsonl").read_text().splitlines() for run in ("plain", "rank"))
    assert first[0] == second[0]
    assert len(first) == len(second) == 2


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite"])
@pytest.mark.parametrize("override", ["train.compile=false", "train.recompute=full", "parallel.offload=parameters"])
def test_experts_learn_with(family: str, override: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(tiny_config(family, hidden_size=64)))
    found = train(override).summary
    assert found["final_eval_loss"] < found["first_eval_loss"] - 1


@pytest.mark.usefixtures("folder")
def test_adapters_learn_and_merge() -> None:
    whole = train("run.dir=runs/whole")
    tuned = train(
        f"model.path={whole.export}", "model.init=null", "run.dir=runs/lora", "lora.rank=8", "lora.merge=true",
        "precision.compute=fp32", "optim.lr=1e-3",
    )  # fmt: skip
    assert tuned.summary["final_eval_loss"] < tuned.summary["first_eval_loss"]
    assert tuned.export is not None
    assert (tuned.export / "model.safetensors").is_file()


def test_a_stopped_deterministic_run_ends_in_the_same_bits(folder: Path) -> None:
    common = ("run.deterministic=true", "checkpoint.every=5", "checkpoint.export_dtype=fp32")
    whole = train("run.dir=runs/whole", *common)
    train("run.dir=runs/stopped", *common)
    stopped = folder / "runs/stopped"
    for file in ("summary.json", "checkpoints/iter_0000012"):
        path = stopped / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (stopped / "checkpoints/latest_checkpointed_iteration.txt").write_text("10")
    again = train("run.dir=runs/stopped", *common)
    assert again.summary["final_eval_loss"] == whole.summary["final_eval_loss"]
    files = [result.export / "model.safetensors" for result in (whole, again) if result.export]
    assert files[0].read_bytes() == files[1].read_bytes()
