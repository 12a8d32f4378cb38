"""The fused head against the plain one: log-softmax and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from burnish.model.lm_head import Head, logits, score

NUM_TOKENS, HIDDEN, VOCABULARY = 37, 16, 203
HEADS = {
    "plain": {"scale": 1.0, "softcap": None, "bias": False},
    "bias": {"scale": 1.0, "softcap": None, "bias": True},
    "scale": {"scale": 0.25, "softcap": None, "bias": False},
    "softcap": {"scale": 1.0, "softcap": 3.0, "bias": False},
    "all": {"scale": 0.7, "softcap": 2.0, "bias": True},
}


def make(dtype: torch.dtype = torch.float64, *, scale=1.0, softcap=None, bias=False, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(0)
    hidden_KD = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocabulary, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets_K = torch.randint(vocabulary, (NUM_TOKENS,), generator=generator)
    return hidden_KD, Head(weight_VD, bias_V if bias else None, scale, softcap), targets_K


def reference_logits(hidden_KD: torch.Tensor, head: Head) -> torch.Tensor:
    logits_KV = hidden_KD.double() @ head.weight_VD.double().T
    if head.bias_V is not None:
        logits_KV = logits_KV + head.bias_V.double()
    logits_KV = logits_KV * head.scale
    return logits_KV if head.softcap is None else head.softcap * torch.tanh(logits_KV / head.softcap)


def leaves(hidden_KD: torch.Tensor, head: Head) -> list[torch.Tensor]:
    return [hidden_KD, head.weight_VD, *([] if head.bias_V is None else [head.bias_V])]


@pytest.mark.parametrize("block", [1, 64, 203, None])
@pytest.mark.parametrize("kind", HEADS)
def test_values_are_those_of_log_softmax(kind: str, block: int | None) -> None:
    hidden_KD, head, targets_K = make(**HEADS[kind])
    logits_KV = reference_logits(hidden_KD, head)
    logprobs_KV = logits_KV.log_softmax(-1)

    scores = score(hidden_KD, head, targets_K, block)

    torch.testing.assert_close(logits(hidden_KD, head), logits_KV)
    torch.testing.assert_close(scores.logprobs_K, logprobs_KV.gather(1, targets_K[:, None])[:, 0])
    torch.testing.assert_close(scores.logsumexp_K, logits_KV.logsumexp(-1))
    torch.testing.assert_close(scores.mean_logprobs_K, logprobs_KV.mean(-1))
    torch.testing.assert_close(scores.entropy_K, -(logprobs_KV.exp() * logprobs_KV).sum(-1).detach())
    assert torch.equal(scores.is_top1_K, logits_KV.argmax(-1) == targets_K)
    assert not scores.entropy_K.requires_grad


@pytest.mark.parametrize("block", [64, None])
@pytest.mark.parametrize("kind", HEADS)
def test_gradient_of_any_function_of_the_three_outputs(kind: str, block: int | None) -> None:
    hidden_KD, head, targets_K = make(**HEADS[kind])
    weights_3K = torch.randn(3, NUM_TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(logprobs_K, logsumexp_K, mean_logprobs_K):
        # Not linear, as clipped ratios are not.
        return (weights_3K * torch.stack((logprobs_K.exp(), logsumexp_K.square(), mean_logprobs_K))).sum()

    scores = score(hidden_KD, head, targets_K, block)
    ours = torch.autograd.grad(
        loss(scores.logprobs_K, scores.logsumexp_K, scores.mean_logprobs_K), leaves(hidden_KD, head)
    )
    logits_KV = reference_logits(hidden_KD, head)
    logprobs_KV = logits_KV.log_softmax(-1)
    target_K = logprobs_KV.gather(1, targets_K[:, None])[:, 0]
    theirs = torch.autograd.grad(loss(target_K, logits_KV.logsumexp(-1), logprobs_KV.mean(-1)), leaves(hidden_KD, head))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_gradcheck(kind: str) -> None:
    hidden_KD, head, targets_K = make(**HEADS[kind], vocabulary=19)

    def outputs(hidden_KD, weight_VD, bias_V):
        scores = score(hidden_KD, Head(weight_VD, bias_V, head.scale, head.softcap), targets_K[:4], 8)
        return scores.logprobs_K, scores.logsumexp_K, scores.mean_logprobs_K

    parts = (hidden_KD[:4, :3], head.weight_VD[:, :3], head.bias_V)
    inputs = [None if part is None else part.detach().requires_grad_() for part in parts]
    assert torch.autograd.gradcheck(outputs, inputs)


def test_equals_cross_entropy_with_label_smoothing() -> None:
    hidden_KD, head, targets_K = make()
    plain = functional.cross_entropy(reference_logits(hidden_KD, head), targets_K, label_smoothing=0.1)
    scores = score(hidden_KD, head, targets_K, 64)
    ours = -(0.9 * scores.logprobs_K + 0.1 * scores.mean_logprobs_K).mean()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves(hidden_KD, head)), torch.autograd.grad(plain, leaves(hidden_KD, head))
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_lower_precision_stays_near_float64(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    hidden_KD, head, targets_K = make(dtype, **HEADS[kind])
    scores = score(hidden_KD, head, targets_K, 64)
    logprobs_K = reference_logits(hidden_KD, head).log_softmax(-1).gather(1, targets_K[:, None])[:, 0]
    assert scores.logprobs_K.dtype == torch.float32
    assert distance(scores.logprobs_K, logprobs_K) < tolerance
    ours = torch.autograd.grad(scores.logprobs_K.mean(), leaves(hidden_KD, head))
    theirs = torch.autograd.grad(logprobs_K.mean(), leaves(hidden_KD, head))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        assert distance(one, other) < tolerance


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def test_large_logits_do_not_overflow() -> None:
    hidden_KD, head, targets_K = make(torch.float32)
    scores = score(hidden_KD * 1e4, head, targets_K, 64)
    expected_K = (reference_logits(hidden_KD * 1e4, head)).log_softmax(-1).gather(1, targets_K[:, None])[:, 0]
    torch.testing.assert_close(scores.logprobs_K.double(), expected_K, rtol=1e-4, atol=1e-1)


def test_a_tie_for_the_highest_logit_counts_as_top1() -> None:
    weight_VD = torch.zeros(130, HIDDEN)
    scores = score(torch.zeros(3, HIDDEN), Head(weight_VD), torch.tensor([0, 64, 129]), 64)
    assert scores.is_top1_K.all()


def test_no_trained_token_gives_zero_gradients() -> None:
    hidden_KD, head, targets_K = make(**HEADS["bias"])
    scores = score(hidden_KD[:0], head, targets_K[:0])
    grads = torch.autograd.grad(scores.logprobs_K.sum(), leaves(hidden_KD, head))
    assert all(not grad.any() for grad in grads)
    assert scores.logprobs_K.shape == scores.entropy_K.shape == scores.is_top1_K.shape == (0,)


def test_gradient_reaches_the_masters_of_a_cast_copy() -> None:
    hidden_KD, head, targets_K = make(torch.float32)
    copy = Head(head.weight_VD.to(torch.bfloat16))
    score(hidden_KD.to(torch.bfloat16), copy, targets_K, 64).logprobs_K.mean().backward()
    assert head.weight_VD.grad is not None
    assert head.weight_VD.grad.dtype == torch.float32
    assert head.weight_VD.grad.any()


class Recorder(TorchDispatchMode):
    """Sizes of all tensors made and the number of matmuls run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.num_matmuls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.num_matmuls += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf))])
        return out


def test_no_tensor_is_larger_than_a_block_or_the_weight() -> None:
    hidden_KD = torch.randn(1000, 8, requires_grad=True)
    weight_VD = torch.randn(5000, 8, requires_grad=True)
    targets_K = torch.randint(5000, (1000,))
    with Recorder() as recorder:
        score(hidden_KD, Head(weight_VD), targets_K, 64).logprobs_K.sum().backward()
    assert recorder.largest == 1000 * 64


@pytest.mark.parametrize(("frozen", "num_matmuls"), [(None, 4), ("hidden", 3), ("weight", 3), ("both", 1)])
def test_frozen_inputs_cost_nothing(frozen: str | None, num_matmuls: int) -> None:
    hidden_KD, head, targets_K = make()
    hidden_KD.requires_grad_(frozen not in ("hidden", "both"))
    head.weight_VD.requires_grad_(frozen not in ("weight", "both"))
    with Recorder() as recorder:
        logprobs_K = score(hidden_KD, head, targets_K).logprobs_K
        if frozen != "both":
            logprobs_K.sum().backward()
    assert recorder.num_matmuls == num_matmuls
    assert (hidden_KD.grad is None) == (frozen in ("hidden", "both"))
    assert (head.weight_VD.grad is None) == (frozen in ("weight", "both"))


def test_nothing_waits_for_the_device() -> None:
    """Meta tensors have no values: any read of one on the host would raise."""
    hidden_KD = torch.empty(5, 8, device="meta", requires_grad=True)
    weight_VD = torch.empty(300, 8, device="meta", requires_grad=True)
    scores = score(hidden_KD, Head(weight_VD, softcap=3.0), torch.empty(5, dtype=torch.int64, device="meta"), 64)
    (scores.logprobs_K.sum() + scores.mean_logprobs_K.sum()).backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad.shape == weight_VD.shape
