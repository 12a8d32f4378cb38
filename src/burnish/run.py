"""A run: its folder, its cadences, what it writes between steps, and when it stops. It trains nothing itself."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

from burnish.config import CheckpointConfig, EvaluateConfig, RecipeError
from burnish.files import write_whole
from burnish.observe.metrics import Line, MetricsWriter, StepWindow, Stopwatch, Totals
from burnish.observe.trackers import Tracker
from burnish.types import Stats, StepInput, StepSource, Trainer, UserError

LOG = logging.getLogger(__name__)


class NonFiniteError(UserError):
    """A step's loss or gradient was not finite; its update was withheld, and nothing was saved since."""


class Watcher(Protocol):
    """What a person sees of a run while it goes."""

    def step(self, line: Line, num_steps: int) -> None: ...

    def evaluation(self, line: Line) -> None: ...


class RunFolder:
    """The paths of RUN/, and the lock that keeps a second process out of it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.answers = self.path / "generations.jsonl"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self.nonfinite = self.path / "nonfinite.json"

    def export(self, step: int) -> Path:
        return self.path / "hf" / f"step-{step}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process. Raises UserError where another has it; a dead process holds nothing."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(
                f"run.dir={self.path} cannot be made: {error.strerror}; name a folder you may write to"
            ) from None
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UserError(
                    f"run.dir={self.path} is in use by process {holder}; wait for it, stop it, or set another run.dir"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def write_json(self, name: str, value: Any) -> None:
        """Write RUN/name as a whole or not at all."""
        write_whole(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Cadence:
    """When something is due: `every` is steps, a fraction of the run, `epoch` or None; `epoch_ends` are steps."""

    every: int | float | Literal["epoch"] | None
    total_steps: int
    epoch_ends: frozenset[int] = frozenset()

    def due(self, step: int) -> bool:
        if self.every is None:
            return False
        if self.every == "epoch":
            return step in self.epoch_ends
        if isinstance(self.every, int):
            return step % self.every == 0
        period = Fraction(str(self.every)) * self.total_steps  # exact: 0.07 of 100 is 7
        return step // period > (step - 1) // period


@dataclass
class Progress:
    """What a run remembers across a resume, besides weights and cursor."""

    step: int = 0
    totals: Totals = field(default_factory=Totals)
    seconds: float = 0.0
    """Time trained, over all starts."""
    best_loss: float | None = None
    best_step: int | None = None
    loss_to_beat: float | None = None
    """The held-out loss that early stopping measures by; it falls only by `min_delta` or more."""
    stale_evaluations: int = 0
    stopped_early: bool = False
    last_evaluation: Line = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        return cls(**{**state, "totals": Totals(**state["totals"])})


@dataclass
class Run:
    """One run's cadences and records.

    `held_out_loss` measures what `evaluate.evaluate` returns, `answers` are (prompt, answer) pairs, `export` writes the
    current weights for a step, and `identity` is what a later resume is compared with.
    """

    folder: RunFolder
    total_steps: int
    clock: Stopwatch
    window: StepWindow
    metrics: MetricsWriter
    trackers: Sequence[Tracker]
    watcher: Watcher
    save_config: CheckpointConfig
    evaluate_config: EvaluateConfig
    held_out_loss: Callable[[Trainer], dict[str, float]] | None
    answers: Callable[[], Sequence[tuple[str, str]]] | None
    export: Callable[[int], Path]
    identity: dict[str, Any]
    epoch_ends: frozenset[int] = frozenset()
    log_every: int = 1
    stop_on_nonfinite: bool = True
    progress: Progress = field(default_factory=Progress)
    interrupted: signal.Signals | None = None
    saved_step: int | None = None
    _unlogged: list[tuple[int, Any, list[str]]] = field(default_factory=list)
    _last_save: float = field(default_factory=time.monotonic)
    _counted_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._evaluate_cadence = Cadence(self.evaluate_config.every, self.total_steps, self.epoch_ends)
        self._save_cadence = Cadence(self.save_config.every, self.total_steps, self.epoch_ends)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps still to take, until the end, a signal or early stopping."""
        while self.progress.step < self.total_steps and self.interrupted is None and not self.progress.stopped_early:
            yield self.progress.step + 1

    def log(self, step: int, stats: Stats, inputs: StepInput) -> None:
        """Count a finished step, and write a line of metrics when one is due."""
        self.progress.step = step
        self.window.add(inputs, stats)
        samples = [sample.id for sample in inputs.samples]
        self._unlogged.append((step, stats["nonfinite_steps"].sum, samples))
        if step % self.log_every == 0 or step == self.total_steps or step == 1:
            self._flush()

    def _flush(self) -> None:
        """Fetch what lies on the device, write it, and look whether every step since the last line was finite."""
        if not self._unlogged:
            return
        pending, self._unlogged = self._unlogged, []
        line = self.window.fetch(self.progress.step)
        self.progress.totals = self.window.totals
        num_bad = line.pop("nonfinite_steps", 0.0)
        if num_bad:
            line["nonfinite_steps"] = num_bad
        self._write(line)
        self.watcher.step(line, self.total_steps)
        if num_bad:
            self._report_nonfinite([(step, samples) for step, flag, samples in pending if float(flag)])

    def _report_nonfinite(self, bad: list[tuple[int, list[str]]]) -> None:
        self.folder.write_json(self.folder.nonfinite.name, [{"step": s, "samples": ids} for s, ids in bad])
        steps = ", ".join(str(step) for step, _ in bad)
        message = (
            f"the loss or the gradient of step {steps} is not finite; the weights never took it, "
            f"and the samples of the step stand in {self.folder.nonfinite}"
        )
        if self.stop_on_nonfinite:
            raise NonFiniteError(
                f"{message}; look at them, lower optim.lr, or set train.on_nonfinite=skip to go on without such steps"
            )
        LOG.warning(f"{message}; skipped, as train.on_nonfinite says")

    def _write(self, line: Line) -> None:
        self.metrics.write(line)
        for tracker in self.trackers:
            tracker.log(line["step"], {k: v for k, v in line.items() if k != "step"})

    def maybe_evaluate(self, step: int, trainer: Trainer) -> None:
        """Evaluate when the cadence says so, and at the end."""
        if self._evaluate_cadence.due(step) or step == self.total_steps:
            self.evaluate_now(trainer)

    def evaluate_now(self, trainer: Trainer) -> None:
        """Evaluate the held-out rows and the fixed prompts at the current step."""
        step = self.progress.step
        self._flush()
        with self.clock("evaluate"):
            if self.held_out_loss is not None:
                line = {"step": step, **self.held_out_loss(trainer)}
                self._write(line)
                self.watcher.evaluation(line)
                self._judge(line)
            if self.answers is not None:
                with self.folder.answers.open("a", encoding="utf-8") as file:
                    for prompt, answer in self.answers():
                        row = {"step": step, "prompt": prompt, "answer": answer}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _judge(self, line: Line) -> None:
        """Whether this is the best held-out loss so far, and whether it has fallen enough to go on."""
        progress, stopping, loss = self.progress, self.evaluate_config.early_stopping, line["eval/loss"]
        progress.last_evaluation = line
        finite = math.isfinite(loss)
        if finite and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.best_step = loss, line["step"]
        if stopping is None:
            return
        if finite and (progress.loss_to_beat is None or loss < progress.loss_to_beat - stopping.min_delta):
            progress.loss_to_beat, progress.stale_evaluations = loss, 0
            return
        progress.stale_evaluations += 1
        if progress.stale_evaluations >= stopping.patience:
            progress.stopped_early = True
            LOG.info(f"no better held-out loss in {progress.stale_evaluations} evaluations: stopping early")

    def maybe_save(self, step: int, trainer: Trainer, source: StepSource) -> None:
        """Save when the cadence or the clock says so, at a new best where that is kept, and at the end."""
        config = self.save_config
        late = config.seconds is not None and time.monotonic() - self._last_save >= config.seconds
        best = config.keep_best and self.progress.best_step == step
        last = step == self.total_steps or self.progress.stopped_early
        if self._save_cadence.due(step) or late or best or last:
            self.save(trainer, source)

    def save(self, trainer: Trainer, source: StepSource) -> None:
        """Save the current step, behind training, with the older ones that retention keeps, and export if asked."""
        step = self.progress.step
        self._flush()
        if self.saved_step == step:
            return
        with self.clock("save"):
            self.count_time()
            state = {"cursor": source.state_dict(), "progress": self.progress.state_dict(), "identity": self.identity}
            best = self.progress.best_step
            protected = {best} if self.save_config.keep_best and best is not None else set()
            trainer.save(str(self.folder.checkpoints), state, self.save_config.keep, protected)
            self.saved_step, self._last_save = step, time.monotonic()
            if self.save_config.export == "save":
                self.export(step)

    def count_time(self) -> None:
        """Add the time since the last call to the progress."""
        now = time.monotonic()
        self.progress.seconds += now - self._counted_at
        self._counted_at = now
