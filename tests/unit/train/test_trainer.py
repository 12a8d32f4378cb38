"""The trainer's checkpoints and the copies that stand in for its parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import native_model, tiny_config

from burnish.config import OptimConfig
from burnish.parallel.execution import Execution, cast_parameters
from burnish.train.loss import CrossEntropy
from burnish.train.trainer import LocalTrainer


def make_trainer() -> LocalTrainer:
    model = native_model(tiny_config("qwen3"), torch.float32)
    return LocalTrainer(
        Execution(model, torch.float32, torch.device("cpu")), CrossEntropy(), OptimConfig(), total_steps=10
    )


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
