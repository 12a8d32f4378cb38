"""Fine-tuning from the command line, as its user runs it."""

from __future__ import annotations

import json
import signal

import pytest
import torch
import yaml
from workshop import wait_for_checkpoint, wait_for_step, weights

from burnish.cli import main


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_run_from_start_to_export(workshop) -> None:
    workshop.recipe(evaluate={"every": 6, "prompts": ["1 and 2"], "max_new_tokens": 4})
    output = workshop.burnish("sft", "recipe.yaml")
    run = workshop.folder / "runs" / "a"
    lines = workshop.metrics()
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in evaluations] == [0, 6, 12]
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"] - 1
    assert evaluations[-1]["eval/held/loss"] == pytest.approx(evaluations[-1]["eval/loss"])
    assert steps[-1]["total_samples"] == 96
    assert sum(line["samples"] for line in steps) == 96
    for key in (
        "grad_norm",
        "lr",
        "tokens",
        "trained_tokens",
        "tokens_per_second",
        "packing_fill",
        "accuracy",
        "time/forward_backward",
        "time/optimizer",
        "time/data_wait",
        "loss/train",
    ):
        assert key in steps[0], key
    for name in ("recipe.yaml", "environment.json", "data.json", "summary.json", "report.html", "logs/rank-0.log"):
        assert (run / name).is_file(), name
    assert yaml.safe_load((run / "recipe.yaml").read_text())["optim"]["betas"] == [0.9, 0.95]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final_eval_loss"] == evaluations[-1]["eval/loss"]
    assert summary["rows"]["train"] == {"kept": 96}
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "12"
    assert sorted(p.name for p in (run / "checkpoints").glob("iter_*")) == ["iter_0000008", "iter_0000012"]
    assert "runs/a/hf/step-12" in output
    answers = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    assert [a["step"] for a in answers] == [0, 6, 12]
    assert list((run / "tensorboard").glob("events*"))

    # Started again, a finished run shows its results and leaves everything as it is.
    before = (run / "metrics.jsonl").read_bytes()
    again = workshop.burnish("sft", "recipe.yaml")
    assert "finished" in again
    assert f"{summary['final_eval_loss']:.4f}" in again
    assert (run / "metrics.jsonl").read_bytes() == before


def test_killed_at_any_moment_it_ends_in_the_same_bits(workshop) -> None:
    recipe = workshop.recipe(train={"epochs": 2}, checkpoint={"every": 3}, precision={"compute": "bf16"})
    workshop.burnish("sft", str(recipe), "run.dir=runs/whole")
    for step in (2, 7, 13):
        process = workshop.start("sft", str(recipe), "run.dir=runs/killed")
        wait_for_step(workshop.folder / "runs" / "killed", step, process)
        process.kill()
    workshop.burnish("sft", str(recipe), "run.dir=runs/killed")
    whole, killed = workshop.metrics("runs/whole"), workshop.metrics("runs/killed")
    kept = ("step", "loss", "grad_norm", "lr", "total_tokens", "total_trained_tokens", "eval/loss")
    assert [{k: v for k, v in line.items() if k in kept} for line in killed] == [
        {k: v for k, v in line.items() if k in kept} for line in whole
    ]
    assert same(weights(workshop.folder / "runs" / "whole"), weights(workshop.folder / "runs" / "killed"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_a_second_run_goes_on(workshop, number: signal.Signals, status: int) -> None:
    recipe = workshop.recipe(train={"epochs": 4}, checkpoint={"every": 1000}, evaluate={"every": None})
    process = workshop.start("sft", str(recipe))
    run = workshop.folder / "runs" / "a"
    wait_for_step(run, 3, process)
    process.send(number)
    found, output = process.wait()
    assert found == status, output
    saved = int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert saved == workshop.metrics()[-1]["step"] < 48
    assert "again" in output, "it says how to go on"
    workshop.burnish("sft", str(recipe))
    assert [line["step"] for line in workshop.metrics() if "loss" in line] == list(range(1, 49))


def test_a_folder_in_use_is_refused(workshop) -> None:
    recipe = workshop.recipe(train={"epochs": 50})
    process = workshop.start("sft", str(recipe))
    wait_for_step(workshop.folder / "runs" / "a", 1, process)
    refused = workshop.burnish("sft", str(recipe), status=1)
    assert f"in use by process {process.pid}" in refused
    process.kill()


def test_a_changed_recipe_is_refused_with_the_difference(workshop) -> None:
    recipe = workshop.recipe()
    process = workshop.start("sft", str(recipe))
    wait_for_checkpoint(workshop.folder / "runs" / "a", process)
    process.kill()
    refused = workshop.burnish("sft", str(recipe), "optim.lr=1e-3", "run.log_every=2", status=2)
    assert "optim.lr" in refused
    assert "0.005 -> 0.001" in refused
    assert "log_every" not in refused, "cadences may change"
    assert "checkpoint.allow_changes" in refused
    with (workshop.folder / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    assert "data: data.train.0: " in workshop.burnish("sft", str(recipe), status=2)
    workshop.burnish("sft", str(recipe), "optim.lr=1e-3", "checkpoint.allow_changes=true")


def test_dry_run_trains_nothing(workshop) -> None:
    recipe = workshop.recipe()
    output = workshop.burnish("sft", str(recipe), "--dry-run")
    assert "12 steps" in output
    assert not (workshop.folder / "runs" / "a" / "checkpoints").exists()
    assert not (workshop.folder / "runs" / "a" / "metrics.jsonl").exists()


def test_a_typo_ends_before_any_work(workshop, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = workshop.recipe()
    assert main(["sft", str(recipe), "optim.lrr=1"]) == 2
    assert "did you mean optim.lr?" in capsys.readouterr().err
    assert not (workshop.folder / "runs").exists()


@pytest.mark.parametrize("prepare", ["ahead", "first"])
def test_a_bad_row_stops_or_is_dropped_and_counted(workshop, prepare: str) -> None:
    lines = (workshop.folder / "train.jsonl").read_text().splitlines()
    lines[40] = lines[40][:-5]
    (workshop.folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    recipe = workshop.recipe(
        data={"train": [{"path": "train.jsonl"}], "prepare": prepare, "shuffle": False, "workers": 1}
    )
    run = workshop.folder / "runs" / "a"
    output = workshop.burnish("sft", str(recipe), status=1)
    assert "train.jsonl:41" in output
    assert "data.bad_rows=drop" in output
    assert ("step 5 is saved" in output) == (prepare == "ahead")
    steps = [line["step"] for line in workshop.metrics() if "loss" in line] if (run / "metrics.jsonl").exists() else []
    assert steps == ([1, 2, 3, 4, 5] if prepare == "ahead" else [])
    if prepare == "ahead":
        assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "5"
    workshop.burnish("sft", str(recipe), "data.bad_rows=drop", "checkpoint.allow_changes=true")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rows"]["train"] == {"kept": 95, "bad": 1}


def test_a_nonfinite_step_leaves_weights_and_names_its_samples(workshop) -> None:
    recipe = workshop.recipe(
        optim={"lr": 1e30, "clip_norm": None}, run={"dir": "runs/a", "log_every": 3}, evaluate={"every": None}
    )
    output = workshop.burnish("sft", str(recipe), status=1)
    assert "not finite" in output
    bad = json.loads((workshop.folder / "runs" / "a" / "nonfinite.json").read_text())
    assert bad[0]["step"] > 1
    assert all(s.startswith("train:") for s in bad[0]["samples"])
    assert len(bad[0]["samples"]) == 8
    assert not (workshop.folder / "runs" / "a" / "checkpoints" / "latest_checkpointed_iteration.txt").exists()
