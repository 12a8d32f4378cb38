"""Cadences, the lock of a run folder, and what is remembered across a resume."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from burnish.config import RecipeError
from burnish.observe.metrics import Totals
from burnish.run import Cadence, Progress, RunFolder
from burnish.types import UserError


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (None, []),
        (4, [4, 8, 12]),
        (100, []),
        (0.25, [3, 6, 9, 12]),
        (0.3, [4, 8, 11]),
        (0.5, [6, 12]),
        (0.01, list(range(1, 13))),
        ("epoch", [5, 10]),
    ],
)
def test_cadences(every: int | float | None, due: list[int]) -> None:
    cadence = Cadence(every, total_steps=12, epoch_ends=frozenset({5, 10}))  # pyright: ignore[reportArgumentType]
    assert [step for step in range(1, 13) if cadence.due(step)] == due


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    message = f"in use by process {os.getpid()}"
    with folder.lock(), pytest.raises(UserError, match=message), RunFolder(tmp_path / "run").lock():
        pass
    with folder.lock():
        pass


def test_progress_comes_back_from_its_state() -> None:
    progress = Progress(7, Totals(1, 2, 3), 8.5, 0.5, 6, 0.6, 1, True, {"step": 6, "eval/loss": 0.5})
    assert Progress.from_state(progress.state_dict()) == progress


def test_fractions_are_exact() -> None:
    assert [step for step in range(1, 101) if Cadence(0.07, 100).due(step)] == list(range(7, 101, 7))


def test_a_run_folder_that_cannot_be_made_is_the_recipes_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"run\.dir=.*file cannot be made"), RunFolder(tmp_path / "file").lock():
        pass
