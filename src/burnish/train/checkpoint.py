"""Checkpoints: one folder a step, complete or not there at all. Tensors through DCP, our own state as JSON.

    ROOT/iter_0000100/{*.distcp, .metadata, state.json}   100 steps finished
    ROOT/latest_checkpointed_iteration.txt                 "100", written last

A checkpoint is written into a hidden folder beside it, synced and renamed, so that a writer may die or the disk fill up
at any moment. What belongs into a checkpoint, and when to write one, is decided elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from burnish.files import sync, write_whole
from burnish.train.dcp_metadata import AnonymousWriter, InertReader, parse
from burnish.types import UserError

TRACKER = "latest_checkpointed_iteration.txt"
STATE = "state.json"
METADATA = ".metadata"

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that could not be written, or cannot be read as what it should be."""


def checkpoint_folder(root: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` finished steps lies below `root`, whether or not it exists."""
    return Path(root) / f"iter_{step:07d}"


def save_checkpoint(root: str | Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` below `root`, in place of one that is there, and make it the latest.

    `tensors` share no memory; `state` is JSON. On return everything is on the disk.
    Raises CheckpointError where it cannot be written, a full disk for instance; what was there is then still valid.
    """
    root = Path(root)
    _assert_distinct(tensors)
    text = json.dumps(state)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for notice in recover(root):
            logger.warning(notice)
        folder = _write(root, step, tensors, json.loads(text))
        write_whole(root / TRACKER, str(step))
        _delete(_hidden(folder, "replaced"))
    except OSError as error:
        recover(root)
        raise CheckpointError(_write_failure(root, step, tensors, error)) from error
    return folder


def load_checkpoint(folder: str | Path, into: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Fill the tensors of `into` from a checkpoint and return the state that was saved with it.

    Every file is checked against its checksum before a tensor is touched. Raises CheckpointError for damage, and where
    names, shapes and types are not exactly those of `into`; what does not begin with `prefix` is left unread.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for name, facts in manifest["files"].items():
        if _checksum(folder / name) != facts["crc32"]:
            raise CheckpointError(_damage(folder, f"{name} does not have the content that was written"))
    try:
        metadata = parse((folder / METADATA).read_bytes(), manifest["files"].keys())
    except ValueError as error:
        raise CheckpointError(_damage(folder, f"{METADATA} is not what a checkpoint holds: {error}")) from error
    _require_same(folder, metadata, into, prefix)
    try:
        with _dcp_as_a_library() as no_dist:
            # Names are flat already; DCP's own flattening would only add to the metadata.
            planner = DefaultLoadPlanner(flatten_state_dict=False)
            load(dict(into), storage_reader=InertReader(folder, metadata), planner=planner, no_dist=no_dist)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_damage(folder, f"it holds something other than tensors: {error}")) from error
    return manifest["state"]


def read_state(folder: str | Path) -> dict[str, Any]:
    """The state that was saved with a checkpoint, without its tensors. Raises CheckpointError for damage."""
    return _read_manifest(Path(folder))["state"]


def latest_checkpoint(root: str | Path) -> Path | None:
    """The checkpoint to go on from: the tracker's, or the newest complete one where that is damaged; None without any.

    Looks at sizes, not contents, and changes nothing, so that it may be called while a run is writing. A fallback is
    logged. Raises CheckpointError where there are checkpoints but no complete one: starting anew must be asked for.
    """
    step = _latest_step(Path(root))
    return None if step is None else checkpoint_folder(root, step)


def retain(root: str | Path, keep: int | None, protect: Set[int] = frozenset()) -> None:
    """Delete all checkpoints but the `keep` newest up to the latest, that one included, and those of `protect`.

    Does nothing for `keep` None. Checkpoints beyond the latest, left by a run that was set back, stay until they are
    written again. For the one who writes there alone.
    """
    latest = _latest_step(Path(root))
    if keep is None or latest is None:
        return
    up_to_latest = [step for step in _steps(Path(root)) if step <= latest]
    for step in up_to_latest[:-keep]:
        if step not in protect:
            folder = checkpoint_folder(root, step)
            hidden = _hidden(folder, "deleting")
            os.rename(folder, hidden)
            _delete(hidden)


def recover(root: str | Path) -> tuple[str, ...]:
    """Put away what a killed writer left below `root`, and say what it was. For the one who writes there alone."""
    notices = []
    for leftover in sorted(Path(root).glob(".iter_*")):
        folder, stage = leftover.with_name(leftover.stem[1:]), leftover.suffix
        if stage == ".replaced" and not folder.exists():
            os.rename(leftover, folder)
            notices.append(f"{folder}: its replacement was cut off; the checkpoint that was there is kept")
            continue
        _delete(leftover)
        if stage == ".writing":
            notices.append(f"{folder}: cut off while it was written, and removed; no checkpoint before it is touched")
    return tuple(notices)


def _write(root: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> Path:
    folder = checkpoint_folder(root, step)
    hidden = _hidden(folder, "writing")
    _save_tensors(hidden, tensors)
    files = {file.name: {"bytes": file.stat().st_size, "crc32": _checksum(file)} for file in sorted(hidden.iterdir())}
    manifest = {"version": 1, "step": step, "files": files, "state": state}
    write_whole(hidden / STATE, json.dumps({"crc32": _manifest_checksum(manifest), **manifest}, indent=1))
    if folder.exists():
        os.rename(folder, _hidden(folder, "replaced"))
    os.rename(hidden, folder)
    sync(root)
    return folder


def _save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    # One thread, because DCP loses the exceptions of any other: a full disk would pass for a success.
    writer = AnonymousWriter(folder, thread_count=1, sync_files=True)
    with _dcp_as_a_library() as no_dist:
        planner = DefaultSavePlanner(flatten_state_dict=False)
        save(dict(tensors), storage_writer=writer, planner=planner, no_dist=no_dist)


@contextmanager
def _dcp_as_a_library() -> Iterator[bool]:
    """Yields whether there is no process group. Within, DCP does not warn of that and raises its failures bare."""
    no_dist = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield no_dist
    except CheckpointException as error:
        (cause, _), *_ = error.failures.values()
        raise _root_cause(cause) from error


def _root_cause(error: BaseException) -> BaseException:
    """The OSError behind `error`, if any: torch's zip writer, closing after a failed write, raises its own."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__context__
    return behind or error


def _assert_distinct(tensors: Mapping[str, Tensor]) -> None:
    by_memory: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            other = by_memory.setdefault(tensor.data_ptr(), name)
            assert other == name, f"{other} and {name} are one tensor; give it to the checkpoint under one name"


def _read_tracker(root: Path) -> int | None:
    tracker = root / TRACKER
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    return int(text) if re.fullmatch(r"[0-9]+", text) else None


def _steps(root: Path) -> list[int]:
    """The steps whose folders exist, ascending."""
    matches = (re.fullmatch(r"iter_(\d{7,})", folder.name) for folder in root.glob("iter_*"))
    return sorted(int(match[1]) for match in matches if match)


def _latest_step(root: Path) -> int | None:
    tracked, steps = _read_tracker(root), _steps(root)
    if tracked is None and not steps:
        return None
    problem = f"{root / TRACKER} is missing or unreadable"
    if tracked is not None:
        fault = _fault(checkpoint_folder(root, tracked))
        if fault is None:
            return tracked
        problem = f"{root / TRACKER} names step {tracked}, whose checkpoint cannot be used: {fault}"
    newest = next((step for step in reversed(steps) if _fault(checkpoint_folder(root, step)) is None), None)
    if newest is None:
        raise CheckpointError(f"{problem}; no other is complete. Restore one, or delete {root} to start anew")
    logger.warning("%s; going on from the newest complete one, step %d", problem, newest)
    return newest


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The content of state.json, all files present and of their sizes. Raises CheckpointError."""
    fault = _fault(folder)
    if fault is not None:
        raise CheckpointError(_damage(folder, fault))
    return json.loads((folder / STATE).read_bytes())


def _fault(folder: Path) -> str | None:
    """Why `folder` is no complete checkpoint; None where it is one, as far as sizes tell."""
    if not (folder / STATE).is_file():
        return f"there is no {STATE} in {folder}"
    try:
        manifest = json.loads((folder / STATE).read_bytes())
    except ValueError:
        return f"{STATE} is not JSON"
    if not isinstance(manifest, dict) or manifest.pop("crc32", None) != _manifest_checksum(manifest):
        return f"{STATE} does not have the content that was written"
    for name, facts in manifest["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != facts["bytes"]:
            return f"{name} has {size} bytes, and {facts['bytes']} were written"
    return None


def _damage(folder: Path, fault: str) -> str:
    others = [other for other in _steps(folder.parent) if checkpoint_folder(folder.parent, other) != folder]
    complete = [other for other in others if _fault(checkpoint_folder(folder.parent, other)) is None]
    remedy = (
        f"move it away to go on from {checkpoint_folder(folder.parent, complete[-1])}"
        if complete
        else "there is no other complete checkpoint beside it; restore it from a copy"
    )
    return f"checkpoint {folder} cannot be used: {fault}; {remedy}"


def _write_failure(root: Path, step: int, tensors: Mapping[str, Tensor], error: OSError) -> str:
    latest = latest_checkpoint(root)
    still = f"{latest} is complete and still the latest" if latest else "there was no checkpoint before it"
    needed = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    free = shutil.disk_usage(root).free / 2**20
    return (
        f"the checkpoint of step {step} could not be written below {root}: {error.strerror or error} (it takes "
        f"{needed:,.0f} MiB, {free:,.0f} MiB are free); {still}. Make room or lower checkpoint.keep, and start again"
    )


def _require_same(folder: Path, metadata: Metadata, into: Mapping[str, Tensor], prefix: str) -> None:
    saved = {name: facts for name, facts in metadata.state_dict_metadata.items() if name.startswith(prefix)}
    faults = [f"{name} is missing in the checkpoint" for name in into if name not in saved]
    faults += [f"{name} is in the checkpoint alone" for name in saved if name not in into]
    for name in into.keys() & saved.keys():
        there, here = saved[name], into[name]
        assert isinstance(there, TensorStorageMetadata)
        if there.size != here.shape or there.properties.dtype != here.dtype:
            faults.append(
                f"{name} is {there.properties.dtype} {list(there.size)} in the checkpoint, "
                f"{here.dtype} {list(here.shape)} here"
            )
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            f"checkpoint {folder} does not fit this model and optimizer: {'; '.join(faults[:8])}{more}. "
            "Resume with the model, model.freeze, optim and precision it was written with"
        )


def _checksum(file: Path) -> str:
    checksum = 0
    with file.open("rb") as stream:
        while piece := stream.read(2**24):
            checksum = zlib.crc32(piece, checksum)
    return f"{checksum:08x}"


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def _hidden(folder: Path, stage: str) -> Path:
    """Where a checkpoint lies while it is writing, replaced or deleting; `recover` knows what each needs."""
    return folder.with_name(f".{folder.name}.{stage}")


def _delete(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
