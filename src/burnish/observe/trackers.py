"""Where metrics go besides metrics.jsonl: TensorBoard, and W&B where its extra is installed.

A tracker gets the lines of metrics as they are written; it never reads them back.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from burnish.files import write_whole
from burnish.types import UserError


class Tracker(Protocol):
    """A place where curves are looked at."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record numbers at a step; what is None (a number that was not finite) leaves a gap."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`/tensorboard.

    A run that resumes appends a file which purges the points beyond `resume_step` (None: a run from its start purges
    all), so that none is shown twice. Each line is flushed: events that a kill took with it would leave a hole.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        if resume_step is None:
            self._writer.add_text("recipe", f"```json\n{json.dumps(recipe, indent=2)}\n```", 0)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _numbers(values).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run; WANDB_MODE=offline and its other environment variables hold, the project is `burnish`.

    Its id lies in `folder`/wandb-run-id.txt, so that a run that resumes continues the same curves. Steps between the
    checkpoint and a crash are logged again; a W&B server ignores steps it has.
    """

    def __init__(self, folder: Path, run_name: str, recipe: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        id_file = folder / "wandb-run-id.txt"
        if not id_file.exists():
            write_whole(id_file, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "burnish"),
            name=run_name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dict(recipe),
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(_numbers(values), step=step)

    def close(self) -> None:
        self._run.finish()


def check_trackers(names: Iterable[str]) -> None:
    """Raises UserError where wandb is among the `names` of run.trackers and not installed."""
    if "wandb" not in names:
        return
    # A folder called wandb, such as it makes itself where it runs, passes for a package without an origin.
    package = importlib.util.find_spec("wandb")
    if package is None or package.origin is None:
        raise UserError(
            "run.trackers=wandb needs the package wandb, which is not installed; "
            'run `pip install "burnish[wandb]"`, or take wandb out of run.trackers'
        )


def open_trackers(
    names: Iterable[str], folder: Path, run_name: str, recipe: Mapping[str, Any], resume_step: int | None = None
) -> list[Tracker]:
    """The trackers of `run.trackers` for the run in `folder`, which resumes from `resume_step` (None: from its start).

    `check_trackers` comes before.
    """
    openers = {
        "tensorboard": lambda: TensorBoard(folder, recipe, resume_step),
        "wandb": lambda: WandB(folder, run_name, recipe),
    }
    return [openers[name]() for name in names]


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and name != "step"}
