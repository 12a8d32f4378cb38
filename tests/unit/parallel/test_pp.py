"""Pipelines of 2 and 4 ranks against one process: cuts, schedules, losses and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import native_model, tiny_config
from torch import Tensor
from torch.distributed.tensor import DTensor

from burnish.config import ParallelConfig, RecipeError
from burnish.data.pack import Layout, pack
from burnish.model.base import CausalLM
from burnish.model.lm_head import score
from burnish.parallel.degrees import Degrees
from burnish.parallel.execution import merge
from burnish.parallel.fsdp import shard
from burnish.parallel.mesh import Mesh
from burnish.parallel.pp import TIED, PipelineEngine, fill_up, keep_part, own_parameters
from burnish.parallel.recompute import recompute_blocks
from burnish.parallel.stages import cut_model, num_chunks, num_micro_batches, parts_of, rank_of, split_layers
from burnish.train.loss import CrossEntropy
from burnish.types import Batch, Sample, Stats

CPU = torch.device("cpu")
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")
LOSS = CrossEntropy(label_smoothing=0.1, z_loss=0.01)


def parallel_of(**keys: Any) -> ParallelConfig:
    return ParallelConfig().model_copy(update=keys)


# Steps: lengths of documents for one data rank and step; those above 90 are not trained. Packs hold 100 tokens.
UNEVEN = (100, 61, 38, 12, 89, 7, 23, 45, 30, 3)
ONE_PACK = (31, 17)
OTHER = (50, 49, 64, 20, 77, 5, 5, 5)
UNTRAINED = (95, 99)


@dataclass(frozen=True)
class Case:
    """A model of as many layers as parts ask for, how it is cut and run, and the data of each data rank's steps."""

    schedule: str
    pp: int = 2
    chunks: int | None = None
    tied: bool = True
    dtype: torch.dtype = torch.float64
    steps: tuple[tuple[int, ...], ...] = (UNEVEN, ONE_PACK, OTHER)
    frozen: tuple[str, ...] = ()
    recompute: str = "none"
    noise: bool = False
    data: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    """Steps by data rank; set, stages are sharded over the data ranks."""
    zero: Any = 3
    compute: torch.dtype | None = None
    layers: int = 8
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def parallel(self) -> ParallelConfig:
        return parallel_of(pp=self.pp, pp_schedule=self.schedule, pp_chunks=self.chunks)

    @property
    def ranks(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return self.data or (self.steps,)

    def __str__(self) -> str:
        marks = [self.schedule, f"pp{self.pp}", "tied" if self.tied else "untied", str(self.dtype)[6:]]
        marks += [mark for mark in (self.recompute, f"zero{self.zero}" if self.data else "none") if mark != "none"]
        return "-".join([*marks, *self.frozen, *(["noise"] if self.noise else []), *([f"x{self.chunks}"] if self.chunks else [])])


def config_of(case: Case) -> dict[str, Any]:
    return tiny_config(
        "qwen3",
        vocab_size=97,
        num_hidden_layers=case.layers,
        tie_word_embeddings=case.tied,
        initializer_range=0.2,
    )


def batches_of(lengths: tuple[int, ...], seed: int) -> list[Batch]:
    random = np.random.default_rng(seed)
    samples = []
    for index, length in enumerate(lengths):
        weights = random.choice([0.0, 0.5, 1.0], length).astype(np.float32) * (length < 90)
        weights[0] = 0.0
        samples.append(Sample(random.integers(0, 97, length).astype(np.int32), weights, f"s{index % 2}", index))
    # A step without a trained token is refused, so one that is dropped again makes it one.
    trained = Sample(np.arange(100, dtype=np.int32) % 97, np.r_[0.0, np.ones(99)].astype(np.float32), "s0", 99)
    batches = pack([*samples, trained], Layout(100)).batches[0]
    return [batch for batch in batches if 99 not in {sample.index for sample in batch.samples}]


def noise_for(batch: Batch, case: Case) -> Tensor | None:
    if not case.noise or not batch.samples:
        return None
    generator = torch.Generator().manual_seed(batch.samples[0].index)
    return torch.rand(batch.num_tokens, 32, generator=generator, dtype=case.dtype)


def score_and_loss(model: CausalLM, hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
    return LOSS(score(hidden_TD[batch.trained_K], model.head(), batch.targets_K), batch)


def freeze(model: CausalLM, case: Case) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(mark in name for mark in case.frozen))


Step = tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]], dict[str, Tensor]]
"""Statistics of training and of evaluation, and gradients."""


def numbers(stats: Stats) -> dict[str, tuple[float, float]]:
    return {name: (float(value.sum), float(value.weight)) for name, value in stats.items()}


def alone(case: Case) -> list[Step]:
    """All data ranks' batches in one process."""
    model = native_model(config_of(case), case.dtype)
    freeze(model, case)
    steps: list[Step] = []
    for number in range(len(case.ranks[0])):
        stats: Stats = {}
        seen: Stats = {}
        for rank, rank_steps in enumerate(case.ranks):
            for batch in batches_of(rank_steps[number], 10 * number + rank):
                tokens = batch.tokens_T, batch.positions_T, batch.documents
                loss, of_batch = score_and_loss(model, model(*tokens, noise_for(batch, case)), batch)
                (loss / 37.0).backward()
                stats = merge(stats, of_batch)
                with torch.no_grad():
                    seen = merge(seen, score_and_loss(model, model(*tokens), batch)[1])
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        steps.append((numbers(stats), numbers(seen), gradients))
    return steps


def on_rank(case: Case) -> list[Step]:
    parallel = case.parallel
    mesh = Mesh(Degrees(pp=case.pp, dp_shard=len(case.ranks)), CPU)
    parts = cut_model(parallel, [1.0] * case.layers, 0.0, 0.5)
    whole = dict(native_model(config_of(case), case.dtype).named_parameters())
    stages = {}
    for index in parts_of(mesh.place["pp"], parallel):
        model = keep_part(native_model(config_of(case), case.dtype), parts[index])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(whole[name])
        freeze(model, case)
        recompute_blocks(model.blocks(), case.recompute)
        if case.data:
            shard(model, mesh, case.zero, compute=case.compute or case.dtype, reduce=case.dtype)
        stages[parts[index]] = model
    engine = PipelineEngine(stages, parallel, mesh.group("pp"), CPU, case.compute or case.dtype)
    steps: list[Step] = []
    for number, lengths in enumerate(case.ranks[mesh.data_rank]):
        batches = batches_of(lengths, 10 * number + mesh.data_rank)
        filled = fill_up(batches, parallel)

        def scored(hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
            assert engine.last is not None
            return score_and_loss(engine.last, hidden_TD, batch)

        def noise(number: int, filled: list[Batch] = filled) -> Tensor | None:
            return noise_for(filled[number], case)

        stats = engine.forward_backward(filled, scored, 37.0, noise)
        seen = engine.evaluate(filled, scored)
        gradients = {}
        for name, parameter in own_parameters(stages).items():
            if parameter.grad is not None:
                gradient = parameter.grad
                gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        for model in stages.values():
            model.zero_grad()
        steps.append((numbers(stats), numbers(seen), gradients))
    return steps


def check(case: Case, tolerance: float) -> None:
    expected = alone(case)
    ranks = run_ranks(case.pp * len(case.ranks), on_rank, case)
    for number, (stats, seen, gradients) in enumerate(expected):
        found: dict[str, Tensor] = {}
        for rank in ranks:
            found |= rank[number][2]
        for kind, wanted in ((0, stats), (1, seen)):
            reports = [dict(rank[number][kind]) for rank in ranks if rank[number][kind]]
            assert len(reports) == len(case.ranks)
            for name, (total, weight) in wanted.items():
                pairs = [report[name] for report in reports if name in report]
                assert sum(p[0] for p in pairs) == pytest.approx(total, rel=tolerance, abs=tolerance), (number, name)
                assert sum(p[1] for p in pairs) == pytest.approx(weight, rel=1e-12)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), (number, name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float64_equals_one_process(schedule: str, tied: bool) -> None:
    check(Case(schedule, tied=tied), 1e-10)


@pytest.mark.parametrize(("schedule", "tied"), [*zip(SCHEDULES, (True, False, True, False, True), strict=True)])
def test_four_ranks_equal_one_process(schedule: str, tied: bool) -> None:
    check(Case(schedule, pp=4, tied=tied, dtype=torch.float32, noise=tied), 1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case("interleaved_1f1b", chunks=3, layers=7),
        Case("interleaved_zero_bubble", chunks=1, layers=3),
        Case("1f1b", recompute="full", noise=True),
        Case("interleaved_zero_bubble", recompute="full", tied=False),
        Case("zbv_zero_bubble", recompute="selective"),
        Case("1f1b", steps=(UNTRAINED, OTHER)),
        Case("zbv_zero_bubble", steps=(UNTRAINED, ONE_PACK)),
    ],
    ids=str,
)
def test_chunks_recomputation_and_untrained_steps(case: Case) -> None:
    check(case, 1e-10)


FIRST_HALF = ("embed_tokens", *(f"layers.{layer}." for layer in range(4)))


@pytest.mark.parametrize("frozen", [("embed_tokens",), ("layers.0.", "layers.1."), FIRST_HALF, ("layers.5.", "lm_head")])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"])
def test_frozen_parameters(schedule: str, frozen: tuple[str, ...]) -> None:
    check(Case(schedule, tied="lm_head" not in frozen, frozen=frozen, steps=(UNEVEN,)), 1e-10)


TWO_RANKS = ((UNEVEN, ONE_PACK), ((*OTHER, 60, 61), UNTRAINED[:1]))
"""Packs of unlike lengths; in the second step a rank without a trained token."""


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sharded_stages(schedule: str, zero: int) -> None:
    check(Case(schedule, data=TWO_RANKS, zero=zero, tied=zero != 2), 1e-10)
