"""TensorBoard's files as TensorBoard reads them, and W&B with a stand-in for its package."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from burnish.observe.trackers import check_trackers, open_trackers
from burnish.types import UserError

RECIPE = {"optim": {"lr": 1e-5}, "run": {"name": None}}


def points(folder, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def log_steps(folder, steps, value: float, resume_step: int | None = None):
    (tracker,) = open_trackers(["tensorboard"], folder, "run", RECIPE, resume_step)
    for step in steps:
        tracker.log(step, {"step": step, "loss": value, "eval/loss": None, "total_tokens": 10 * step})
    return tracker


def test_tensorboard_shows_each_line_at_once_and_leaves_a_gap_for_null(tmp_path):
    tracker = log_steps(tmp_path, [1, 2], 0.5)
    assert points(tmp_path, "loss") == [(1, 0.5), (2, 0.5)], "flushed before it is closed"
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "total_tokens"]
    assert events.Tags()["tensors"] == ["recipe/text_summary"]


def test_tensorboard_shows_no_point_twice_after_a_resume(tmp_path):
    log_steps(tmp_path, range(1, 8), 1.0)  # not closed: killed
    log_steps(tmp_path, range(6, 10), 2.0, resume_step=5).close()
    assert points(tmp_path, "loss") == [(s, 1.0) for s in range(1, 6)] + [(s, 2.0) for s in range(6, 10)]


def test_tensorboard_of_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    log_steps(tmp_path, range(4), 1.0)
    log_steps(tmp_path, range(2), 2.0).close()
    assert points(tmp_path, "loss") == [(0, 2.0), (1, 2.0)]


def test_wandb_asked_for_and_not_installed_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'run\.trackers=wandb .*pip install "burnish\[wandb\]"'):
        check_trackers(["wandb"])


def test_a_folder_called_wandb_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="not installed"):
        check_trackers(["wandb"])


class StandIn:
    """Records what is asked of wandb."""

    def __init__(self):
        self.inits: list[dict] = []
        self.lines: list[tuple[int, dict]] = []
        self.finished = 0

    def init(self, **settings):
        self.inits.append(settings)
        return types.SimpleNamespace(
            log=lambda values, step: self.lines.append((step, values)), finish=lambda: self.__dict__.update(finished=1)
        )


@pytest.fixture
def wandb(monkeypatch) -> StandIn:
    stand_in = StandIn()
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="stand-in")
    monkeypatch.setattr(module, "init", stand_in.init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return stand_in


def test_wandb_continues_the_run_whose_id_lies_in_the_folder(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for _ in range(2):
        (tracker,) = open_trackers(["wandb"], tmp_path, "my run", RECIPE)
        tracker.log(3, {"step": 3, "loss": 0.25, "grad_norm": None})
        tracker.close()
    first, second = wandb.inits
    assert first == second
    assert first["id"] == (tmp_path / "wandb-run-id.txt").read_text().strip()
    assert (first["project"], first["name"], first["resume"]) == ("burnish", "my run", "allow")
    assert first["config"] == RECIPE
    assert wandb.lines[0] == (3, {"loss": 0.25})
    assert wandb.finished


def test_no_trackers_open_nothing(tmp_path):
    assert open_trackers([], tmp_path, "run", RECIPE) == []
    assert list(tmp_path.iterdir()) == []
