"""Checkpoints of many ranks: alike under every layout, written behind training, and never half there."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from workshop import COMMANDS

from burnish.config import OptimConfig
from burnish.train import checkpoint
from burnish.train.checkpoint import (
    Checkpointer,
    CheckpointError,
    DamagedCheckpoint,
    checkpoint_folder,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    name_of_rank,
    recover,
    save_checkpoint,
    verify_checkpoint,
)
from burnish.train.dcp_write import SummingWriter
from burnish.train.optim import Optimizer, build_optimizer
from burnish.train.states import Coded, like, local_part, place

# Layouts


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 6, 5))


class Model(nn.Module):
    """Large enough for int8, uneven, with fewer rows than ranks, without dimensions to spare, and of another type."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 72, bias=False)
        self.down = nn.Linear(72, 64)
        self.uneven = nn.Linear(5, 7, bias=False)
        self.short = nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
        self.experts = Experts()
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


LAYOUTS = {"fsdp": 4, "fsdp of 2": 2, "tp x fsdp": 4, "hsdp": 4, "pp x fsdp": 4, "one rank": 1}
"""Ranks by layout."""


def make_parameters(layout: str) -> dict[str, nn.Parameter]:
    """The parameters that this rank holds, with the values of `Model`."""
    model = Model()
    if layout == "tp x fsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))
        experts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert_dp", "ep"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        stacked = distribute_tensor(model.experts.weight.data, experts["ep"], [Shard(0)])
        model.experts.weight = nn.Parameter(stacked)
        fully_shard(model.experts, mesh=experts["expert_dp"])
        fully_shard(model, mesh=mesh["shard"])
    elif layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "pp x fsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "shard"))
        for name in ("up", "uneven") if mesh.get_local_rank("pp") else ("down", "short", "experts"):
            setattr(model, name, None)
        fully_shard(model, mesh=mesh["shard"])
    elif layout.startswith("fsdp"):
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return dict(model.named_parameters())


def part_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """`whole` laid out as `parameter` is."""
    local = local_part(parameter)
    begin = place(parameter) or (0,) * local.dim()
    if local.numel():
        whole = whole[tuple(slice(b, b + size) for b, size in zip(begin, local.shape, strict=True))]
        return like(parameter, whole.to(local.dtype).clone())
    return like(parameter, torch.empty_like(local))


def make_optimizer(parameters: dict[str, nn.Parameter], states: Any, num_steps: int) -> Optimizer:
    """An optimizer that has taken steps with gradients that no layout has a say in."""
    optimizer = build_optimizer(parameters, OptimConfig(lr=1e-2), states, seed=3)
    shapes = {name: parameter.shape for name, parameter in Model().named_parameters()}
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        gradients = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for name, parameter in parameters.items():
            parameter.grad = part_of(gradients[name], parameter)
        optimizer.step(1e-2, torch.tensor(True))
        optimizer.zero_grad()
    return optimizer


def everything(parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor | Coded]:
    own: dict[str, Tensor | Coded] = {f"model.{name}": parameter for name, parameter in parameters.items()}
    return own | {f"optim.{name}": tensor for name, tensor in optimizer.state_tensors().items()}


def gathered(tensors: dict[str, Tensor | Coded]) -> dict[str, Tensor]:
    """Whole copies of this rank's tensors. A rank's peers must gather the same ones."""
    values = {name: t.values() if isinstance(t, Coded) else t.detach() for name, t in tensors.items()}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in values.items()}


def save_layout(layout: str, root: Path) -> dict[str, Tensor]:
    """Save a checkpoint named by the layout; returns what it must hold of this rank."""
    parameters = make_parameters(layout)
    tensors = everything(parameters, make_optimizer(parameters, "fp32", 2))
    rank = dist.get_rank()
    random = {f"rng.{kind}": torch.full((3,), rank) for kind in (name_of_rank("cpu", rank),)}
    save_checkpoint(root / layout, 1, tensors | random, {"rank": rank})
    return gathered(tensors)


def load_layouts(layout: str, root: Path) -> dict[str, tuple[Any, dict[str, Tensor], int]]:
    """What comes back of the checkpoint of every layout: state, whole tensors of this rank, and its random state."""
    results = {}
    for saved in LAYOUTS:
        parameters = make_parameters(layout)
        tensors = everything(parameters, build_optimizer(parameters, OptimConfig(lr=1e-2), "fp32", seed=3))
        for parameter in parameters.values():
            local_part(parameter).fill_(-1)
        random = torch.full((3,), -1)
        rng = name_of_rank("rng.cpu", dist.get_rank() if dist.is_initialized() else 0)
        state = load_checkpoint(root / saved / "iter_0000001", tensors | {rng: random})
        results[saved] = (state, gathered(tensors), int(random[0]))
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A root with one checkpoint for each layout, and what they must hold, all ranks together."""
    root = tmp_path_factory.mktemp("layouts")
    held = {}
    for layout, world in LAYOUTS.items():
        held[layout] = {}
        for tensors in run_ranks(world, save_layout, layout, root):
            held[layout] |= tensors
    return root, held


def test_every_layout_saves_all_of_it_once(saved: tuple[Path, dict[str, dict[str, Tensor]]]):
    root, held = saved
    names = {f"model.{name}" for name, _ in Model().named_parameters()}
    for layout, world in LAYOUTS.items():
        assert names < held[layout].keys()
        folder = root / layout / "iter_0000001"
        written = sum(file.stat().st_size for file in folder.glob("*.distcp"))
        needed = sum(tensor.nbytes for tensor in held[layout].values())
        assert len(list(folder.glob("*.distcp"))) == world
        # Two copies would be twice that; a file's frame around each piece takes some 1.5 kB.
        assert needed < written < needed + 1700 * world * (len(held[layout]) + 2)


@pytest.mark.parametrize("layout", [*LAYOUTS, None], ids=lambda layout: layout or "no group")
def test_every_layout_reads_what_any_wrote(saved: tuple[Path, dict[str, dict[str, Tensor]]], layout: str | None):
    root, held = saved
    ranks = [load_layouts("none", root)] if layout is None else run_ranks(LAYOUTS[layout], load_layouts, layout, root)
    for writer, expected in held.items():
        seen = set()
        for rank, results in enumerate(ranks):
            state, tensors, random = results[writer]
            assert state == {"rank": 0}
            assert random == (rank if rank < LAYOUTS[writer] else -1)
            seen |= tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, expected[name]), (writer, rank, name)
        assert seen == expected.keys()


# int8 and bf16


def step_and_save(layout: str, states: str, root: Path) -> dict[str, Tensor]:
    """What was saved, after the same layout resumed from it to the bit, as two more steps of both show."""
    parameters = make_parameters(layout)
    optimizer = make_optimizer(parameters, states, 3)
    held = everything(parameters, optimizer)
    save_checkpoint(root, 3, held, {})
    saved = gathered(held)

    again = make_parameters(layout)
    resumed = everything(again, resumed_optimizer := make_optimizer(again, states, 1))
    load_checkpoint(checkpoint_folder(root, 3), resumed)
    for left, right in zip(held.values(), resumed.values(), strict=True):
        if isinstance(left, Coded) and isinstance(right, Coded):
            assert torch.equal(left.store.codes_BK, right.store.codes_BK)
            assert torch.equal(left.store.scales_B, right.store.scales_B)
    for trained, taking in ((parameters, optimizer), (again, resumed_optimizer)):
        for _ in range(2):
            for parameter in trained.values():
                parameter.grad = like(parameter, local_part(parameter).clone())
            taking.step(1e-2, torch.tensor(True))
    after, resumed_after = gathered(held), gathered(resumed)
    for name in after:
        assert torch.equal(after[name], resumed_after[name]), name
    return saved


@pytest.mark.parametrize("states", ["bf16", "int8"])
@pytest.mark.parametrize("layout", ["fsdp", "tp x fsdp"])
def test_narrow_states_come_back_to_the_bit_and_go_to_other_layouts(tmp_path: Path, layout: str, states: Any):
    saved = run_ranks(4, step_and_save, layout, states, tmp_path)[0]
    parameters = make_parameters("none")
    resumed = everything(parameters, build_optimizer(parameters, OptimConfig(lr=1e-2), states, seed=3))
    load_checkpoint(checkpoint_folder(tmp_path, 3), resumed)
    kinds = {type(tensor) for tensor in resumed.values()}
    assert (Coded in kinds) == (states == "int8")
    for name, tensor in gathered(resumed).items():
        # Under another layout blocks are others: a value may move to the next level, by 1/64 of the block's largest.
        room = float(saved[name].abs().max()) / 64 if isinstance(resumed[name], Coded) else 0.0
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=room)


def rounded(layout: str) -> tuple[Any, Tensor]:
    """Where this rank's part of a tensor begins, and how a step rounded values that were all alike."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = nn.Linear(64, 8, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    if layout == "hsdp":
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(lr=1e-3, name="sgd"), "fp32", seed=0)
    model.weight.grad = like(model.weight, torch.ones_like(local_part(model.weight)))
    optimizer.step(1e-3, torch.tensor(True))
    return place(model.weight), local_part(model.weight).clone()


def test_shards_draw_noise_of_their_own_and_replicas_the_same():
    parts = run_ranks(4, rounded, "hsdp")
    assert [place for place, _ in parts] == [(), (4, 0), (), (4, 0)]
    first, second, first_again, second_again = (values for _, values in parts)
    assert len(first.unique()) == 2
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)


def fused_steps(layout: str, name: str) -> dict[str, Tensor]:
    """Weights after two steps of one of torch's own optimizers."""
    parameters = {key: p for key, p in make_parameters(layout).items() if p.dtype is torch.float32}
    optimizer = build_optimizer(parameters, OptimConfig.model_validate({"name": name, "lr": 1e-2}), "fp32", seed=0)
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = like(parameter, local_part(parameter).clone())
        optimizer.step(1e-2, torch.tensor(True))
        optimizer.step(1e-2, torch.tensor(False))
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters.values())
    return gathered(dict(parameters))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_on_shards_are_those_of_one_process(name: str):
    expected = fused_steps("none", name)
    for tensors in run_ranks(4, fused_steps, "tp x fsdp", name):
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, expected[key]), key


# Behind training


class Gate:
    """Holds back the writing of a checkpoint until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.opened, self.reached = threading.Event(), threading.Event()
        original = checkpoint.write_pieces

        def held_back(*arguments: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return original(*arguments)

        monkeypatch.setattr(checkpoint, "write_pieces", held_back)


def shards(value: float) -> dict[str, Tensor]:
    """An uneven tensor of `value` over all ranks, and one that they have alike."""
    whole = torch.full((5, 40), value)
    alike = {"alike": torch.full((9,), value)}
    if not dist.is_initialized():
        return {"weight": whole} | alike
    return {"weight": distribute_tensor(whole, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])} | alike


def value_of(folder: Path) -> float:
    into = {"weight": torch.zeros(5, 40), "alike": torch.zeros(9)}
    load_checkpoint(folder, into)
    (value,) = {float(value) for tensor in into.values() for value in tensor.flatten()}
    return value


def save_and_mutate(root: Path) -> None:
    checkpointer, tensors, state = Checkpointer(), shards(1.0), {"list": [1]}
    for step in (1, 2):
        with pytest.MonkeyPatch.context() as monkeypatch:
            gate = Gate(monkeypatch)
            checkpointer.save(root, step, tensors, state, keep=1)
            assert gate.reached.wait(60)
            assert not checkpoint_folder(root, step).exists()
            assert step == 1 or value_of_local(checkpoint_folder(root, 1)) == 1  # kept until the next is complete
            for tensor in tensors.values():
                local_part(tensor).fill_(step + 1)
            state["list"].append(step + 1)
            gate.opened.set()
            checkpointer.wait()
    checkpointer.wait()


def value_of_local(folder: Path) -> float:
    """The value on this rank alone, whose peers do something else."""
    return float(json.loads((folder / "state.json").read_text())["step"])


@pytest.mark.parametrize("world", [0, 1, 2, 4])
def test_what_is_saved_is_what_there_was_when_save_returned(tmp_path: Path, world: int):
    run_ranks(world, save_and_mutate, tmp_path) if world else save_and_mutate(tmp_path)
    assert value_of(checkpoint_folder(tmp_path, 2)) == 2.0
    assert checkpoint.read_state(checkpoint_folder(tmp_path, 2)) == {"list": [1, 2]}
    assert not checkpoint_folder(tmp_path, 1).exists()
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 2)


def test_buffers_serve_every_save_and_follow_what_is_saved(tmp_path: Path):
    checkpointer = Checkpointer()
    checkpointer.save(tmp_path, 1, {"a": torch.ones(3), "b": torch.ones(2)}, {})
    checkpointer.wait()
    before = checkpointer._copies._pieces["a"].values.data_ptr()
    checkpointer.save(tmp_path, 2, {"a": torch.full((3,), 2.0), "c": torch.ones(4, dtype=torch.int8)}, {})
    checkpointer.wait()
    assert checkpointer._copies._pieces["a"].values.data_ptr() == before
    into = {"a": torch.zeros(3), "c": torch.zeros(4, dtype=torch.int8)}
    load_checkpoint(checkpoint_folder(tmp_path, 2), into)
    assert into["a"].tolist() == [2.0] * 3
    assert into["c"].tolist() == [1] * 4


def test_what_is_prepared_before_the_first_save_is_what_it_copies_to(tmp_path: Path):
    checkpointer = Checkpointer()
    checkpointer.prepare({"a": torch.zeros(3)})
    before = checkpointer._copies._pieces["a"].values.data_ptr()
    checkpointer.save(tmp_path, 1, {"a": torch.full((3,), 2.0)}, {})
    checkpointer.wait()
    assert checkpointer._copies._pieces["a"].values.data_ptr() == before
    into = {"a": torch.zeros(3)}
    load_checkpoint(checkpoint_folder(tmp_path, 1), into)
    assert into["a"].tolist() == [2.0] * 3


# Failures


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_on_rank_1(root: Path, behind: bool) -> str:
    save_checkpoint(root, 1, shards(1.0), {})
    checkpointer = Checkpointer()
    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() == 1:
            monkeypatch.setattr(SummingWriter, "write_data", no_space)
        if behind:
            checkpointer.save(root, 2, shards(2.0), {})
        attempt = checkpointer.save if behind else save_checkpoint  # which says what became of the one before
        with pytest.raises(CheckpointError) as caught:
            attempt(root, 3 if behind else 2, shards(2.0), {})
    assert latest_checkpoint(root) == checkpoint_folder(root, 1)
    dist.barrier()
    checkpointer.save(root, 4, shards(4.0), {})
    checkpointer.wait()
    return str(caught.value)


@pytest.mark.parametrize("behind", [True, False])
def test_a_full_disk_under_one_rank_fails_the_save_on_all(tmp_path: Path, behind: bool):
    messages = run_ranks(2, fail_on_rank_1, tmp_path, behind)
    assert messages[0] == messages[1]
    assert "step 2 could not be written" in messages[0]
    assert "on rank 1: No space left on device" in messages[0]
    assert "iter_0000001 is complete and still the latest" in messages[0]
    assert not list(tmp_path.glob(".iter_*"))
    assert [value_of(checkpoint_folder(tmp_path, step)) for step in (1, 4)] == [1.0, 4.0]


def refuse_on_rank_1(root: Path) -> None:
    state = {"path": root} if dist.get_rank() == 1 else {}
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(root, 1, shards(1.0), state)
    for method, rank in (("prepare_local_plan", 1), ("finish", 0)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            if dist.get_rank() == rank:
                monkeypatch.setattr(SummingWriter, method, broken)
            with pytest.raises(RuntimeError, match="broken"):
                save_checkpoint(root, 1, shards(1.0), {})


def broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("broken")


def test_whatever_fails_on_one_rank_is_raised_on_all(tmp_path: Path):
    run_ranks(2, refuse_on_rank_1, tmp_path)
    assert latest_checkpoint(tmp_path) is None


def hidden_from_rank_0(root: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(root / (f"host {dist.get_rank()}"), 1, shards(1.0), {})
    return str(caught.value)


def test_hosts_that_do_not_share_the_folder_are_told(tmp_path: Path):
    for message in run_ranks(2, hidden_from_rank_0, tmp_path):
        assert "__1_0.distcp is missing; all hosts must see the same folder" in message
    assert latest_checkpoint(tmp_path / "host 0") is None


def die_while_writing(root: Path) -> None:
    checkpointer = Checkpointer()
    checkpointer.save(root, 1, shards(1.0), {})
    checkpointer.wait()
    if not dist.is_initialized() or dist.get_rank() == 1:
        original = SummingWriter.write_data

        def write_and_die(*arguments: Any) -> None:
            original(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        SummingWriter.write_data = write_and_die  # pyright: ignore - this process is its only user
    checkpointer.save(root, 2, shards(2.0), {})
    checkpointer.wait()


@pytest.mark.parametrize("world", [0, 2])
def test_kill_9_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path: Path, world: int):
    if world:
        with pytest.raises(RankFailed):
            run_ranks(world, die_while_writing, tmp_path)
    else:
        writer = COMMANDS.Process(target=die_while_writing, args=(tmp_path,))
        writer.start()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob(".iter_0000002.writing/*.distcp"))
    assert latest_checkpoint(tmp_path) == find_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)
    assert "iter_0000002: cut off" in recover(tmp_path)[0]
    assert value_of(checkpoint_folder(tmp_path, 1)) == 1.0
    save_checkpoint(tmp_path, 2, shards(3.0), {})
    assert value_of(checkpoint_folder(tmp_path, 2)) == 3.0


# Damage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def three_checkpoints(root: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(root, step, shards(float(step)), {})


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    three_checkpoints(tmp_path)
    assert find_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 3)
    flip(checkpoint_folder(tmp_path, 3) / "__0_0.distcp")
    (checkpoint_folder(tmp_path, 2) / "state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)
    assert "iter_0000003 cannot be used: __0_0.distcp does not have the content that was written" in caplog.text
    assert f"going on from {checkpoint_folder(tmp_path, 1)}" in caplog.text
    # Gone back to step 1: what lies beyond is neither counted nor touched until its step comes again.
    save_checkpoint(tmp_path, 2, shards(20.0), {}, keep=1)
    assert find_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 2)
    assert sorted(folder.name for folder in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    save_checkpoint(tmp_path, 3, shards(30.0), {}, keep=1)
    assert [folder.name for folder in tmp_path.glob("iter_*")] == ["iter_0000003"]
    assert value_of(checkpoint_folder(tmp_path, 3)) == 30.0


def test_a_step_that_was_asked_for_is_that_step_or_an_error(tmp_path: Path):
    assert find_checkpoint(tmp_path) is None
    three_checkpoints(tmp_path)
    assert find_checkpoint(tmp_path, 2) == checkpoint_folder(tmp_path, 2)
    flip(checkpoint_folder(tmp_path, 2) / "__0_0.distcp")
    with pytest.raises(DamagedCheckpoint, match=r"iter_0000002 cannot be used: .*set checkpoint.step=3"):
        find_checkpoint(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 .*; there are: 1, 2, 3"):
        find_checkpoint(tmp_path, 4)


def test_a_run_does_not_go_on_from_what_lies_beyond_it(tmp_path: Path):
    three_checkpoints(tmp_path)
    save_checkpoint(tmp_path, 1, shards(10.0), {})  # set back to step 0, and trained anew
    flip(checkpoint_folder(tmp_path, 1) / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"iter_0000001 cannot be used.*checkpoint.step=3.*to start anew"):
        find_checkpoint(tmp_path)


def verify_and_count(folder: Path) -> tuple[list[str], list[str]]:
    """The files this rank read, and what a damaged one makes all raise."""
    files = []

    def counting(file: Path, original: Callable[[Path], str] = checkpoint._checksum) -> str:
        files.append(file.name)
        return original(file)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(checkpoint, "_checksum", counting)
        verify_checkpoint(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        flip(folder / "__3_0.distcp")
    dist.barrier()
    messages = []
    for attempt in (verify_checkpoint, lambda folder: load_checkpoint(folder, shards(0.0))):
        with pytest.raises(DamagedCheckpoint, match=r"__3_0.distcp") as caught:
            attempt(folder)
        messages.append(str(caught.value))
    return files, messages


def test_ranks_share_the_checking_of_files(tmp_path: Path):
    run_ranks(4, three_checkpoints, tmp_path)
    folder = checkpoint_folder(tmp_path, 3)
    shares = run_ranks(4, verify_and_count, folder)
    read = [name for files, _ in shares for name in files]
    assert sorted(read) == sorted(path.name for path in folder.iterdir() if path.name != "state.json")
    assert all(files for files, _ in shares)
    assert len({message for _, messages in shares for message in messages}) == 1


def ask_for_more(folder: Path) -> str:
    into = shards(0.0) | ({"extra": torch.zeros(2)} if dist.get_rank() == 1 else {})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, into)
    assert not any(local_part(tensor).any() for tensor in into.values())
    return str(caught.value)


def test_what_one_rank_asks_for_and_is_not_there_is_refused_on_all(tmp_path: Path):
    folder = save_checkpoint(tmp_path, 1, shards(1.0) | {"other": torch.zeros(2)}, {})
    messages = run_ranks(2, ask_for_more, folder)
    assert messages[0] == messages[1]
    assert "extra is missing in the checkpoint; other is in the checkpoint alone" in messages[0]


# Earlier versions


def as_version_1(folder: Path) -> None:
    manifest = json.loads((folder / "state.json").read_text())
    manifest["version"] = 1
    del manifest["crc32"]
    manifest["crc32"] = checkpoint._manifest_checksum(manifest)
    (folder / "state.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_checkpoints_of_version_1_are_read_on_one_process(tmp_path: Path, states: Any):
    """They hold one tensor of counters, and codes as they lie."""
    parameters = make_parameters("none")
    held = everything(parameters, make_optimizer(parameters, states, 2))
    counters = [
        tensor for name, tensor in held.items() if name.startswith("optim.step.") and isinstance(tensor, Tensor)
    ]
    counters[1].fill_(7)
    old = {"optim.step": torch.stack(counters)}
    for name, tensor in held.items():
        if isinstance(tensor, Coded):
            old[f"{name.removesuffix('.root')}.codes"] = tensor.store.codes_BK
            old[f"{name.removesuffix('.root')}.scales"] = tensor.store.scales_B
        elif not name.startswith("optim.step."):
            old[name] = tensor
    folder = save_checkpoint(tmp_path, 2, old, {})
    as_version_1(folder)
    again = make_parameters("none")
    resumed = everything(again, build_optimizer(again, OptimConfig(lr=1e-2), states, seed=3))
    load_checkpoint(folder, resumed)
    expected = gathered(held)
    for name, tensor in gathered(resumed).items():
        assert torch.equal(tensor, expected[name]), name
