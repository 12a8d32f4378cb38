"""The command and scripts under Ray, torchrun and Slurm: what is refused, and what a script comes to."""

from __future__ import annotations

import sys

import pytest
from workshop import Workshop

PLAIN = {"checkpoint": {"every": None}, "evaluate": {"every": None}, "run": {"dir": "runs/a", "trackers": []}}


@pytest.mark.slow
def test_what_ranks_refuse_is_one_line(workshop: Workshop) -> None:
    """The driver, which has no weights, does not know it."""
    recipe = str(workshop.recipe(**PLAIN))
    keys = ["cluster.devices_per_node=2", "train.router_aux_loss=0.1"]
    output = workshop.burnish("sft", recipe, *keys, "--dry-run", status=2)
    assert output.splitlines()[-1].startswith("burnish: error: train.router_aux_loss=0.1")
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
