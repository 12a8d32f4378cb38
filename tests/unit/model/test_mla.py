"""Latent attention and the models of it against transformers, feature by feature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_moe import assert_equal_logits, documents_of, loaded, native, pack, saved
from tiny import random_peer, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from burnish.config import ModelConfig
from burnish.model import zoo
from burnish.model.attention import attend_sdpa
from burnish.model.base import UnsupportedModel, model_shape, saved_buffers
from burnish.model.hf_io import read_config
from burnish.model.mla import read_sigmoid_moe
from burnish.model.moe import routers_of
from burnish.types import UserError

FAMILIES = ("glm4_moe_lite", "deepseek_v3")
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
FEATURES = {
    "queries without a latent": {"q_lora_rank": None},
    "pairs half a head apart": {"rope_interleave": False},
    "biases": {"attention_bias": True},
    "values smaller than keys": {"v_head_dim": 4},
    "values larger than keys": {"v_head_dim": 20},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 64},
    "yarn without mscale_all_dim": {
        "rope_scaling": {key: value for key, value in YARN.items() if "mscale" not in key},
        "max_position_embeddings": 64,
    },
    "weights as they are": {"norm_topk_prob": False},
    "two shared experts": {"n_shared_experts": 2},
    "groups": {"n_group": 2, "topk_group": 1},
    "tied head": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_feature(family: str, feature: str, tmp_path: Path):
    peer = random_peer(tiny_config(family, **FEATURES[feature]))
    assert_equal_logits(loaded(saved(peer, tmp_path)), peer)


@pytest.mark.parametrize("feature", FEATURES)
def test_no_feature_is_without_effect(feature: str):
    """Else the test above would pass where both sides ignore it."""
    config = tiny_config("deepseek_v3")
    changed = config | FEATURES[feature]
    models = [zoo.build(c, attend_sdpa, dtype=torch.float64, device="cpu") for c in (config, changed)]
    outputs = []
    for model in models:
        zoo.initialise(model, 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.fill_(0.1)
            outputs.append(model(*pack([40])))
    assert not torch.allclose(*outputs, rtol=1e-6, atol=1e-9) or feature == "tied head"
    if feature == "tied head":
        assert not hasattr(models[1], "lm_head")


def test_the_config_on_the_hub():
    """As GLM-4.7-Flash's is written: older names for rotary positions, a further layer for prediction."""
    hub = {
        "architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "pad_token_id": 154820, "eos_token_id": [154820, 154827, 154829], "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 10240, "max_position_embeddings": 202752, "model_type": "glm4_moe_lite",
        "moe_intermediate_size": 1536, "topk_method": "noaux_tc", "norm_topk_prob": True, "num_attention_heads": 20,
        "n_group": 1, "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "routed_scaling_factor": 1.8,
        "num_experts_per_tok": 4, "first_k_dense_replace": 1, "num_hidden_layers": 47, "num_key_value_heads": 20,
        "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 1000000, "tie_word_embeddings": False, "dtype": "bfloat16", "transformers_version": "5.0.0rc0",
        "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
        "vocab_size": 154880,
    }  # fmt: skip
    model = zoo.build(hub, attend_sdpa, dtype=torch.bfloat16, device="meta")
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hub))
    theirs = {name: parameter.numel() for name, parameter in peer.named_parameters()}
    assert {name: parameter.numel() for name, parameter in model.named_parameters()} == theirs
    assert model.config["num_nextn_predict_layers"] == 0
    shape = model_shape(model)
    assert shape.head_dim == 256
    # 46 layers of 4 + 1 of 64 + 1 experts: "A3B".
    assert shape.body_parameters + shape.head_parameters == pytest.approx(3.6e9, rel=0.05)


def test_layers_that_predict_further_tokens_are_not_read(tmp_path: Path):
    peer = random_peer(tiny_config("glm4_moe_lite", num_nextn_predict_layers=1))
    saved(peer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    further = {
        name.replace("layers.2.", "layers.3."): tensor for name, tensor in tensors.items() if "layers.2." in name
    }
    further["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
    save_file(tensors | {name: tensor.clone() for name, tensor in further.items()}, tmp_path / "model.safetensors")
    model = loaded(tmp_path)
    assert_equal_logits(model, peer)
    (tmp_path / "export").mkdir()
    model.export(tmp_path / "export", torch.float32)
    assert load_file(tmp_path / "export" / "model.safetensors").keys() == tensors.keys()
    assert json.loads((tmp_path / "export" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_corrections_stay_float32(tmp_path: Path):
    peer = random_peer(tiny_config("glm4_moe_lite"))
    model = loaded(saved(peer, tmp_path), torch.bfloat16)
    (tmp_path / "export").mkdir()
    model.export(tmp_path / "export", torch.bfloat16)
    theirs = dict(peer.named_buffers())
    written = load_file(tmp_path / "export" / "model.safetensors")
    assert len(saved_buffers(model)) == 2
    for name, correction in saved_buffers(model).items():
        assert correction.dtype == written[name].dtype == torch.float32
        assert torch.equal(correction, theirs[name])
        assert torch.equal(written[name], theirs[name])
    assert written["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["qwen3_moe", *FAMILIES])
def test_an_adopted_model_shares_its_weights(family: str, tmp_path: Path):
    peer = AutoModelForCausalLM.from_pretrained(saved(random_peer(tiny_config(family)), tmp_path))
    config = ModelConfig(path=str(tmp_path), implementation="native")
    model = zoo.adopt_model(peer, config, device="cpu", dtype=torch.float32, compute_dtype=torch.float32).model
    assert_equal_logits(model, peer)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    for router in routers_of(model).values():
        router.update_bias(0.1, torch.arange(8))
    assert_equal_logits(model, peer)  # pyright: ignore[reportArgumentType]


def test_corrections_choose_but_do_not_weigh():
    model = native("deepseek_v3")
    router = next(iter(routers_of(model).values()))
    logits_TE = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    documents = documents_of([50])
    before, weights_TK = router(logits_TE, documents)
    router.gate.e_score_correction_bias[:2] = 5
    after, _ = router(logits_TE, documents)
    assert (after < 2).sum() > (before < 2).sum()
    scores_TK = logits_TE.sigmoid().gather(1, before)
    expected = 2.5 * scores_TK / scores_TK.sum(-1, keepdim=True)
    torch.testing.assert_close(weights_TK, expected, rtol=1e-14, atol=0)
    groups = after // 2
    assert all(len(set(row)) <= 2 for row in groups.tolist())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_key_value_heads": 2}, UnsupportedModel, "num_key_value_heads=2"),
        ({"topk_method": "greedy"}, UnsupportedModel, "topk_method"),
        ({"scoring_func": "softmax"}, UnsupportedModel, "scoring_func"),
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedModel, "quantization_config"),
        ({"kv_lora_rank": None}, UserError, "kv_lora_rank"),
        ({"n_group": 3}, UserError, "n_group=3"),
        ({"n_group": 8}, UserError, "n_group=8"),
        ({"topk_group": 0}, UserError, "num_experts_per_tok=2"),
        ({"first_k_dense_replace": None}, UserError, "first_k_dense_replace"),
    ],
)
def test_configs_that_are_not_computed_are_refused(changes: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        zoo.build(tiny_config("deepseek_v3", **changes), attend_sdpa, dtype=torch.float32, device="meta")


def test_a_config_must_say_whether_queries_have_a_latent():
    config = tiny_config("deepseek_v3")
    del config["q_lora_rank"]
    with pytest.raises(UserError, match="q_lora_rank"):
        zoo.build(config, attend_sdpa, dtype=torch.float32, device="meta")


def test_which_layers_have_experts():
    config = tiny_config("glm4_moe_lite", num_hidden_layers=4)
    assert read_sigmoid_moe(config).is_sparse == (False, True, True, True)
    kinds = ["sparse", "dense", "sparse", "sparse"]
    by_kind = config | {"mlp_layer_types": kinds, "first_k_dense_replace": None}
    assert read_sigmoid_moe(by_kind).is_sparse == (True, False, True, True)
    with pytest.raises(UserError, match="disagree"):
        read_sigmoid_moe(config | {"mlp_layer_types": kinds})
    with pytest.raises(UserError, match="mlp_layer_types"):
        read_sigmoid_moe(config | {"mlp_layer_types": kinds[1:]})


def test_what_was_read_is_what_the_config_says(tmp_path: Path):
    peer = random_peer(tiny_config("glm4_moe_lite"))
    model = loaded(saved(peer, tmp_path))
    assert model.config == zoo.complete(read_config(tmp_path))


def test_a_shallow_model_is_a_cut_of_the_config() -> None:
    config = tiny_config("glm4_moe_lite", mlp_layer_types=["dense", "sparse", "sparse"], first_k_dense_replace=None)
    model = zoo.build(zoo.shallow(config), attend_sdpa, dtype=torch.float32, device="meta")
    assert len(model.blocks()) == 2
