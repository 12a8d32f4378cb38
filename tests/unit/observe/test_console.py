"""The console on a terminal and in a pipe, and where log records go."""

from __future__ import annotations

import io
import logging
import warnings

import pytest

from burnish.observe.console import Console, logging_to


class Clock:
    """A clock that is moved by hand, in seconds."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def train(console: Console, clock: Clock, num_steps: int, seconds_a_step: float) -> None:
    for step in range(1, num_steps + 1):
        clock.now += seconds_a_step
        line = {"step": step, "loss": 2.0, "lr": 1e-5, "grad_norm": 0.5, "tokens_per_second": 12_345.0}
        console.step(line, num_steps)


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Opens a console on a terminal of so many columns."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LINES", "40")

    def open_console(columns: int, clock: Clock) -> tuple[Console, Screen]:
        monkeypatch.setenv("COLUMNS", str(columns))
        screen = Screen()
        return Console(screen, clock), screen

    return open_console


def last_line(screen: Screen) -> str:
    """What the progress line shows, without colours."""
    from rich.text import Text

    drawn = [part for part in screen.getvalue().replace("\r", "\n").split("\n") if "/" in part]
    return Text.from_ansi(drawn[-1]).plain


def test_plain_lines_are_whole_and_aligned():
    stream, clock = io.StringIO(), Clock()
    train(Console(stream, clock), clock, 12, 10.0)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[0] == "step  1/12  loss 2.0000  lr 1.00e-05  norm 0.5   12.3 k tok/s"
    assert lines[1] == "step  2/12  loss 2.0000  lr 1.00e-05  norm 0.5   12.3 k tok/s  1:40 left"
    assert "left" not in lines[-1]
    assert not set("\r\x1b") & set(stream.getvalue())


@pytest.mark.parametrize(("num_steps", "seconds_a_step", "most"), [(20_000, 0.01, 45), (300_000, 1.0, 5_500)])
def test_plain_lines_of_a_long_run_are_few_and_hold_the_first_and_last(num_steps, seconds_a_step, most):
    stream, clock = io.StringIO(), Clock()
    train(Console(stream, clock), clock, num_steps, seconds_a_step)
    lines = stream.getvalue().splitlines()
    assert 20 < len(lines) < most
    assert f" 1/{num_steps}" in lines[0]
    assert f"{num_steps}/{num_steps}" in lines[-1]


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_the_progress_line_fits_its_terminal_and_always_shows_the_loss(terminal, columns):
    clock = Clock()
    console, screen = terminal(columns, clock)
    with console:
        train(console, clock, 1234, 1.0)
    line = last_line(screen)
    assert len(line) <= columns
    assert "1234/1234" in line
    assert "loss 2.0000" in line
    assert ("12.3 k tok/s" in line) == (columns >= 60)
    assert screen.getvalue().endswith("\x1b[?25h"), "the cursor is back"


def test_the_progress_line_is_redrawn_five_times_a_second_at_most(terminal):
    clock = Clock()
    console, screen = terminal(80, clock)
    with console:
        train(console, clock, 1000, 0.01)
    assert 40 < screen.getvalue().count("loss 2.0000") < 60


def test_evaluations_show_the_change_and_the_sources_where_there_are_several():
    stream = io.StringIO()
    console = Console(stream)
    console.evaluation({"step": 0, "eval/loss": 3.0, "eval/perplexity": 20.0855, "eval/accuracy": 0.25})
    console.evaluation({"step": 10, "eval/loss": 2.5, "eval/math/loss": 2.0, "eval/chat/web/loss": 3.0})
    console.evaluation({"step": 20, "eval/loss": None, "eval/math/loss": 2.0})
    assert stream.getvalue().splitlines() == [
        "step      0  held-out loss 3.0000  perplexity 20.09  accuracy 25.0%",
        "step     10  held-out loss 2.5000 (-0.5000)",
        "             math      2.0000",
        "             chat/web  3.0000",
        "step     20  held-out loss not finite",
    ]


def test_facts_are_aligned_and_never_wrapped_in_a_file():
    stream = io.StringIO()
    Console(stream).facts("burnish sft", [("model", "m" * 200), ("precision", "bf16 [bold]")])
    assert stream.getvalue().splitlines() == ["burnish sft", "  model      " + "m" * 200, "  precision  bf16 [bold]"]


def test_log_records_of_the_level_go_to_file_and_console_and_nothing_stays_behind(tmp_path):
    stream, path = io.StringIO(), tmp_path / "logs" / "rank-0.log"
    logger = logging.getLogger("burnish.data.rows")
    before = list(logging.getLogger("burnish").handlers), logging.getLogger("burnish").level
    for _ in range(2):
        with logging_to(path, "info", Console(stream)):
            logger.debug("quiet")
            logger.info("dropped %d rows", 3)
            logger.warning("odd")
            warnings.warn("deprecated", FutureWarning, stacklevel=1)
    logger.warning("after")
    logged = path.read_text().splitlines()
    assert sum("INFO    burnish.data.rows: dropped 3 rows" in line for line in logged) == 2, "appended, once each"
    assert any("FutureWarning: deprecated" in line for line in logged)
    shown = stream.getvalue().splitlines()
    assert shown[:2] == ["dropped 3 rows", "warning: odd"]
    assert shown[2].endswith("FutureWarning: deprecated")
    assert not any("quiet" in line or "after" in line for line in [*logged, *shown])
    assert (list(logging.getLogger("burnish").handlers), logging.getLogger("burnish").level) == before
