"""Where a run takes place: versions, machine and the state of the working tree, for environment.json."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("burnish", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and uncommitted files of the working directory's repository; None outside of one."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git("status", "--porcelain") or ""
    return {"commit": commit, "uncommitted": [line[3:] for line in changed.splitlines()]}


def environment(device: str) -> dict[str, Any]:
    """All of it, with the command line."""
    return {
        "command": sys.argv,
        "versions": versions(),
        "device": device,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "git": git_state(),
    }


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip("\n") if result.returncode == 0 else None
