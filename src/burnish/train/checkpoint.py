"""Checkpoints: one folder a step, complete or not there at all. Tensors through DCP, our own state as JSON.

    ROOT/iter_0000100/{*.distcp, .metadata, state.json}   100 steps finished; a .distcp file for each rank that wrote
    ROOT/latest_checkpointed_iteration.txt                 "100", written last

A checkpoint is written into a hidden folder beside it, synced and renamed, so that a writer may die or the disk fill up
at any moment. What it holds says nothing of the layout it was written under. What belongs into a checkpoint, and when
to write one, is decided elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from burnish.files import sync, write_whole
from burnish.parallel.mesh import world_timeout
from burnish.train.dcp_metadata import InertReader, parse
from burnish.train.dcp_write import HostCopies, Piece, pieces, write_pieces
from burnish.train.states import Coded, local_part
from burnish.train.together import Together
from burnish.types import UserError

TRACKER = "latest_checkpointed_iteration.txt"
STATE = "state.json"
METADATA = ".metadata"

OF_A_RANK = "rng."
"""What names of tensors begin with that are a rank's own: each rank takes its own where they are saved."""

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that could not be written, or cannot be read as what it should be."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was written: `fault` says how, without what to do about it."""

    fault: str = ""


def checkpoint_folder(root: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` finished steps lies below `root`, whether or not it exists."""
    return Path(root) / f"iter_{step:07d}"


def name_of_rank(name: str, rank: int) -> str:
    """The name of a tensor that each rank has one of, such as `rng.cpu`: rank 0's is the name itself."""
    return name if rank == 0 else f"{name}.{rank}"


def save_checkpoint(
    root: str | Path,
    step: int,
    tensors: Mapping[str, Tensor | Coded],
    state: Mapping[str, Any],
    *,
    keep: int | None = None,
    protect: Set[int] = frozenset(),
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint of `step` below `root`, in place of one that is there, and make it the latest.

    Called by all ranks of `group`, by default of the default process group where there is one, with any tensors of
    theirs: DTensors of any layout; plain tensors, of which those of one name are alike on all ranks that have it and
    are written once. Tensors of one rank share no memory. `state` is JSON, and rank 0's is written. Afterwards `retain`
    deletes what `keep` and `protect` leave out.

    On return everything is on the disk. All ranks raise CheckpointError where one cannot write, on a full disk for
    instance; what was there is then still valid.
    """
    ranks = Together(group)
    return _save(ranks, Path(root), step, _prepared(ranks, tensors, state, pieces), keep, protect)


class Checkpointer:
    """Writes checkpoints behind training, which waits for a copy alone. All ranks make it together, and use it alike.

    The copies take as much host memory as what is saved, kept from `prepare` or the first save on; moments in int8 take
    the four bytes a value that a checkpoint holds of them. A process that ends by itself finishes the save it is at.
    """

    def __init__(self) -> None:
        # A group of its own, because its thread must not come between the collectives of training.
        group = dist.new_group(backend="gloo", timeout=world_timeout()) if dist.is_initialized() else None
        self._ranks = Together(group)  # pyright: ignore[reportArgumentType] - this rank is in the group
        self._copies = HostCopies()
        self._pending: Future[Path] | None = None

    def prepare(self, tensors: Mapping[str, Tensor | Coded]) -> None:
        """Have the copies of what will be saved allocated, so that the first save stands still no longer than others.

        It takes as long as a first copy: call it where nothing waits, before the first step.
        """
        self._copies.take(tensors)

    def save(
        self,
        root: str | Path,
        step: int,
        tensors: Mapping[str, Tensor | Coded],
        state: Mapping[str, Any],
        *,
        keep: int | None = None,
        protect: Set[int] = frozenset(),
    ) -> None:
        """As `save_checkpoint`, but return once the tensors are copied, and raise what the save before came to.

        That one is waited for first.
        """
        self.wait()
        prepared = _prepared(self._ranks, tensors, state, self._copies.take)
        self._pending = pending = Future()

        def write() -> None:
            try:
                pending.set_result(_save(self._ranks, Path(root), step, prepared, keep, protect))
            except BaseException as error:
                pending.set_exception(error)

        threading.Thread(target=write, name=f"checkpoint of step {step}").start()

    def wait(self) -> None:
        """Return when the last save is on the disk. Raises CheckpointError where it could not be written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def load_checkpoint(
    folder: str | Path,
    into: Mapping[str, Tensor | Coded],
    prefix: str = "",
    *,
    verified: bool = False,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fill the tensors of `into` from a checkpoint and return the state that was saved with it.

    Called by all ranks of `group`, by default of the default process group where there is one, each with what it holds,
    whatever layout and number of ranks the checkpoint was written under; a rank reads the files its parts lie in.
    What begins with OF_A_RANK is filled where it is saved under its name and in its shape, and left as it is where it
    is not: of a run on fewer ranks the further ranks keep their own, and of one on more the rest is left unread.

    `verify_checkpoint` comes first, unless `verified`. Raises CheckpointError on all ranks, and fills nothing, for
    damage, and where the names that ranks ask for, their shapes and types are not exactly those of the checkpoint; what
    does not begin with `prefix` is left unread. Checkpoints of version 1 are read on one process.
    """
    folder, ranks = Path(folder), Together(group)
    if not verified:
        verify_checkpoint(folder, group=group)
    contents: list[tuple[dict[str, Any], Metadata]] = []
    ranks.each(lambda: contents.append(_read_contents(folder)))
    manifest, metadata = contents[0]
    wanted, take = (_wanted_of_version_1 if manifest["version"] == 1 else _wanted)(into)
    lacking = [name for name in wanted if name.startswith(OF_A_RANK) and _difference(metadata, name, wanted[name])]
    wanted = {name: tensor for name, tensor in wanted.items() if name not in lacking}
    _require_same(ranks, folder, metadata, wanted, prefix)
    ranks.each(lambda: _read_tensors(folder, metadata, wanted))
    take()
    return manifest["state"]


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, whatever layout wrote it: each is read when it is asked for, and whole.

    `state` is what was saved with them. Its files are taken for whole: `verify_checkpoint` comes before. Of a
    checkpoint of version 1 the weights are as they are now.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        manifest, self._metadata = _read_contents(folder)
        self.state: dict[str, Any] = manifest["state"]

    def __getitem__(self, name: str) -> Tensor:
        stored = self._metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        _read_tensors(self._folder, self._metadata, {name: tensor})
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._metadata.state_dict_metadata)

    def __len__(self) -> int:
        return len(self._metadata.state_dict_metadata)

    def __contains__(self, name: object) -> bool:
        return name in self._metadata.state_dict_metadata


def verify_checkpoint(folder: str | Path, *, group: dist.ProcessGroup | None = None) -> None:
    """Compare every file of a checkpoint with its checksum, each by one rank of those that `load_checkpoint` names.

    Raises DamagedCheckpoint on all of them where one differs.
    """
    folder, ranks = Path(folder), Together(group)

    def verify_share() -> None:
        files = _read_manifest(folder)["files"]
        by_size = sorted(files, key=lambda name: (files[name]["bytes"], name))
        for name in by_size[ranks.rank :: ranks.count]:
            try:
                checksum = _checksum(folder / name)
            except FileNotFoundError:
                raise damaged(folder, f"{name} is missing") from None
            if checksum != files[name]["crc32"]:
                raise damaged(folder, f"{name} does not have the content that was written")

    ranks.each(verify_share)


def fault_of(folder: str | Path, *, group: dist.ProcessGroup | None = None) -> str | None:
    """What `verify_checkpoint` finds wrong, on all ranks; None where nothing is."""
    try:
        verify_checkpoint(folder, group=group)
    except DamagedCheckpoint as error:
        return error.fault
    return None


def damaged(folder: Path, fault: str) -> DamagedCheckpoint:
    """The error that says of a checkpoint that `fault` is wrong with it, and which other there is."""
    others = [other for other in _steps(folder.parent) if checkpoint_folder(folder.parent, other) != folder]
    complete = [other for other in others if _fault(checkpoint_folder(folder.parent, other)) is None]
    remedy = (
        f"set checkpoint.step={complete[-1]} to go on from {checkpoint_folder(folder.parent, complete[-1])}"
        if complete
        else "there is no other complete checkpoint beside it; restore it from a copy"
    )
    error = DamagedCheckpoint(f"checkpoint {folder} cannot be used: {fault}; {remedy}")
    error.fault = fault
    return error


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


def find_checkpoint(
    root: str | Path, step: int | None = None, verify: Callable[[Path], object] = verify_checkpoint
) -> Path | None:
    """The checkpoint to go on from: that of `step`, or the latest that `verify` finds whole; None without any.

    For `step` None a damaged one is passed over for the one before it, which is logged; it stays where it is until its
    step is saved again. Raises CheckpointError where the one of `step` is damaged or missing, and where there are
    checkpoints but none is whole.
    """
    root = Path(root)
    if step is not None:
        folder = checkpoint_folder(root, step)
        if step not in _steps(root):
            there = ", ".join(str(other) for other in _steps(root)) or "none"
            raise CheckpointError(f"there is no checkpoint of step {step} below {root}; there are: {there}")
        verify(folder)
        return folder

    def newest_whole(damage: list[str]) -> int | None:
        for candidate in _candidates(root, damage):
            try:
                verify(checkpoint_folder(root, candidate))
                return candidate
            except DamagedCheckpoint as error:
                damage.append(f"checkpoint {checkpoint_folder(root, candidate)} cannot be used: {error.fault}")
        return None

    found = _search(root, newest_whole)
    return None if found is None else checkpoint_folder(root, found)


def retain(root: str | Path, keep: int | None, protect: Set[int] = frozenset()) -> None:
    """Delete all checkpoints but the `keep` newest up to the latest, that one included, and those of `protect`.

    Does nothing for `keep` None. Checkpoints beyond the latest, left by a run that was set back, stay until they are
    written again. For the one who writes there alone; `save_checkpoint` and `Checkpointer` call it.
    """
    latest = _latest_step(Path(root))
    if keep is None or latest is None:
        return
    up_to_latest = [step for step in _steps(Path(root)) if step <= latest]
    for step in up_to_latest[:-keep]:
        if step not in protect:
            folder = checkpoint_folder(root, step)
            _put_away(folder, folder)


def recover(root: str | Path) -> tuple[str, ...]:
    """Put away what a killed writer left below `root`, and say what it was. For the one who writes there alone."""
    notices = []
    for leftover in sorted(Path(root).glob(".iter_*")):
        folder, stage = leftover.with_name(leftover.stem[1:]), leftover.suffix
        if stage == ".replaced" and not folder.exists():
            os.rename(leftover, folder)
            notices.append(f"{folder}: its replacement was cut off; the checkpoint that was there is kept")
            continue
        if stage != ".writing":
            _put_away(leftover, folder)
        else:
            _delete(leftover)
            notices.append(f"{folder}: cut off while it was written, and removed; no checkpoint before it is touched")
    return tuple(notices)


def _prepared(
    ranks: Together,
    tensors: Mapping[str, Tensor | Coded],
    state: Mapping[str, Any],
    make_pieces: Callable[[Mapping[str, Tensor | Coded]], dict[str, Piece]],
) -> tuple[dict[str, Piece], dict[str, Any]]:
    """What a save writes, all ranks having got this far: pieces, and the state as it is now."""

    def prepare() -> tuple[dict[str, Piece], dict[str, Any]]:
        _assert_distinct(tensors)
        copied = json.loads(json.dumps(state))
        return make_pieces(tensors), copied

    prepared: list[tuple[dict[str, Piece], dict[str, Any]]] = []
    ranks.each(lambda: prepared.append(prepare()))
    return prepared[0]


def _save(
    ranks: Together,
    root: Path,
    step: int,
    prepared: tuple[dict[str, Piece], dict[str, Any]],
    keep: int | None,
    protect: Set[int],
) -> Path:
    own_pieces, state = prepared
    folder = checkpoint_folder(root, step)
    try:
        ranks.first(lambda: _make_room(root))
        files = write_pieces(ranks, _hidden(folder, "writing"), own_pieces)
        ranks.first(lambda: _complete(root, step, files, state, keep, protect))
    except OSError as error:
        cause = error
        needed = sum(ranks.each(lambda: _num_bytes(own_pieces)))
        message = ranks.first(lambda: _after_failure(root, step, needed, cause))
        raise CheckpointError(message) from error
    return folder


def _make_room(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for notice in recover(root):
        logger.warning(notice)


def _complete(
    root: Path, step: int, files: Mapping[str, Any], state: dict[str, Any], keep: int | None, protect: Set[int]
) -> None:
    """Make a checkpoint of what was written, and the latest."""
    folder = checkpoint_folder(root, step)
    hidden = _hidden(folder, "writing")
    manifest = {"version": 2, "step": step, "files": dict(sorted(files.items())), "state": state}
    write_whole(hidden / STATE, json.dumps({"crc32": _manifest_checksum(manifest), **manifest}, indent=1))
    if (fault := _fault(hidden)) is not None:
        raise OSError(f"{fault}; all hosts must see the same folder there")
    if folder.exists():
        os.rename(folder, _hidden(folder, "replaced"))
    os.rename(hidden, folder)
    sync(root)
    write_whole(root / TRACKER, str(step))
    _put_away(_hidden(folder, "replaced"), folder)
    retain(root, keep, protect)


def _after_failure(root: Path, step: int, needed: int, error: OSError) -> str:
    """Put away what a failed save left, and say what happened."""
    recover(root)
    return _write_failure(root, step, needed, error)


def _assert_distinct(tensors: Mapping[str, Tensor | Coded]) -> None:
    by_memory: dict[int, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Coded) and local_part(tensor).numel():
            other = by_memory.setdefault(local_part(tensor).data_ptr(), name)
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
    return _search(root, lambda damage: next(_candidates(root, damage), None))


def _search(root: Path, search: Callable[[list[str]], int | None]) -> int | None:
    """The step that `search` finds below `root`, what it passes over said; None where there is no checkpoint.

    `search` adds to the list it is given what it finds damaged. It is asked again where a run has saved meanwhile,
    and so may have deleted what was looked at.
    """
    while True:
        tracked, damage = _read_tracker(root), list[str]()
        found = search(damage)
        if not damage or _read_tracker(root) == tracked:
            break
    if found is None:
        if damage:
            raise CheckpointError(_none_left(root, damage))
        return None
    for problem in damage:
        logger.warning("%s; going on from %s", problem, checkpoint_folder(root, found))
    return found


def _candidates(root: Path, damage: list[str]) -> Iterator[int]:
    """The steps that a run may go on from, as far as sizes tell: the tracker's and those before it, newest first.

    Without a tracker, all. What is wrong with what is passed over is added to `damage`.
    """
    tracked, steps = _read_tracker(root), _steps(root)
    if tracked is None and steps:
        damage.append(f"{root / TRACKER} is missing or unreadable")
    if tracked is not None:
        steps = sorted({step for step in steps if step <= tracked} | {tracked})
    for step in reversed(steps):
        fault = _fault(checkpoint_folder(root, step))
        if fault is None:
            yield step
        elif step == tracked:
            damage.append(f"{root / TRACKER} names step {step}, whose checkpoint cannot be used: {fault}")


def _none_left(root: Path, damage: list[str]) -> str:
    tracked = _read_tracker(root)
    beyond = [step for step in _steps(root) if tracked is not None and step > tracked]
    other = f", set checkpoint.step={beyond[-1]} for one of a run before" if beyond else ""
    return f"{'; '.join(damage)}; no other is complete. Restore one{other}, or delete {root} to start anew"


def _read_contents(folder: Path) -> tuple[dict[str, Any], Metadata]:
    manifest = _read_manifest(folder)
    try:
        return manifest, parse((folder / METADATA).read_bytes(), manifest["files"].keys())
    except FileNotFoundError:
        raise damaged(folder, f"{METADATA} is missing") from None
    except ValueError as error:
        raise damaged(folder, f"{METADATA} is not what a checkpoint holds: {error}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The content of state.json, all files present and of their sizes. Raises DamagedCheckpoint."""
    manifest, fault = _examine(folder)
    if fault is not None:
        raise damaged(folder, fault)
    return manifest


def _fault(folder: Path) -> str | None:
    """Why `folder` is no complete checkpoint; None where it is one, as far as sizes tell."""
    return _examine(folder)[1]


def _examine(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The content of state.json, and what is wrong with the checkpoint. A run may delete it meanwhile."""
    try:
        manifest = json.loads((folder / STATE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}, f"there is no {STATE} in {folder}"
    except ValueError:
        return {}, f"{STATE} is not JSON"
    if not isinstance(manifest, dict) or manifest.pop("crc32", None) != _manifest_checksum(manifest):
        return {}, f"{STATE} does not have the content that was written"
    for name, facts in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            return {}, f"{name} is missing"
        if size != facts["bytes"]:
            return {}, f"{name} has {size} bytes, and {facts['bytes']} were written"
    return manifest, None


def _num_bytes(own_pieces: Mapping[str, Piece]) -> int:
    return sum(piece.values.nbytes for piece in own_pieces.values())


def _write_failure(root: Path, step: int, needed: int, error: OSError) -> str:
    latest = latest_checkpoint(root)
    still = f"{latest} is complete and still the latest" if latest else "there was no checkpoint before it"
    where = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    free = shutil.disk_usage(root).free / 2**20
    size = f"{needed / 2**20:,.0f}" if needed >= 2**20 else "under 1"
    return (
        f"the checkpoint of step {step} could not be written below {root}{where}: {error.strerror or error} (it takes "
        f"{size} MiB, {free:,.0f} MiB are free); {still}. Make room or lower checkpoint.keep, and start "
        "again"
    )


def _wanted(into: Mapping[str, Tensor | Coded]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The tensors that a checkpoint fills for `into`, and what is to be done then."""
    wanted = {name: tensor.empty() if isinstance(tensor, Coded) else tensor.detach() for name, tensor in into.items()}

    def take() -> None:
        for name, tensor in into.items():
            if isinstance(tensor, Coded):
                tensor.take(wanted[name])

    return wanted, take


def _wanted_of_version_1(into: Mapping[str, Tensor | Coded]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The same for one process's checkpoints of earlier versions, with codes as they lie and one tensor of counters."""
    counters = [
        tensor for name, tensor in into.items() if name.startswith("optim.step.") and isinstance(tensor, Tensor)
    ]
    steps_P = torch.zeros(len(counters))
    wanted = {"optim.step": steps_P} if counters else {}
    for name, tensor in into.items():
        if isinstance(tensor, Coded):
            wanted[name.removesuffix(".root") + ".codes"] = tensor.store.codes_BK
            wanted[name.removesuffix(".root") + ".scales"] = tensor.store.scales_B
        elif not name.startswith("optim.step."):
            wanted[name] = tensor.detach()

    def take() -> None:
        for counter, step in zip(counters, steps_P, strict=True):
            counter.copy_(step)

    return wanted, take


def _read_tensors(folder: Path, metadata: Metadata, into: dict[str, Tensor]) -> None:
    # Names are flat already; DCP's own flattening would only add to the metadata. Ranks read without regard to others.
    planner, reader = DefaultLoadPlanner(flatten_state_dict=False), InertReader(folder, metadata)
    planner.set_up_planner(into, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    try:
        reader.read_data(planner.create_local_plan(), planner).wait()
    except FileNotFoundError as error:
        raise damaged(folder, f"{error.filename} is gone: a run that saves there may have deleted it") from None
    except pickle.UnpicklingError as error:
        raise damaged(folder, f"it holds something other than tensors: {error}") from error


def _difference(metadata: Metadata, name: str, here: Tensor) -> str | None:
    """What keeps `here` from being filled, if anything does."""
    there = metadata.state_dict_metadata.get(name)
    if there is None:
        return f"{name} is missing in the checkpoint"
    assert isinstance(there, TensorStorageMetadata)
    if there.size == here.shape and there.properties.dtype == here.dtype:
        return None
    return (
        f"{name} is {there.properties.dtype} {list(there.size)} in the checkpoint, {here.dtype} {list(here.shape)} here"
    )


def _require_same(ranks: Together, folder: Path, metadata: Metadata, wanted: Mapping[str, Tensor], prefix: str) -> None:
    def compare() -> tuple[Set[str], list[str]]:
        differences = (_difference(metadata, name, tensor) for name, tensor in wanted.items())
        return set(wanted), [difference for difference in differences if difference]

    compared = ranks.each(compare)
    asked = {name for names, _ in compared for name in names}
    faults = list(dict.fromkeys(fault for _, faults in compared for fault in faults))
    faults += [
        f"{name} is in the checkpoint alone"
        for name in metadata.state_dict_metadata
        if name.startswith(prefix) and not name.startswith(OF_A_RANK) and name not in asked
    ]
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


def _put_away(path: Path, folder: Path) -> None:
    """Delete `path`, which was the checkpoint `folder` once. A shared disk may refuse while somebody reads it: then the
    next save tries again."""
    hidden = _hidden(folder, "deleting")  # of which nothing is put back
    try:
        if path.exists():
            os.rename(path, hidden)
        _delete(hidden)
    except OSError as error:
        logger.warning("%s cannot be deleted now, and is left for the next save: %s", path, error.strerror or error)


def _delete(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
