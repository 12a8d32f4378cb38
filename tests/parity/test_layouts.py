"""One step on any layout of ranks has the loss, gradients and weights of one process on the whole batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_step_invariance import make_samples
from tiny import native_model, tiny_config
from torch import Tensor
from torch.distributed.tensor import DTensor

from burnish.config import LoraConfig, OptimConfig, ParallelConfig
from burnish.data.pack import Layout, pack
from burnish.model import zoo
from burnish.model.attention import attend_sdpa
from burnish.model.lora import initialise_adapters, inject
from burnish.parallel.apply import Parallelism, Precision, load_weights
from burnish.parallel.degrees import Degrees
from burnish.parallel.execution import Execution
from burnish.parallel.mesh import Mesh
from burnish.parallel.recompute import Blocks
from burnish.train.loss import CrossEntropy
from burnish.train.trainer import LocalTrainer, Routing, freeze_parameters

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A step: on which ranks, of which model, how cut and how computed."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    world: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    compute: str = "fp32"
    master: str = "fp32"
    normalization: str = "token"
    budget: int = 64
    num_samples: int = 14
    optimizer: str = "sgd"
    freeze: tuple[str, ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)

    recompute: str = "none"
    lora: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def model_config(self) -> dict[str, Any]:
        return tiny_config(**{"family": "qwen3", **self.config})

    @property
    def alone(self) -> Case:
        """The same step in one process, the whole batch in one pack."""
        return replace(self, parallel={}, world=1, budget=4096, compute="fp64" if self.compute == "fp64" else "fp32")


@dataclass
class Outcome:
    """What a step came to; tensors are whole, by Hugging Face's names."""

    loss: float | None
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    held_out: float | None


def take_step(case: Case) -> Outcome | None:
    """One step of `case` on this rank; the outcome on rank 0."""
    cpu, degrees = torch.device("cpu"), Degrees()
    if case.world == 1:
        model = native_model(case.model_config, DTYPES[case.master])
        if case.lora is not None:
            inject(model, LoraConfig(**case.lora), DTYPES[case.master])
            initialise_adapters(model, 0)
        freeze_parameters(model, case.freeze)
        execution = Execution(model, DTYPES[case.compute], cpu)
    else:
        parallel = ParallelConfig.model_construct(**{**ParallelConfig().model_dump(), **case.parallel})
        degrees = Degrees.of(parallel, case.world)
        execution = on_mesh(case, Parallelism(Mesh(degrees, cpu), parallel))
    # Gradients of bf16 masters are clipped in a wider copy, which is not looked at below.
    clip_norm = None if case.master == "bf16" else 0.5
    optim = OptimConfig(
        name=case.optimizer, lr=0.1, weight_decay=0.01, schedule="constant", warmup_ratio=0.0, clip_norm=clip_norm
    )
    trainer = LocalTrainer(execution, CrossEntropy(), optim, total_steps=2, **case.trainer)
    inputs = pack(make_samples(case.num_samples), Layout(case.budget, degrees.data_ranks), case.normalization)
    data_rank = 0 if case.world == 1 else degrees.data_rank(dist.get_rank())
    mine = replace(inputs, batches=[inputs.batches[data_rank]])
    evaluated = trainer.evaluate(mine)
    held_out = evaluated["loss"].mean if evaluated else None
    if case.master != "bf16":  # the noise of whose rounding is each shard's own
        trainer.step(mine)  # a step before, so that nothing of it is left behind
    stats = trainer.step(mine)
    gradients = {n: whole(p.grad) for n, p in trainer.execution.parameters().items() if p.grad is not None}
    weights = {n: whole(p.detach()) for n, p in trainer.execution.parameters().items()}
    if case.world > 1 and any(place for axis, place in degrees.place(dist.get_rank()).items() if axis != "pp"):
        return None
    loss = stats["loss"].mean if "loss" in stats else None
    return Outcome(loss, stats["grad_norm"].mean, gradients, weights, held_out)


def joined(outcomes: list[Outcome | None]) -> Outcome:
    """The outcomes of the stages of a pipeline as one."""
    found = [outcome for outcome in outcomes if outcome is not None]
    names = [name for outcome in found for name in outcome.weights]
    assert len(names) == len(set(names)), "each parameter belongs to one stage"
    return Outcome(
        next(outcome.loss for outcome in found if outcome.loss is not None),
        found[0].grad_norm,
        {name: gradient for outcome in found for name, gradient in outcome.gradients.items()},
        {name: weight for outcome in found for name, weight in outcome.weights.items()},
        next(outcome.held_out for outcome in found if outcome.held_out is not None),
    )


def on_mesh(case: Case, parallelism: Parallelism) -> Execution:
    """This rank's part of the model of `case`, built on meta and given its weights when it is cut."""
    lora = None if case.lora is None else LoraConfig(**case.lora)
    kernel, precision = (
        parallelism.kernel(attend_sdpa),
        Precision(*(DTYPES[t] for t in (case.master, case.compute)), torch.float32),
    )
    execution = parallelism.apply(
        partial(zoo.build, case.model_config, kernel, dtype=precision.master, device="meta", compute=precision.compute),
        precision,
        Blocks(case.recompute),
        partial(freeze_parameters, patterns=case.freeze),
        lora,
    )
    load_weights(execution, None, 0, lora)
    return execution


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor: |a - b| / |b|."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(float((found[n].double() - e.double()).norm() / e.double().norm()) for n, e in expected.items())


MOE: dict[str, Any] = {"family": "qwen3_moe"}
PP: dict[str, Any] = {"num_hidden_layers": 4}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
CASES = [
    Case("shard2", {"dp_shard": 2}, 2),
    Case("shard4-zero1", {"dp_shard": 4, "zero": 1}, 4),
    Case("shard4-zero2", {"dp_shard": 4, "zero": 2}, 4),
    Case("replicate2", {"dp_replicate": 2}, 2),
    Case("replicate2-shard2", {"dp_replicate": 2, "dp_shard": 2}, 4),
    Case("shard2-untied-frozen", {"dp_shard": 2}, 2, {"tie_word_embeddings": False}, freeze=("model.norm.weight",)),
    Case("shard4-idle-ranks", {"dp_shard": 4}, 4, num_samples=2, trainer={"neftune_alpha": 5.0}),
    Case("shard2-sample", {"dp_shard": 2}, 2, normalization="sample"),
    Case("shard2-neftune", {"dp_shard": 2}, 2, trainer={"neftune_alpha": 5.0}),
    Case("tp2", {"tp": 2}, 2),
    Case("tp2-no-sp", {"tp": 2, "sequence_parallel": False}, 2),
    Case("tp2-shard2-untied", {"tp": 2, "dp_shard": 2}, 4, {"tie_word_embeddings": False}),
    Case("tp2-shard2-neftune", {"tp": 2, "dp_shard": 2}, 4, trainer={"neftune_alpha": 5.0}),
    Case("tp4-kv4", {"tp": 4}, 4, {"num_key_value_heads": 4, "vocab_size": 513}),
    Case("ring2", {"cp": 2}, 2),
    Case("ring4-shard1-neftune", {"cp": 4}, 4, trainer={"neftune_alpha": 5.0}),
    Case("a2a2", {"cp": 2, "cp_kind": "all_to_all"}, 2),
    Case("a2a4", {"cp": 4, "cp_kind": "all_to_all"}, 4),
    Case("ring2-shard2-sample", {"cp": 2, "dp_shard": 2}, 4, normalization="sample"),
    Case("ring2-tp2", {"cp": 2, "tp": 2}, 4),
    Case("a2a2-tp2-no-sp", {"cp": 2, "tp": 2, "cp_kind": "all_to_all", "sequence_parallel": False}, 4),
    Case("pp2", {"pp": 2}, 2, PP),
    Case("pp2-gpipe-untied-neftune", {"pp": 2, "pp_schedule": "gpipe"}, 2, PP | UNTIED, trainer={"neftune_alpha": 5.0}),
    Case("pp2-interleaved", {"pp": 2, "pp_schedule": "interleaved_1f1b"}, 2, PP),
    Case("pp2-interleaved-zb", {"pp": 2, "pp_schedule": "interleaved_zero_bubble"}, 2, PP),
    Case("pp2-zbv", {"pp": 2, "pp_schedule": "zbv_zero_bubble"}, 2, PP),
    Case("pp2-shard2-sample", {"pp": 2, "dp_shard": 2}, 4, PP, normalization="sample"),
    Case("pp2-tp2", {"pp": 2, "tp": 2}, 4, PP),
    Case("pp2-ring2", {"pp": 2, "cp": 2}, 4, PP | UNTIED),
    Case("pp2-tp2-shard2-bf16", {"pp": 2, "tp": 2, "dp_shard": 2, "zero": 1}, 8, PP, compute="bf16"),
    Case("ep2", {"ep": 2}, 2, MOE),
    Case("ep2-shard4", {"ep": 2, "dp_shard": 4}, 4, MOE, normalization="sample"),
    Case("moe-shard2", {"dp_shard": 2}, 2, MOE),
    Case("ep2-tp2", {"ep": 2, "tp": 2}, 2, MOE),
    Case("ep2-tp2-no-sp", {"ep": 2, "tp": 2, "sequence_parallel": False}, 2, MOE),
    Case("etp2-tp2-shard2-ep2", {"ep": 2, "tp": 2, "etp": 2, "dp_shard": 2}, 4, MOE),
    Case("ep4-ring2-shard2", {"ep": 4, "cp": 2, "dp_shard": 2}, 4, MOE),
    Case("ep2-pp2-shard2", {"ep": 2, "pp": 2, "dp_shard": 2}, 4, MOE | PP),
    Case("mla-tp2-ep2", {"tp": 2, "ep": 2}, 2, {"family": "glm4_moe_lite"}),
    Case("mla-ring2", {"cp": 2}, 2, {"family": "glm4_moe_lite"}),
    Case("ep2-ring2-losses", {"ep": 2, "cp": 2}, 2, MOE, trainer={"routing": Routing(0.1, 0.01)}),
    Case(
        "mla-tp2-shard2-losses",
        {"tp": 2, "dp_shard": 2, "ep": 2},
        4,
        {"family": "glm4_moe_lite"},
        trainer={"routing": Routing(0.1, 0.01, 1e-3)},
    ),
    Case("lora-shard2", {"dp_shard": 2}, 2, lora={}),
    Case("lora-tp2-shard2", {"tp": 2, "dp_shard": 2}, 4, lora={"rslora": True}),
    Case("dora-tp2", {"tp": 2}, 2, lora={"kind": "dora"}),
    Case("shard2-full-recompute", {"dp_shard": 2}, 2, recompute="full"),
    Case("ring2-tp2-shard2-recompute", {"cp": 2, "tp": 2, "dp_shard": 2}, 8, recompute="full"),
    Case("tp2-shard2-fp64-adamw", {"tp": 2, "dp_shard": 2}, 4, optimizer="adamw", compute="fp64", master="fp64"),
    Case("ring2-tp2-bf16", {"cp": 2, "tp": 2}, 4, compute="bf16"),
    Case("shard2-adamw", {"dp_shard": 2}, 2, optimizer="adamw", compute="fp64", master="fp64"),
    Case("shard2-bf16", {"dp_shard": 2}, 2, compute="bf16"),
    Case("shard2-bf16-masters", {"dp_shard": 2}, 2, compute="bf16", master="bf16"),
]
_alone: dict[str, Outcome] = {}


def differences(case: Case) -> dict[str, float]:
    """How far a step of `case` is from the same in one process: of each kind of result the largest, relative."""
    key = repr(replace(case.alone, name=""))
    if key not in _alone:
        outcome = take_step(case.alone)
        assert outcome is not None
        _alone[key] = outcome
    expected, found = _alone[key], joined(run_ranks(case.world, take_step, case))
    assert None not in (expected.loss, found.loss, expected.held_out, found.held_out)
    return {
        "loss": abs(found.loss - expected.loss) / expected.loss,
        "held out": abs(found.held_out - expected.held_out) / expected.held_out,
        "norm": abs(found.grad_norm - expected.grad_norm) / expected.grad_norm,
        "gradients": worst(found.gradients, expected.gradients),
        "weights": worst(found.weights, expected.weights),
    }


def limits(case: Case) -> dict[str, float]:
    """What `differences` may come to."""
    loss, tensors = {"fp32": (1e-5, 1e-5), "fp64": (1e-10, 1e-9), "bf16": (1e-2, 5e-2)}[case.compute]
    norm = 5e-2 if case.compute == "bf16" else loss
    return {"loss": loss, "held out": loss, "norm": norm, "gradients": tensors, "weights": tensors}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout(case: Case) -> None:
    allowed = limits(case)
    exceeded = {name: value for name, value in differences(case).items() if value > allowed[name]}
    assert not exceeded
