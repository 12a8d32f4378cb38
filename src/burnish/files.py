"""Files that are whole or not there: a kill or a full disk leaves what was before, never a part of what was to come;
and JSON files of others, read with a message where they are not what they should be.

Folders that are whole belong to those who write them: train/checkpoint.py and model/hf_io.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from burnish.types import UserError


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON object that a file holds. Raises UserError, which ends in `remedy`, where it holds anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is a JSON {type(value).__name__}, and must be an object; {remedy}")
    return value


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file, text as UTF-8, in place of one that is there. On return it is on the disk.

    It is written to a hidden file beside it, which a death may leave and the next write takes over.
    """
    hidden = path.with_name(f".{path.name}.writing")
    with hidden.open("wb") as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(hidden, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or which names a folder holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
