"""Pipelines of 2 and 4 ranks against one process: cuts, schedules, losses and every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import native_model, tiny_config
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from burnish.config import ParallelConfig, RecipeError
from burnish.data.pack import Layout, pack
from burnish.model.base import CausalLM
from burnish.model.lm_head import score
from burnish.parallel.cp import pad
from burnish.parallel.degrees import Degrees
from burnish.parallel.execution import merge
from burnish.parallel.fsdp import shard
from burnish.parallel.mesh import Mesh
from burnish.parallel.pp import OVERRIDDEN, PipelineEngine, check_torch, fill_up, keep_part, own_parameters
from burnish.parallel.recompute import recompute_blocks
from burnish.parallel.stages import (
    Part,
    check_split,
    cut_model,
    num_chunks,
    num_micro_batches,
    parts_of,
    rank_of,
    split_layers,
)
from burnish.parallel.tp import VocabularyParallel, parallelize
from burnish.train.loss import CrossEntropy
from burnish.types import Batch, Sample, Stats, UserError

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
    tp: int = 1
    layers: int = 4

    @property
    def parallel(self) -> ParallelConfig:
        return parallel_of(pp=self.pp, pp_schedule=self.schedule, pp_chunks=self.chunks)

    @property
    def ranks(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return self.data or (self.steps,)

    def __str__(self) -> str:
        marks = [self.schedule, f"pp{self.pp}", "tied" if self.tied else "untied", str(self.dtype)[6:]]
        marks += [f"tp{self.tp}"] if self.tp > 1 else []
        marks += [mark for mark in (self.recompute, f"zero{self.zero}" if self.data else "none") if mark != "none"]
        marks += ["noise"] if self.noise else []
        return "-".join([*marks, *self.frozen, *([f"x{self.chunks}"] if self.chunks else [])])


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


@torch.no_grad()
def descend(parameters: dict[str, torch.nn.Parameter]) -> None:
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.sub_(0.05 * parameter.grad)
            parameter.grad = None


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
        descend(dict(model.named_parameters()))
        steps.append((numbers(stats), numbers(seen), gradients))
    return steps


def build(case: Case, part: Part, mesh: Mesh) -> CausalLM:
    """A part as a run makes it: cut from a whole model, wrapped, sharded."""
    model = native_model(config_of(case), case.dtype)
    freeze(model, case)
    keep_part(model, part)
    whole = dict(native_model(config_of(case), case.dtype).named_parameters())
    with torch.no_grad():
        for name, parameter in own_parameters({part: model}).items():
            parameter.copy_(whole[name])
        if "lm_head.weight" not in whole and part.is_last:
            model.get_parameter("lm_head.weight").fill_(torch.nan)  # refresh_tied has to write it
    if case.tp > 1:
        parallelize(model, mesh.axis("tp"), sequence_parallel=True)
    recompute_blocks(model.blocks(), case.recompute)
    if case.data or case.tp > 1:
        shard(model, mesh, case.zero, compute=case.compute or case.dtype, reduce=case.dtype)
    return model


def on_rank(case: Case) -> list[Step]:
    parallel = case.parallel
    mesh = Mesh(Degrees(pp=case.pp, dp_shard=len(case.ranks), tp=case.tp), CPU)
    parts = cut_model(parallel, [1.0] * case.layers, 0.0, 0.5)
    stages = {parts[index]: build(case, parts[index], mesh) for index in parts_of(mesh.place["pp"], parallel)}
    vocabulary = VocabularyParallel(mesh.axis("tp"), sequence_parallel=True) if case.tp > 1 else None
    engine = PipelineEngine(
        stages, parallel, mesh.group("pp"), CPU, case.compute or case.dtype, lambda b: len(b.tokens_T) // case.tp
    )

    def scored(hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        assert engine.last is not None
        if vocabulary is None:
            return score_and_loss(engine.last, hidden_TD, batch)
        hidden_KD = vocabulary.gather(hidden_TD)[batch.trained_K]
        return LOSS(vocabulary.score(hidden_KD, engine.last.head(), batch.targets_K), batch)

    steps: list[Step] = []
    for number, lengths in enumerate(case.ranks[mesh.data_rank]):
        engine.refresh_tied()
        batches = [pad(batch, case.tp) for batch in batches_of(lengths, 10 * number + mesh.data_rank)]
        filled = fill_up(batches, parallel, case.tp)

        def noise(number: int, filled: list[Batch] = filled) -> Tensor | None:
            return noise_for(filled[number], case)

        stats = engine.forward_backward(filled, scored, 37.0, noise)
        seen = engine.evaluate(filled, scored)
        gradients: dict[str, Tensor] = {}
        for name, parameter in own_parameters(stages).items():
            if parameter.grad is not None:
                gradient = parameter.grad
                gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        descend(own_parameters(stages))
        steps.append((numbers(stats), numbers(seen), gradients))
    return steps


def check(case: Case, tolerance: float) -> None:
    expected = alone(case)
    ranks = run_ranks(case.pp * len(case.ranks) * case.tp, on_rank, case)
    for number, (stats, seen, gradients) in enumerate(expected):
        found: dict[str, Tensor] = {}
        for rank in ranks:
            found |= rank[number][2]
        for kind, wanted in ((0, stats), (1, seen)):
            reports = [dict(rank[number][kind]) for rank in ranks if rank[number][kind]]
            assert len(reports) == len(case.ranks) * case.tp
            for name, (total, weight) in wanted.items():
                pairs = [report[name] for report in reports[:: case.tp] if name in report]
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
    check(Case(schedule, pp=4, tied=tied, dtype=torch.float32, noise=tied, layers=8), 1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case("interleaved_1f1b", chunks=3, layers=7, recompute="selective"),
        Case("interleaved_zero_bubble", chunks=1, layers=3),
        Case("1f1b", recompute="full", noise=True),
        Case("interleaved_zero_bubble", recompute="full", tied=False),
        Case("1f1b", steps=(UNTRAINED, OTHER)),
        Case("zbv_zero_bubble", steps=(UNTRAINED, ONE_PACK)),
    ],
    ids=str,
)
def test_chunks_recomputation_and_untrained_steps(case: Case) -> None:
    check(case, 1e-10)


FIRST_HALF = ("embed_tokens", "layers.0.", "layers.1.")


@pytest.mark.parametrize(
    ("schedule", "frozen"),
    [
        ("1f1b", ("embed_tokens",)),
        ("1f1b", FIRST_HALF),
        ("1f1b", ("layers.3.", "lm_head")),
        ("interleaved_zero_bubble", FIRST_HALF),
        ("zbv_zero_bubble", ("embed_tokens", "layers.1.")),
    ],
)
def test_frozen_parameters(schedule: str, frozen: tuple[str, ...]) -> None:
    check(Case(schedule, tied="lm_head" not in frozen, frozen=frozen, steps=(UNEVEN,)), 1e-10)


TWO_RANKS = ((UNEVEN, ONE_PACK), ((*OTHER, 60, 61), UNTRAINED[:1]))
"""As many packs on either, but of unlike lengths; in the second step a rank without a trained token."""


@pytest.mark.parametrize(
    "case",
    [
        *(Case(schedule, data=TWO_RANKS, tied=schedule[-1] == "e") for schedule in SCHEDULES),
        Case("1f1b", data=TWO_RANKS, zero=1),
        Case("zbv_zero_bubble", data=TWO_RANKS, zero=2, recompute="full"),
    ],
    ids=str,
)
def test_sharded_parts(case: Case) -> None:
    check(case, 1e-10)


@pytest.mark.parametrize("tied", [True, False])
def test_tensor_parallel_parts(tied: bool) -> None:
    check(Case("interleaved_zero_bubble", tp=2, tied=tied, steps=(UNEVEN, ONE_PACK)), 1e-10)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble"])
def test_half_precision_is_near(schedule: str) -> None:
    # Against float32, of which bf16 keeps eight bits: small sums of large terms are the roughest.
    check(Case(schedule, data=TWO_RANKS, dtype=torch.float32, compute=torch.bfloat16), 0.15)


def _accumulate() -> list[float]:
    """Whether two calls of unlike numbers of micro-batches add up: norms of the gradients of one, other and both."""
    case = Case("1f1b", data=((), ()))
    mesh = Mesh(Degrees(pp=2, dp_shard=2), CPU)
    parts = cut_model(case.parallel, [1.0] * case.layers, 0.0, 0.0)
    part = parts[mesh.place["pp"]]
    stages = {part: build(case, part, mesh)}
    engine = PipelineEngine(stages, case.parallel, mesh.group("pp"), CPU, case.dtype)

    def scored(hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        return score_and_loss(stages[part], hidden_TD, batch)

    engine.refresh_tied()
    weight = stages[part].get_parameter("model.layers.0.mlp.up_proj.weight" if part.is_first else "model.norm.weight")
    found: list[Tensor] = []
    for together in ((UNEVEN,), (OTHER,), (UNEVEN, OTHER)):
        for lengths in together:
            engine.forward_backward(fill_up(batches_of(lengths, 0), case.parallel), scored, 37.0)
            engine.evaluate(fill_up(batches_of(ONE_PACK, 0), case.parallel), scored)
        gradient = weight.grad
        assert isinstance(gradient, DTensor)
        found.append(gradient.full_tensor().clone())
        stages[part].zero_grad()
    return [float((found[2] - found[0] - found[1]).norm() / found[2].norm()), float(found[0].norm())]


def test_calls_add_up_over_evaluations() -> None:
    for difference, norm in run_ranks(4, _accumulate):
        assert difference < 1e-12
        assert norm > 0


def test_layers_are_cut_by_cost() -> None:
    assert split_layers([1.0] * 8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    # A head as dear as six layers leaves the last part with one; the others are even.
    assert [len(part) for part in split_layers([1.0] * 28, 4, last=6.0)] == [8, 8, 9, 3]
    assert [len(part) for part in split_layers([1.0] * 28, 4, first=3.0)] == [4, 8, 8, 8]
    assert [len(part) for part in split_layers([5.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2)] == [1, 5]
    assert [len(part) for part in split_layers([1.0] * 28, 4, first_layers=10, last_layers=4)] == [10, 7, 7, 4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0] * 3, 4), ("4 parts", "3 layers", "lower parallel.pp")),
        (([1.0] * 6, 4, 0.0, 0.0, 3, 2), ("pp_first_layers=3", "pp_last_layers=2", "leave 1", "6 layers", "4 layers")),
        (([1.0] * 6, 2, 0.0, 0.0, 3, 2), ("leave 1 of", "0 other parts", "null")),
        (([1.0] * 6, 3, 0.0, 0.0, None, 6), ("pp_last_layers=6", "leave 0", "4 layers")),
    ],
)
def test_cuts_that_cannot_be(arguments: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        split_layers(*arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_places_of_parts() -> None:
    rounds = parallel_of(pp=4, pp_schedule="interleaved_1f1b")
    assert [parts_of(rank, rounds) for rank in range(4)] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    vee = parallel_of(pp=4, pp_schedule="zbv_zero_bubble")
    assert [parts_of(rank, vee) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert (rank_of(7, rounds), rank_of(7, vee)) == (3, 0)
    assert [part.layers for part in cut_model(parallel_of(pp=2), [1.0] * 4, 0.0, 0.0)] == [range(0, 2), range(2, 4)]


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 2), ("gpipe", 3), ("zbv_zero_bubble", 1)])
def test_chunks_that_a_schedule_cannot_run(schedule: str, chunks: int) -> None:
    with pytest.raises(RecipeError, match=f"pp_chunks={chunks}"):
        num_chunks(parallel_of(pp=2, pp_schedule=schedule, pp_chunks=chunks))


@pytest.mark.parametrize(
    ("schedule", "numbers"),
    [
        ("gpipe", {1: 4, 4: 4, 5: 5}),
        ("1f1b", {1: 4, 9: 9}),
        ("interleaved_1f1b", {1: 1, 3: 3, 7: 7, 9: 10, 11: 12, 13: 15, 17: 20}),
        ("zbv_zero_bubble", {1: 1, 9: 9}),
    ],
)
def test_numbers_of_micro_batches(schedule: str, numbers: dict[int, int]) -> None:
    parallel = parallel_of(pp=4, pp_schedule=schedule)
    assert {number: num_micro_batches(parallel, number) for number in numbers} == numbers


def test_split_backward_refuses_what_goes_backward_once() -> None:
    split = parallel_of(pp=2, pp_schedule="zbv_zero_bubble")
    with pytest.raises(RecipeError, match=r"train\.recompute=selective"):
        check_split(split, "selective", is_compiled=False)
    with pytest.raises(RecipeError, match=r"train\.compile"):
        check_split(split, "full", is_compiled=True)
    check_split(split, "full", is_compiled=False)
    check_split(parallel_of(pp=2), "selective", is_compiled=True)


def test_a_torch_that_calls_other_methods_is_refused() -> None:
    renamed = type("Renamed", (), dict.fromkeys(OVERRIDDEN))
    check_torch(PipelineStage, torch.__version__)
    check_torch(renamed, "2.12.1")
    with pytest.raises(UserError, match=r"torch 2.14.0 have no _post_metadata_inference_cleanup; install torch 2.13"):
        check_torch(renamed, "2.14.0")
    with pytest.raises(UserError, match=r"have no _get_init_p2p_neighbors_ops and no backward_one_chunk"):
        check_torch(object, "2.11.0")
