"""Decoders with experts against transformers, and their routers against definitions written out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import random_peer, tiny_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from burnish.config import ModelConfig
from burnish.model import zoo
from burnish.model.attention import attend_sdpa
from burnish.model.base import UnsupportedModel, model_shape, saved_buffers
from burnish.model.hf_io import named_weights, read_config, read_weights
from burnish.model.lm_head import logits
from burnish.model.moe import (
    Experts,
    Gate,
    MoELM,
    MoEShape,
    Router,
    choose_compute,
    compute_grouped,
    compute_grouped_eagerly,
    compute_one_by_one,
    dispatch_locally,
    load_of,
    read_moe_shape,
    routers_of,
)
from burnish.model.probe import leak_tolerance, probe_isolation
from burnish.types import Documents, UserError

FAMILIES = ("qwen3_moe", "glm4_moe_lite", "deepseek_v3")
LENGTHS = (40, 13)


def documents_of(lengths: Sequence[int], *, has_padding: bool = False, here_T: Tensor | None = None) -> Documents:
    return Documents(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), tuple(lengths), has_padding, here_T)


def pack(lengths: Sequence[int], seed: int = 1) -> tuple[Tensor, Tensor, Documents]:
    tokens_T = torch.randint(0, 512, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return tokens_T, torch.cat([torch.arange(length) for length in lengths]), documents_of(lengths)


def saved(peer: nn.Module, folder: Path) -> Path:
    peer.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> MoELM:
    config = ModelConfig(path=str(folder), implementation="native")
    model = zoo.load_model(config, device="cpu", dtype=dtype, compute_dtype=dtype, seed=0).model
    assert isinstance(model, MoELM)
    return model


def native(family: str, dtype: torch.dtype = torch.float64, **changes: object) -> MoELM:
    """Our model with weights large enough that routing and attention are sharp."""
    model = zoo.build(tiny_config(family, **changes), attend_sdpa, dtype=dtype, device="cpu")
    zoo.initialise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    assert isinstance(model, MoELM)
    return model


def their_logits(peer: nn.Module, tokens_T: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([peer(document[None]).logits[0] for document in tokens_T.split(list(lengths))])


def assert_equal_logits(model: MoELM, peer: nn.Module) -> None:
    tokens_T, positions_T, documents = pack(LENGTHS)
    with torch.no_grad():
        ours = logits(model(tokens_T, positions_T, documents), model.head())
        theirs = their_logits(peer, tokens_T, LENGTHS)
    assert theirs.abs().max() > 1, "logits too small to tell anything"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_weights_there_and_back(family: str, tmp_path: Path):
    peer = random_peer(tiny_config(family))
    model = loaded(saved(peer, tmp_path / "theirs"))
    assert_equal_logits(model, peer)
    (tmp_path / "ours").mkdir()
    model.export(tmp_path / "ours", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs = peer.state_dict()
    assert again.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [{"norm_topk_prob": False}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"moe_intermediate_size": 18}],
    ids=str,
)
def test_logits_of_qwen3_features(changes: dict[str, object], tmp_path: Path):
    peer = random_peer(tiny_config("qwen3_moe", **changes))
    assert_equal_logits(loaded(saved(peer, tmp_path)), peer)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers(family: str, tmp_path: Path):
    peer = random_peer(tiny_config(family))
    model = loaded(saved(peer, tmp_path))
    tokens_T, positions_T, documents = pack(LENGTHS)
    towards = torch.randn(sum(LENGTHS), 512, generator=torch.Generator().manual_seed(3)) / 50
    (logits(model(tokens_T, positions_T, documents), model.head()) * towards).sum().backward()
    (their_logits(peer, tokens_T, LENGTHS) * towards).sum().backward()
    theirs = dict(peer.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        expected = theirs[name].grad
        assert expected is not None
        expected = expected.view(parameter.shape)
        assert expected.norm() > 1e-6, name
        assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_checkpoints_are_read_and_written_as_such(family: str, tmp_path: Path):
    peer = random_peer(tiny_config(family))
    separate = loaded(saved(peer, tmp_path / "theirs"))
    save_file(peer.state_dict(), tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    stacked = loaded(tmp_path / "theirs")
    ours = named_weights(separate)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in named_weights(stacked).items())
    (tmp_path / "ours").mkdir()
    stacked.export(tmp_path / "ours", torch.float32)
    with (
        safe_open(tmp_path / "ours" / "model.safetensors", "pt") as written,
        safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as read,
    ):
        assert set(written.keys()) == set(read.keys())
    assert_equal_logits(stacked, AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_part_of_the_experts_is_read_alone(is_whole: bool, tmp_path: Path):
    peer = random_peer(tiny_config("qwen3_moe"))
    model = loaded(saved(peer, tmp_path))
    if is_whole:
        save_file(peer.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    part = zoo.build(zoo.complete(read_config(tmp_path)), attend_sdpa, dtype=torch.float32, device="cpu")
    boxes = {  # experts 2 to 4, and of each the inner rows 4 to 11
        "gate_up_proj": (slice(2, 5), slice(0, 2), slice(4, 12), slice(0, 32)),
        "down_proj": (slice(2, 5), slice(0, 32), slice(4, 12)),
    }
    locals_: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in part.named_parameters()}

    def part_of(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
        name = names.get(id(tensor), "")
        last = name.rpartition(".")[2]
        if ".experts." not in name:
            return tensor, tuple(slice(0, size) for size in tensor.shape)
        box = boxes[last]
        locals_[name] = torch.full([side.stop - side.start for side in box], torch.nan)
        return locals_[name], box

    read_weights(tmp_path, part, part_of=part_of)
    whole = dict(model.named_parameters())
    assert len(locals_) == 4
    for name, local in locals_.items():
        assert torch.equal(local, whole[name][boxes[name.rpartition(".")[2]]]), name


def test_a_missing_expert_is_named(tmp_path: Path):
    peer = random_peer(tiny_config("qwen3_moe"))
    saved(peer, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        loaded(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_of_a_pack_do_not_see_each_other(family: str):
    model = native(family)
    result = probe_isolation(
        model, vocab_size=512, device="cpu", leak_tolerance=leak_tolerance(model.config), restart_tolerance=1e-9
    )
    assert result.reason is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_matmuls_are_those_of_each_expert(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    counts_E = torch.tensor([5, 0, 11, 1])
    rows_RD, gate_up, down, towards = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((17, 32), (4, 2, 16, 32), (4, 32, 16), (17, 32))
    )
    outcomes = []
    for compute, wide in ((compute_grouped, dtype), (compute_one_by_one, torch.float64)):
        inputs = [tensor.to(wide, copy=True).requires_grad_() for tensor in (rows_RD, gate_up, down)]
        output = compute(inputs[0], counts_E, inputs[1], inputs[2])
        output.backward(towards.to(wide))
        outcomes.append([output, *(tensor.grad for tensor in inputs)])
    for ours, exact in zip(*outcomes, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * exact.norm()


def test_the_kernel_is_chosen_by_type_and_size():
    assert choose_compute(torch.bfloat16, "cuda", 32, 16) is compute_grouped
    assert choose_compute(torch.bfloat16, "cpu", 32, 12) is compute_one_by_one
    assert choose_compute(torch.float32, "cpu", 32, 12) is compute_grouped_eagerly
    assert choose_compute(torch.float32, "cuda", 32, 12) is compute_one_by_one
    assert choose_compute(torch.float64, "cpu", 32, 16) is compute_one_by_one
    model = zoo.build(tiny_config("qwen3_moe"), attend_sdpa, dtype=torch.float64, device="meta", compute=torch.bfloat16)
    computes = [module.compute for module in model.modules() if isinstance(module, Experts)]
    assert computes == [compute_grouped, compute_grouped]


def test_dispatch_adds_up_each_tokens_experts():
    experts = Experts(4, 6, 5).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, generator=generator)
    hidden_TD = torch.randn(7, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    weights_TK = torch.rand(7, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    indices_TK = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(7)])  # the last one has none

    def run(hidden_TD: Tensor, weights_TK: Tensor, *_: Tensor) -> Tensor:
        return dispatch_locally(hidden_TD, indices_TK, weights_TK, experts)

    def one(x_D: Tensor, expert: int) -> Tensor:
        gate, up = experts.gate_up_proj[expert]
        return experts.down_proj[expert] @ (nn.functional.silu(gate @ x_D) * (up @ x_D))

    expected = torch.stack(
        [sum((w * one(x, e) for w, e in zip(ws, es, strict=True)), torch.zeros(6)) for x, ws, es in
         zip(hidden_TD, weights_TK, indices_TK.tolist(), strict=True)]
    )  # fmt: skip
    torch.testing.assert_close(run(hidden_TD, weights_TK), expected, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(run, (hidden_TD, weights_TK, *experts.parameters()))


# Routers.

SHAPES = {
    "softmax": MoEShape(num_experts=6, top_k=2, intermediate_size=4, normalises=True, is_sparse=(True,)),
    "sigmoid": MoEShape(
        num_experts=6, top_k=2, intermediate_size=4, normalises=True, is_sparse=(True,), scores="sigmoid", scale=1.5
    ),
}


def router_of(scores: str, aux: float = 0.0, z: float = 0.0) -> Router:
    shape = SHAPES[scores]
    router = Router(Gate(4, shape.num_experts, shape.scores), shape)
    router.aux, router.z = aux, z
    return router


def random_logits(num_tokens: int) -> Tensor:
    return 2 * torch.randn(num_tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def defined_losses(scores: str, logits_TE: Tensor, indices_TK: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both losses summed over tokens, by their definitions."""
    shape, start, aux = SHAPES[scores], 0, torch.zeros((), dtype=torch.float64)
    for length in lengths:
        chosen = indices_TK[start : start + length].flatten().tolist()
        of_document = logits_TE[start : start + length]
        for expert in range(shape.num_experts):
            if scores == "softmax":
                share, factor = chosen.count(expert) / length, shape.num_experts
                mean = of_document.softmax(-1)[:, expert].mean()
            else:
                share, factor = chosen.count(expert) / length, shape.num_experts / shape.top_k
                mean = (of_document.sigmoid()[:, expert] / of_document.sigmoid().sum(-1)).mean()
            aux = aux + length * factor * share * mean
        start += length
    z = logits_TE[: sum(lengths)].exp().sum(-1).log().square().sum()
    return aux, z


@pytest.mark.parametrize("scores", SHAPES)
def test_losses_and_their_gradients_follow_the_definitions(scores: str):
    lengths = (7, 1, 12)
    router, logits_TE = router_of(scores, aux=0.3, z=0.02), random_logits(20).requires_grad_()
    router.begin(50)
    indices_TK, weights_TK = router(logits_TE, documents_of(lengths))
    (weights_TK * 0).sum().backward()
    exact_TE = logits_TE.detach().clone().requires_grad_()
    aux, z = defined_losses(scores, exact_TE, indices_TK, lengths)
    ((0.3 * aux + 0.02 * z) / 50).backward()
    torch.testing.assert_close(logits_TE.grad, exact_TE.grad, rtol=1e-12, atol=1e-15)
    assert router.aux_sum.item() == pytest.approx(aux.item(), rel=1e-12)
    assert router.z_sum.item() == pytest.approx(z.item(), rel=1e-12)
    assert router.counts_E.tolist() == [(indices_TK == expert).sum().item() for expert in range(6)]


@pytest.mark.parametrize(("scores", "value"), [("softmax", 2.0), ("sigmoid", 1.0)])
def test_a_balanced_load_has_the_stated_loss(scores: str, value: float):
    router = router_of(scores, aux=1.0)
    router.begin(6)
    near_even = 1e-9 * torch.eye(6, dtype=torch.float64)
    near_even += 1e-9 * near_even.new_tensor(torch.eye(6).roll(1, 1).tolist())
    router(near_even, documents_of([6]))
    assert router.counts_E.tolist() == [2] * 6
    assert router.aux_sum.item() / 6 == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("scores", SHAPES)
def test_losses_leave_the_weights_alone(scores: str):
    logits_TE, documents = random_logits(9), documents_of([9])
    with_losses, without = router_of(scores, aux=0.3, z=0.02), router_of(scores)
    with_losses.begin(9)
    ours, plain = with_losses(logits_TE, documents), without(logits_TE, documents)
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])


@pytest.mark.parametrize("scores", SHAPES)
def test_no_cut_changes_losses(scores: str):
    """One pack, a pack a document, and two ranks with half of a padded pack each, in no order: one gradient."""
    lengths = (7, 1, 12)

    def run(router: Router, logits_TE: Tensor, documents: Documents) -> None:
        _, weights_TK = router(logits_TE, documents)
        (weights_TK[:, 0] * weights_TK[:, 1]).sum().backward()

    def routers(number: int) -> list[Router]:
        made = [router_of(scores, aux=0.3, z=0.02) for _ in range(number)]
        for router in made:
            router.begin(20)
        return made

    (packed,) = routers(1)
    logits_TE = random_logits(24).requires_grad_()
    padding = documents_of((*lengths, 4), has_padding=True)
    weights_TK = packed(logits_TE, padding)[1]
    (weights_TK[:20, 0] * weights_TK[:20, 1]).sum().backward()
    assert logits_TE.grad is not None
    assert not logits_TE.grad[20:].any()

    (apart,) = routers(1)
    apart_TE = logits_TE.detach()[:20].clone().requires_grad_()
    for piece, length in zip(apart_TE.split(lengths), lengths, strict=True):
        run(apart, piece, documents_of([length]))
    torch.testing.assert_close(apart_TE.grad, logits_TE.grad[:20], rtol=1e-12, atol=1e-15)

    ranks = routers(2)
    places = torch.randperm(24, generator=torch.Generator().manual_seed(0)).split(12)
    counts: list[Tensor] = []
    for router, here_T in zip(ranks, places, strict=True):
        router.reduce = lambda counts_NE: counts.append(counts_NE) or counts_NE
        router(logits_TE.detach()[here_T], documents_of((*lengths, 4), has_padding=True, here_T=here_T))
        router.reduce = lambda counts_NE: counts[0] + counts[1]
        router.begin(20)
    cut_TE = logits_TE.detach().clone().requires_grad_()
    for router, here_T in zip(ranks, places, strict=True):
        documents = documents_of((*lengths, 4), has_padding=True, here_T=here_T)
        _, weights_TK = router(cut_TE[here_T], documents)
        ((weights_TK[:, 0] * weights_TK[:, 1])[here_T < 20]).sum().backward()
    torch.testing.assert_close(cut_TE.grad, logits_TE.grad, rtol=1e-12, atol=1e-15)

    for name in ("counts_E", "aux_sum", "z_sum"):
        whole = getattr(packed, name)
        torch.testing.assert_close(getattr(apart, name), whole)
        torch.testing.assert_close(getattr(ranks[0], name) + getattr(ranks[1], name), whole)
    assert packed.counts_E.sum() == 2 * 20


def test_a_router_may_see_a_part_of_the_tokens_at_hand():
    logits_TE, documents = random_logits(20), documents_of((7, 13))
    whole, half = router_of("softmax", aux=0.3), router_of("softmax", aux=0.3)
    whole.begin(20)
    half.begin(20)
    whole(logits_TE, documents)
    sums: list[Tensor] = []
    half.reduce = lambda counts_NE: sums.append(counts_NE) or counts_NE
    for places in (slice(0, 10), slice(10, 20)):
        half.part = lambda tensor_T, places=places: tensor_T[places]
        half(logits_TE[places], documents)
    assert torch.equal(half.counts_E, whole.counts_E)
    assert torch.equal((sums[0] + sums[1]).sum(0), whole.counts_E)


@pytest.mark.parametrize("family", FAMILIES)
def test_packs_and_recomputation_change_no_gradient_and_no_count(family: str):
    def run(packs: Sequence[Sequence[int]], recomputes: bool) -> tuple[dict[str, Tensor], list[Router]]:
        model = native(family)
        routers = [*routers_of(model).values()]
        tokens_T = pack([40, 13, 22])[0]
        if recomputes:
            for block in model.blocks():
                forward = block.forward
                block.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)
        for router in routers:
            router.aux, router.z = 0.1, 0.01
            router.begin(75)
        start = 0
        for lengths in packs:
            _, positions_T, documents = pack(lengths)
            hidden_TD = model(tokens_T[start : start + sum(lengths)], positions_T, documents)
            (hidden_TD**3).sum().backward()
            start += sum(lengths)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, routers

    expected, routers = run([[40, 13, 22]], recomputes=False)
    for packs, recomputes in (([[40], [13, 22]], False), ([[40, 13, 22]], True), ([[40, 13], [22]], True)):
        gradients, others = run(packs, recomputes)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).norm() <= 1e-10 * expected[name].norm(), name
        for router, other in zip(routers, others, strict=True):
            assert router.counts_E.sum() == 75 * 2
            for name in ("counts_E", "aux_sum", "z_sum"):
                torch.testing.assert_close(getattr(other, name), getattr(router, name), rtol=1e-10, atol=0)


def test_nothing_is_counted_outside_of_training():
    model = native("qwen3_moe")
    inputs = pack(LENGTHS)
    model(*inputs)
    (first, *_) = routers_of(model).values()
    assert not first.counts_E.any()
    first.begin(53)
    with torch.no_grad():
        model(*inputs)
    assert not first.counts_E.any()
    model(*inputs)
    assert first.counts_E.sum() == 53 * 2
    first.begin(53)
    assert not first.counts_E.any()


def test_the_bias_follows_the_load():
    router = router_of("sigmoid")
    router.gate.e_score_correction_bias.fill_(0.5)
    router.update_bias(0.001, torch.tensor([4, 0, 2, 2, 3, 1]))
    expected = torch.tensor([0.499, 0.501, 0.5, 0.5, 0.499, 0.501])
    torch.testing.assert_close(router.gate.e_score_correction_bias, expected, rtol=0, atol=1e-7)


def test_steps_of_the_bias_even_out_the_load():
    router, logits_TE = router_of("sigmoid"), random_logits(200) + torch.linspace(0, 3, 6, dtype=torch.float64)
    before = None
    for _ in range(200):
        router.begin(200)
        router(logits_TE.requires_grad_(), documents_of([200]))
        before = before or load_of(router.counts_E)[0]
        router.update_bias(0.01, router.counts_E)
    assert before is not None
    assert load_of(router.counts_E)[0] < 1.25 < 1.5 < before


def test_the_load_of_experts_is_measured_in_means():
    assert load_of(torch.tensor([3, 3, 3, 3])) == (1.0, 0.0)
    assert load_of(torch.tensor([12, 0, 0, 0])) == (4.0, 0.75)
    assert load_of(torch.zeros(4, dtype=torch.int64))[0] == 0.0


def test_dense_models_have_no_routers():
    model = zoo.build(tiny_config("qwen3"), attend_sdpa, dtype=torch.float32, device="meta")
    assert not routers_of(model)


# Configs, first weights, counts.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_experts_per_tok": 9}, UserError, "num_experts_per_tok=9"),
        ({"num_experts_per_tok": None}, UserError, "num_experts_per_tok"),
        ({"num_experts": None}, UserError, "num_experts"),
        ({"use_sliding_window": True, "sliding_window": 8}, UnsupportedModel, "use_sliding_window"),
        ({"shared_expert_intermediate_size": 8}, UnsupportedModel, "shared_expert_intermediate_size"),
    ],
)
def test_configs_that_are_not_computed_are_refused(changes: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        zoo.build(tiny_config("qwen3_moe", **changes), attend_sdpa, dtype=torch.float32, device="meta")


def test_which_layers_have_experts():
    config = tiny_config("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert read_moe_shape(config).is_sparse == (False, True, False, False, False, True)
    assert read_moe_shape(config | {"num_experts": None, "num_local_experts": 4}).num_experts == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_first_weights(family: str):
    model = zoo.build(tiny_config(family), attend_sdpa, dtype=torch.bfloat16, device="cpu")
    zoo.initialise(model, 0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.ndim > 1:
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.2), name
        else:
            assert (parameter == 1).all(), name
    corrections = saved_buffers(model)
    assert len(corrections) == (0 if family == "qwen3_moe" else 2)
    for correction in corrections.values():
        assert correction.dtype == torch.float32
        assert not correction.any()


def test_a_token_is_counted_with_its_own_experts():
    config = tiny_config("qwen3_moe", num_hidden_layers=1)
    attention = 2 * 32 * 32 + 2 * 32 * 16
    experts, gate = 2 * (3 * 32 * 16), 8 * 32
    shape = model_shape(zoo.build(config, attend_sdpa, dtype=torch.float32, device="meta"))
    assert shape.body_parameters == attention + experts + gate
    assert (shape.num_heads, shape.head_dim) == (4, 8)
