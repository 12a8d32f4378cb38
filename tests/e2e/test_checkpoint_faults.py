"""What becomes of a run whose checkpoints meet a kill, a full disk or a bad block, on one process and on two ranks."""

from __future__ import annotations

import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from workshop import Command, Workshop, wait_for_checkpoint

CHECKPOINTS = Path("runs/a/checkpoints")
TRACKER = CHECKPOINTS / "latest_checkpointed_iteration.txt"


def recipe(workshop: Workshop, keep: int) -> None:
    """Six steps, saved at 2, 4 and 6."""
    workshop.recipe(train={"steps": 6}, evaluate={"every": None}, checkpoint={"every": 2, "keep": keep})


def exported(workshop: Workshop, run: str) -> bytes:
    return (workshop.folder / run / "hf" / "step-6" / "model.safetensors").read_bytes()


def start(workshop: Workshop, world: int, *arguments: str) -> list[Command]:
    return workshop.start_ranks(world, *arguments) if world > 1 else [workshop.start(*arguments)]


def hang_while_writing() -> None:
    """Let a save that has one before it write its tensors and then never end."""
    from burnish.train.dcp_write import SummingWriter

    write_data = SummingWriter.write_data

    def write_and_hang(self: Any, *args: Any) -> Any:
        written = write_data(self, *args)
        if TRACKER.exists():
            time.sleep(600)
        return written

    setattr(SummingWriter, "write_data", write_and_hang)  # noqa: B010 - of a wider signature


@pytest.mark.parametrize("world", [1, 2])
def test_a_kill_amid_a_save_leaves_the_checkpoint_before_and_says_so(workshop: Workshop, world: int) -> None:
    recipe(workshop, keep=1)
    workshop.burnish("sft", "recipe.yaml", "run.dir=runs/whole", world=world)
    workshop.before = hang_while_writing
    ranks = start(workshop, world, "sft", "recipe.yaml")
    writing, deadline = workshop.folder / CHECKPOINTS / ".iter_0000004.writing", time.monotonic() + 90
    while len(list(writing.glob("*.distcp"))) < world:
        assert time.monotonic() < deadline, ranks[0].output.read_text()
        assert ranks[0].is_running, ranks[0].output.read_text()
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
    there = sorted(path.name for path in (workshop.folder / CHECKPOINTS).glob("iter_*"))
    assert there == ["iter_0000002"], "with keep 1, the older is there until the newer is complete"
    workshop.before = None
    said = workshop.burnish("sft", "recipe.yaml", world=world)
    assert "iter_0000004: cut off while it was written" in said
    assert "going on from runs/a/checkpoints/iter_0000002" in said
    assert exported(workshop, "runs/a") == exported(workshop, "runs/whole")


@pytest.mark.parametrize("world", [1, 2])
def test_a_flipped_bit_in_the_newest_checkpoint_takes_the_one_before_and_says_so(
    workshop: Workshop, world: int
) -> None:
    recipe(workshop, keep=3)
    workshop.burnish("sft", "recipe.yaml", world=world)
    whole = exported(workshop, "runs/a")
    file = max((workshop.folder / CHECKPOINTS / "iter_0000006").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = workshop.burnish("sft", "recipe.yaml", world=world)
    assert f"iter_0000006 cannot be used: {file.name} does not have the content that was written" in said
    assert "going on from runs/a/checkpoints/iter_0000004" in said
    assert exported(workshop, "runs/a") == whole


def fill_the_disk() -> None:
    """Let no file grow beyond what metrics and configuration take, once there is a checkpoint."""

    def limit() -> None:
        while not TRACKER.exists():
            time.sleep(0.001)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    threading.Thread(target=limit, daemon=True).start()


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_is_full_ends_the_run_with_a_message_and_leaves_a_checkpoint(
    workshop: Workshop, world: int
) -> None:
    recipe(workshop, keep=1)
    workshop.before = fill_the_disk
    first, *others = start(workshop, world, "sft", "recipe.yaml")
    status, said = first.wait()
    assert status == 1, said
    assert "could not be written below" in said
    assert "File too large" in said
    assert "is complete and still the latest" in said
    assert all(other.wait(30)[0] is not None for other in others)
    latest = (workshop.folder / TRACKER).read_text()
    assert latest in ("2", "4")
    workshop.before = None
    said = workshop.burnish("sft", "recipe.yaml", world=world)
    assert f"going on from runs/a/checkpoints/iter_000000{latest}" in said
    assert exported(workshop, "runs/a")


def test_a_second_run_of_two_ranks_is_refused_a_folder_in_use(workshop: Workshop) -> None:
    recipe(workshop, keep=1)
    first = workshop.start_ranks(2, "sft", "recipe.yaml", "train.steps=5000")
    wait_for_checkpoint(workshop.folder / "runs/a", first[0])
    second = workshop.start_ranks(2, "sft", "recipe.yaml")
    status, said = second[0].wait()
    assert status == 1
    assert "is in use by process" in said
    assert first[0].is_running
    for rank in [*first, *second]:
        rank.kill()
