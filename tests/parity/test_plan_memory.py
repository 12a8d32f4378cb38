"""The memory that `burnish plan` foretells is what torch's MemTracker sees of a real step on the CPU, within 10 %."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import native_model, tiny_config
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor

from burnish.config import Recipe
from burnish.data.pack import Layout as Packing
from burnish.data.pack import pack
from burnish.estimate import Layout, Sizes, rank_memory
from burnish.parallel.degrees import Degrees
from burnish.parallel.execution import Execution, MeshExecution
from burnish.parallel.fsdp import Sharding, shard
from burnish.parallel.mesh import Mesh
from burnish.parallel.recompute import recompute_blocks
from burnish.parallel.trace import Micro
from burnish.plan import rank_models
from burnish.recipe import recipe_from_dict
from burnish.train.loss import CrossEntropy
from burnish.train.optim import DTYPES
from burnish.train.states import Coded
from burnish.train.trainer import LocalTrainer, freeze_parameters
from burnish.types import Sample, StepInput

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 4096,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
LENGTHS = (300, 212, 512)


@dataclass(frozen=True)
class Case:
    """A step of a recipe over documents of `lengths` on `world` data ranks, each with the same micro-batches."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = LENGTHS
    micro_batches: int = 1
    world: int = 1
    zero: int = 3

    def __str__(self) -> str:
        return self.name

    @property
    def model(self) -> dict[str, Any]:
        return tiny_config(**(SHAPE | self.config))

    @property
    def read(self) -> Recipe:
        recipe = recipe_from_dict({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}} | self.recipe)
        return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"zero": self.zero})})


class Tracker(MemTracker):
    """Counts all tensors alike: parameters that are copies for the length of a step can carry none of its hooks."""

    def _track_module_params_and_buffers(self, module: torch.nn.Module, install_grad_hooks: bool = True) -> Any:
        return 0, 0


def peak_of(action: Callable[[Tracker], object], held: list[torch.Tensor]) -> int:
    """Bytes at the fullest moment of `action`, with what is held before it."""
    tracker = Tracker()
    tracker.track_external(*held)
    with tracker:
        action(tracker)
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


def tensors_of(value: Any) -> tuple[torch.Tensor, ...]:
    """The local tensors behind an entry of a checkpoint."""
    if isinstance(value, Coded):
        return value.store.codes_BK, value.store.scales_B
    return (value.to_local() if isinstance(value, DTensor) else value,)


def step_input(case: Case) -> StepInput:
    random, samples = np.random.default_rng(0), []
    for length in case.lengths * (case.micro_batches * case.world):
        weights = np.zeros(length, np.float32)
        weights[length // 3 :] = 1
        samples.append(Sample(random.integers(0, case.model["vocab_size"], length).astype(np.int32), weights))
    return pack(samples, Packing(sum(case.lengths), case.world))


def measure(case: Case) -> tuple[int, int]:
    """Peaks of forward and backward, and of the optimizer's step, on this rank."""
    recipe = case.read
    compute, master, reduce = (DTYPES[getattr(recipe.precision, k)] for k in ("compute", "master", "reduce"))
    model = native_model(case.model, master)
    freeze_parameters(model, recipe.model.freeze)
    recompute_blocks(model.blocks(), recipe.train.recompute)
    if case.world == 1:
        execution = Execution(model, compute, CPU)
    else:
        mesh = Mesh(Degrees(dp_shard=case.world), CPU)
        modules = shard(model, mesh, recipe.parallel.zero, compute=compute, reduce=reduce)
        sharding = Sharding(modules, recipe.parallel.zero)
        execution = MeshExecution(model, compute, CPU, mesh, sharding, model)
    trainer = LocalTrainer(execution, CrossEntropy(), recipe.optim, 10, recipe.precision.states, reduce=reduce)
    inputs = step_input(case)
    mine = replace(inputs, batches=[inputs.batches[dist.get_rank() if case.world > 1 else 0]])
    begin = execution._begin

    def accumulate(tracker: Tracker) -> None:
        def forget(is_last: bool) -> None:
            tracker.reset_mod_stats()  # a model that runs twice is an error to it
            begin(is_last)

        execution._begin = forget
        trainer.accumulate(mine, 1)

    if case.world > 1:  # what FSDP2 sets up at its first forward
        trainer.accumulate(mine, 1)
        trainer.zero_grad()
    held = [t for value in trainer.tensors().values() for t in tensors_of(value)]
    forward_backward = peak_of(accumulate, held)
    shards = trainer.parameters
    gradients = [s.grad for s in shards.values() if s.grad is not None]
    step = peak_of(lambda _: trainer.optimizer.step(1e-3, torch.tensor(True)), held + gradients)
    return forward_backward, step


def foretell(case: Case) -> tuple[float, float]:
    recipe, degrees = case.read, Degrees(dp_shard=case.world)
    inputs = step_input(case)
    fullest = max(inputs.batches[0], key=lambda batch: batch.num_tokens)
    micro = Micro(fullest.documents.lengths, len(fullest.targets_K))
    (model,) = rank_models(case.model, recipe, degrees, micro, "cpu").values()
    layout = Layout(recipe.parallel, degrees, Sizes.of(recipe), case.micro_batches, "cpu")
    memory = rank_memory(model, layout, [range(len(model.blocks))], 0)
    return sum(memory.forward_backward.values()), sum(memory.optimizer_step.values())


def precision(**keys: str) -> dict[str, Any]:
    return {"precision": keys}


FP32 = precision(compute="fp32")
SHORT = {"vocab_size": 16384}
"""With few tokens, where weights and gradients are most of the memory."""
WIDE = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 6, "num_key_value_heads": 8}
CASES = [
    Case("fp32", recipe=FP32),
    Case("fp32-untied", {"tie_word_embeddings": False}, FP32),
    Case("fp32-selective", recipe=FP32 | {"train": {"recompute": "selective"}}),
    Case("fp32-full", recipe=FP32 | {"train": {"recompute": "full"}}),
    Case("fp32-two-micro-batches", recipe=FP32, micro_batches=2),
    Case("fp32-short", SHORT, FP32, (64, 64)),
    Case("fp64", recipe=precision(compute="fp64", master="fp64", states="fp64", reduce="fp64")),
    Case("bf16"),
    Case("bf16-untied", {"tie_word_embeddings": False}),
    Case("bf16-selective-int8", recipe=precision(states="int8") | {"train": {"recompute": "selective"}}),
    Case("bf16-full-two-micro-batches", recipe={"train": {"recompute": "full"}}, micro_batches=2),
    Case("bf16-masters", recipe=precision(master="bf16", states="bf16"), micro_batches=2),
    Case("bf16-short", SHORT, {}, (64, 64)),
    Case("bf16-short-sgd", SHORT, {"optim": {"name": "sgd"}}, (64, 64), micro_batches=4),
    Case("bf16-frozen", recipe={"model": {"path": "m", "freeze": ["model.embed_tokens.*", "model.layers.[01].*"]}}),
    Case("fp32-wide", WIDE, FP32, (700,)),
]
RANKS = [
    Case("zero3-fp32", recipe=FP32, world=2),
    Case("zero3-bf16", world=2),
    Case("zero3-bf16-full", recipe={"train": {"recompute": "full"}}, world=2, micro_batches=2),
    Case("zero3-bf16-short", SHORT, {}, (64, 64), world=2, micro_batches=2),
    Case("zero2-bf16-short", SHORT, {}, (64, 64), world=2, micro_batches=2, zero=2),
    Case("zero1-bf16-short", SHORT, {}, (64, 64), world=2, micro_batches=2, zero=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process(case: Case) -> None:
    assert foretell(case) == pytest.approx(measure(case), rel=0.1)


@pytest.mark.parametrize("case", RANKS, ids=str)
def test_sharded_ranks(case: Case) -> None:
    foretold = foretell(case)
    for measured in run_ranks(case.world, measure, case):
        assert foretold == pytest.approx(measured, rel=0.1)
