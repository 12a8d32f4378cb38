"""The trainer's checkpoints and the copies that stand in for its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import native_model, tiny_config

from burnish.config import OptimConfig
from burnish.data.pack import Layout, pack
from burnish.parallel.execution import Execution, cast_parameters
from burnish.train.loss import CrossEntropy
from burnish.train.trainer import LocalTrainer
from burnish.types import Sample, StepInput


def make_trainer(master: torch.dtype = torch.float32, optim: OptimConfig | None = None, **options: Any) -> LocalTrainer:
    model = native_model(tiny_config("qwen3"), master)
    execution = Execution(model, torch.float32, torch.device("cpu"))
    return LocalTrainer(execution, CrossEntropy(), optim or OptimConfig(), total_steps=10, **options)


def test_a_checkpoint_of_another_device_goes_on_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, trainer = make_trainer(), make_trainer()
    states = {"cpu": torch.get_rng_state(), "cuda": torch.arange(16, dtype=torch.uint8)}
    monkeypatch.setattr(LocalTrainer, "_random_states", lambda self: states)
    written.num_steps = 3
    for parameter in written.parameters.values():
        parameter.data.add_(1)
    written.save(str(tmp_path), {"cursor": 7})
    written.finish_saves()
    monkeypatch.undo()
    torch.rand(5)
    state = trainer.load(str(tmp_path / "iter_0000003"))
    assert (state["cursor"], trainer.num_steps) == (7, 3)
    assert all(torch.equal(trainer.parameters[n], p) for n, p in written.parameters.items())
    assert torch.equal(torch.get_rng_state(), states["cpu"])


def test_cast_parameters_share_ties_pass_gradients_and_go_back() -> None:
    model = native_model(tiny_config("qwen3", tie_word_embeddings=True), torch.float32)
    masters = dict(model.named_parameters())
    with cast_parameters(model, torch.bfloat16):
        inside = model.head().weight_VD
        assert inside.dtype == torch.bfloat16
        inside.sum().backward()
    assert dict(model.named_parameters()).keys() == masters.keys()
    assert all(after is masters[name] for name, after in model.named_parameters())
    gradient = masters["model.embed_tokens.weight"].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32


def some_input(seed: int) -> StepInput:
    random = np.random.default_rng(seed)
    samples = [
        Sample(random.integers(0, 512, 20).astype(np.int32), np.array([0.0] + [1.0] * 19, np.float32), "a", index)
        for index in range(4)
    ]
    return pack(samples, Layout(40))


@pytest.mark.parametrize(
    ("name", "master", "states"),
    [
        ("adamw", torch.float32, "fp32"),
        ("adamw", torch.float32, "int8"),
        ("adamw", torch.bfloat16, "bf16"),
        ("sgd", torch.float32, "fp32"),
        ("sgd", torch.bfloat16, "fp32"),
    ],
)
def test_an_optimizer_on_the_host_changes_no_bit(name: Any, master: torch.dtype, states: str, tmp_path: Path) -> None:
    optim = OptimConfig(name=name, lr=1e-2, clip_norm=0.5)
    here = make_trainer(master, optim, states=states)
    there = make_trainer(master, optim, states=states, updates_on_host=True)
    for seed in range(2):
        here.step(some_input(seed))
        there.step(some_input(seed))
    there.save(str(tmp_path), {})
    there.finish_saves()
    resumed = make_trainer(master, optim, states=states, updates_on_host=True)
    resumed.load(str(tmp_path / "iter_0000002"))
    here.step(some_input(2))
    resumed.step(some_input(2))
    assert all(torch.equal(resumed.parameters[n], p) for n, p in here.parameters.items())
    with torch.no_grad():
        for parameter in there.parameters.values():
            parameter.zero_()
    there.step(some_input(2))
    assert all(p.abs().max() < 0.1 for p in there.parameters.values()), "it goes on from the weights as they are"
