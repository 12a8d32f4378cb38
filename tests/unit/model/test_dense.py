"""The native decoder against transformers' own modules, on random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from burnish.model import zoo
from burnish.model.attention import attend_sdpa
from burnish.model.base import CausalLM, UnsupportedModel, model_shape
from burnish.model.dense import RMSNorm
from burnish.model.lm_head import logits
from burnish.model.rope import VARIANTS, Rope, Rotary, read_rope
from burnish.observe.flops import step_flops
from burnish.types import Documents, UserError

FAMILIES = ("llama", "qwen2", "qwen3")
LENGTH_64 = {"max_position_embeddings": 64}
ROPES = {
    "default": {},
    "theta in rope_parameters": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, **LENGTH_64},
    "dynamic, longer than trained": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 16,
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        **LENGTH_64,
    },
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        **LENGTH_64,
    },
    "yarn, all settings": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 8,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
            "truncate": False,
        },
        **LENGTH_64,
    },
    "longrope, short": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.7],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": 50,
        },
        **LENGTH_64,
    },
    "longrope, long": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.7],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        **LENGTH_64,
    },
}
FEATURES = {
    "untied head": {"tie_word_embeddings": False},
    "as many key heads as query heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "head_dim apart from hidden_size": {"head_dim": 16},
    "attention_bias": {"attention_bias": True},
}


def build(config: dict[str, object], dtype: torch.dtype = torch.float32, seed: int = 0) -> CausalLM:
    model = zoo.build(zoo.complete(config), attend_sdpa, dtype=dtype, device="cpu")
    zoo.initialise(model, seed)
    # Norms of 1 and biases of 0 would hide that one is missing; larger weights make attention sharper.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.mul_(5)
    return model


def peer_of(model: CausalLM, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model of the same config with the same weights."""
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config)).to(dtype).eval()
    missing, unexpected = peer.load_state_dict(model.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    peer.tie_weights()
    return peer


def pack(lengths: Sequence[int], vocab_size: int = 512, seed: int = 1) -> tuple[Tensor, Tensor, Documents]:
    tokens_T = torch.randint(0, vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return tokens_T, positions_T, Documents(bounds, tuple(lengths))


def all_logits(model: CausalLM, *inputs: object) -> Tensor:
    return logits(model(*inputs), model.head())


def assert_equal_logits(config: dict[str, object], lengths: Sequence[int] = (40, 13)) -> None:
    model = build(config)
    peer = peer_of(model)
    tokens_T, positions_T, documents = pack(lengths)
    with torch.no_grad():
        ours = all_logits(model, tokens_T, positions_T, documents)
        theirs = torch.cat([peer(document[None]).logits[0] for document in tokens_T.split(lengths)])
    assert ours.abs().max() > 1, "logits too small to tell anything"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_rope_variant(family: str, rope: str):
    assert_equal_logits(tiny_config(family, **ROPES[rope]))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_feature(family: str, feature: str):
    assert_equal_logits(tiny_config(family, **FEATURES[feature]))


def test_logits_with_mlp_bias():
    assert_equal_logits(tiny_config("llama", mlp_bias=True))


@pytest.mark.parametrize(
    "layers",
    [{"max_window_layers": 1}, {"layer_types": ["sliding_attention", "full_attention"]}],
    ids=["max_window_layers", "layer_types"],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_logits_with_sliding_windows(family: str, layers: dict[str, object]):
    assert_equal_logits(tiny_config(family, use_sliding_window=True, sliding_window=7, **layers))


REAL_ROPES = {
    "Llama-3.1": (
        "llama",
        131072,
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Qwen3 with YaRN": (
        "qwen3",
        131072,
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "YaRN, not truncated": (
        "llama",
        65536,
        {"rope_type": "yarn", "factor": 16.0, "truncate": False, "beta_fast": 24, "beta_slow": 2},
    ),
    "YaRN without a factor": (
        "llama",
        65536,
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096, "attention_factor": 1.2},
    ),
    "plain": ("qwen2", 32768, {"rope_type": "default", "rope_theta": 1e6}),
}


@pytest.mark.parametrize("name", REAL_ROPES)
def test_frequencies_of_real_shapes_are_those_of_transformers(name: str):
    """A tiny head has too few frequencies to show every branch of a variant."""
    family, max_positions, rope = REAL_ROPES[name]
    config = tiny_config(family, head_dim=128, max_position_embeddings=max_positions, rope_parameters=dict(rope))
    peer = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "rope_theta"})
    (rotary,) = [m for m in AutoModelForCausalLM.from_config(peer).modules() if "RotaryEmbedding" in type(m).__name__]
    ours = read_rope(config, head_dim=128)
    assert torch.equal(VARIANTS[ours.kind].frequencies(ours, 1), rotary.inv_freq)
    assert VARIANTS[ours.kind].attention_factor(ours) == pytest.approx(rotary.attention_scaling, rel=1e-12)


def test_angles_are_exact_in_float64():
    rope = read_rope(tiny_config("llama"), head_dim=8)
    positions_T = torch.tensor([0, 1, 100_003])
    documents = Documents(torch.tensor([0, 3]), (3,))
    cos_T1F, sin_T1F = Rotary(rope)(positions_T, documents, torch.float64)
    angles_TF = positions_T.double()[:, None] * VARIANTS["default"].frequencies(rope, 1).double()
    assert torch.equal(cos_T1F[:, 0], angles_TF.cos())
    assert torch.equal(sin_T1F[:, 0], angles_TF.sin())


@pytest.mark.parametrize(("rope", "lengths"), [("yarn", [1]), ("dynamic", [40, 13, 70])])
def test_frequencies_are_made_once_a_type_and_length(rope: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch):
    config, made = read_rope(tiny_config("llama", **ROPES[rope]), head_dim=8), []
    variant = VARIANTS[config.kind]

    def frequencies(rope: Rope, length: int) -> Tensor:
        made.append(length)
        return variant.frequencies(rope, length)

    monkeypatch.setitem(VARIANTS, config.kind, replace(variant, frequencies=frequencies))
    rotary, (_, positions_T, documents) = Rotary(config), pack([40, 13, 70, 13])
    # Angles of bfloat16 are float32, so the two share theirs.
    for dtype, is_new in (
        (torch.bfloat16, True),
        (torch.float32, False),
        (torch.float64, True),
        (torch.float32, False),
    ):
        fresh = Rotary(config)(positions_T, documents, dtype)
        made.clear()
        kept = rotary(positions_T, documents, dtype)
        assert made == (lengths if is_new else [])
        assert all(torch.equal(*pair) for pair in zip(kept, fresh, strict=True))


def test_norm_is_exact_in_float64():
    norm = RMSNorm(16, 1e-6).double()
    torch.nn.init.constant_(norm.weight, 0.3)
    x_TD = torch.randn(7, 16, dtype=torch.float64)
    expected = 0.3 * x_TD / (x_TD.square().sum(-1, keepdim=True) / 16 + 1e-6).sqrt()
    torch.testing.assert_close(norm(x_TD), expected, rtol=1e-14, atol=0)


def test_one_rope_variant_differs_from_another():
    inputs = pack([40])
    outputs = [all_logits(build(tiny_config("llama", **rope)), *inputs) for rope in ROPES.values()]
    distinct = [torch.stack(outputs)[:, -1].detach()]
    # Only dynamic within the trained length is the default, by definition.
    differences = torch.cdist(distinct[0], distinct[0]).fill_diagonal_(1)
    same = [tuple(pair) for pair in (differences < 1e-3).nonzero().tolist()]
    assert same == [(0, 3), (3, 0)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_gradients_equal_those_of_transformers(family: str, is_tied: bool):
    # pad_token_id makes transformers drop one embedding's gradient; packs hold no padding, so ours trains it.
    model = build(tiny_config(family, tie_word_embeddings=is_tied, pad_token_id=None))
    peer = peer_of(model)
    tokens_T, positions_T, documents = pack([33])
    weights_TV = torch.randn(33, 512, generator=torch.Generator().manual_seed(2))
    (all_logits(model, tokens_T, positions_T, documents) * weights_TV).sum().backward()
    (peer(tokens_T[None]).logits[0] * weights_TV).sum().backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        grad, reference = parameter.grad, theirs[name].grad
        assert grad is not None
        assert (grad - reference).norm() <= 5e-6 * reference.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ["default", "dynamic, longer than trained", "longrope, long"])
def test_packed_documents_equal_separate_ones(family: str, rope: str):
    model = build(tiny_config(family, **ROPES[rope]), torch.float64)
    lengths = (5, 30, 1, 17)
    tokens_T, positions_T, documents = pack(lengths)
    packed = all_logits(model, tokens_T, positions_T, documents)
    alone = [all_logits(model, tokens, *pack([len(tokens)])[1:]) for tokens in tokens_T.split(lengths)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_document_leaves_the_other_bit_identical(dtype: torch.dtype):
    model = build(tiny_config("qwen3"), dtype)
    tokens_T, positions_T, documents = pack([20, 11])
    changed_T = torch.cat([(tokens_T[:20] + 7) % 512, tokens_T[20:]])
    with torch.no_grad():
        before, after = (all_logits(model, tokens, positions_T, documents) for tokens in (tokens_T, changed_T))
    assert torch.equal(before[20:], after[20:])
    assert not torch.equal(before[:20], after[:20])


@pytest.mark.parametrize("rope", ROPES)
def test_float64_stays_float64(rope: str):
    """What float32 rounding leaves of the difference is far more than float64 itself may show."""
    config = tiny_config("qwen3", **ROPES[rope])
    exact, single = build(config, torch.float64), build(config)
    inputs = pack([40, 13])
    with torch.no_grad():
        hidden = exact(*inputs)
        assert hidden.dtype == torch.float64
        difference = (hidden - single(*inputs)).abs().max()
        repeated = exact(inputs[0][:40], inputs[1][:40], Documents(torch.tensor([0, 40]), (40,)))
    assert 1e-9 < difference < 1e-4
    torch.testing.assert_close(hidden[:40], repeated, rtol=0, atol=1e-13)


def test_bfloat16_equals_transformers_in_bfloat16():
    model = build(tiny_config("qwen3"), torch.bfloat16)
    peer = peer_of(model, torch.bfloat16)
    tokens_T, positions_T, documents = pack([40])
    with torch.no_grad():
        hidden = model(tokens_T, positions_T, documents)
        reference = peer.model(tokens_T[None]).last_hidden_state[0]
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden, reference, rtol=0, atol=0.1)
    assert (hidden - reference).float().norm() < 0.01 * reference.float().norm()


def test_noise_is_added_to_the_embeddings():
    model = build(tiny_config("llama"))
    tokens_T, positions_T, documents = pack([9])
    noise_TD = torch.randn(9, 32)
    noisy = model(tokens_T, positions_T, documents, noise_TD)
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(model.model.embed_tokens(tokens_T) + noise_TD)
    assert torch.equal(noisy, model(torch.arange(9), positions_T, documents))


def test_documents_run_packed_or_not_at_all():
    model = build(tiny_config("llama"))
    assert model.row_reason is None
    with pytest.raises(UserError, match=r"they leak.*model\.implementation=transformers"):
        model.run_rows("they leak")


def test_a_compiled_block_is_compiled_once_for_all_packs():
    torch._dynamo.reset()
    model = build(tiny_config("qwen3"))
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    for block in model.blocks():
        block.compile(backend=count, dynamic=True)
    num_graphs = []
    for lengths in ([20, 30], [7, 8, 9], [12], [3, 4, 5, 6]):
        inputs = pack(lengths)
        torch.testing.assert_close(model(*inputs), build(tiny_config("qwen3"))(*inputs))
        num_graphs.append(len(graphs))
    assert num_graphs[0] == num_graphs[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type='proportional'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 1}}, "knows no twist"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "full_attention"),
        ({"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(UnsupportedModel, match=message):
        build(tiny_config("llama", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"head_dim": None}, "no head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"layer_types": ["full_attention"]}, "1 entries for num_hidden_layers=2"),
        ({"layer_types": ["sliding_attention"] * 2}, "no window is set"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has 1 numbers; head_dim=8 needs 4",
        ),
    ],
)
def test_a_config_that_contradicts_itself_is_an_error(changes: dict[str, object], message: str):
    with pytest.raises(UserError, match=message) as caught:
        build(tiny_config("qwen3", **changes))
    assert not isinstance(caught.value, UnsupportedModel)


def test_initial_weights_depend_on_seed_and_name_alone():
    config = zoo.complete(tiny_config("qwen2", tie_word_embeddings=False))
    first, second, other = (zoo.build(config, attend_sdpa, dtype=torch.float32, device="cpu") for _ in range(3))
    torch.manual_seed(1)
    zoo.initialise(first, 5)
    torch.manual_seed(2)
    zoo.initialise(second, 5)
    zoo.initialise(other, 6)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
    weights = {name: p for name, p in first.named_parameters() if p.ndim == 2}
    assert not any(torch.equal(weight, other.get_parameter(name)) for name, weight in weights.items())
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.mlp.gate_proj.weight"])
    assert torch.cat([w.flatten() for w in weights.values()]).std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(first.get_parameter("model.norm.weight"), torch.ones(32))
    assert not first.get_parameter("model.layers.0.self_attn.q_proj.bias").any()


def test_work_counts_matrix_products_of_forward_and_backward():
    """Against torch's own count of FLOPs; it takes attention as a full square, which causality halves."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build(tiny_config("qwen3", tie_word_embeddings=False))
    tokens_T, positions_T, documents = pack([40])
    with FlopCounterMode(display=False) as counter:
        all_logits(model, tokens_T, positions_T, documents).sum().backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    matmul = sum(flops for op, flops in counted.items() if "attention" not in op)
    shape = model_shape(model)
    assert matmul == 6 * (shape.body_parameters + shape.head_parameters) * 40
    assert step_flops(shape, [40], 40) - matmul == 6 * 2 * 4 * 8 * 40**2
