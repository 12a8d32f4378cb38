"""Runs on several ranks by the command line: each layout against one process, interrupted runs, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import native_model, tiny_config
from workshop import Workshop, wait_for_step, weights

from burnish.model.zoo import locate
from burnish.recipe import read_recipe, recipe_from_dict
from burnish.sft import SFT
from burnish.types import UserError

FULL = {"checkpoint": {"every": None, "export_dtype": "fp32"}, "run": {"dir": "runs/a", "trackers": []}}
"""Sections of a recipe whose exports tell runs apart to the last digit."""


def losses(workshop: Workshop, run: str) -> list[float]:
    return [line["loss"] for line in workshop.metrics(run) if "loss" in line]


def assert_alike(workshop: Workshop, run: str, other: str) -> None:
    """The same losses, rows and weights, but for the order of sums; and the same keys of metrics."""
    assert losses(workshop, run) == pytest.approx(losses(workshop, other), rel=1e-5)
    one, two = workshop.metrics(run), workshop.metrics(other)
    assert {key for line in one for key in line} == {key for line in two for key in line}
    for name in ("total_samples", "total_tokens", "eval/loss"):
        found, expected = ([line[name] for line in lines if name in line] for lines in (one, two))
        assert found == pytest.approx(expected, rel=1e-5)
    first, second = weights(workshop.folder / run), weights(workshop.folder / other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        difference = (tensor - second[name]).abs().max()
        assert difference <= 1e-4, f"{name}: {difference}"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_processes_that_a_launcher_started_are_the_ranks(workshop: Workshop, launcher: str) -> None:
    recipe = workshop.recipe(**FULL)
    workshop.burnish("sft", str(recipe))
    command = ["-m", "burnish", "sft", str(recipe), "run.dir=runs/b"]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if launcher == "torchrun":
        options = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
        starts = [([sys.executable, "-m", "torch.distributed.run", *options, *command], environment)]
    else:
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port}
        places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
        starts = [([sys.executable, *command], {**environment, **step, **place}) for place in places]
    processes = [subprocess.Popen(c, env=e, cwd=workshop.folder, stdout=-1, stderr=-2, text=True) for c, e in starts]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    assert "2 ranks on cpu: dp_shard 2" in outputs[0]
    assert all(output == "" for output in outputs[1:])
    assert (workshop.folder / "runs/b/logs/rank-1.log").is_file()
    assert_alike(workshop, "runs/b", "runs/a")


LAYOUTS = {
    "dp_shard": (2, "dense", {}),
    "tp": (2, "dense", {"tp": 2}),
    "cp": (2, "dense", {"cp": 2}),
    "pp": (2, "dense", {"pp": 2}),
    "ep": (2, "moe", {"ep": 2}),
    "zero 1": (2, "dense", {"zero": 1}),
    "offloaded": (2, "dense", {"zero": 1, "offload": "parameters"}),
    "offloaded alone": (1, "dense", {"offload": "parameters"}),
    "adapters": (2, "lora", {"tp": 2}),
    "adapters over dp": (2, "lora", {}),
    "transformers": (2, "transformers", {}),
    "pp x tp": (4, "dense", {"pp": 2, "tp": 2}),
    "cp x dp": (4, "dense", {"cp": 2, "cp_kind": "all_to_all"}),
}
OFTEN = {"tp", "pp", "ep", "offloaded alone", "transformers"}
"""Run every day."""


def sections_of(kind: str) -> dict[str, Any]:
    """A recipe of four steps for a kind of model, with an evaluation that answers."""
    sections: dict[str, Any] = {
        **FULL,
        "train": {"steps": 4},
        "evaluate": {"every": 2, "prompts": ["3 and 4"], "max_new_tokens": 4},
    }
    if kind == "moe":
        sections["model"] = {"init": "moe.json"}
    elif kind == "lora":
        sections["lora"] = {"rank": 4, "merge": True}
    elif kind == "transformers":
        sections["model"] = {"implementation": "transformers"}
    return sections


def add_models(workshop: Workshop) -> None:
    (workshop.folder / "moe.json").write_text(json.dumps(tiny_config("qwen3_moe")))


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_a_layout_trains_answers_and_exports_as_one_process(workshop: Workshop, name: str) -> None:
    world, kind, parallel = LAYOUTS[name]
    add_models(workshop)
    recipe = str(workshop.recipe(**sections_of(kind)))
    written = [f"parallel.{key}={value}" for key, value in parallel.items()]
    workshop.burnish("sft", recipe)
    workshop.burnish("sft", recipe, "run.dir=runs/b", *written, world=world)
    assert_alike(workshop, "runs/b", "runs/a")
    answers = [(workshop.folder / run / "generations.jsonl").read_text() for run in ("runs/a", "runs/b")]
    assert answers[0] == answers[1]
    assert answers[0].count("\n") == 3
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(workshop.folder / "runs/b/hf/step-4", dtype="auto")
    assert {p.dtype for p in exported.parameters()} == {torch.float32}


def test_interrupted_runs_go_on_under_another_layout(workshop: Workshop) -> None:
    """Two ranks, then two that are laid out otherwise, then one process: no row twice, none skipped."""
    sections = {"train": {"epochs": 4}, "evaluate": {"every": None}, "optim": {"lr": 1e-3}}
    recipe = str(workshop.recipe(**{**FULL, **sections}))
    workshop.burnish("sft", recipe)
    run = workshop.folder / "runs/b"
    for step, layout in ((3, ["parallel.tp=2"]), (10, ["parallel.dp_shard=2"])):
        ranks = workshop.start_ranks(2, "sft", recipe, "run.dir=runs/b", *layout)
        wait_for_step(run, step, ranks[0])
        ranks[0].send(signal.SIGINT)
        status, output = ranks[0].wait()
        assert status == 130, output
        assert [rank.wait(30) for rank in ranks[1:]] == [(0, "")]
        saved = int((run / "checkpoints/latest_checkpointed_iteration.txt").read_text())
        assert saved == workshop.metrics("runs/b")[-1]["step"] < 48
    workshop.burnish("sft", recipe, "run.dir=runs/b")
    assert [line["step"] for line in workshop.metrics("runs/b") if "loss" in line] == list(range(1, 49))
    assert_alike(workshop, "runs/b", "runs/a")


@pytest.mark.slow
def test_a_run_that_goes_on_under_its_own_layout_is_the_same_to_the_bit(workshop: Workshop) -> None:
    recipe = str(workshop.recipe(**{**FULL, "checkpoint": {"every": 4, "keep": None, "export_dtype": "fp32"}}))
    layout = ["parallel.tp=2"]
    workshop.burnish("sft", recipe, *layout, world=2)
    shutil.copytree(workshop.folder / "runs/a", workshop.folder / "runs/b")
    (workshop.folder / "runs/b/summary.json").unlink()
    workshop.burnish("sft", recipe, *layout, "run.dir=runs/b", "checkpoint.step=8", world=2)
    files = [workshop.folder / run / "hf/step-12/model.safetensors" for run in ("runs/a", "runs/b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert losses(workshop, "runs/a") == losses(workshop, "runs/b")


RENDERER = """
from burnish.types import Origin
def render(messages, tools, kwargs):
    for i, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\\n", Origin(i, "template")
        yield message["content"], Origin(i, "content")
        yield "<|im_end|>\\n", Origin(i, "template")
"""


def note_reading() -> None:
    """Write down which rank compares which file of a checkpoint with its checksum."""
    from burnish.train import checkpoint

    checksum = checkpoint._checksum

    def noted(file: Path) -> str:
        with open("read.txt", "a") as notes:
            notes.write(f"{os.environ['RANK']} {file.name}\n")
        return checksum(file)

    checkpoint._checksum = noted


def test_a_start_says_what_is_done_by_whom(workshop: Workshop) -> None:
    (workshop.folder / "our_renderer.py").write_text(RENDERER)
    recipe = str(workshop.recipe(**{**FULL, "checkpoint": {"every": 1, "export": "never"}}))
    keys = ["data.renderer=our_renderer.render", "train.steps=2", "data.validation=0.2"]
    workshop.burnish("sft", recipe, *keys, world=2)
    (workshop.folder / "runs/a/summary.json").unlink()
    workshop.before = note_reading
    again = workshop.burnish("sft", recipe, *keys, "checkpoint.step=1", world=2)
    read = [line.split() for line in (workshop.folder / "read.txt").read_text().splitlines()]
    assert sorted(name for _, name in read) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert {rank for rank, _ in read} == {"0", "1"}, "each rank its share"
    of_rank = ["joined the process group", "modules imported", "weights loaded: "]
    of_rank += ["checkpoint verified: ", "checkpoint loaded: ", "ready ("]
    said = [line.partition("pid ")[2].partition(": ")[2] for line in again.splitlines() if " pid " in line]
    expected = [
        "rows: train (",  # once, though it is held out from as well
        "plug-ins imported: our_renderer.render",
        "ranks up: 2",
        *of_rank,
        "every rank ready",
    ]
    assert len(said) == len(expected)
    assert all(line.startswith(part) for line, part in zip(said, expected, strict=True)), said
    log = (workshop.folder / "runs/a/logs/rank-1.log").read_text().splitlines()
    lines = [line.partition("rank 1 pid ")[2].partition(": ")[2] for line in log if "rank 1 pid " in line]
    assert all(line.startswith(part) for line, part in zip(lines[-len(of_rank) :], of_rank, strict=True)), lines


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["parallel.tp=2"], "tp=2 x pp=1 = 2 does not divide the number of ranks, 1"),
        (["cluster.devices_per_node=4", "parallel.tp=4"], "parallel.tp=4 does not divide num_key_value_heads=2"),
        (
            ["cluster.devices_per_node=2", "parallel.cp=2", "model.implementation=transformers"],
            "parallel.cp=2 cuts modules of our own",
        ),
    ],
)
def test_a_layout_that_cannot_be_is_refused_before_rows_are_read(
    workshop: Workshop, keys: list[str], message: str
) -> None:
    recipe = str(workshop.recipe(**FULL, data={"prepare": "first"}))
    output = workshop.burnish("sft", recipe, *keys, status=2)
    assert message in output
    assert "preparing" not in output
    assert not (workshop.folder / "runs/a/prepared").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.attention=varlen"], "model.attention=varlen needs a CUDA device, and the model is on cpu"),
        (["train.router_z_loss=0.1"], "train.router_z_loss=0.1 is about routers of experts, and no layer"),
        (["optim.no_decay=[nothing]"], "optim.no_decay pattern 'nothing' matches no trained parameter"),
        (["model.freeze=['*']"], "model.freeze freezes every parameter"),
        (["model.freeze=[nothing]"], "model.freeze=nothing fits no parameter"),
        (["lora={rank: 2, targets: [nothing]}"], "lora.targets=nothing ends no module's name"),
        (["lora={rank: 2, path: model}"], "lora.path=model has no adapter_config.json"),
        (["model.init=null", "model.path=model"], "model has neither model.safetensors nor"),
        (["model.init=null", "model.path=model", "model.implementation=transformers"], "model has neither"),
        (["run.trackers=[wandb]"], "run.trackers=wandb needs the package wandb"),
    ],
)
def test_what_can_be_known_before_is_refused_without_a_rank_or_a_row(
    workshop: Workshop, keys: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop.folder)
    monkeypatch.setattr("burnish.sft.open_ranks", lambda *_, **__: pytest.fail("there are ranks"))
    path = workshop.recipe(**FULL, data={"prepare": "first"})
    recipe = read_recipe(path, ["cluster.devices_per_node=2", *keys])
    with pytest.raises(UserError, match=re.escape(message)):
        SFT(recipe).train()
    assert not (workshop.folder / "runs/a/prepared").exists()


def test_ranks_read_the_commit_that_the_driver_found_and_ask_the_hub_only_where_it_is_not(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, asked, opened = "1f0c" * 10, list[str](), list[Any]()
    snapshot = workshop.folder / "hub/snapshots" / commit
    native_model(tiny_config(), torch.float32).export(workshop.folder / "model", torch.float32)
    shutil.copytree(workshop.folder / "model", snapshot)

    def download(path: str, revision: str, **_: Any) -> str:
        asked.append(f"{path} {revision}")
        return str(snapshot)

    def open_ranks(config: Any, target: str, args: tuple[Any, ...], **_: Any) -> None:
        opened.extend(args)
        raise UserError("no ranks")

    monkeypatch.chdir(workshop.folder)
    monkeypatch.setattr("burnish.model.hf_io.snapshot_download", download)
    monkeypatch.setattr("burnish.sft.open_ranks", open_ranks)
    keys = ["model.init=null", "model.path=owner/name", "cluster.devices_per_node=2"]
    with pytest.raises(UserError, match="no ranks"):
        SFT(read_recipe(workshop.recipe(), keys)).train()
    assert asked == ["owner/name main"]
    recipe, _, found = opened
    model = recipe_from_dict(recipe).model
    assert locate(model, Path(found)).folder == snapshot
    assert asked == ["owner/name main"]
    assert locate(model, workshop.folder / "elsewhere").folder == snapshot
    assert asked == ["owner/name main", f"owner/name {commit}"]


@pytest.mark.parametrize(
    ("key", "message", "status"),
    [
        ("parallel.tp=3", "does not divide the number of ranks, 2", 2),
        ("data.train.0.path=absent.jsonl", "absent.jsonl", 1),
    ],
)
def test_the_others_end_with_a_driver_that_is_refused(workshop: Workshop, key: str, message: str, status: int) -> None:
    driver, other = workshop.start_ranks(2, "sft", str(workshop.recipe(**FULL)), key)
    found, output = driver.wait()
    assert message in output
    assert found == status
    assert other.wait(30) == (0, "burnish: rank 1 ends, as rank 0 did before it had ranks; it says why\n")


@pytest.mark.slow
def test_a_rank_that_fails_is_told_and_ends_the_others(workshop: Workshop) -> None:
    """That a tied weight is stored twice, with other values, is found by ranks alone."""
    recipe = str(workshop.recipe(**FULL, train={"steps": 1}))
    workshop.burnish("sft", recipe)
    folder = workshop.folder / "runs/a/hf/step-1"
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    keys = ["model.init=null", "model.path=runs/a/hf/step-1", "model.tokenizer=tokenizer", "run.dir=runs/b"]
    output = workshop.burnish("sft", recipe, *keys, world=2, status=1)
    assert "lm_head.weight" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_ray_starts_the_ranks(workshop: Workshop) -> None:
    recipe = str(workshop.recipe(**sections_of("dense")))
    workshop.burnish("sft", recipe)
    output = workshop.burnish("sft", recipe, "run.dir=runs/b", "cluster.devices_per_node=2", "parallel.cp=2")
    assert "2 ranks on cpu: cp 2" in output
    assert_alike(workshop, "runs/b", "runs/a")


TOKENIZER = """
import shutil
import burnish
from transformers import AutoTokenizer
if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    shutil.rmtree("tokenizer")
    burnish.SFT("recipe.yaml", tokenizer=tokenizer).train()
"""


def run_script(workshop: Workshop, script: str) -> None:
    (workshop.folder / "script.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=workshop.folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_tokenizer_that_is_passed_in_answers_on_ranks(workshop: Workshop) -> None:
    """There is no other where the recipe looks for it."""
    recipe = workshop.recipe(**sections_of("dense"))
    workshop.burnish("sft", str(recipe), "run.dir=runs/b")
    workshop.recipe(**sections_of("dense"), cluster={"devices_per_node": 2})
    run_script(workshop, TOKENIZER)
    assert_alike(workshop, "runs/a", "runs/b")
    answers = [(workshop.folder / run / "generations.jsonl").read_text() for run in ("runs/a", "runs/b")]
    assert answers[0] == answers[1]
    assert answers[0].count("\n") == 3


PYTHON = """
import burnish
if __name__ == "__main__":
    sft = burnish.SFT("recipe.yaml")
    result = sft.train()
    assert abs(sft.evaluate()["eval/loss"] - result.summary["final_eval_loss"]) < 1e-4
    print(sft.export("exported"))
"""


@pytest.mark.slow
def test_the_model_can_be_used_from_python_once_ranks_have_trained_it(workshop: Workshop) -> None:
    workshop.recipe(**sections_of("dense"), cluster={"devices_per_node": 2})
    run_script(workshop, PYTHON)
    exported = load_file(workshop.folder / "exported/model.safetensors")
    trained = weights(workshop.folder / "runs/a")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in exported.items())
