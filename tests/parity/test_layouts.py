"""One step on any layout of ranks has the loss, gradients and weights of one process on the whole batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_step_invariance import make_samples
from tiny import EXPERTS, native_model, tiny_config
from torch import Tensor
from torch.distributed.tensor import DTensor

from burnish.config import LoraConfig, OptimConfig, ParallelConfig
from burnish.data.pack import Layout, pack
from burnish.model import zoo
from burnish.model.attention import attend_sdpa
from burnish.model.lora import initialise_adapters, inject
from burnish.parallel import offload
from burnish.parallel.apply import Parallelism, Precision, load_weights
from burnish.parallel.degrees import Degrees
from burnish.parallel.execution import Execution
from burnish.parallel.mesh import Mesh
from burnish.parallel.recompute import Blocks
from burnish.parallel.weights import local_part as part_of
from burnish.train.loss import CrossEntropy
from burnish.train.optim import weight_decays
from burnish.train.states import local_part
from burnish.train.trainer import LocalTrainer, Routing, freeze_parameters
from burnish.types import Batch, Sample, Stats, TokenScores, UserError

SLOW = pytest.mark.slow
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
    normalization: Literal["token", "sample"] = "token"
    budget: int = 64
    num_samples: int = 14
    seed: int = 0
    optimizer: Literal["adamw", "sgd"] = "sgd"
    freeze: tuple[str, ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)

    recompute: Literal["none", "selective", "full"] = "none"
    blocks: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    loss: dict[str, Any] = field(default_factory=dict)
    rows: str = "uneven"
    num_steps: int = 2
    lr: float = 0.1

    def __str__(self) -> str:
        return self.name

    @property
    def model_config(self) -> dict[str, Any]:
        return tiny_config(**{"family": "qwen3", **self.config})

    @property
    def alone(self) -> Case:
        """The same step in one process, the whole batch in one pack, nothing recomputed or on the host."""
        compute = "fp64" if self.compute == "fp64" else "fp32"
        return replace(self, parallel={}, world=1, budget=4096, compute=compute, recompute="none", blocks={})

    @property
    def samples(self) -> list[Sample]:
        samples = make_samples(self.num_samples, self.seed)
        match self.rows:
            case "one long":  # as long as all others together
                others = samples[1:]
                tokens = np.concatenate([sample.tokens for sample in others])
                weights = np.concatenate([sample.loss_weights for sample in others])
                return [Sample(tokens, weights, "a", 0), *others]
            case "few trained":  # so that most packs, and slices of packs, have nothing to train
                for sample in samples:
                    sample.loss_weights[:] = 0
                    if sample.index % 7 == 1:
                        sample.loss_weights[-1] = 1
        return samples


@dataclass
class Outcome:
    """What a step came to; tensors are whole, by Hugging Face's names."""

    loss: float | None
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    held_out: float | None
    buffers: dict[str, Tensor]
    metrics: dict[str, float]


def build_trainer(case: Case) -> tuple[LocalTrainer, Degrees]:
    """The trainer of this rank, and how ranks are laid out."""
    cpu, degrees = torch.device("cpu"), Degrees()
    if not case.parallel:
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
        name=case.optimizer, lr=case.lr, weight_decay=0.01, schedule="constant", warmup_ratio=0.0, clip_norm=clip_norm
    )
    on_host = case.parallel.get("offload") == "optimizer"
    trainer = LocalTrainer(
        execution, CrossEntropy(**case.loss), optim, total_steps=4, updates_on_host=on_host, **case.trainer
    )
    return trainer, degrees


def take_step(case: Case) -> Outcome | None:
    """One step of `case` on this rank; the outcome on rank 0."""
    trainer, degrees = build_trainer(case)
    inputs = pack(case.samples, Layout(case.budget, degrees.data_ranks), case.normalization)
    data_rank = 0 if not case.parallel else degrees.data_rank(dist.get_rank())
    mine = replace(inputs, batches=[inputs.batches[data_rank]])
    evaluated = trainer.evaluate(mine)
    held_out = evaluated["loss"].mean if evaluated else None
    if case.master != "bf16":  # the noise of whose rounding is each shard's own
        for _ in range(case.num_steps - 1):  # before, so that nothing of them is left behind
            trainer.step(mine)
    stats = trainer.step(mine)
    gradients = {n: whole(p.grad) for n, p in trainer.execution.parameters().items() if p.grad is not None}
    weights = {n: whole(p.detach()) for n, p in trainer.execution.parameters().items()}
    buffers = {n: t.clone() for n, t in trainer.execution.state().items() if n not in weights}
    if case.world > 1 and any(place for axis, place in degrees.place(dist.get_rank()).items() if axis != "pp"):
        return None
    loss = stats["loss"].mean if "loss" in stats else None
    metrics = {name: float(value.mean) for name, value in stats.items()} if loss is not None else {}
    return Outcome(loss, stats["grad_norm"].mean, gradients, weights, held_out, buffers, metrics)


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
        {name: buffer for outcome in found for name, buffer in outcome.buffers.items()},
        next(outcome.metrics for outcome in found if outcome.metrics),
    )


def on_mesh(case: Case, parallelism: Parallelism) -> Execution:
    """This rank's part of the model of `case`, built on meta and given its weights when it is cut."""
    lora = None if case.lora is None else LoraConfig(**case.lora)
    kernel = parallelism.kernel(attend_sdpa)
    precision = Precision(DTYPES[case.master], DTYPES[case.compute], torch.float32)
    offload.SMALLEST = 0
    execution = parallelism.apply(
        partial(zoo.build, case.model_config, kernel, dtype=precision.master, device="meta", compute=precision.compute),
        precision,
        Blocks(case.recompute, **case.blocks),
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
ROUTED: dict[str, Any] = {"routing": Routing(0.1, 0.01)}
BALANCED: dict[str, Any] = {"routing": Routing(0.1, 0.01, 1e-3)}
SMOOTH = {"label_smoothing": 0.1, "z_loss": 1e-2}
LONG: dict[str, Any] = {"rows": "one long", "budget": 400}
SPARING: list[tuple[str, Literal["none", "selective", "full"], dict[str, Any], dict[str, Any]]] = [
    ("selective", "selective", {}, {}),
    ("every2", "full", {"every": 2}, {}),
    ("activations", "none", {"is_offloaded": True}, {}),
    ("full-activations", "full", {"is_offloaded": True}, {}),
    ("offload-optimizer", "none", {}, {"offload": "optimizer"}),
    ("offload-parameters", "none", {}, {"offload": "parameters"}),
]
NO_TIES: dict[str, Any] = {"num_samples": 3, "seed": 8, "num_steps": 1}
"""With these no trained token is so near a tie of experts that rounding to bf16 decides where it goes."""
WINDOWS: dict[str, Any] = {
    "family": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention"],
}
EVERYDAY = [
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
    Case("moe-tp2", {"tp": 2}, 2, MOE),
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
    Case("moe-tp2-shard2", {"tp": 2, "dp_shard": 2}, 4, MOE),
    Case("lora-pp2", {"pp": 2}, 2, PP, lora={}),
    Case("lora-ring2", {"cp": 2}, 2, lora={}),
    Case("lora-ep2", {"ep": 2}, 2, MOE, lora={}),
    Case("lora-shard2", {"dp_shard": 2}, 2, lora={}),
    Case("lora-tp2-shard2", {"tp": 2, "dp_shard": 2}, 4, lora={"rslora": True}),
    Case("dora-tp2", {"tp": 2}, 2, lora={"kind": "dora"}),
    Case("dora-tp2-frozen-lengths", {"tp": 2}, 2, lora={"kind": "dora"}, freeze=("*.lora_magnitude_vector.*",)),
    Case("shard2-full-recompute", {"dp_shard": 2}, 2, recompute="full"),
    Case("ep2-selective", {"ep": 2}, 2, MOE, recompute="selective"),
    Case("lora-a2a2-frozen", {"cp": 2, "cp_kind": "all_to_all"}, 2, lora={}, freeze=("model.layers.0.*",)),
    Case("lora-etp2-tp2", {"tp": 2, "etp": 2}, 2, MOE, lora={}),
    Case("pp2-shard2-one-rank-trains", {"pp": 2, "dp_shard": 2}, 4, PP, num_samples=1),
    Case("ring2-tp2-shard2-recompute", {"cp": 2, "tp": 2, "dp_shard": 2}, 8, recompute="full"),
    Case("tp2-shard2-fp64-adamw", {"tp": 2, "dp_shard": 2}, 4, optimizer="adamw", compute="fp64", master="fp64"),
    Case("ring2-tp2-bf16", {"cp": 2, "tp": 2}, 4, compute="bf16"),
    Case("shard2-adamw", {"dp_shard": 2}, 2, optimizer="adamw", compute="fp64", master="fp64"),
    Case("shard2-bf16", {"dp_shard": 2}, 2, compute="bf16"),
    Case("shard2-bf16-masters", {"dp_shard": 2}, 2, compute="bf16", master="bf16"),
]
WIDE: list[Case] = [
    # Products.
    Case("tp2-pp2-shard2", {"tp": 2, "pp": 2, "dp_shard": 2}, 8, PP),
    Case("ring2-tp2-shard2-sample", {"cp": 2, "tp": 2, "dp_shard": 2}, 8, normalization="sample"),
    Case("a2a2-pp2-tp2", {"cp": 2, "cp_kind": "all_to_all", "pp": 2, "tp": 2}, 8, PP | UNTIED),
    Case("replicate2-tp2", {"dp_replicate": 2, "tp": 2}, 4),
    Case("replicate2-shard2-tp2-zero1", {"dp_replicate": 2, "dp_shard": 2, "tp": 2, "zero": 1}, 8),
    Case("replicate2-ring2", {"dp_replicate": 2, "cp": 2}, 4),
    Case("replicate2-pp2", {"dp_replicate": 2, "pp": 2}, 4, PP),
    Case("replicate2-ep2", {"dp_replicate": 2, "dp_shard": 2, "ep": 2}, 4, MOE, trainer=ROUTED),
    Case("moe-tp2-no-sp", {"tp": 2, "sequence_parallel": False}, 2, MOE, trainer=ROUTED),
    Case("moe-tp2-shard2", {"tp": 2, "dp_shard": 2}, 4, MOE, trainer=ROUTED),
    Case("moe-tp2-pp2", {"tp": 2, "pp": 2}, 4, MOE | PP, trainer=ROUTED),
    Case("replicate2-moe-losses", {"dp_replicate": 2}, 2, MOE, trainer=ROUTED),
    Case("ep4-tp2", {"ep": 4, "tp": 2, "dp_shard": 2}, 4, MOE, trainer=ROUTED),
    Case("ep4-tp2-shard4", {"ep": 4, "tp": 2, "dp_shard": 4}, 8, MOE, trainer=ROUTED),
    Case("etp2-tp2-pp2", {"tp": 2, "etp": 2, "pp": 2}, 4, MOE | PP, trainer=ROUTED),
    Case("ep2-tp2-ring2-no-sp", {"ep": 2, "tp": 2, "cp": 2, "sequence_parallel": False}, 4, MOE, trainer=ROUTED),
    Case("ep2-a2a2", {"ep": 2, "cp": 2, "cp_kind": "all_to_all"}, 2, MOE, trainer=ROUTED),
    Case("pp2-zbv-shard2", {"pp": 2, "pp_schedule": "zbv_zero_bubble", "dp_shard": 2}, 4, PP | UNTIED),
    Case("pp2-interleaved-tp2", {"pp": 2, "pp_schedule": "interleaved_1f1b", "tp": 2}, 4, PP, **LONG),
    Case("pp4", {"pp": 4}, 4, PP),
    # ZeRO's stages under each of the others.
    *(
        Case(f"{name}-zero{zero}", {**parallel, "zero": zero}, 4, config, budget=60)
        for zero in (1, 2)
        for name, parallel, config in (
            ("tp2-shard2", {"tp": 2, "dp_shard": 2}, {}),
            ("ring2-shard2", {"cp": 2, "dp_shard": 2}, {}),
            ("pp2-shard2", {"pp": 2, "dp_shard": 2}, PP),
            ("ep2-shard4", {"ep": 2, "dp_shard": 4}, MOE),
            ("replicate2-shard2", {"dp_replicate": 2, "dp_shard": 2}, {}),
        )
    ),
    Case("pp2-zbv-shard2-zero1", {"pp": 2, "pp_schedule": "zbv_zero_bubble", "dp_shard": 2, "zero": 1}, 4, PP),
    # Frozen parameters.
    *(
        Case(f"{name}-frozen-{what}", parallel, 2, {**config, **untied}, freeze=freeze)
        for what, freeze, untied in (
            ("embedding", ("model.embed_tokens.weight",), {}),
            ("embedding-untied", ("model.embed_tokens.weight",), UNTIED),
            ("first-block", ("model.embed_tokens.weight", "model.layers.0.*"), UNTIED),
            ("last-block", ("model.layers.1.*",), {}),
            ("head", ("lm_head.weight", "model.norm.weight"), UNTIED),
        )
        for name, parallel, config in (
            ("shard2", {"dp_shard": 2}, {}),
            ("tp2", {"tp": 2}, {}),
            ("ring2", {"cp": 2}, {}),
            ("pp2", {"pp": 2}, {}),
            ("pp2-zbv", {"pp": 2, "pp_schedule": "zbv_zero_bubble"}, PP),
            ("replicate2", {"dp_replicate": 2}, {}),
            ("shard2-zero1", {"dp_shard": 2, "zero": 1}, {}),
            ("a2a2", {"cp": 2, "cp_kind": "all_to_all"}, {}),
            ("ep2", {"ep": 2}, MOE),
            ("etp2-tp2", {"tp": 2, "etp": 2}, MOE),
        )
    ),
    Case("ep2-frozen-experts", {"ep": 2}, 2, MOE, freeze=("*.experts.*",), trainer=ROUTED),
    Case("ep2-frozen-all-but-experts", {"ep": 2}, 2, MOE, freeze=("*embed*", "*_proj.weight", "*norm*", "lm_head*")),
    Case("pp2-frozen-stage", {"pp": 2}, 2, UNTIED, freeze=("model.embed_tokens.weight", "model.layers.0.*")),
    # Losses.
    *(
        Case(f"{name}-smooth-sample", parallel, 2, config, loss=SMOOTH, normalization="sample")
        for name, parallel, config in (
            ("shard2", {"dp_shard": 2}, {}),
            ("replicate2", {"dp_replicate": 2}, {}),
            ("tp2", {"tp": 2}, {"vocab_size": 513}),
            ("ring2", {"cp": 2}, {}),
            ("a2a2", {"cp": 2, "cp_kind": "all_to_all"}, {}),
            ("pp2", {"pp": 2}, {}),
            ("ep2", {"ep": 2}, MOE),
        )
    ),
    # Few trained tokens, and one document as long as all the others.
    *(
        Case(f"{name}-{kind.replace(' ', '-')}", parallel, 2, config, rows=kind, budget=400, trainer=trainer)
        for kind in ("few trained", "one long")
        for name, parallel, config, trainer in (
            ("shard2", {"dp_shard": 2}, {}, {}),
            ("tp2", {"tp": 2}, {}, {}),
            ("ring2", {"cp": 2}, {}, {"neftune_alpha": 5.0}),
            ("a2a2", {"cp": 2, "cp_kind": "all_to_all"}, {}, {}),
            ("pp2", {"pp": 2}, {}, {}),
            ("ep2", {"ep": 2}, MOE, ROUTED),
        )
    ),
    *(
        # The one data rank has nothing, or a micro-batch less.
        Case(f"{name}-{what}", parallel, 4, config, num_samples=num_samples, budget=60, trainer=trainer)
        for what, num_samples in (("one-rank-trains", 1), ("uneven", 3))
        for name, parallel, config, trainer in (
            ("tp2-shard2", {"tp": 2, "dp_shard": 2}, {}, {"neftune_alpha": 5.0}),
            ("tp2-replicate2", {"tp": 2, "dp_replicate": 2}, {}, {}),
            ("ring2-shard2", {"cp": 2, "dp_shard": 2}, {}, {"neftune_alpha": 5.0}),
            ("a2a2-shard2-zero1", {"cp": 2, "cp_kind": "all_to_all", "dp_shard": 2, "zero": 1}, {}, {}),
            ("pp2-replicate2", {"pp": 2, "dp_replicate": 2}, PP, {"neftune_alpha": 5.0}),
            ("pp2-zbv-shard2", {"pp": 2, "pp_schedule": "zbv_zero_bubble", "dp_shard": 2}, PP, {}),
            ("ep2-tp2-shard2", {"ep": 2, "tp": 2, "dp_shard": 2}, MOE, ROUTED),
            ("etp2-tp2-shard2", {"etp": 2, "tp": 2, "dp_shard": 2}, MOE, ROUTED),
        )
    ),
    *(
        Case(f"{name}-neftune", parallel, 2, config, trainer={"neftune_alpha": 5.0})
        for name, parallel, config in (
            ("tp2-no-sp", {"tp": 2, "sequence_parallel": False}, {}),
            ("a2a2", {"cp": 2, "cp_kind": "all_to_all"}, {}),
            ("pp2-interleaved", {"pp": 2, "pp_schedule": "interleaved_1f1b"}, PP),
            ("pp2-zbv", {"pp": 2, "pp_schedule": "zbv_zero_bubble"}, PP),
            ("ep2-tp2", {"ep": 2, "tp": 2}, MOE),
        )
    ),
    *(
        Case(f"{name}-idle", parallel, 4, config, num_samples=2, trainer=trainer)
        for name, parallel, config, trainer in (
            ("tp2-shard2", {"tp": 2, "dp_shard": 2}, {}, {}),
            ("ring2-shard2", {"cp": 2, "dp_shard": 2}, {}, {}),
            ("pp2-shard2", {"pp": 2, "dp_shard": 2}, PP, {}),
            ("ep4-shard4", {"ep": 4, "dp_shard": 4}, MOE, ROUTED),
        )
    ),
    # Families.
    *(
        Case(f"{name}-{family}", parallel, 2, config)
        for family, config in (
            ("llama-biases", {"family": "llama", "attention_bias": True, "mlp_bias": True}),
            ("qwen2-windows", WINDOWS),
        )
        for name, parallel in (
            ("tp2", {"tp": 2}),
            ("tp2-no-sp", {"tp": 2, "sequence_parallel": False}),
            ("ring2", {"cp": 2}),
            ("a2a2", {"cp": 2, "cp_kind": "all_to_all"}),
            ("pp2", {"pp": 2}),
            ("shard2", {"dp_shard": 2}),
        )
    ),
    Case("ring4-windows-long", {"cp": 4}, 4, WINDOWS, **LONG),
    *(
        Case(f"{name}-{family}-losses", parallel, world, {"family": family, **config}, trainer=BALANCED)
        for family in ("glm4_moe_lite", "deepseek_v3")
        for name, parallel, world, config in (
            ("ep2", {"ep": 2}, 2, {}),
            ("pp2", {"pp": 2}, 2, {}),
            ("pp2-zbv", {"pp": 2, "pp_schedule": "zbv_zero_bubble"}, 2, {"num_hidden_layers": 4}),
            ("ep2-pp2", {"ep": 2, "pp": 2, "dp_shard": 2}, 4, {}),
            ("tp2-ring2", {"tp": 2, "cp": 2, "ep": 2}, 4, {}),
            ("tp2-no-sp", {"tp": 2, "sequence_parallel": False}, 2, {}),
        )
    ),
    # Adapters.
    *(
        Case(f"{kind}-{name}", parallel, 2, config, lora={"kind": kind})
        for kind in ("lora", "dora")
        for name, parallel, config in (
            ("shard2-steps", {"dp_shard": 2}, {}),
            ("tp2-no-sp", {"tp": 2, "sequence_parallel": False}, {}),
            ("ring2", {"cp": 2}, {}),
            ("a2a2", {"cp": 2, "cp_kind": "all_to_all"}, {}),
            ("pp2", {"pp": 2}, {}),
            ("ep2", {"ep": 2}, MOE),
            ("ep2-tp2", {"ep": 2, "tp": 2}, MOE),
            ("etp2-tp2", {"etp": 2, "tp": 2}, {"family": "glm4_moe_lite"}),
        )
    ),
    *(
        Case(f"{kind}-{name}-frozen", parallel, 2, config, lora={"kind": kind}, freeze=freeze)
        for kind, freeze in (("lora", ("*.lora_A.*",)), ("dora", ("model.layers.0.*",)))
        for name, parallel, config in (
            ("shard2", {"dp_shard": 2}, {}),
            ("tp2", {"tp": 2}, {}),
            ("ring2", {"cp": 2}, {}),
            ("pp2", {"pp": 2}, {}),
        )
    ),
    # bf16 of each family.
    *(
        Case(f"{name}-{family}-bf16", parallel, 2, {"family": family}, compute="bf16")
        for family in ("llama", "qwen2", "qwen3")
        for name, parallel in (
            ("tp2", {"tp": 2}),
            ("ring2", {"cp": 2}),
            ("pp2", {"pp": 2}),
        )
    ),
    *(
        Case(f"{name}-{family}-bf16", parallel, 2, {"family": family}, compute="bf16", **NO_TIES)
        for family in EXPERTS
        for name, parallel in (
            ("tp2", {"tp": 2}),
            ("ring2", {"cp": 2}),
            ("pp2", {"pp": 2}),
            ("ep2", {"ep": 2}),
            ("etp2-tp2", {"etp": 2, "tp": 2}),
        )
    ),
    # AdamW over three steps.
    *(
        Case(
            f"{name}-adamw-{dtype}",
            parallel,
            2,
            config,
            num_steps=3,
            optimizer="adamw",
            lr=1e-3,
            compute=dtype,
            master=dtype,
        )
        for dtype in ("fp32", "fp64")
        for name, parallel, config in (
            ("shard2", {"dp_shard": 2}, {}),
            ("tp2", {"tp": 2}, {}),
            ("ring2", {"cp": 2}, {}),
            ("pp2", {"pp": 2}, {}),
            ("ep2", {"ep": 2}, MOE),
        )
    ),
    # What is computed again or lies on the host.
    *(
        Case(f"{name}-{what}", {**parallel, **more}, 2, config, recompute=recompute, blocks=blocks)
        for what, recompute, blocks, more in SPARING
        for name, parallel, config in (
            ("shard2", {"dp_shard": 2}, {}),
            ("tp2", {"tp": 2}, {}),
            ("ring2", {"cp": 2}, {}),
            ("pp2", {"pp": 2}, PP),
            ("ep2", {"ep": 2}, MOE),
        )
    ),
    Case("pp2-zbv-activations", {"pp": 2, "pp_schedule": "zbv_zero_bubble"}, 2, PP, blocks={"is_offloaded": True}),
    Case("pp2-zbv-full", {"pp": 2, "pp_schedule": "zbv_zero_bubble"}, 2, PP, recompute="full"),
    Case("shard1-offload-parameters", {"offload": "parameters"}, 1),
    Case("shard1-offload-optimizer-zero1", {"offload": "optimizer", "zero": 1}, 1),
    Case("shard2-offload-parameters-zero1", {"dp_shard": 2, "offload": "parameters", "zero": 1}, 2),
    Case("lora-shard2-offload-parameters", {"dp_shard": 2, "offload": "parameters"}, 2, lora={}),
    Case("ep2-pp2-shard2-selective", {"ep": 2, "pp": 2, "dp_shard": 2}, 4, MOE | PP, recompute="selective"),
    Case("ep2-shard4-selective-zero2", {"ep": 2, "dp_shard": 4, "zero": 2}, 4, MOE, recompute="selective"),
    # Compiled blocks.
    *(
        Case(f"{name}-compiled", parallel, 2, config, recompute=recompute, blocks={"is_compiled": True})
        for name, parallel, config, recompute in (
            ("shard2", {"dp_shard": 2}, {}, "none"),
            ("shard2-selective", {"dp_shard": 2}, {}, "selective"),
            ("tp2", {"tp": 2}, {}, "none"),
            ("ring2", {"cp": 2}, {}, "none"),
            ("pp2", {"pp": 2}, PP, "none"),
            ("ep2-selective", {"ep": 2}, MOE, "selective"),
        )
    ),
]
"""Cases that the everyday run leaves out."""
CASES = [*EVERYDAY, *WIDE]
_alone: dict[str, Outcome] = {}


def outcomes(case: Case) -> tuple[Outcome, Outcome]:
    """What one process and what the ranks of `case` come to."""
    key = repr(replace(case.alone, name=""))
    if key not in _alone:
        outcome = take_step(case.alone)
        assert outcome is not None
        _alone[key] = outcome
    timeout = 500 if "is_compiled" in case.blocks else 120
    return _alone[key], joined(run_ranks(case.world, take_step, case, timeout=timeout))


def differences(case: Case, both: tuple[Outcome, Outcome] | None = None) -> dict[str, float]:
    """How far a step of `case` is from the same in one process: of each kind of result the largest, relative."""
    expected, found = both or outcomes(case)
    assert expected.loss is not None and found.loss is not None  # noqa: PT018 - read by the type checker
    assert expected.held_out is not None and found.held_out is not None  # noqa: PT018
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


@pytest.mark.parametrize("case", [*EVERYDAY, *(pytest.param(case, marks=SLOW) for case in WIDE)], ids=str)
def test_layout(case: Case) -> None:
    both, allowed = outcomes(case), limits(case)
    exceeded = {name: value for name, value in differences(case, both).items() if value > allowed[name]}
    assert not exceeded
    expected, found = both
    assert found.metrics.keys() == expected.metrics.keys()
    assert found.buffers.keys() == expected.buffers.keys()
    if case.compute != "bf16":  # whose rounding changes which expert is best, and which token
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
        assert all(torch.equal(found.buffers[name], buffer) for name, buffer in expected.buffers.items())


@dataclass
class Poisoned:
    """Cross-entropy that is not finite on one rank in one step."""

    rank: int
    step: int
    factor: float
    num_calls: int = 0

    def __call__(self, scores: TokenScores, batch: Batch) -> tuple[Tensor, Stats]:
        loss_sum, stats = CrossEntropy()(scores, batch)
        is_bad = self.step == 2 and self.num_calls == 0 and dist.get_rank() == self.rank
        self.num_calls += len(batch.trained_K) > 0  # nothing is to be spoilt where nothing is trained
        return (loss_sum * self.factor if is_bad else loss_sum), stats


Told = tuple[list[float], dict[tuple[str, str], bytes]]


def take_a_bad_step(case: Case, rank: int, factor: float) -> Told:
    """Three steps, the second of which is not finite on `rank` alone; what each says of itself, and the weights that
    are here at the end, by name and place in the whole."""
    parallel = ParallelConfig.model_construct(**{**ParallelConfig().model_dump(), **case.parallel})
    degrees = Degrees.of(parallel, case.world)
    execution = on_mesh(case, Parallelism(Mesh(degrees, torch.device("cpu")), parallel))
    optim = OptimConfig(lr=1e-2, schedule="constant", warmup_ratio=0.0, clip_norm=0.5)
    on_host = parallel.offload == "optimizer"
    loss = Poisoned(rank, 0, factor)
    trainer = LocalTrainer(execution, loss, optim, total_steps=4, updates_on_host=on_host, **case.trainer)
    inputs = pack(case.samples, Layout(case.budget, degrees.data_ranks))
    mine = replace(inputs, batches=[inputs.batches[degrees.data_rank(dist.get_rank())]])

    def held() -> dict[str, Tensor]:
        return {n: local_part(t).clone() for n, t in trainer.tensors().items() if isinstance(t, Tensor)}

    told, states = [], [held()]
    for step in (1, 2, 3):
        loss.step, loss.num_calls = step, 0
        told.append(trainer.step(mine)["nonfinite_steps"].mean)
        states.append(held())
    before, after, refused, then = states
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(after[name], refused[name]) for name in after), "a withheld update leaves all to the bit"
    assert any(not torch.equal(refused[name], then[name]) for name in then)
    assert all(bool(t.isfinite().all()) for t in then.values())
    parts = {name: part_of(parameter) for name, parameter in execution.parameters().items()}
    return told, {(name, str(box)): local.numpy().tobytes() for name, (local, box) in parts.items()}


@pytest.mark.parametrize(
    ("case", "rank"),
    [
        (Case("shard2", {"dp_shard": 2}, 2), 1),
        (Case("pp2", {"pp": 2}, 2, PP), 1),
        (Case("ep2", {"ep": 2}, 2, {"family": "glm4_moe_lite"}, trainer=BALANCED), 1),
        (Case("ring2", {"cp": 2}, 2), 0),
        (Case("shard2-offload-optimizer", {"dp_shard": 2, "offload": "optimizer"}, 2), 0),
        (Case("replicate2-tp2", {"dp_replicate": 2, "tp": 2}, 4), 3),
        (Case("a2a2", {"cp": 2, "cp_kind": "all_to_all"}, 2), 1),
        (Case("tp2", {"tp": 2}, 2), 1),
        (Case("etp2-tp2", {"etp": 2, "tp": 2}, 2, MOE, trainer=ROUTED), 0),
        (Case("lora-pp2-tp2", {"pp": 2, "tp": 2}, 4, PP, lora={}), 3),
    ],
    ids=str,
)
def test_no_rank_takes_a_step_that_is_not_finite_on_one(case: Case, rank: int) -> None:
    """Where one rank's loss is not a number or without bounds, all withhold the update, and go on with one model."""
    factor = torch.inf if rank % 2 else torch.nan
    held: dict[tuple[str, str], bytes] = {}
    for told, weights in run_ranks(case.world, take_a_bad_step, case, rank, factor):
        assert told == [0.0, 1.0, 0.0]
        assert all(held.setdefault(place, values) == values for place, values in weights.items())


@pytest.mark.parametrize(
    "case",
    [
        Case("ring2-tp2", {"cp": 2, "tp": 2}, 4, optimizer="adamw"),
        pytest.param(Case("ep2-pp2", {"ep": 2, "pp": 2, "dp_shard": 2}, 4, MOE | PP, trainer=ROUTED), marks=SLOW),
        pytest.param(Case("shard2-bf16-masters", {"dp_shard": 2}, 2, compute="bf16", master="bf16"), marks=SLOW),
    ],
    ids=str,
)
def test_a_layout_repeats_itself_to_the_bit(case: Case) -> None:
    one, other = (joined(run_ranks(case.world, take_step, case)) for _ in range(2))
    assert (one.loss, one.grad_norm, one.held_out, one.metrics) == (
        other.loss,
        other.grad_norm,
        other.held_out,
        other.metrics,
    )
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name


def decays_of_parts() -> list[str]:
    """What of this part of a pipeline has weight decay, where a pattern names what is in the other."""
    case = Case("pp2", {"pp": 2}, 2, PP)
    parallel = ParallelConfig.model_construct(**{**ParallelConfig().model_dump(), **case.parallel})
    execution = on_mesh(case, Parallelism(Mesh(Degrees.of(parallel, 2), torch.device("cpu")), parallel))
    optim = OptimConfig(no_decay=("model.norm.weight", "model.embed_tokens.weight"), weight_decay=0.1)
    LocalTrainer(execution, CrossEntropy(), optim, total_steps=4)
    wrong = optim.model_copy(update={"no_decay": ("model.nrom.weight",)})
    with pytest.raises(UserError, match="nrom"):
        LocalTrainer(execution, CrossEntropy(), wrong, total_steps=4)
    decays = weight_decays(execution.parameters(), optim, execution.trained_names())
    return [name for name, decay in decays.items() if not decay]


def test_a_pattern_may_name_what_another_stage_has() -> None:
    assert run_ranks(2, decays_of_parts) == [["model.embed_tokens.weight"], ["model.norm.weight"]]
