"""The command and scripts under Ray, torchrun and Slurm: what is refused, and what a script comes to."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import native_model, tiny_config
from workshop import Workshop

PLAIN = {"checkpoint": {"every": None}, "evaluate": {"every": None}, "run": {"dir": "runs/a", "trackers": []}}


@pytest.mark.slow
def test_what_ranks_refuse_is_one_line(workshop: Workshop) -> None:
    """The driver, which reads no weights, does not know it."""
    native_model(tiny_config(), torch.float32).export(workshop.folder / "model", torch.float32)
    file = workshop.folder / "model/model.safetensors"
    stored = load_file(file)
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"] + 1}, file)
    keys = ["cluster.devices_per_node=2", "model.init=null", "model.path=model"]
    output = workshop.burnish("sft", str(workshop.recipe(**PLAIN)), *keys, "--dry-run", status=1)
    assert "joined the process group" in output
    assert re.match("burnish: error: .* the two are stored with different values", output.splitlines()[-1])
    assert "Traceback" not in output


def test_a_cluster_that_does_not_answer_is_said_before_rows_are_read(workshop: Workshop) -> None:
    workshop.before = _hurry
    output = workshop.burnish("sft", str(workshop.recipe(**PLAIN)), "cluster.address=127.0.0.1:9", status=1)
    assert "burnish: error: cluster.address=127.0.0.1:9: no Ray cluster answers there" in output
    assert not (workshop.folder / "runs/a/prepared").exists()


def _hurry() -> None:
    from burnish.cluster import placement

    placement.ANSWER = 0.1


def _script() -> None:
    """What a user's script does, in place of the command."""
    import burnish

    sft = burnish.SFT("recipe.yaml")
    result = sft.train()
    print(f"trained {result.summary['step']}, then {sft.evaluate()['eval/loss']:.6f}", flush=True)
    sys.exit()


def test_a_script_under_a_launcher_is_one_run(workshop: Workshop) -> None:
    workshop.recipe(**PLAIN)
    workshop.before = _script
    alone = workshop.burnish("sft", "recipe.yaml").splitlines()[-1]
    workshop.recipe(**{**PLAIN, "run": {**PLAIN["run"], "dir": "runs/b"}})
    driver, other = workshop.start_ranks(2, "sft", "recipe.yaml")
    status, output = driver.wait()
    assert status == 0, output
    assert "2 ranks on cpu: dp_shard 2" in output
    assert output.splitlines()[-1] == alone
    assert alone.startswith("trained 12, then ")
    assert other.wait(30) == (0, "")
