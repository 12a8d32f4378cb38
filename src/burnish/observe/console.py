"""What a run says while it runs: a progress line on a terminal, plain lines into a file or pipe, and the log.

It shows what it is given and decides nothing about the run; every line of metrics is in metrics.jsonl anyway.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from burnish.observe.units import count_text, duration_text, rate_text

_LOGGERS = ("burnish", "py.warnings")


class Console:
    """The screen of one run; a context, so that the terminal's cursor comes back however the run ends.

    Where the stream is no terminal, a step's line is printed when the last is 5 seconds old, or a hundredth of the time
    gone by, a minute at most: some hundred lines for a run of hours. The first and the last step are always printed.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream: TextIO = stream or sys.stdout
        self._terminal = Terminal(file=self._stream, highlight=False, emoji=False, markup=False)
        self._live = self._terminal.is_terminal and not self._terminal.is_dumb_terminal
        self._clock = clock
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._started: tuple[int, float] | None = None
        self._shown_at = -float("inf")
        self._last_held_out: float | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the progress line down; what was printed stays."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A title and labelled facts, one below the other: what is about to run, and what came of it."""
        width = max((len(label) for label, _ in rows), default=0)
        if not self._live:
            self._print("\n".join([title, *(f"  {label:<{width}}  {value}" for label, value in rows)]))
            return
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True, width=width + 2)
        table.add_column(overflow="fold")
        for label, value in rows:
            table.add_row(f"  {label}", value)
        self._terminal.print(Text(title, style="bold"))
        self._terminal.print(table)

    def notice(self, text: str) -> None:
        """Something worth knowing that needs no action."""
        self._print(text, "cyan")

    def warning(self, text: str) -> None:
        """Something that may need action."""
        self._print(f"warning: {text}", "yellow")

    def step(self, line: Mapping[str, Any], num_steps: int) -> None:
        """Show a line of metrics of a run that ends at step `num_steps`."""
        step, now = int(line["step"]), self._clock()
        self._started = self._started or (step, now)
        due = now - self._shown_at >= self._interval(now)
        if not due and step != num_steps:
            return
        self._shown_at = now
        left = self._time_left(step, num_steps, now)
        if self._live:
            self._advance(line, num_steps, left)
        else:
            self._print(_step_text(line, num_steps, left))

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Show a held-out loss (`eval/...` keys) and how it moved since the last one."""
        loss = line["eval/loss"]
        text = f"step {line['step']:>6}  held-out loss {_loss_text(loss)}"
        if self._last_held_out is not None and loss is not None:
            text += f" ({loss - self._last_held_out:+.4f})"
        if line.get("eval/perplexity") is not None:
            text += f"  perplexity {line['eval/perplexity']:.4g}"
        if line.get("eval/accuracy") is not None:
            text += f"  accuracy {line['eval/accuracy']:.1%}"
        sources = _source_losses(line)
        self._print(text, "green")
        if len(sources) > 1:
            width = max(len(name) for name in sources)
            for name, value in sources.items():
                self._print(f"             {name:<{width}}  {_loss_text(value)}", "green")
        self._last_held_out = loss if loss is not None else self._last_held_out

    def handler(self) -> logging.Handler:
        """A handler that prints log records above the progress line."""
        return _ConsoleHandler(self)

    def _interval(self, now: float) -> float:
        if self._live:
            return 0.2
        assert self._started is not None
        return min(max(5.0, (now - self._started[1]) / 100), 60.0)

    def _time_left(self, step: int, num_steps: int, now: float) -> float | None:
        """Seconds, by the pace since the first line shown, so that start-up and compilation do not count."""
        assert self._started is not None
        first_step, since = self._started
        return (now - since) / (step - first_step) * (num_steps - step) if first_step < step < num_steps else None

    def _advance(self, line: Mapping[str, Any], num_steps: int, left: float | None) -> None:
        if self._progress is None:
            self._progress = Progress(
                BarColumn(bar_width=None if self._terminal.width >= 60 else 8),
                TextColumn("{task.fields[status]}", markup=False),
                console=self._terminal,
                auto_refresh=False,  # no thread of its own beside processes that fork
                expand=True,
            )
            self._task = self._progress.add_task("", total=num_steps, status="")
            self._progress.start()
        status = _status_text(line, num_steps, left, self._terminal.width)
        self._progress.update(self._task, total=num_steps, completed=line["step"], status=status)
        self._progress.refresh()

    def _print(self, text: str, style: str = "") -> None:
        if self._live:
            self._terminal.print(Text(text, style=style))
        else:
            self._stream.write(text + "\n")
            self._stream.flush()


def _source_losses(line: Mapping[str, Any]) -> dict[str, float | None]:
    """The values of `eval/<source>/loss` by source."""
    keys = [key for key in line if key.startswith("eval/") and key.endswith("/loss") and key != "eval/loss"]
    return {key.removeprefix("eval/").removesuffix("/loss"): line[key] for key in keys}


def _loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _parts(line: Mapping[str, Any], left: float | None) -> dict[str, str]:
    """What a step's line may show, by how much it matters."""
    parts = {"loss": f"loss {_loss_text(line.get('loss'))}"}
    if left is not None:
        parts["left"] = f"{duration_text(left)} left"
    if line.get("tokens_per_second") is not None:
        parts["rate"] = f"{count_text(line['tokens_per_second'])} tok/s"
    if line.get("lr") is not None:
        parts["lr"] = f"lr {rate_text(line['lr'])}"
    if line.get("grad_norm") is not None:
        parts["norm"] = f"norm {line['grad_norm']:.3g}"
    return parts


_ORDER = ("loss", "lr", "norm", "rate", "left")


def _status_text(line: Mapping[str, Any], num_steps: int, left: float | None, width: int) -> str:
    """The parts that leave the bar 20 columns, those that matter least left out first."""
    parts = _parts(line, left)
    while True:
        shown = [parts[name] for name in _ORDER if name in parts]
        text = "  ".join([f"{line['step']}/{num_steps}", *shown])
        if len(text) + 20 <= width or len(parts) == 1:
            return text
        parts.popitem()


def _step_text(line: Mapping[str, Any], num_steps: int, left: float | None) -> str:
    parts = _parts(line, left)
    digits = len(str(num_steps))
    widths = {"loss": 11, "lr": 11, "norm": 9, "rate": 12, "left": 0}
    shown = [f"{parts[name]:<{widths[name]}}" for name in _ORDER if name in parts]
    return "  ".join([f"step {line['step']:>{digits}}/{num_steps}", *shown]).rstrip()


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.name == "py.warnings":
            text = text.splitlines()[0]  # the source line that follows is for the log
        if record.levelno >= logging.WARNING:
            self._console.warning(text)
        else:
            self._console.notice(text)


@contextmanager
def logging_to(path: Path, level: str, console: Console) -> Iterator[None]:
    """Within this context, log records of burnish and Python's warnings go to the console and, with time, to the end of
    the file `path`; those below `level` (debug, info, warning, error) go nowhere.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    handlers = [to_file, console.handler()]
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    previous = [logger.level for logger in loggers]
    logging.captureWarnings(True)
    for logger in loggers:
        logger.setLevel(level.upper())
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, old_level in zip(loggers, previous, strict=True):
            logger.setLevel(old_level)
            for handler in handlers:
                logger.removeHandler(handler)
        logging.captureWarnings(False)
        to_file.close()
