"""What SIGINT and SIGTERM come to: the end at once, or once the step under way is finished and saved.

Python hands signals to the main thread alone: where a block runs in another, nothing is changed.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

LOG = logging.getLogger(__name__)

NUMBERS = (signal.SIGINT, signal.SIGTERM)
ONE = 1.0
"""Seconds within which the same signal counts once: `timeout` sends it to the process and then to its group."""


class Interrupted(KeyboardInterrupt):
    """A signal ended what went on; `status` is the exit status that says so."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped, while no step was under way; run the same command again to go on")
        self.status = 128 + number


class Stoppable(Protocol):
    """What goes on in steps until `interrupted` is set."""

    interrupted: signal.Signals | None


@contextmanager
def end_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the block, which cleans up and raises Interrupted; a second one ends the process."""
    received: list[int] = []

    def first(number: int) -> None:
        received.append(number)
        raise KeyboardInterrupt  # what Ray's waits let through, alone of all exceptions

    try:
        with _handled(first, lambda number: os._exit(128 + number)):
            yield
    except BaseException:
        if received:  # whatever else went wrong on the way out
            raise Interrupted(received[0]) from None
        raise


@contextmanager
def stop_on_signals(
    run: Stoppable, end_at_once: Callable[[int], None], limit: Callable[[int], threading.Timer]
) -> Iterator[None]:
    """SIGINT and SIGTERM let the current step finish and end the loop; a second one calls `end_at_once` with the exit
    status. At a SIGTERM, whose sender will not wait for ever, `limit` starts a timer, which ends with the block."""
    timers: list[threading.Timer] = []

    def first(number: int) -> None:
        run.interrupted = signal.Signals(number)
        if number == signal.SIGTERM:
            timers.append(limit(128 + number))
        LOG.info(f"{signal.Signals(number).name}: finishing the step, then saving; again stops at once")

    try:
        with _handled(first, lambda number: end_at_once(128 + number)):
            yield
    finally:
        for timer in timers:
            timer.cancel()


@contextmanager
def _handled(first: Callable[[int], None], again: Callable[[int], None]) -> Iterator[None]:
    """Within the block the first signal calls `first`, further ones `again`."""
    seen: dict[int, float] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        is_first, is_same = not seen, time.monotonic() - seen.get(number, -ONE) < ONE
        seen[number] = time.monotonic()
        if is_first:
            first(number)
        elif not is_same:
            again(number)

    is_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handle) for number in (NUMBERS if is_main else ())}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
