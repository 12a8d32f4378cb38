"""What signals come to, sent to this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from burnish.signals import Interrupted, end_on_signals, stop_on_signals


def test_another_signal_ends_the_process_at_once_and_sigterm_has_a_limit() -> None:
    ended: list[int] = []
    limits: list[int] = []
    timer = threading.Timer(60, lambda: None)

    def limit(status: int) -> threading.Timer:
        limits.append(status)
        timer.start()
        return timer

    run: Any = SimpleNamespace(interrupted=None)
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals(run, ended.append, limit):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does, to the process and to its group
        assert (run.interrupted, ended) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGINT)
        assert (ended, limits) == ([130], [143])
    assert timer.finished.is_set(), "a run that ended in time is not ended again"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_block_whatever_goes_wrong_on_the_way_out(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    cleaned: list[str] = []

    def clean() -> None:
        cleaned.append("yes")
        raise ValueError("a connection that is gone")

    def block() -> None:
        with end_on_signals(), ExitStack() as stack:
            stack.callback(clean)
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=f"{number.name}: stopped") as raised:
        block()
    assert (raised.value.status, cleaned) == (128 + number, ["yes"])
    assert signal.getsignal(number) is before


def test_what_no_signal_raised_goes_through() -> None:
    with pytest.raises(ValueError, match="of its own"), end_on_signals():
        raise ValueError("of its own")


CLI = """
import os, signal
import burnish.cli
burnish.cli._sft = lambda parsed: exec("os.kill(os.getpid(), signal.SIGTERM)", globals())
raise SystemExit(burnish.cli.main(["sft", "r.yaml"]))
"""


def test_the_command_says_which_signal_and_exits_with_its_status(tmp_path: Any) -> None:
    (tmp_path / "interrupted.py").write_text(CLI)
    done = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 143
    assert done.stderr == f"burnish: {Interrupted(signal.SIGTERM)}\n"
