"""Checkpoints come back to the bit, survive a writer's death at any call, say what is damaged, and run nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import pickle
import random
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.nn import Parameter
from workshop import COMMANDS

from burnish.train import checkpoint
from burnish.train.checkpoint import (
    CheckpointError,
    SavedTensors,
    checkpoint_folder,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    recover,
    retain,
    save_checkpoint,
    verify_checkpoint,
)
from burnish.train.dcp_metadata import parse
from burnish.types import UserError


def make_tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "model.layers.0.weight": torch.full((30, 20), value),
        "model.norm.weight": torch.full((20,), value, dtype=torch.bfloat16),
        "optim.exp_avg.model.norm.weight": torch.full((7,), value, dtype=torch.float64),
        "optim.exp_avg.codes": torch.full((2, 256), int(value), dtype=torch.uint8),
        "optim.int8": torch.full((5,), int(value), dtype=torch.int8),
        "optim.step": torch.tensor(value),
        "rng.cpu": torch.full((16,), int(value), dtype=torch.uint8),
        "empty": torch.empty(0, 4),
    }


def load_value(folder: Path) -> float:
    """The value of `make_tensors` that a checkpoint was made with, all tensors agreeing."""
    tensors = make_tensors(0.0)
    state = load_checkpoint(folder, tensors)
    values = {float(value) for tensor in tensors.values() for value in tensor.flatten()}
    assert values == {state["value"]}
    return state["value"]


def save(root: Path, step: int, value: float | None = None) -> Path:
    value = float(step) if value is None else value
    return save_checkpoint(root, step, make_tensors(value), {"value": value})


# Round trip


def test_every_type_comes_back_to_the_bit(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    saved = {
        "bf16": torch.randn(3, 5, generator=generator).bfloat16(),
        "fp32": torch.randn(3, 5, generator=generator),
        "fp64": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "uint8": torch.randint(0, 256, (300,), generator=generator, dtype=torch.uint8),
        "int8": torch.randint(-128, 128, (300,), generator=generator, dtype=torch.int8),
        "int64": torch.tensor(2**62 + 1),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(math.pi),
        "nan": torch.tensor([math.nan, math.inf, -0.0]),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "view": torch.arange(100.0)[10:13],
        "parameter": Parameter(torch.ones(4)),
    }
    state = {"cursor": {"epoch": 1, "at": [3, 2**53]}, "loss": 0.1 + 0.2, "name": "é\n", "none": None}
    folder = save_checkpoint(tmp_path / "checkpoints", 100, saved, state)
    assert folder == tmp_path / "checkpoints" / "iter_0000100"
    assert (folder.parent / "latest_checkpointed_iteration.txt").read_text() == "100"

    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    places = {name: tensor.data_ptr() for name, tensor in loaded.items()}
    assert load_checkpoint(folder, loaded) == state == read_state(folder)
    for name, tensor in saved.items():
        assert loaded[name].data_ptr() == places[name]
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_saving_and_loading_warn_of_nothing(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_value(save(tmp_path, 1))


def test_metadata_does_not_say_where_it_was_written(tmp_path: Path):
    assert str(tmp_path).encode() not in (save(tmp_path, 1) / ".metadata").read_bytes()


def test_one_tensor_under_two_names_is_refused(tmp_path: Path):
    weight = torch.ones(3)
    with pytest.raises(AssertionError, match="head and embed are one tensor"):
        save_checkpoint(tmp_path, 1, {"head": weight, "embed": weight[:2]}, {})


def test_state_that_is_no_json_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, make_tensors(), {"path": tmp_path})
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path: Path):
    folder = save(tmp_path, 1, 7.0)
    into = make_tensors(0.0)
    del into["optim.int8"]
    into["extra"] = torch.zeros(2)
    into["optim.step"] = torch.zeros(1)
    into["model.norm.weight"] = torch.zeros(20)
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder, into)
    for part in (
        "extra is missing in the checkpoint",
        "optim.int8 is in the checkpoint alone",
        "optim.step is torch.float32 [] in the checkpoint, torch.float32 [1] here",
        "model.norm.weight is torch.bfloat16 [20] in the checkpoint, torch.float32 [20] here",
    ):
        assert part in str(caught.value)
    assert not any(bool(tensor.any()) for tensor in into.values())


# The latest, and those before it


def test_a_new_run_has_no_latest_checkpoint(tmp_path: Path):
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_the_tracker_decides_even_when_a_later_step_lies_there(tmp_path: Path):
    save(tmp_path, 3)
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 2)


@pytest.mark.parametrize(
    "damage", ["gone", "file gone", "cut", "no state", "torn state", "tracker gone", "tracker torn"]
)
def test_without_what_the_tracker_names_the_newest_complete_one_is_taken_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
):
    for step in (1, 2, 3):
        folder = save(tmp_path, step)
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "file gone":
        (folder / ".metadata").unlink()
    elif damage == "cut":
        os.truncate(folder / "__0_0.distcp", 100)
    elif damage == "no state":
        (folder / "state.json").unlink()
    elif damage == "torn state":
        (folder / "state.json").write_text((folder / "state.json").read_text().replace('"value": 3', '"value": 4'))
    elif damage == "tracker gone":
        (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    else:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    expected = 3 if damage.startswith("tracker") else 2
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, expected)
    assert f"going on from {checkpoint_folder(tmp_path, expected)}" in caplog.text


def test_a_reader_looks_again_where_the_run_saved_meanwhile(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save(tmp_path, 1)

    def verify(folder: Path) -> None:
        if folder == checkpoint_folder(tmp_path, 1):
            save(tmp_path, 2)
            retain(tmp_path, 1)
        verify_checkpoint(folder)

    assert find_checkpoint(tmp_path, verify=verify) == checkpoint_folder(tmp_path, 2)
    assert not caplog.text


def test_a_run_does_not_start_anew_because_its_only_checkpoint_is_damaged(tmp_path: Path):
    (save(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(UserError, match=r"names step 1.*no state.json.*delete .* to start anew"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_flipped_bit_is_found_before_anything_is_loaded(tmp_path: Path, name: str):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    into = make_tensors(0.0)
    with pytest.raises(
        CheckpointError, match=rf"{name} does not have the content .* checkpoint.step=1 to go on from .*iter_0000001"
    ):
        load_checkpoint(folder, into)
    assert not any(bool(tensor.any()) for tensor in into.values())


def test_an_old_step_that_cannot_be_deleted_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """As a shared disk refuses while somebody has a file open."""
    delete = shutil.rmtree

    def refuse(path: Path) -> None:
        if "0000001" in path.name:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        delete(path)

    save(tmp_path, 1)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(shutil, "rmtree", refuse)
        for step in (2, 3):
            save_checkpoint(tmp_path, step, make_tensors(float(step)), {}, keep=1)
    assert "cannot be deleted now, and is left for the next save: Directory not empty" in caplog.text
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 3)
    save_checkpoint(tmp_path, 4, make_tensors(4.0), {}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000004", "latest_checkpointed_iteration.txt"]


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_said(tmp_path: Path):
    saved = SavedTensors(save(tmp_path, 1))
    shutil.rmtree(checkpoint_folder(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"distcp is gone: a run that saves there may have deleted it"):
        _ = saved[next(iter(saved))]


def test_retention_keeps_the_newest_the_protected_and_what_lies_beyond_the_latest(tmp_path: Path):
    for step in (9, 1, 2, 3, 4, 5):
        save(tmp_path, step)
    retain(tmp_path, None)
    assert len(list(tmp_path.glob("iter_*"))) == 6
    retain(tmp_path, 2, {1})
    assert sorted(int(folder.name[5:]) for folder in tmp_path.glob("iter_*")) == [1, 4, 5, 9]
    assert load_value(checkpoint_folder(tmp_path, 5)) == 5
    retain(tmp_path / "none", 2)


# Death and full disks


class Killed(BaseException):
    """The process ends here: nothing of ours may catch it."""


def fail_at(monkeypatch: pytest.MonkeyPatch, count: int, make_error: Callable[[], BaseException]) -> list[str]:
    """Raise at call number `count`, from 0, of those that change the disk for good; return the list of them."""
    calls: list[str] = []
    for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (shutil, "rmtree")):
        original = getattr(module, name)

        def failing(*arguments: Any, original: Callable[..., Any] = original, **options: Any) -> Any:
            calls.append(original.__name__)
            if len(calls) == count + 1:
                raise make_error()
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, failing)
    return calls


@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "adding"])
def test_death_at_any_call_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, step: int):
    survivors = set()
    for count in range(100):
        root = tmp_path / str(count)
        save(root, 1, 10.0)
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = fail_at(monkeypatch, count, Killed)
            with contextlib.suppress(Killed):
                save(root, step, 20.0)
        if len(calls) <= count:
            break
        recover(root)
        assert not list(root.glob(".iter_*"))
        latest = latest_checkpoint(root)
        assert latest is not None
        survivors.add(load_value(latest))
        assert load_value(save(root, step, 30.0)) == 30.0
    assert count > 8
    assert survivors == {10.0, 20.0}


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_of_the_disk_at_any_call_is_told_and_leaves_a_checkpoint(tmp_path: Path):
    for count in range(1, 100):  # 0 is a mkdir of what exists
        root = tmp_path / str(count)
        save(root, 1)
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = fail_at(monkeypatch, count, no_space)
            try:
                save(root, 2)
            except CheckpointError as error:
                message = str(error)
        if len(calls) <= count:
            break
        latest = latest_checkpoint(root)
        assert latest is not None
        assert load_value(latest) in (1.0, 2.0)
        assert f"{latest} is complete and still the latest" in message
        assert "No space left on device" in message
        assert "step 2" in message
        assert not list(root.glob(".iter_*"))
    assert count > 8


def test_a_disk_that_takes_no_more_bytes_is_told(tmp_path: Path):
    """A real short write, below Python: torch's zip writer makes a RuntimeError of it."""
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = make_tensors() | {"large": torch.zeros(100_000)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .*: File too large .*iter_0000001"):
            save_checkpoint(tmp_path, 2, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["iter_0000001"]
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)


def save_forever(root: Path, step: int) -> None:
    torch.set_num_threads(1)
    while True:
        step += 1
        save(root, step, float(step % 100))
        retain(root, 2)


def test_kill_9_of_a_writer_leaves_a_checkpoint(tmp_path: Path):
    steps, delays = [0], random.Random(0)
    save(tmp_path, 0)
    for _ in range(12):
        writer = COMMANDS.Process(target=save_forever, args=(tmp_path, steps[-1]))
        writer.start()
        deadline = time.monotonic() + 60
        while latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, steps[-1]):
            assert time.monotonic() < deadline, "the writer saves nothing"
            time.sleep(0.01)
        time.sleep(delays.uniform(0, 0.2))
        writer.kill()
        writer.join()
        recover(tmp_path)
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        steps.append(int(latest.name[5:]))
        assert load_value(latest) == steps[-1] % 100
    assert steps == sorted(set(steps))


def test_leftovers_are_named_and_gone_at_the_next_save(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save(tmp_path, 1)
    shutil.copytree(checkpoint_folder(tmp_path, 1), tmp_path / ".iter_0000002.writing")
    shutil.copytree(checkpoint_folder(tmp_path, 1), tmp_path / ".iter_0000000.deleting")
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 3)
    assert "iter_0000002: cut off while it was written, and removed" in caplog.text
    assert not list(tmp_path.glob(".iter_*"))


def test_looking_for_the_latest_disturbs_no_writer(tmp_path: Path):
    save(tmp_path, 1)
    hidden = tmp_path / ".iter_0000002.writing"
    hidden.mkdir()
    latest_checkpoint(tmp_path)
    assert hidden.exists()


# Pickles that mean harm


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


DCP = "torch.distributed.checkpoint.metadata"


def by_name(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls a global by its name, dotted names and all, as a compiler would not write it."""
    texts = b"".join(pickle.BINUNICODE + len(text).to_bytes(4, "little") + text.encode() for text in arguments)
    named = b"".join(
        pickle.SHORT_BINUNICODE + len(text).to_bytes(1, "little") + text.encode() for text in (module, name)
    )
    return b"\x80\x04" + named + pickle.STACK_GLOBAL + b"(" + texts + b"tR."


def build_on(module: str, name: str, state: bytes) -> bytes:
    """A pickle that sets attributes of a global itself, not of an instance."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + state + b"b."


SLOT_STATE = b"N}X\x04\x00\x00\x00evilK\x01s\x86"
DICT_STATE = b"}X\x05\x00\x00\x00cacheX\x04\x00\x00\x00evils"


def forged(target: Path) -> dict[str, bytes]:
    touch = f"touch {target}"
    return {
        "os.system": pickle.dumps(Call(os.system, touch)),
        "nested in metadata": pickle.dumps(Metadata({"x": Call(os.system, touch)})),  # pyright: ignore
        "in planner data": pickle.dumps(Metadata({}, planner_data=Call(os.system, touch), storage_data={})),
        "in storage meta": pickle.dumps(
            Metadata({}, storage_data={}, storage_meta=StorageMeta(Call(os.system, touch)))  # pyright: ignore
        ),
        "eval": pickle.dumps(Call(eval, f"open({str(target)!r}, 'w')")),
        "exec": pickle.dumps(Call(exec, f"open({str(target)!r}, 'w')")),
        "getattr of os": pickle.dumps(Call(getattr, Call(__import__, "os"), "system")),
        "getattr by name": by_name("builtins", "getattr", DCP, "__init__"),
        "getattr of a record": pickle.dumps(Call(getattr, Metadata, "__init__")),
        "import": by_name("builtins", "__import__", "os"),
        "dotted": by_name(DCP, "Metadata.__init__.__globals__"),
        "module of a module": by_name("torch.distributed.checkpoint.filesystem", "os.system", touch),
        "torch.hub": by_name("torch.hub", "load", "x"),
        "torch.load": by_name("torch", "load", str(target)),
        "torch internals": by_name("torch._utils", "_rebuild_tensor_v2"),
        "torch._C": by_name("torch._C", "_rename_privateuse1_backend", "evil"),
        "attribute of a class": build_on(DCP, "Metadata", SLOT_STATE),
        "attribute of a class with __setstate__": build_on(DCP, "TensorProperties", SLOT_STATE),
        "attribute of a function": build_on("torch.serialization", "_get_layout", DICT_STATE),
        "attribute of a dtype": build_on("torch", "float32", SLOT_STATE),
        "attribute of a type of torch": build_on("torch", "Size", SLOT_STATE),
        "persistent id": b"\x80\x04X\x01\x00\x00\x00xQ.",
        "extension code": b"\x80\x04\x82\x01.",
        "DCP bytes": pickle.dumps(Metadata({"x": BytesStorageMetadata()}, storage_data={})),
        "no metadata": pickle.dumps({"a": 1}),
        "bare record": pickle.dumps(Metadata({}, storage_data={}))[:-40] + b".",
        "wrong tensor": pickle.dumps(Metadata({"x": 3}, storage_data={})),  # pyright: ignore
        "wrong key": pickle.dumps(Metadata({}, storage_data={3: 4})),
        "no storage": pickle.dumps(Metadata({})),
        "empty": b"",
        "no pickle": b"\x00\xff",
        "deep": b"\x80\x04" + b"(" * 10_000 + b"t" * 10_000 + b".",
    }


@pytest.mark.parametrize("kind", list(forged(Path())))
def test_a_forged_metadata_runs_nothing_and_is_refused(tmp_path: Path, kind: str):
    target = tmp_path / "harm"
    with pytest.raises(ValueError, match=r".+"):
        parse(forged(target)[kind], {"__0_0.distcp"})
    assert not target.exists()
    assert not hasattr(Metadata, "evil")
    assert not hasattr(torch.Size, "evil")
    assert torch.serialization._get_layout("torch.strided") is torch.strided


def put(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and make all checksums agree, as a forger would."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "state.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "crc32": checkpoint._checksum(folder / name)}
    del manifest["crc32"]
    manifest["crc32"] = checkpoint._manifest_checksum(manifest)
    (folder / "state.json").write_text(json.dumps(manifest))


def test_loading_a_forged_checkpoint_is_a_users_error(tmp_path: Path):
    folder, target = save(tmp_path, 1), tmp_path / "harm"
    put(folder, ".metadata", pickle.dumps(Call(os.system, f"touch {target}")))
    with pytest.raises(UserError, match=r"\.metadata is not what a checkpoint holds: .*posix.system"):
        load_checkpoint(folder, make_tensors())
    assert not target.exists()


def test_tensors_outside_the_checkpoint_are_not_read(tmp_path: Path):
    folder = save(tmp_path, 1)
    content = (folder / ".metadata").read_bytes().replace(b"__0_0.distcp", b"/etc/passwd\x00")
    put(folder, ".metadata", content)
    with pytest.raises(UserError, match="which is no file of the checkpoint"):
        load_checkpoint(folder, make_tensors())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_holds_no_tensors_runs_nothing(tmp_path: Path):
    folder, target = save_checkpoint(tmp_path, 1, {"x": torch.zeros(3)}, {}), tmp_path / "harm"
    size = (folder / "__0_0.distcp").stat().st_size
    content = pickle.dumps(Call(os.system, f"touch {target}"))
    put(folder, "__0_0.distcp", content + b"\x00" * (size - len(content)))
    with pytest.raises(UserError, match="something other than tensors"):
        load_checkpoint(folder, {"x": torch.zeros(3)})
    assert not target.exists()


def test_metadata_of_a_python_that_pickles_enums_by_getattr_is_read(tmp_path: Path):
    """Debian 12's Python 3.11.2 writes getattr(_MEM_FORMAT_ENCODING, name) where others write a call with a number."""
    folder = save(tmp_path, 1, 5.0)
    pickled = (folder / ".metadata").read_bytes()
    encoding = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(encoding, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
        rewritten = pickle.dumps(pickle.loads(pickled))
    assert b"getattr" in rewritten
    put(folder, ".metadata", rewritten)
    assert load_value(folder) == 5.0
