"""A run by the command line that goes on under one layout after the other: no row twice, none skipped."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_ranks import FULL
from tiny import tiny_config
from workshop import Workshop, weights

LEGS = [
    (4, ["parallel.dp_shard=4"]),
    (2, ["parallel.tp=2", "parallel.ep=2"]),
    (4, ["parallel.pp=2", "parallel.dp_shard=2"]),
    (1, []),
]
"""Ranks and layout of each three steps of twelve."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["experts", "adapters"])
def test_a_run_goes_on_under_any_layout(workshop: Workshop, kind: str) -> None:
    (workshop.folder / "moe.json").write_text(json.dumps(tiny_config("glm4_moe_lite", num_hidden_layers=2)))
    sections: dict[str, Any] = {
        **FULL,
        "model": {"init": "moe.json"},
        "checkpoint": {"every": 3, "keep": None, "export_dtype": "fp32"},
        "evaluate": {"every": None},
        "optim": {"lr": 1e-3},
        **({"lora": {"rank": 4, "merge": True}} if kind == "adapters" else {}),
    }
    recipe = str(workshop.recipe(**sections))
    workshop.burnish("sft", recipe)
    run = workshop.folder / "runs/b"
    for leg, (world, layout) in enumerate(LEGS):
        # Each part runs to the end, and the next goes back to where it was to stop.
        start = [f"checkpoint.step={3 * leg}"] if leg else []
        output = workshop.burnish("sft", recipe, "run.dir=runs/b", *layout, *start, world=world)
        assert not leg or f"going on from runs/b/checkpoints/iter_{3 * leg:07}" in output
        (run / "summary.json").unlink()
    found, expected = ([line for line in workshop.metrics(run) if "loss" in line] for run in ("runs/b", "runs/a"))
    assert [line["step"] for line in found] == list(range(1, 13))
    for key in ("total_samples", "total_tokens", "loss", "eval/loss"):
        values = [line[key] for line in expected if key in line]
        assert [line[key] for line in found if key in line] == pytest.approx(values, rel=1e-5)
    ends = weights(run), weights(workshop.folder / "runs/a")
    for name, tensor in ends[1].items():
        assert (ends[0][name] - tensor).abs().max() <= 1e-4, name
