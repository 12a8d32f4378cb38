"""Ends what a Ray of our own leaves behind when its driver is killed. Run as a script, it imports nothing of ours.

Ray's agents outlive it for a minute: they wait for a head that is gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "BURNISH_RAY"
"""The variable by which every process of such a Ray is found; it holds the folder."""
SECONDS = 10.0


@contextlib.contextmanager
def janitor(folder: Path) -> Iterator[None]:
    """Until this context ends, or this process in whatever way: then no process marked with `folder` is left."""
    process = subprocess.Popen(
        [sys.executable, "-I", __file__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        yield
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS)


def marked(folder: str) -> list[int]:
    """The processes whose environment says that they belong to `folder`, or that write into a session's folder there:
    Ray's agents overwrite their environment with a title."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is somebody else's
            if f"{MARK}={folder}\0".encode() in (process / "environ").read_bytes() or any(
                os.readlink(file).startswith(f"{folder}/session") for file in (process / "fd").iterdir()
            ):
                found.append(int(process.name))
    return found


def main(folder: str) -> None:
    driver = os.getppid()
    sys.stdin.read()  # until the driver is gone, or has ended its Ray
    deadline = time.monotonic() + SECONDS
    while (left := [pid for pid in marked(folder) if pid != driver]) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
