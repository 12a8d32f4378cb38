"""A folder to train in, rows of our own, and the command line as a user runs it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

COMMANDS = multiprocessing.get_context("forkserver")
"""Commands are forked from a process that imported what they need once: an import costs more than a tiny run."""
COMMANDS.set_forkserver_preload(
    [
        "burnish.sft",
        "torch.utils.tensorboard",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.generation",
    ]
)


def _command(
    arguments: list[str],
    folder: Path,
    output: Path,
    environment: Mapping[str, str],
    before: Callable[[], object] | None,
) -> None:
    """Run the command line in a process of its own, its output into a file."""
    os.environ |= environment
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    if before is not None:
        before()
    from burnish.cli import main

    sys.exit(main(arguments))


@dataclass
class Command:
    """A command that runs, or ran."""

    process: ForkServerProcess
    output: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait(self, timeout: float = 120) -> tuple[int | None, str]:
        """Exit status and output; a command that takes too long is killed, and its status is None."""
        self.process.join(timeout)
        status = self.process.exitcode
        self.kill()
        return status, self.output.read_text()


def make_rows(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chats of one or two turns about sums, some with a system turn: easy to learn, of uneven length."""
    generator = random.Random(seed)
    rows = []
    for _ in range(num):
        messages = [{"role": "system", "content": "add"}] if generator.random() < 0.3 else []
        for _ in range(generator.choice([1, 1, 2])):
            a, b = generator.randrange(50), generator.randrange(50)
            messages.append({"role": "user", "content": f"{a} and {b}"})
            messages.append(
                {"role": "assistant", "content": f"the answer is {a + b}" + " over" * generator.randrange(4)}
            )
        rows.append({"messages": messages})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass
class Workshop:
    """Writes recipes and runs `burnish` in a folder of its own."""

    folder: Path
    num_commands: int = 0
    before: Callable[[], object] | None = None
    """What the process of each command calls first, importable by its name: a fault that is to happen there."""

    def recipe(self, name: str = "recipe.yaml", **sections: Mapping[str, Any]) -> Path:
        """A recipe for a tiny model and 96 rows, 12 steps; `sections` are merged over it."""
        tree: dict[str, Any] = {
            "model": {"init": "model/config.json", "tokenizer": "tokenizer"},
            "data": {"train": [{"path": "train.jsonl"}], "validation": [{"path": "held.jsonl"}], "workers": 1},
            "batch": {"samples": 8, "tokens_per_micro_batch": 256},
            "optim": {"lr": 5e-3, "warmup_ratio": 0.1},
            "precision": {"compute": "fp32"},
            "evaluate": {"every": 6},
            "checkpoint": {"every": 4},
            "run": {"dir": "runs/a"},
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        path = self.folder / name
        path.write_text(yaml.safe_dump(tree))
        return path

    def start(self, *arguments: str, environment: Mapping[str, str] = MappingProxyType({})) -> Command:
        self.num_commands += 1
        output = self.folder / f"output-{self.num_commands}.txt"
        args = (list(arguments), self.folder, output, dict(environment), self.before)
        process = COMMANDS.Process(target=_command, args=args, daemon=True)
        process.start()
        return Command(process, output)

    def start_ranks(self, world: int, *arguments: str) -> list[Command]:
        """The command once for each of `world` ranks, with the environment that torchrun gives them; by rank."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(*arguments, environment={"RANK": str(rank), "LOCAL_RANK": str(rank), **common})
            for rank in range(world)
        ]

    def burnish(self, *arguments: str, status: int = 0, world: int = 1) -> str:
        """Run a command to its end, by `world` ranks; returns what the first printed. Asserts its exit status, and that
        the others ended with 0 where it did, and said nothing."""
        first, *others = self.start_ranks(world, *arguments) if world > 1 else [self.start(*arguments)]
        found, output = first.wait()
        assert found == status, f"exit status {found}:\n{output}"
        for other in others:
            ended, said = other.wait(30)
            assert ended is not None, f"a rank lives on:\n{said}"
            assert said == "", said
            assert status or ended == 0, f"exit status {ended}"
        return output

    def metrics(self, run: str = "runs/a") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The exported tensors of the newest step."""
    newest = max((folder / "hf").glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
    return {k: v for file in sorted(newest.glob("*.safetensors")) for k, v in load_file(file).items()}


def wait_for_step(run: Path, step: int, command: Command, seconds: float = 90) -> None:
    """Return once metrics.jsonl holds `step`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        if steps and max(steps) >= step:
            return
        assert command.is_running, command.output.read_text()
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {seconds} s")


def wait_for_checkpoint(run: Path, command: Command, seconds: float = 90) -> None:
    """Return once a checkpoint is complete."""
    deadline = time.monotonic() + seconds
    while not (run / "checkpoints" / "latest_checkpointed_iteration.txt").exists():
        assert time.monotonic() < deadline, f"there was no checkpoint in {seconds} s"
        assert command.is_running, command.output.read_text()
        time.sleep(0.02)
