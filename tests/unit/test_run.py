"""Cadences, the lock of a run folder, and files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from burnish.observe.metrics import Totals
from burnish.run import Cadence, Progress, RunFolder, write_text
from burnish.types import UserError


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (None, []),
        (4, [4, 8, 12]),
        (100, []),
        (0.25, [3, 6, 9, 12]),
        (0.3, [4, 8, 11]),
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
    progress = Progress(7, Totals(1, 2, 3), 0.5, 6, 1, {"step": 6, "eval/loss": 0.5})
    assert Progress.from_state(progress.state_dict()) == progress


def test_a_file_is_written_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")

    def torn(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", torn)
    with pytest.raises(OSError, match="disk full"):
        write_text(file, "new")
    assert file.read_text() == "old"
