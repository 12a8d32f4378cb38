"""A run that is saved and goes on under one layout after the other ends as one that one process ran without a break."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_layouts import BALANCED, MOE, PP, ROUTED, SLOW, Case, build_trainer, whole
from test_step_invariance import make_samples
from torch import Tensor

from burnish.data.pack import Layout, pack
from burnish.train.checkpoint import checkpoint_folder, latest_checkpoint
from burnish.train.states import Coded

LEGS: list[tuple[int, dict[str, Any]]] = [
    (4, {"dp_shard": 4}),
    (2, {"tp": 2, "ep": 2}),
    (4, {"pp": 2, "dp_shard": 2}),
    (1, {}),
]
"""Ranks and `parallel` of each part of a run."""
PER_LEG = 2
EXACT: dict[str, Any] = {"compute": "fp64", "master": "fp64", "optimizer": "adamw", "lr": 1e-3}
LATENT: dict[str, Any] = {"family": "glm4_moe_lite", "num_hidden_layers": 4}
Tensors = dict[str, Tensor]


def train(case: Case, folder: Path, num_steps: int) -> tuple[list[float], Tensors]:
    """Go on from the last checkpoint in `folder`, if there is one, and save after `num_steps` more.

    Returns the losses of the steps, where statistics appear, and whole tensors of what is here.
    """
    trainer, degrees = build_trainer(case)
    last = latest_checkpoint(folder)
    if last is not None:
        trainer.load(str(last))
    data_rank = degrees.data_rank(dist.get_rank()) if case.parallel else 0
    losses = []
    for step in range(trainer.num_steps, trainer.num_steps + num_steps):
        inputs = pack(make_samples(6, seed=step), Layout(case.budget, degrees.data_ranks))
        stats = trainer.step(replace(inputs, batches=[inputs.batches[data_rank]]))
        losses += [float(stats["loss"].mean)] if "loss" in stats else []
    trainer.save(str(folder), {})
    trainer.finish_saves()
    values = {n: t.values() if isinstance(t, Coded) else t.detach() for n, t in trainer.tensors().items()}
    return losses, {name: whole(tensor) for name, tensor in values.items()}


def run(case: Case, folder: Path, num_steps: int) -> tuple[list[float], Tensors]:
    """The losses and what is saved at the end, of all ranks of `case` together."""
    if not case.parallel:
        return train(case, folder, num_steps)
    found = run_ranks(case.world, train, case, folder, num_steps)
    tensors = {name: tensor for _, tensors in found for name, tensor in tensors.items()}
    return next(losses for losses, _ in found if losses), tensors


def with_states(states: str) -> dict[str, Any]:
    return {"optimizer": "adamw", "lr": 1e-3, "trainer": {"states": states}, "config": MOE | PP}


RUNS = {
    "experts": Case("experts", config=MOE | PP, trainer=ROUTED, **EXACT),
    "latent": Case("latent", config=LATENT, trainer=BALANCED, **EXACT),
    "adapters": Case("adapters", config=LATENT, lora={}, **EXACT),
    "dense": Case("dense", config=PP, **EXACT),
    "parameters on the host": Case("parameters", {"offload": "parameters"}, config=MOE | PP, **EXACT),
    "optimizer on the host": Case("optimizer", {"offload": "optimizer"}, config=MOE | PP, **EXACT),
    "bf16 states": Case("bf16", **with_states("bf16")),
    "int8 states": Case("int8", **with_states("int8")),
}
OFTEN = ("experts",)
"""Run every day."""


def laid_out(case: Case, world: int, parallel: dict[str, Any]) -> Case:
    if case.config.get("family", "qwen3") == "qwen3":
        parallel = {key: value for key, value in parallel.items() if key != "ep"}
    return replace(case, world=world, parallel={**case.parallel, **parallel} if parallel else {})


@pytest.mark.parametrize("name", [name if name in OFTEN else pytest.param(name, marks=SLOW) for name in RUNS])
def test_a_run_goes_on_under_any_layout(name: str, tmp_path: Path) -> None:
    case = RUNS[name]
    losses: list[float] = []
    tensors: Tensors = {}
    for world, parallel in LEGS:
        found, tensors = run(laid_out(case, world, parallel), tmp_path / "legs", PER_LEG)
        losses += found
    unbroken = replace(case, parallel={}, budget=4096)
    expected_losses, expected = run(unbroken, tmp_path / "whole", PER_LEG * len(LEGS))
    (tmp_path / "none").mkdir()
    _, first = run(unbroken, tmp_path / "none", 0)
    # Shards round narrow states each by noise of its own: they differ by a part of the way that weights went.
    is_exact = case.compute == "fp64"
    assert losses == pytest.approx(expected_losses, rel=1e-10 if is_exact else 1e-3)
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.startswith("model.") and not tensor.equal(first[key]):
            way = (tensor - first[key]).norm()
            assert (tensors[key] - tensor).norm() <= (1e-8 if is_exact else 0.1) * way, key


@pytest.mark.parametrize(
    ("name", "leg"),
    [
        ("experts", 1),
        *(pytest.param(name, leg, marks=SLOW) for name, leg in (("int8 states", 0), ("adapters", 2), ("latent", 2))),
    ],
)
def test_a_run_goes_on_under_its_own_layout_to_the_bit(name: str, leg: int, tmp_path: Path) -> None:
    case = laid_out(RUNS[name], *LEGS[leg])
    first, _ = run(case, tmp_path / "two", PER_LEG)
    then, tensors = run(case, tmp_path / "two", PER_LEG)
    losses, expected = run(case, tmp_path / "one", 2 * PER_LEG)
    assert first + then == losses
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensors[key], tensor), key
    assert checkpoint_folder(tmp_path / "two", 2 * PER_LEG).is_dir()
