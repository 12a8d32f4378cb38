"""Experts over ranks against the same experts in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import native_model, tiny_config
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from burnish.config import RecipeError
from burnish.data.pack import Layout, pack
from burnish.model import zoo
from burnish.model.attention import attend_sdpa
from burnish.model.base import CausalLM
from burnish.model.moe import Dispatch, Experts, choose_compute, dispatch_locally, routers_of
from burnish.parallel import ep, tp
from burnish.parallel.cp import ContextParallel, Kind, cut_tokens, pad
from burnish.parallel.degrees import Degrees
from burnish.parallel.ep import check_expert_parallel
from burnish.parallel.mesh import Mesh
from burnish.parallel.recompute import recompute_blocks
from burnish.parallel.weights import local_part
from burnish.types import Batch, Sample, UserError

NUM_EXPERTS, TOP_K, SIZE, INNER = 8, 2, 16, 16
Choice = Literal["any", "one", "first rank"]


def experts_of(dtype: torch.dtype) -> Experts:
    experts = Experts(NUM_EXPERTS, SIZE, INNER).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    experts.compute = choose_compute(dtype, "cpu", SIZE, INNER)
    return experts


def tokens_of(rank: int, num_tokens: int, choice: Choice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of a data rank, the experts they go to, and these experts' weights."""
    generator = torch.Generator().manual_seed(rank + 1)
    hidden_TD = torch.randn(num_tokens, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    weights_TK = torch.rand(num_tokens, TOP_K, generator=generator, dtype=torch.float64).to(dtype)
    high = {"any": NUM_EXPERTS, "one": 2, "first rank": 2}[choice]
    indices_TK = torch.rand(num_tokens, high, generator=generator).argsort(1)[:, :TOP_K]
    if choice == "one":
        indices_TK = torch.tensor([5, 2]).expand(num_tokens, TOP_K).contiguous()
    return hidden_TD, indices_TK, weights_TK


def run_dispatch(dispatch: Dispatch, tokens: tuple[Tensor, Tensor, Tensor], experts: Experts) -> list[Tensor]:
    """Output, gradients of hidden states and weights, and of the experts."""
    hidden_TD, indices_TK, weights_TK = tokens
    hidden_TD, weights_TK = hidden_TD.requires_grad_(), weights_TK.requires_grad_()
    output_TD = dispatch(hidden_TD, indices_TK, weights_TK, experts)
    factor_TD = torch.linspace(0.1, 1, output_TD.numel(), dtype=output_TD.dtype).view_as(output_TD)
    inputs = (hidden_TD, weights_TK, *experts.parameters())
    return [output_TD.detach(), *torch.autograd.grad((output_TD * factor_TD).sum(), inputs)]


def dispatch_on_ranks(numbers: list[int], choice: Choice, dtype: torch.dtype) -> list[Tensor]:
    rank = dist.get_rank()
    mesh = Mesh(Degrees(dp_shard=len(numbers), ep=len(numbers)), torch.device("cpu"))
    experts = experts_of(dtype)
    ep.cut(experts, mesh)
    tokens = tokens_of(rank, numbers[rank], choice, dtype)
    found = run_dispatch(ep.ExpertRanks(mesh.group("ep"), None).dispatch, tokens, experts)
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in found]


@pytest.mark.parametrize(
    ("numbers", "choice", "dtype", "tolerance"),
    [
        ([7, 12], "any", torch.float64, 1e-13),
        ([7, 12, 0, 3], "any", torch.float64, 1e-13),
        ([7, 12, 5, 3], "one", torch.float64, 1e-13),
        ([7, 12, 5, 3], "first rank", torch.float64, 1e-13),
        ([7, 12, 0, 3], "first rank", torch.float32, 1e-5),
    ],
)
def test_dispatch_over_ranks_is_the_local_one(numbers: list[int], choice: Choice, dtype: torch.dtype, tolerance: float):
    """With uneven tokens, ranks that have or get none, and all tokens to two experts."""
    by_rank = run_ranks(len(numbers), dispatch_on_ranks, numbers, choice, dtype)
    experts = experts_of(dtype)
    summed = [torch.zeros_like(parameter) for parameter in experts.parameters()]
    for rank, number in enumerate(numbers):
        expected = run_dispatch(dispatch_locally, tokens_of(rank, number, choice, dtype), experts)
        for found, reference in zip(by_rank[rank][:3], expected[:3], strict=True):
            torch.testing.assert_close(found, reference, rtol=0, atol=tolerance)
        summed = [total + gradient for total, gradient in zip(summed, expected[3:], strict=True)]
    for found, reference in zip(by_rank[0][3:], summed, strict=True):
        torch.testing.assert_close(found, reference, rtol=tolerance, atol=tolerance)


LENGTHS = (9, 4, 12)


@dataclass(frozen=True)
class Case:
    name: str
    degrees: Degrees
    sequence_parallel: bool = False
    family: str = "qwen3_moe"
    cp_kind: Kind = "ring"
    is_sharded: bool = False
    is_recomputed: bool = False
    is_lopsided: bool = False
    """Whether all tokens go to the first two experts, which the first rank has."""

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("ep", Degrees(dp_shard=2, ep=2)),
    Case("ep-and-expert-dp-sharded", Degrees(dp_shard=4, ep=2), is_sharded=True),
    Case("ep-4-latent-recomputed", Degrees(dp_shard=4, ep=4), family="glm4_moe_lite", is_recomputed=True),
    Case("tp", Degrees(tp=2)),
    Case("tp-ep", Degrees(tp=2, ep=2)),
    Case("tp-ep-sp", Degrees(tp=2, ep=2), sequence_parallel=True),
    Case("tp-etp", Degrees(tp=2, etp=2)),
    Case("tp-etp-sp", Degrees(tp=2, etp=2), sequence_parallel=True),
    Case("dp-tp-ep-etp", Degrees(dp_shard=2, tp=2, ep=2, etp=2), family="deepseek_v3"),
    Case("dp-tp-ep-etp-sp-sharded", Degrees(dp_shard=2, tp=2, ep=2, etp=2), sequence_parallel=True, is_sharded=True),
    Case("dp-tp-etp-sp-sharded", Degrees(dp_shard=2, tp=2, etp=2), sequence_parallel=True, is_sharded=True),
    Case("dp-tp-ep-4-sp", Degrees(dp_shard=2, tp=2, ep=4), sequence_parallel=True, family="glm4_moe_lite"),
    Case("cp-ep", Degrees(cp=2, ep=2)),
    Case("ep-idle", Degrees(dp_shard=2, ep=2), family="glm4_moe_lite", is_lopsided=True),
    Case("ep-idle-sharded", Degrees(dp_shard=4, ep=2), family="glm4_moe_lite", is_sharded=True, is_lopsided=True),
    Case("tp-ep-idle-sp", Degrees(tp=2, ep=2), sequence_parallel=True, family="glm4_moe_lite", is_lopsided=True),
    Case("cp-tp-ep-sp", Degrees(cp=2, tp=2, ep=2), sequence_parallel=True, cp_kind="all_to_all"),
]


def config_of(case: Case) -> dict[str, Any]:
    changes = {} if case.family == "qwen3_moe" else {"num_key_value_heads": 4}
    return tiny_config(case.family, **changes)


def model_of(case: Case) -> CausalLM:
    model = native_model(config_of(case), torch.float64)
    for router in routers_of(model).values() if case.is_lopsided else ():
        router.gate.e_score_correction_bias[:2] = 9.0
    return model


def batch_of(data_rank: int) -> Batch:
    random = np.random.default_rng(data_rank)
    weights = [np.ones(length, np.float32) for length in LENGTHS]
    for weight in weights:
        weight[0] = 0
    samples = [Sample(random.integers(0, 512, len(w)).astype(np.int32), w, index=i) for i, w in enumerate(weights)]
    return pack(samples, Layout(sum(LENGTHS))).batches[0][0]


def factors_of(data_rank: int) -> Tensor:
    """What hidden states are weighed by in a loss."""
    return torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(data_rank), dtype=torch.float64)


def begin(model: CausalLM, case: Case) -> None:
    for router in routers_of(model).values():
        router.aux, router.z = 0.1, 0.01
        router.begin(sum(LENGTHS) * case.degrees.dp_shard)


def one_process(case: Case) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gradients of the sum of all data ranks' losses, and how often each expert was chosen."""
    model = model_of(case)
    begin(model, case)
    for data_rank in range(case.degrees.dp_shard):
        batch = batch_of(data_rank)
        hidden_TD = model(batch.tokens_T, batch.positions_T, batch.documents)
        (hidden_TD * factors_of(data_rank)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, [router.counts_E for router in routers_of(model).values()]


def equals_one_process(case: Case) -> None:
    expected, expected_counts = one_process(case)
    mesh = Mesh(case.degrees, torch.device("cpu"))
    degrees = case.degrees
    cp = ContextParallel(mesh.group("cp"), case.cp_kind) if degrees.cp > 1 else None
    model = zoo.build(config_of(case), cp.kernel(attend_sdpa) if cp else attend_sdpa, dtype=torch.float64, device="cpu")
    model.load_state_dict(model_of(case).state_dict())
    if degrees.tp > 1:
        tp.parallelize(model, mesh.axis("tp"), case.sequence_parallel)
    ep.parallelize(model, mesh, case.sequence_parallel)
    recompute_blocks(model.blocks(), "full" if case.is_recomputed else "none")
    if case.is_sharded:
        shard_with_sums(model, mesh)
    begin(model, case)

    batch = batch_of(mesh.data_rank)
    if cp or case.sequence_parallel:
        batch = pad(batch, (cp.multiple if cp else 1) * degrees.tp)
    batch = cp.cut(batch) if cp else batch
    factors_TD = cut_tokens(factors_of(mesh.data_rank), batch.documents)
    if case.sequence_parallel:
        factors_TD = factors_TD.chunk(degrees.tp)[mesh.place["tp"]]
    hidden_TD = model(batch.tokens_T, batch.positions_T, batch.documents)
    (hidden_TD * factors_TD).sum().backward()

    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        total = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        if not case.is_sharded:
            group = mesh.expert_shards.get_group() if ".experts." in name else mesh.group("shard")
            dist.all_reduce(total, group=group)
        assert (total - expected[name]).norm() <= 1e-10 * expected[name].norm(), name
    for router, counts_E in zip(routers_of(model).values(), expected_counts, strict=True):
        dist.all_reduce(router.counts_E)
        copies = degrees.tp if not case.sequence_parallel else 1
        assert torch.equal(router.counts_E, counts_E * copies)


def shard_with_sums(model: CausalLM, mesh: Mesh) -> None:
    for module in model.modules():
        if isinstance(module, Experts):
            fully_shard(module, mesh=mesh.expert_shards)
    for block in model.blocks():
        fully_shard(block, mesh=mesh.shards)
    fully_shard(model, mesh=mesh.shards)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_has_the_gradients_of_one_process(case: Case):
    """With the routers' losses in them, padding where tokens are cut, and experts that get no token anywhere."""
    run_ranks(case.degrees.world, equals_one_process, case)


def draw_experts() -> list[tuple[int, ...]]:
    """The shapes of all tensors that a rank draws for its part of a model."""
    config, mesh, shapes = tiny_config("qwen3_moe"), Mesh(Degrees(dp_shard=2, ep=2), torch.device("cpu")), []
    model = zoo.build(config, attend_sdpa, dtype=torch.float32, device="meta")
    ep.parallelize(model, mesh, False)
    model.to_empty(device="cpu")
    normal = torch.normal

    def recorded(mean: float, deviation: float, shape: tuple[int, ...], **options: Any) -> Tensor:
        shapes.append(shape)
        return normal(mean, deviation, shape, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "normal", recorded)
        zoo.initialise(model, 0, local_part)
    whole = dict(native_model(config, torch.float32).named_parameters())
    for name, parameter in model.named_parameters():
        local, box = local_part(parameter)
        assert torch.equal(local, whole[name][box]), name
    return shapes


def test_a_rank_draws_its_own_experts_alone():
    """What it draws are single experts, the same as in one process."""
    for shapes in run_ranks(2, draw_experts):
        assert shapes.count((2, 16, 32)) == 2 * NUM_EXPERTS // 2  # of two layers
        assert shapes.count((32, 16)) == 2 * NUM_EXPERTS // 2
        assert max(map(len, shapes)) == 3


def test_experts_that_ranks_cannot_share_are_refused():
    config = tiny_config("qwen3_moe")  # 8 experts of 16 columns
    check_expert_parallel(config, Degrees(dp_shard=8, ep=8))
    check_expert_parallel(tiny_config(), Degrees(dp_shard=8))
    with pytest.raises(RecipeError, match=r"parallel.ep=3 does not divide .* 8 experts.*set parallel.ep to 1 or 2"):
        check_expert_parallel(config, Degrees(dp_shard=6, ep=3))
    with pytest.raises(RecipeError, match=r"parallel.etp=3 does not divide moe_intermediate_size=16.*set .*etp to 1"):
        check_expert_parallel(config, Degrees(tp=3, etp=3))
    with pytest.raises(RecipeError, match=r"parallel.ep=2 and etp=1 cut experts, and this model has none"):
        check_expert_parallel(tiny_config(), Degrees(dp_shard=2, ep=2))


def refused_without_experts() -> str:
    model = native_model(tiny_config(), torch.float64)
    with pytest.raises(UserError) as caught:
        ep.parallelize(model, Mesh(Degrees(dp_shard=2, ep=2), torch.device("cpu")), False)
    return str(caught.value)


def test_a_model_whose_experts_are_unknown_is_refused():
    assert "parallel.ep=2 and etp=1: nothing is known" in run_ranks(2, refused_without_experts)[0]
