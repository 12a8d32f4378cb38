"""Adapters: the numbers of peft on the model of transformers, files that peft reads, and faults that are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import native_model, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from burnish.config import LoraConfig
from burnish.model import hf_io
from burnish.model.base import CausalLM
from burnish.model.lora import (
    initialise_adapters,
    inject,
    merge,
    read_adapter,
    stored_name,
    trained,
    write_adapter,
)
from burnish.recipe import recipe_from_dict
from burnish.resume import altering_keys, check_resumable
from burnish.types import Documents, UserError

TOKENS = torch.arange(40) * 7 % 511 + 1
"""Without 0, the padding token, whose embedding transformers never trains."""
KINDS = [
    LoraConfig(rank=4, alpha=8),
    LoraConfig(rank=4, alpha=8, rslora=True),
    LoraConfig(rank=4, alpha=8, kind="dora", targets=("q_proj", "down_proj")),
    LoraConfig(rank=2, alpha=3, targets=("v_proj",), modules_to_save=("embed_tokens", "norm")),
]


def adapted_model(lora: LoraConfig, dtype: torch.dtype = torch.float64, **changes: object) -> CausalLM:
    """A tiny Qwen2, whose projections have biases, with adapters that do something."""
    model = native_model(tiny_config("qwen2", **changes), dtype)
    inject(model, lora, dtype)
    initialise_adapters(model, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def our_logits(model: CausalLM) -> Tensor:
    hidden = model(TOKENS, torch.arange(40), Documents(torch.tensor([0, 40], dtype=torch.int32), (40,)))
    return torch.nn.functional.linear(hidden, model.head().weight_VD)


def write(model: CausalLM, lora: LoraConfig, folder: Path) -> tuple[Path, Path]:
    """The base and the adapter of a model as folders."""
    base, adapter = folder / "base", folder / "adapter"
    for path in (base, adapter):
        path.mkdir(parents=True)
    plain = native_model(model.config, torch.float64)
    plain.export(base, torch.float64)
    write_adapter(adapter, model, trained(model), torch.float64, str(base))
    return base, adapter


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("lora", KINDS, ids=repr)
def test_loss_and_gradients_are_those_of_peft(lora: LoraConfig, is_tied: bool, tmp_path: Path):
    model = adapted_model(lora, tie_word_embeddings=is_tied)
    base, adapter = write(model, lora, tmp_path)
    inner = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    peer: Any = peft.PeftModel.from_pretrained(inner, adapter, is_trainable=True, autocast_adapter_dtype=False)
    targets = TOKENS.roll(-1)
    ours = torch.nn.functional.cross_entropy(our_logits(model), targets)
    theirs = torch.nn.functional.cross_entropy(peer(TOKENS[None]).logits[0], targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # transformers' rotary and norms are float32
    ours.backward()
    theirs.backward()
    theirs_by_name = {
        stored_name(name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")): p.grad
        for name, p in peer.named_parameters()
        if p.grad is not None
    }
    gradients = {stored_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == theirs_by_name.keys() == {stored_name(name) for name in trained(model)}
    for name, gradient in gradients.items():
        difference = (gradient - theirs_by_name[name]).norm() / gradient.norm()
        assert difference < 1e-5, (name, difference)


@pytest.mark.parametrize("lora", KINDS, ids=repr)
def test_merged_weights_compute_what_the_adapted_model_does(lora: LoraConfig, tmp_path: Path):
    model = adapted_model(lora)
    merged = merge(iter(hf_io.named_weights(model).items()), model, trained(model))
    hf_io.write_model(tmp_path, model.config, merged, torch.float64)
    plain = native_model(model.config, torch.float64, seed=9)
    hf_io.read_weights(tmp_path, plain)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(plain), our_logits(model), rtol=0, atol=1e-10)
        assert (our_logits(plain) - our_logits(native_model(model.config, torch.float64))).abs().max() > 1e-3


@pytest.mark.parametrize("lora", KINDS, ids=repr)
def test_fresh_adapters_change_nothing_and_are_drawn_from_the_seed(lora: LoraConfig):
    plain, model, again, other = (native_model(tiny_config("qwen2"), torch.float64) for _ in range(4))
    for adapted, seed in ((model, 3), (again, 3), (other, 4)):
        inject(adapted, lora, torch.float64)
        initialise_adapters(adapted, seed)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(model), our_logits(plain), rtol=0, atol=1e-12)
    for name, parameter in trained(model).items():
        assert torch.equal(parameter, trained(again)[name])
        if ".lora_A." in name:
            assert not torch.equal(parameter, trained(other)[name])
            assert 0.8 < parameter.abs().max() * parameter.shape[1] ** 0.5 <= 1
    firsts = [p.flatten()[0].item() for name, p in trained(model).items() if ".lora_A." in name]
    assert len(set(firsts)) == len(firsts)


def test_gaussian_adapters_deviate_by_one_over_rank():
    model = native_model(tiny_config("qwen2", hidden_size=256), torch.float32)
    inject(model, LoraConfig(rank=8, init="gaussian", targets=("o_proj",)), torch.float32)
    initialise_adapters(model, 0)
    drawn = torch.cat([p.flatten() for name, p in trained(model).items() if ".lora_A." in name])
    torch.testing.assert_close(drawn.std(), torch.tensor(1 / 8), rtol=0.1, atol=0)


def test_all_linear_are_the_layers_of_the_blocks_and_the_base_keeps_its_type():
    model = native_model(tiny_config("qwen3", tie_word_embeddings=False), torch.bfloat16)
    before = dict(hf_io.named_weights(model))
    inject(model, LoraConfig(modules_to_save=("model.norm",)), torch.float32)
    assert hf_io.named_weights(model).keys() == before.keys()
    names = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained(model) if "lora" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len([name for name in trained(model) if "lora_A" in name]) == 14
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert "model.norm.weight" in trained(model)
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_adapters_can_be_laid_out_before_they_have_memory(tmp_path: Path):
    from burnish.model import zoo
    from burnish.model.attention import attend_sdpa

    lora = LoraConfig(rank=4, kind="dora")
    native_model(tiny_config("qwen3"), torch.float32).export(tmp_path, torch.float32)
    early = zoo.build(tiny_config("qwen3"), attend_sdpa, dtype=torch.float32, device="meta")
    inject(early, lora, torch.float32)
    early.to_empty(device="cpu")
    hf_io.read_weights(tmp_path, early)
    late = native_model(tiny_config("qwen3"), torch.float32)
    inject(late, lora, torch.float32)
    for model in (early, late):
        initialise_adapters(model, 5)
    ours, theirs = (dict(model.named_parameters()) for model in (early, late))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {name: p.requires_grad for name, p in ours.items()} == {n: p.requires_grad for n, p in theirs.items()}


@pytest.mark.parametrize("lora", KINDS, ids=repr)
def test_an_adapter_goes_on_where_it_ended(lora: LoraConfig, tmp_path: Path):
    model = adapted_model(lora)
    _, adapter = write(model, lora, tmp_path)
    other = native_model(model.config, torch.float64)
    inject(other, lora, torch.float64)
    read_adapter(str(adapter), other, lora)
    assert all(torch.equal(p, trained(model)[name]) for name, p in trained(other).items())


def test_an_adapter_that_peft_wrote_goes_on_here(tmp_path: Path):
    base, _ = write(adapted_model(KINDS[0]), KINDS[0], tmp_path)
    inner = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear", init_lora_weights=False)
    peer: Any = peft.get_peft_model(inner, config, autocast_adapter_dtype=False)
    peer.save_pretrained(tmp_path / "theirs")
    lora = LoraConfig(rank=4, alpha=8, kind="dora")
    model = native_model(tiny_config("qwen2"), torch.float64)
    inject(model, lora, torch.float64)
    read_adapter(str(tmp_path / "theirs"), model, lora)
    with torch.no_grad():
        difference = our_logits(model) - peer(TOKENS[None]).logits[0]
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"lora.rank=8, and the adapter in .* has 4; set lora.rank to 4"),
        ({"alpha": 16}, r"lora.alpha=16.0, .* has 8; set lora.alpha to 8"),
        ({"rslora": True}, "lora.rslora=True"),
        ({"kind": "dora"}, "lora.kind=dora"),
        ({"targets": ("q_proj",)}, "unexpected: base_model.model.model.layers.0.mlp.*set lora.targets"),
    ],
)
def test_another_adapter_than_the_recipe_describes_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    _, adapter = write(adapted_model(KINDS[0]), KINDS[0], tmp_path)
    lora = LoraConfig.model_validate({"rank": 4, "alpha": 8, **changes})
    model = native_model(tiny_config("qwen2"), torch.float64)
    inject(model, lora, torch.float64)
    with pytest.raises(UserError, match=message):
        read_adapter(str(adapter), model, lora)


def test_a_folder_without_an_adapter_and_a_foreign_one_are_named(tmp_path: Path):
    lora = KINDS[0]
    base, adapter = write(adapted_model(lora), lora, tmp_path)
    model = native_model(tiny_config("qwen2"), torch.float64)
    inject(model, lora, torch.float64)
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        read_adapter(str(base), model, lora)
    file = adapter / "adapter_config.json"
    written = json.loads(file.read_text())
    for change, message in (({"peft_type": "IA3"}, "of type IA3"), ({"rank_pattern": {"q": 2}}, "has rank_pattern")):
        file.write_text(json.dumps(written | change))
        with pytest.raises(UserError, match=message):
            read_adapter(str(adapter), model, lora)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q_porj",)}, "lora.targets=q_porj ends no module's name; take some of q_proj"),
        (
            {"targets": ("gate_up_proj",)},
            "take some of gate_proj, up_proj, v_proj, q_proj, o_proj, k_proj, down_proj$",
        ),
        ({"modules_to_save": ("nope",)}, "take some of norm, (?=.*lm_head)(?=.*embed_tokens).*up_proj"),
        ({"targets": ("self_attn",)}, "is model.layers.0.self_attn, a module of type Attention"),
        ({"targets": ("lm_head",)}, "is the output layer"),
        ({"modules_to_save": ("embed",)}, "ends no name of a module with weights; take some of embed_tokens"),
    ],
)
def test_targets_that_cannot_be_are_named(settings: dict[str, Any], message: str):
    model = native_model(tiny_config("qwen3", tie_word_embeddings=False), torch.float32)
    with pytest.raises(UserError, match=message):
        inject(model, LoraConfig(**settings), torch.float32)


def test_a_tied_head_is_saved_as_the_embedding():
    with pytest.raises(UserError, match=r"it is tied to model\.embed_tokens, so name that"):
        inject(native_model(tiny_config(), torch.float32), LoraConfig(modules_to_save=("lm_head",)), torch.float32)


def test_adapters_are_written_once_in_the_type_asked_for(tmp_path: Path):
    model = adapted_model(KINDS[2])
    write_adapter(tmp_path, model, trained(model), torch.bfloat16, "owner/base")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector" in stored
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]


def test_checkpoints_without_adapters_resume_and_adapters_are_a_change():
    tree = {"model": {"path": "base"}, "data": {}}
    plain, adapted = (altering_keys(recipe_from_dict(t)) for t in (tree, {**tree, "lora": {"rank": 8}}))
    saved = {key: value for key, value in plain.items() if key != "lora"}
    assert check_resumable({"recipe": saved}, {"recipe": plain}, False, "there") == []
    with pytest.raises(UserError, match=r"lora\.rank"):
        check_resumable({"recipe": saved}, {"recipe": adapted}, False, "there")
