"""One line in the log for each part of a start: what is done, when, by whom, and how long it took."""

from __future__ import annotations

import logging
import os
import time

LOG = logging.getLogger(__name__)


class _Clock:
    last = time.monotonic()


def phase(name: str) -> None:
    """Say that `name` is done, such as `weights loaded: Qwen/Qwen3-4B`."""
    now = time.monotonic()
    who = f"rank {os.environ['RANK']}" if "RANK" in os.environ else "driver"
    LOG.info("%s  %s pid %d: %s (%.1f s)", time.strftime("%H:%M:%S"), who, os.getpid(), name, now - _Clock.last)
    _Clock.last = now
