"""Models cut over tensor-parallel ranks against the same models in one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import native_model, tiny_config
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from burnish.config import RecipeError
from burnish.model.base import CausalLM
from burnish.model.lm_head import Head, score
from burnish.model.moe import routers_of
from burnish.parallel.degrees import Degrees
from burnish.parallel.divisible import check_tensor_parallel
from burnish.parallel.fsdp import Sharding, shard
from burnish.parallel.mesh import Mesh
from burnish.parallel.recompute import recompute_blocks
from burnish.parallel.tp import VocabularyParallel, parallelize
from burnish.types import Documents, TokenScores, UserError

LENGTHS = (7, 12, 1, 9, 3)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A model, and how it is cut and run."""

    name: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    tp: int = 2
    sequence_parallel: bool = True
    dtype: torch.dtype = torch.float64
    recompute: str = "none"
    frozen: tuple[str, ...] = ()
    noise: bool = False
    dp_shard: int = 1
    compute: torch.dtype | None = None
    """Of the activations; set, it puts fully_shard on top."""

    def __str__(self) -> str:
        return self.name


# Weights are large enough for attention to differ between tokens; where it does not, gradients of queries cancel.
QWEN3: dict[str, Any] = {"vocab_size": 203, "num_key_value_heads": 4, "initializer_range": 0.2}
# GLM-4.7-Flash's attention; its first layer is dense.
LATENT: dict[str, Any] = {"vocab_size": 203, "initializer_range": 0.2}
BIASED = QWEN3 | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
CASES = [
    Case("qwen3", "qwen3", QWEN3, sequence_parallel=False),
    Case("qwen3-sp", "qwen3", QWEN3),
    Case("qwen3-untied-sp-4", "qwen3", QWEN3 | {"tie_word_embeddings": False}, tp=4),
    Case("qwen2-4", "qwen2", QWEN3, tp=4, sequence_parallel=False),
    Case("qwen2-sp", "qwen2", QWEN3),
    Case("llama-biased", "llama", BIASED, sequence_parallel=False),
    Case("llama-biased-sp-4", "llama", BIASED, tp=4),
    Case("qwen3-moe", "qwen3_moe", QWEN3, sequence_parallel=False),
    Case("qwen3-moe-sp", "qwen3_moe", QWEN3),
    Case("latent", "glm4_moe_lite", LATENT | {"attention_bias": True}, sequence_parallel=False),
    Case("latent-sp-4", "glm4_moe_lite", LATENT, tp=4),
    Case("latent-queries-sp", "deepseek_v3", LATENT | {"q_lora_rank": None}, recompute="full"),
    Case("fp32", "qwen3", QWEN3, sequence_parallel=False, dtype=torch.float32),
    Case("fp32-sp-4", "llama", BIASED, tp=4, dtype=torch.float32),
    Case("recomputed", "qwen3", QWEN3, sequence_parallel=False, recompute="full"),
    Case("recomputed-sp", "qwen3", QWEN3, recompute="full"),
    Case("recomputed-selectively-sp", "llama", BIASED, recompute="selective"),
    Case("frozen", "qwen3", QWEN3, frozen=("model.embed_tokens", "model.layers.0", "model.layers.1.self_attn.q_norm")),
    Case("noise-sp", "qwen3", QWEN3, noise=True),
    Case("noise", "qwen3", QWEN3, noise=True, sequence_parallel=False),
    Case("sharded", "qwen3", QWEN3, sequence_parallel=False, dp_shard=2, compute=torch.float64),
    Case("sharded-sp", "llama", BIASED, dp_shard=2, compute=torch.float64, recompute="full"),
    Case("sharded-once-sp", "qwen3", QWEN3, compute=torch.float64),
    Case("sharded-fp32-sp", "qwen3", QWEN3, dp_shard=2, dtype=torch.float32, compute=torch.float32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hidden_states_scores_and_gradients_are_those_of_one_process(case: Case) -> None:
    run_ranks(case.tp * case.dp_shard, equals_one_process, case)


def equals_one_process(case: Case) -> None:
    alone = make_model(case)
    begin_step(alone)
    hidden_TD, scores = run_alone(alone, case)
    loss_of(scores).backward()

    mesh = Mesh(Degrees(tp=case.tp, dp_shard=case.dp_shard), CPU)
    model = make_model(case)
    parallelize(model, mesh.axis("tp"), case.sequence_parallel)
    assert all(isinstance(p, DTensor) or ".experts." in name for name, p in model.named_parameters())
    recompute_blocks(model.blocks(), case.recompute)
    if case.compute is not None:
        Sharding(shard(model, mesh, 3, compute=case.compute, reduce=case.compute), 3).begin(is_last=True)
    vocabulary = VocabularyParallel(mesh.axis("tp"), case.sequence_parallel)
    begin_step(model)
    for router in routers_of(model).values():
        router.part = vocabulary.cut
        router.reduce = partial(summed, case)
    tokens_T, positions_T, documents, trained_K, targets_K = make_pack()
    noise_TD = vocabulary.cut(make_noise(case.dtype)) if case.noise else None
    cut_TD = model(tokens_T, positions_T, documents, noise_TD)
    assert len(cut_TD) == len(tokens_T) // (case.tp if case.sequence_parallel else 1)
    whole_TD = vocabulary.gather(cut_TD)
    found = vocabulary.score(whole_TD[trained_K], model.head(), targets_K)
    (loss_of(found) / case.dp_shard).backward()

    check(whole_TD, hidden_TD, "hidden states")
    for name in ("logprobs_K", "logsumexp_K", "mean_logprobs_K", "entropy_K"):
        check(getattr(found, name), getattr(scores, name), name)
    assert torch.equal(found.is_top1_K, scores.is_top1_K)
    expected = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.requires_grad}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient is not None
        # Each rank has computed with all experts, of which others will take care.
        check(gradient.full_tensor() if isinstance(gradient, DTensor) else summed(case, gradient), expected[name], name)
    if case.compute is not None:
        norm_counts_each_value_once(gradients, expected)


def begin_step(model: CausalLM) -> None:
    for router in routers_of(model).values():
        router.aux, router.z = 0.1, 0.01
        router.begin(sum(LENGTHS))


def summed(case: Case, tensor: Tensor) -> Tensor:
    """Over ranks that see different tokens."""
    if case.sequence_parallel:
        dist.all_reduce(tensor)
    return tensor


def norm_counts_each_value_once(gradients: dict[str, Any], expected: dict[str, Any]) -> None:
    """With fully_shard on top no gradient is a partial sum, and copies are counted by the sizes of what is cut."""
    square = torch.zeros(())
    for gradient in gradients.values():
        # FSDP2's own _StridedShard, for what is cut by rows twice, says no to is_shard.
        sizes = [gradient.device_mesh.size(i) for i, p in enumerate(gradient.placements) if not p.is_replicate()]
        assert not any(placement.is_partial() for placement in gradient.placements)
        copies = dist.get_world_size() / torch.tensor(sizes).prod()
        square = square + gradient.to_local().square().sum() / copies
    dist.all_reduce(square)
    check(square, torch.stack([gradient.square().sum() for gradient in expected.values()]).sum(), "norm")


def check(found: Tensor, expected: Any, name: str) -> None:
    assert found.dtype == expected.dtype
    limit = 1e-10 if expected.dtype == torch.float64 else 1e-5
    difference = ((found - expected).norm() / expected.norm()).item()
    assert difference < limit, (name, difference)


def make_model(case: Case) -> CausalLM:
    model = native_model(tiny_config(case.family, **case.config), case.dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases that are not all the same
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.2 * noise.to(case.dtype))
            parameter.requires_grad_(not name.startswith(case.frozen) if case.frozen else True)
    return model


def make_pack() -> tuple[Tensor, Tensor, Documents, Tensor, Tensor]:
    tokens_T = torch.randint(203, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    positions_T = torch.cat([torch.arange(length) for length in LENGTHS])
    documents = Documents(torch.tensor([0, *LENGTHS]).cumsum(0).int(), LENGTHS)
    trained_K = torch.tensor([0, 1, 2, 5, 8, 11, 14, 17, 21, 25, 27, 29, 30])
    return tokens_T, positions_T, documents, trained_K, tokens_T[trained_K + 1]


def make_noise(dtype: torch.dtype) -> Tensor:
    return torch.rand(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def run_alone(model: CausalLM, case: Case) -> tuple[Tensor, TokenScores]:
    tokens_T, positions_T, documents, trained_K, targets_K = make_pack()
    hidden_TD = model(tokens_T, positions_T, documents, make_noise(case.dtype) if case.noise else None)
    return hidden_TD, score(hidden_TD[trained_K], model.head(), targets_K)


def loss_of(scores: TokenScores) -> Tensor:
    return (scores.logsumexp_K.square() * 0.01 - scores.logprobs_K.exp() - scores.mean_logprobs_K * 0.1).sum()


@pytest.mark.parametrize(("num_vocabulary", "num_trained"), [(203, 11), (5, 11), (203, 0)])
def test_any_head_is_scored_as_a_whole(num_vocabulary: int, num_trained: int) -> None:
    """Five tokens over four ranks leave one of them none."""
    run_ranks(4, scores_a_head, num_vocabulary, num_trained)


def scores_a_head(num_vocabulary: int, num_trained: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [(num_trained, 16), (num_vocabulary, 16), (num_vocabulary,)]
    hidden_KD, weight_VD, bias_V = (torch.randn(p, generator=generator, dtype=torch.float64) for p in parts)
    targets_K = torch.randint(num_vocabulary, (num_trained,), generator=generator)
    axis = Mesh(Degrees(tp=4), CPU).axis("tp")
    leaves = [x.clone().requires_grad_() for x in (hidden_KD, weight_VD, bias_V)]
    cut = [hidden_KD.clone(), *(distribute_tensor(x, axis, [Shard(0)]) for x in (weight_VD, bias_V))]
    cut = [x.requires_grad_() for x in cut]

    expected = score(leaves[0], Head(leaves[1], leaves[2], scale=0.7, softcap=2.0), targets_K)
    loss_of(expected).backward()
    vocabulary = VocabularyParallel(axis, sequence_parallel=False)
    found = vocabulary.score(vocabulary.gather(cut[0]), Head(cut[1], cut[2], scale=0.7, softcap=2.0), targets_K, 16)
    loss_of(found).backward()

    for name in ("logprobs_K", "logsumexp_K", "mean_logprobs_K", "entropy_K", "is_top1_K"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    for one, other in zip(cut, leaves, strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.full_tensor() if isinstance(one.grad, DTensor) else one.grad, other.grad)


def test_logits_never_exist_beyond_a_block() -> None:
    run_ranks(2, makes_no_tensor_beyond_a_block)


def makes_no_tensor_beyond_a_block() -> None:
    axis = Mesh(Degrees(tp=2), CPU).axis("tp")
    hidden_KD = torch.randn(1000, 8, requires_grad=True)
    weight_VD = distribute_tensor(torch.randn(5000, 8), axis, [Shard(0)]).requires_grad_()
    vocabulary = VocabularyParallel(axis, sequence_parallel=False)
    with Largest() as largest:
        scores = vocabulary.score(vocabulary.gather(hidden_KD), Head(weight_VD), torch.randint(5000, (1000,)), 64)
        scores.logprobs_K.sum().backward()
    assert largest.size == 1000 * 64


class Largest(TorchDispatchMode):
    """The number of values in the largest local tensor made while it is active."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x.to_local() if isinstance(x, DTensor) else x for x in tree_leaves(out) if torch.is_tensor(x)]
        self.size = max([self.size, *(x.numel() for x in made)])
        return out


def test_a_model_on_meta_is_cut_without_its_values() -> None:
    assert run_ranks(2, cuts_on_meta) == [(51, 32), (50, 32)]


def cuts_on_meta() -> tuple[int, ...]:
    from burnish.model.attention import attend_sdpa
    from burnish.model.zoo import build

    config = tiny_config("qwen3", vocab_size=101)
    model = build(config, attend_sdpa, dtype=torch.float32, device="meta")
    parallelize(model, Mesh(Degrees(tp=2), CPU).axis("tp"), sequence_parallel=True)
    model.to_empty(device="cpu")
    weight = model.get_parameter("model.embed_tokens.weight")
    assert isinstance(weight, DTensor)
    assert weight.shape == (101, 32)
    return tuple(weight.to_local().shape)


def test_an_unknown_parameter_is_refused_before_anything_is_cut() -> None:
    run_ranks(2, refuses_the_unknown)


def refuses_the_unknown() -> None:
    model = native_model(tiny_config("qwen3"), torch.float32)
    model.get_submodule("model").register_module("extra", torch.nn.Linear(2, 2, bias=False))
    with pytest.raises(UserError, match=r"parallel.tp=2.*model.extra.weight.*set parallel.tp to 1"):
        parallelize(model, Mesh(Degrees(tp=2), CPU).axis("tp"), sequence_parallel=True)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_degrees_that_divide_a_model_pass(tp: int) -> None:
    check_tensor_parallel(tiny_config("qwen3", num_key_value_heads=4), tp)


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({"num_attention_heads": 16, "num_key_value_heads": 8}, 3, "num_key_value_heads=8.*to 1, 2, 4 or 8$"),
        ({"num_key_value_heads": 1}, 2, "divide num_key_value_heads=1 .*to 1$"),
        ({"intermediate_size": 6}, 4, "divide num_key_value_heads=2, intermediate_size=6 .*to 1 or 2$"),
        ({"num_key_value_heads": None, "intermediate_size": 62}, 4, "divide intermediate_size=62 .*to 1 or 2$"),
        ({"num_key_value_heads": 3, "kv_lora_rank": 8}, 8, "divide num_attention_heads=4 .*to 1, 2 or 4$"),
        ({"num_key_value_heads": 4, "moe_intermediate_size": 2, "n_shared_experts": 1}, 4, "n_shared_experts=2 "),
    ],
)
def test_degrees_that_do_not_divide_a_model_are_refused(changes: dict[str, Any], tp: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_tensor_parallel(tiny_config("qwen3", **changes), tp)
