"""The same optimizer step cut into any micro-batches and packs has the same loss and the same gradients."""

import numpy as np
import pytest
import torch
from tiny import native_model, tiny_config

from burnish.config import OptimConfig
from burnish.data.pack import Layout, pack
from burnish.parallel.execution import Execution
from burnish.train.loss import CrossEntropy
from burnish.train.trainer import LocalTrainer
from burnish.types import Sample


def make_samples(num: int = 14, seed: int = 0) -> list[Sample]:
    """Uneven lengths and fractional weights, one sample without any trained token, two sources."""
    random = np.random.default_rng(seed)
    samples = []
    for index in range(num):
        length = int(random.integers(3, 60))
        weights = random.choice([0.0, 0.25, 1.0, 2.0], length).astype(np.float32)
        weights[0] = 0
        weights[-1] = 0.5
        if index == 3:
            weights[:] = 0
        tokens = random.integers(0, 512, length).astype(np.int32)
        samples.append(Sample(tokens, weights, source="ab"[index % 2], index=index))
    return samples


def make_trainer(dtype: torch.dtype, compute: torch.dtype | None = None, **options: object) -> LocalTrainer:
    model = native_model(tiny_config("qwen3"), dtype)
    loss = options.pop("loss", CrossEntropy())
    optim = OptimConfig(name="sgd", lr=0.1, weight_decay=0.0, schedule="constant", warmup_ratio=0.0)
    return LocalTrainer(Execution(model, compute or dtype, torch.device("cpu")), loss, optim, total_steps=10, **options)  # pyright: ignore


def gradients(trainer: LocalTrainer, samples: list[Sample], layout: Layout, normalization: str) -> tuple[float, dict]:
    trainer.zero_grad()
    inputs = pack(samples, layout, normalization)  # pyright: ignore[reportArgumentType]
    stats = trainer.accumulate(inputs, 1)
    return stats["loss"].mean, {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}


def worst(found: dict, expected: dict) -> float:
    """The largest relative difference of a gradient, over tensors: |a - b| / |b|."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


CUTS = [Layout(59), Layout(64), Layout(100), Layout(177), Layout(128, kind="rows"), Layout(128, kind="single")]


@pytest.mark.parametrize("normalization", ["token", "sample"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-10)])
def test_any_cut_gives_the_whole_batch(normalization: str, dtype: torch.dtype, tolerance: float) -> None:
    trainer, samples = make_trainer(dtype), make_samples()
    loss, whole = gradients(trainer, samples, Layout(4096), normalization)
    for layout in CUTS:
        cut_loss, cut = gradients(trainer, samples[::-1], layout, normalization)
        assert cut_loss == pytest.approx(loss, rel=1e-6 if dtype == torch.float32 else 1e-12)
        assert worst(cut, whole) < tolerance, layout


@pytest.mark.parametrize("normalization", ["token", "sample"])
def test_the_whole_batch_is_the_definition(normalization: str) -> None:
    """Against the definition written out one document at a time, with full logits, in float64."""
    trainer, samples = make_trainer(torch.float64), make_samples()
    loss, found = gradients(trainer, samples, Layout(4096), normalization)
    model = trainer.execution.model
    total, denominator = torch.zeros((), dtype=torch.float64), 0.0
    for sample in samples:
        batch = pack([_all_trained(sample)], Layout(4096)).batches[0][0]
        hidden_TD = model(batch.tokens_T, batch.positions_T, batch.documents)
        logprobs_TV = torch.log_softmax(hidden_TD @ model.head().weight_VD.T, -1)
        nll = -logprobs_TV[torch.arange(len(sample.tokens) - 1), batch.tokens_T[1:]]
        weights = torch.from_numpy(sample.loss_weights[1:]).double()
        if weights.sum() == 0:
            continue
        scale = 1.0 if normalization == "token" else 1 / float(weights.sum())
        total = total + scale * (weights * nll).sum()
        denominator += float(weights.sum()) if normalization == "token" else 1
    expected = torch.autograd.grad(total / denominator, list(trainer.parameters.values()))
    assert loss == pytest.approx(float((total / denominator).detach()), rel=1e-12)
    assert worst(found, dict(zip(trainer.parameters, expected, strict=True))) < 1e-10


def _all_trained(sample: Sample) -> Sample:
    weights = np.ones(len(sample.tokens), np.float32)
    weights[0] = 0
    return Sample(sample.tokens, weights, sample.source, sample.index)


def test_extras_do_not_depend_on_the_cut_either() -> None:
    """NEFTune's noise, label smoothing and z-loss are those of the sample, not of its pack."""
    trainer = make_trainer(torch.float64, loss=CrossEntropy(label_smoothing=0.1, z_loss=1e-3), neftune_alpha=5.0)
    samples = make_samples()
    _, whole = gradients(trainer, samples, Layout(4096), "token")
    _, cut = gradients(trainer, samples[::-1], Layout(64), "token")
    # float32 noise is added to float64 embeddings; it is the same noise to the bit.
    assert worst(cut, whole) < 1e-10
    plain = make_trainer(torch.float64)
    assert worst(gradients(plain, samples, Layout(4096), "token")[1], whole) > 1e-3


@pytest.mark.parametrize("normalization", ["token", "sample"])
def test_bf16_compute_stays_close_and_gradients_are_of_the_master_type(normalization: str) -> None:
    exact, rounded = make_trainer(torch.float32), make_trainer(torch.float32, torch.bfloat16)
    samples = make_samples()
    loss, reference = gradients(exact, samples, Layout(4096), normalization)
    bf16_loss, found = gradients(rounded, samples, Layout(100), normalization)
    assert bf16_loss == pytest.approx(loss, rel=1e-2)
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert worst(found, reference) < 5e-2
    assert {p.dtype for p in rounded.execution.model.parameters()} == {torch.float32}, "the masters are back in place"


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_recomputation_changes_no_bit(mode: str, compute: torch.dtype) -> None:
    from burnish.parallel.recompute import recompute_blocks

    samples = make_samples()
    plain, again = make_trainer(torch.float32, compute), make_trainer(torch.float32, compute)
    recompute_blocks(again.execution.model.blocks(), mode)
    _, expected = gradients(plain, samples, Layout(200), "token")
    _, found = gradients(again, samples, Layout(200), "token")
    assert all(torch.equal(found[n], expected[n]) for n in expected)
