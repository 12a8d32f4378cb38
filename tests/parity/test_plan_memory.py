"""The memory that `burnish plan` foretells is what torch's MemTracker sees of a real step on the CPU, within 10 %."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import native_model, tiny_config
from torch.distributed._tools.mem_tracker import MemTracker

from burnish.config import Recipe
from burnish.data.pack import Layout as Packing
from burnish.data.pack import pack
from burnish.model import zoo
from burnish.model.attention import attend_sdpa
from burnish.model.lora import initialise_adapters, inject
from burnish.parallel.apply import Parallelism, Precision, layer_costs, load_weights
from burnish.parallel.degrees import Degrees
from burnish.parallel.execution import Execution
from burnish.parallel.mesh import Mesh
from burnish.parallel.recompute import Blocks
from burnish.parallel.trace import Micro
from burnish.plan.layouts import RankModels, lay_out, stages
from burnish.plan.memory import rank_memory
from burnish.recipe import recipe_from_dict
from burnish.train.loss import CrossEntropy
from burnish.train.optim import DTYPES
from burnish.train.trainer import LocalTrainer, freeze_parameters
from burnish.types import Sample, StepInput

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 4096,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
LENGTHS = (300, 212, 512)
EVEN = (512, 512)
"""Of which every pack is as full, so that micro-batches in flight are alike."""


@dataclass(frozen=True)
class Case:
    """A step of a recipe over documents of `lengths` on `world` ranks, every data rank with the same micro-batches."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = LENGTHS
    micro_batches: int = 1
    world: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def model(self) -> dict[str, Any]:
        return tiny_config(**SHAPE | self.config)

    @property
    def read(self) -> Recipe:
        return recipe_from_dict({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}} | self.recipe)

    @property
    def degrees(self) -> Degrees:
        return Degrees.of(self.read.parallel, self.world)

    @property
    def inputs(self) -> StepInput:
        """Of all data ranks, which have the same rows."""
        random, samples = np.random.default_rng(0), []
        for length in self.lengths * (self.micro_batches * self.degrees.data_ranks):
            weights = np.zeros(length, np.float32)
            weights[length // 3 :] = 1
            samples.append(Sample(random.integers(0, self.model["vocab_size"], length).astype(np.int32), weights))
        return pack(samples, Packing(sum(self.lengths), self.degrees.data_ranks))


class NoModules:
    """In the place of what follows modules, whose hooks a model that runs in parts and in any order does not bear."""

    is_bw = False
    parents = frozenset[str]()

    def register_user_hooks(self, *hooks: object) -> None: ...

    def clear_user_hooks(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


class Tracker(MemTracker):
    """Counts bytes of tensors, and knows no modules."""

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker = NoModules()  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def peak(self, peaks: dict[str, int], name: str) -> Iterator[None]:
        """Note under `name` the bytes at the fullest moment within."""
        self._peak_mem = {CPU: self._curr_mem_snap[CPU]["Total"]}
        yield
        peaks[name] = self._peak_mem[CPU]


def tensors() -> list[torch.Tensor]:
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


def execution_of(case: Case) -> Execution:
    recipe = case.read
    precision = Precision(*(DTYPES[getattr(recipe.precision, key)] for key in ("master", "compute", "reduce")))
    train = recipe.train
    blocks = Blocks(train.recompute, train.recompute_every, is_offloaded=train.offload_activations)
    held = precision.master if recipe.lora is None else precision.compute
    freeze = partial(freeze_parameters, patterns=recipe.model.freeze)
    if case.world == 1:
        model = native_model(case.model, held)
        if recipe.lora is not None:
            inject(model, recipe.lora, precision.master)
            initialise_adapters(model, 0)
        freeze(model)
        blocks.wrap(model)
        return Execution(model, precision.compute, CPU)
    parallelism = Parallelism(Mesh(case.degrees, CPU), recipe.parallel)
    kernel = parallelism.kernel(attend_sdpa)
    build = partial(zoo.build, case.model, kernel, dtype=held, device="meta", compute=precision.compute)
    execution = parallelism.apply(build, precision, blocks, freeze, recipe.lora)
    load_weights(execution, None, 0, recipe.lora)
    return execution


def measure(case: Case) -> tuple[int, int]:
    """Peaks of forward and backward, and of the optimizer's step, on this rank."""
    recipe, others = case.read, tensors()
    peaks: dict[str, int] = {}
    trainer = LocalTrainer(
        execution_of(case),
        CrossEntropy(),
        recipe.optim,
        10,
        recipe.precision.states,
        reduce=DTYPES[recipe.precision.reduce],
        updates_on_host=recipe.parallel.offload == "optimizer",
    )
    inputs = case.inputs
    mine = replace(inputs, batches=[inputs.batches[case.degrees.data_rank(dist.get_rank() if case.world > 1 else 0)]])
    trainer.step(mine)  # sets up what is there from then on
    trainer.zero_grad()
    gc.collect()
    known = set(map(id, others))
    tracker = Tracker()
    tracker.track_external(*(tensor for tensor in tensors() if id(tensor) not in known))
    trainer.clock = partial(tracker.peak, peaks)
    with tracker:
        trainer.step(mine)
    return peaks["forward_backward"], peaks["optimizer"]


def foretell(case: Case) -> list[tuple[float, float]]:
    """The same by rank of the pipeline; on a CPU the host's memory is the device's."""
    recipe, degrees = case.read, case.degrees
    fullest = max(case.inputs.batches[0], key=lambda batch: batch.num_tokens)
    micro = Micro(fullest.documents.lengths, len(fullest.targets_K))
    model = RankModels(case.model, recipe, micro, "cpu").of(recipe, degrees)
    layout = lay_out(recipe, degrees, case.micro_batches, "cpu")
    parts = stages(layer_costs(native_model(case.model, torch.float32)), recipe.parallel)
    memories = [rank_memory(model, layout, parts, rank) for rank in range(degrees.pp)]
    moments = [(memory.forward_backward, memory.optimizer_step) for memory in memories]
    return [(first.on_device + first.on_host, last.on_device + last.on_host) for first, last in moments]


def precision(**keys: str) -> dict[str, Any]:
    return {"precision": keys}


FP32 = precision(compute="fp32")
SHORT = {"vocab_size": 16384}
"""With few tokens, where weights and gradients are most of the memory."""
WIDE = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 6, "num_key_value_heads": 8}
MOE = {"family": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 256}
MLA = {
    "family": "glm4_moe_lite", "n_routed_experts": 8, "moe_intermediate_size": 256, "num_key_value_heads": 8,
    "q_lora_rank": 128, "kv_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "head_dim": None,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}


def on(**parallel: Any) -> dict[str, Any]:
    return {"parallel": parallel}


CASES = [
    Case("fp32", recipe=FP32),
    Case("fp32-untied", UNTIED, FP32),
    Case("fp32-selective", recipe=FP32 | {"train": {"recompute": "selective"}}),
    Case("fp32-full", recipe=FP32 | {"train": {"recompute": "full"}}),
    Case("fp32-full-every2", recipe=FP32 | {"train": {"recompute": "full", "recompute_every": 2}}),
    Case("fp32-offload-activations", recipe=FP32 | {"train": {"offload_activations": True}}),
    Case("fp32-two-micro-batches", recipe=FP32, micro_batches=2),
    Case("fp32-short", SHORT, FP32, (64, 64)),
    Case("fp64", recipe=precision(compute="fp64", master="fp64", states="fp64", reduce="fp64")),
    Case("bf16"),
    Case("bf16-untied", UNTIED),
    Case("bf16-selective-int8", recipe=precision(states="int8") | {"train": {"recompute": "selective"}}),
    Case("bf16-full-two-micro-batches", recipe={"train": {"recompute": "full"}}, micro_batches=2),
    Case("bf16-masters", recipe=precision(master="bf16", states="bf16"), micro_batches=2),
    Case("bf16-short", SHORT, {}, (64, 64)),
    Case("bf16-short-sgd", SHORT, {"optim": {"name": "sgd"}}, (64, 64), micro_batches=4),
    Case("bf16-short-int8", SHORT, precision(states="int8"), (64, 64)),
    Case("bf16-short-bf16-states", SHORT, precision(states="bf16"), (64, 64)),
    Case("bf16-short-offload-optimizer", SHORT, on(offload="optimizer"), (64, 64)),
    Case("bf16-frozen", recipe={"model": {"path": "m", "freeze": ["model.embed_tokens.*", "model.layers.[01].*"]}}),
    Case("fp32-wide", WIDE, FP32, (700,)),
    Case("bf16-lora", recipe={"lora": {"rank": 8}}),
    Case("bf16-lora-short", SHORT, {"lora": {"rank": 8}}, (64, 64), micro_batches=2),
    Case("bf16-lora-selective", recipe={"lora": {"rank": 8}, "train": {"recompute": "selective"}}),
    Case("bf16-moe", MOE),
    Case("bf16-moe-selective", MOE, {"train": {"recompute": "selective"}}),
    Case("bf16-mla", MLA),
]
RANKS = [
    Case("zero3-fp32", recipe=FP32, world=2),
    Case("zero3-bf16", world=2),
    Case("zero3-bf16-full", recipe={"train": {"recompute": "full"}}, world=2, micro_batches=2),
    Case("zero3-bf16-short", SHORT, {}, (64, 64), world=2, micro_batches=2),
    Case("zero2-bf16-short", SHORT, on(zero=2), (64, 64), world=2, micro_batches=2),
    Case("zero1-bf16-short", SHORT, on(zero=1), (64, 64), world=2, micro_batches=2),
    Case("zero3-offload-parameters", SHORT, on(offload="parameters"), (64, 64), world=2),
    Case("zero3-offload-optimizer", SHORT, on(offload="optimizer"), (64, 64), world=2),
    Case("zero3-bf16-int8", SHORT, precision(states="int8"), (64, 64), world=2),
    Case("zero3-lora", recipe={"lora": {"rank": 8}}, world=2),
    Case("replicate2", SHORT, on(dp_replicate=2), (64, 64), world=2),
    Case("tp2", recipe=on(tp=2), world=2),
    Case("tp2-fp32", recipe=on(tp=2) | FP32, world=2),
    Case("tp2-no-sp", recipe=on(tp=2, sequence_parallel=False), world=2),
    Case("tp2-short", SHORT, on(tp=2), (64, 64), world=2, micro_batches=2),
    Case("tp2-full", recipe=on(tp=2) | {"train": {"recompute": "full"}}, world=2),
    Case("tp2-lora", recipe=on(tp=2) | {"lora": {"rank": 8}}, world=2),
    Case("ring2", recipe=on(cp=2), world=2),
    Case("ring2-fp32", recipe=on(cp=2) | FP32, world=2),
    Case("ring2-full", recipe=on(cp=2) | {"train": {"recompute": "full"}}, world=2),
    Case("ring2-selective", recipe=on(cp=2) | {"train": {"recompute": "selective"}}, world=2),
    Case("ring4", recipe=on(cp=4), lengths=(800, 800), world=4),
    Case("a2a2", recipe=on(cp=2, cp_kind="all_to_all"), world=2),
    Case("a2a2-fp32", recipe=on(cp=2, cp_kind="all_to_all") | FP32, world=2),
    Case("pp2-1f1b", recipe=on(pp=2), lengths=EVEN, world=2, micro_batches=4),
    Case("pp2-1f1b-untied-fp32", UNTIED, on(pp=2) | FP32, EVEN, world=2, micro_batches=4),
    Case("pp2-gpipe", recipe=on(pp=2, pp_schedule="gpipe"), lengths=EVEN, world=2, micro_batches=4),
    Case("pp2-interleaved", recipe=on(pp=2, pp_schedule="interleaved_1f1b"), lengths=EVEN, world=2, micro_batches=4),
    Case(
        "pp2-interleaved-zb",
        recipe=on(pp=2, pp_schedule="interleaved_zero_bubble"),
        lengths=EVEN,
        world=2,
        micro_batches=4,
    ),
    Case("pp2-zbv", recipe=on(pp=2, pp_schedule="zbv_zero_bubble"), lengths=EVEN, world=2, micro_batches=4),
    Case("pp2-short", SHORT, on(pp=2), (64, 64), world=2, micro_batches=4),
    Case("pp2-full", recipe=on(pp=2) | {"train": {"recompute": "full"}}, lengths=EVEN, world=2, micro_batches=4),
    Case("pp4-1f1b", recipe=on(pp=4), lengths=EVEN, world=4, micro_batches=6),
    Case("moe-zero3", MOE, world=2),
    Case("ep2", MOE, on(ep=2), world=2),
    Case("ep2-short", MOE | {"moe_intermediate_size": 1024}, on(ep=2), (64, 64), world=2),
    Case("ep2-selective", MOE, on(ep=2) | {"train": {"recompute": "selective"}}, world=2),
    Case("ep2-full", MOE, on(ep=2) | {"train": {"recompute": "full"}}, world=2),
    Case("moe-tp2", MOE, on(tp=2), world=2),
    Case("ep2-tp2", MOE, on(ep=2, tp=2), world=2),
    Case("etp2-tp2", MOE, on(etp=2, tp=2), world=2),
    Case("mla-tp2-ep2", MLA, on(ep=2, tp=2), world=2),
    Case("mla-ring2", MLA, on(cp=2), world=2),
    Case("tp2-shard2", recipe=on(tp=2), world=4),
    Case("tp2-shard2-short", SHORT, on(tp=2), (64, 64), world=4),
    Case("pp2-shard2", recipe=on(pp=2), lengths=EVEN, world=4, micro_batches=4),
    Case("ring2-shard2", recipe=on(cp=2), world=4),
    Case("ep2-shard4", MOE, on(ep=2), world=4),
    Case("tp2-pp2", recipe=on(tp=2, pp=2), lengths=EVEN, world=4, micro_batches=4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process(case: Case) -> None:
    assert foretell(case) == [pytest.approx(measure(case), rel=0.1)]


QUICK = {"zero3-bf16-short", "tp2-short", "ring2", "pp2-1f1b", "ep2-tp2", "tp2-lora"}
"""Of which each kind of layout has one."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow) for case in RANKS],
)
def test_ranks(case: Case) -> None:
    foretold = foretell(case)
    for rank, measured in enumerate(run_ranks(case.world, measure, case)):
        assert foretold[case.degrees.place(rank)["pp"]] == pytest.approx(measured, rel=0.1)
