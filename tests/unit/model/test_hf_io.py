"""Hugging Face folders: what transformers writes we read, what we write transformers reads, and each fault is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import native_model, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from burnish.config import ModelConfig
from burnish.model import zoo
from burnish.model.base import CausalLM
from burnish.model.hf_io import find_folder, read_config, read_weights, write_model, written_beside
from burnish.model.lm_head import logits
from burnish.types import Documents, UserError

FAMILIES = ("llama", "qwen2", "qwen3")
TOKENS = torch.arange(40) * 7 % 512


def our_logits(model: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(TOKENS, torch.arange(40), Documents(torch.tensor([0, 40], dtype=torch.int32), (40,)))
        return logits(hidden, model.head())


def load(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> zoo.Loaded:
    config = ModelConfig(path=str(path), **settings)
    return zoo.load_model(config, device="cpu", dtype=dtype, compute_dtype=dtype, seed=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as we write it: Qwen3, untied, one file."""
    model = native_model(tiny_config("qwen3", tie_word_embeddings=False), torch.float32)
    model.export(tmp_path, torch.float32)
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_write(family: str, is_tied: bool, tmp_path: Path):
    model = native_model(tiny_config(family, tie_word_embeddings=is_tied), torch.float32)
    write_model(tmp_path, model.config, dict(model.named_parameters()), torch.float32, max_shard_bytes=30_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 35_000 or len(load_file(shard)) == 1 for shard in shards)
    peer, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert peer.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(our_logits(model), peer(TOKENS[None]).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_what_transformers_writes(family: str, is_tied: bool, tmp_path: Path):
    config = AutoConfig.for_model(**tiny_config(family, tie_word_embeddings=is_tied))
    peer = AutoModelForCausalLM.from_config(config)
    peer.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = load(tmp_path)
    assert loaded.implementation == "native"
    with torch.no_grad():
        torch.testing.assert_close(our_logits(loaded.model), peer(TOKENS[None]).logits[0], rtol=0, atol=1e-5)


def test_old_config_and_new_one_mean_the_same(tmp_path: Path):
    """transformers 4 wrote rope_theta and rope_scaling, 5 writes rope_parameters."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    old = native_model(tiny_config("qwen2", rope_theta=5e5, rope_scaling=scaling), torch.float32)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**old.config)).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert "rope_theta" not in config
    new = native_model(config, torch.float32)
    assert torch.equal(our_logits(old), our_logits(new))


def test_weights_are_cast_on_the_way_in_and_out(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    model = load(folder, torch.float64).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    out = tmp_path_factory.mktemp("half")
    model.export(out, torch.bfloat16)
    assert read_config(out)["dtype"] == "bfloat16"
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    original = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], original[name].bfloat16()) for name in original)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_stale_torch_dtype_does_not_survive(folder: Path):
    model = native_model(tiny_config("llama", torch_dtype="float16"), torch.float32)
    model.export(folder, torch.float32)
    assert read_config(folder)["dtype"] == "float32"
    assert "torch_dtype" not in read_config(folder)


def test_a_tied_head_is_written_once_and_may_be_stored_twice(tmp_path: Path):
    model = native_model(tiny_config("qwen3"), torch.float32)
    model.export(tmp_path, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    edit_weights(tmp_path, **{"lm_head.weight": stored["model.embed_tokens.weight"].clone()})
    assert torch.equal(our_logits(load(tmp_path).model), our_logits(model))
    edit_weights(tmp_path, **{"lm_head.weight": stored["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match=r"ties lm_head.weight to model.embed_tokens.weight.*different values"):
        load(tmp_path)


def test_old_rotary_buffers_are_no_weights(folder: Path):
    edit_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    load(folder)


def test_every_missing_and_unexpected_tensor_is_named(folder: Path):
    before = native_model(tiny_config("qwen3", tie_word_embeddings=False), torch.float32, seed=1)
    weights = {name: parameter.clone() for name, parameter in before.named_parameters()}
    edit_weights(folder, **{"lm_head.weight": None, "model.norm.weight": None, "score.weight": torch.ones(2)})
    with pytest.raises(UserError) as caught:
        read_weights(folder, before)
    assert "missing: lm_head.weight, model.norm.weight; unexpected: score.weight" in str(caught.value)
    assert all(torch.equal(weights[name], parameter) for name, parameter in before.named_parameters())


def test_a_wrong_shape_is_named(folder: Path):
    edit_config(folder, intermediate_size=48)
    with pytest.raises(UserError, match=r"layers.0.mlp.down_proj.weight is \[32, 64\], not \[32, 48\].*correct config"):
        load(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "is a JSON list"),
        (lambda f: (f / "config.json").write_text("{}"), "names no architecture"),
        (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "as .bin files.*convert them with"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
            "is no whole safetensors file.*copy it again",
        ),
    ],
)
def test_a_spoilt_folder_is_an_error_with_a_remedy(spoil: Any, message: str, folder: Path):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_a_lost_shard_is_named(tmp_path: Path):
    model = native_model(tiny_config("llama"), torch.float32)
    write_model(tmp_path, model.config, dict(model.named_parameters()), torch.float32, max_shard_bytes=30_000)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-.*safetensors, which model.*index.json names"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("owner/no-such-model", "not in the cache and the hub cannot be reached.*hf download owner/no-such-model"),
        ("./no/such/folder", "no folder here, and no hub id"),
    ],
)
def test_a_path_that_is_nowhere_is_an_error_with_a_remedy(path: str, message: str):
    with pytest.raises(UserError, match=message):
        find_folder(path)


def test_a_file_is_no_model_folder(folder: Path):
    with pytest.raises(UserError, match=f"is a file.*so give {folder}"):
        find_folder(str(folder / "config.json"))


def test_auto_says_why_it_falls_to_transformers(folder: Path):
    edit_config(folder, attention_dropout=0.5)
    loaded = load(folder)
    assert loaded.implementation == "transformers"
    assert "attention_dropout=0.5" in loaded.reason
    edit_config(folder, attention_dropout=0.0)
    torch.testing.assert_close(our_logits(loaded.model), our_logits(load(folder).model), rtol=0, atol=1e-5)


def test_native_is_an_error_where_it_cannot_be(folder: Path):
    edit_config(folder, attention_dropout=0.5)
    with pytest.raises(UserError, match=r"implementation=native: config.json has attention_dropout=0.5.*set it to"):
        load(folder, implementation="native")


def test_random_weights_start_from_a_config_alone(tmp_path: Path):
    file = tmp_path / "config.json"
    config = {key: value for key, value in tiny_config("qwen3").items() if key != "architectures"}
    file.write_text(json.dumps(config))
    first, second = (
        zoo.load_model(
            ModelConfig(init=str(path), tokenizer="somewhere"),
            device="cpu",
            dtype=torch.float32,
            compute_dtype=torch.float32,
            seed=3,
        )
        for path in (file, tmp_path)
    )
    assert first.facts["architecture"] == "Qwen3ForCausalLM"
    assert first.num_parameters == sum(p.numel() for p in second.model.parameters()) > 10_000
    assert torch.equal(our_logits(first.model), our_logits(second.model))


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "export"
    with written_beside(target) as partial:
        (partial / "config.json").write_text("first")
        assert not target.exists()

    def fail() -> None:
        with written_beside(target) as partial:
            (partial / "config.json").write_text("second")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert (target / "config.json").read_text() == "first"
    with written_beside(target) as partial:
        (partial / "config.json").write_text("third")
    assert (target / "config.json").read_text() == "third"
    assert [entry.name for entry in tmp_path.iterdir()] == ["export"]


def test_the_old_folder_survives_a_crash_during_the_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "export"
    with written_beside(target) as partial:
        (partial / "config.json").write_text("first")
    rename = Path.rename

    def crash(path: Path, to: Path) -> Path:
        if path.suffix == ".partial":
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt), written_beside(target) as partial:
            (partial / "config.json").write_text("second")
    with pytest.raises(OSError, match="disk"), written_beside(target):
        raise OSError("disk full")
    assert (target / "config.json").read_text() == "first"


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no model folder"), written_beside(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").exists()


def test_a_folder_of_adapters_is_replaced(tmp_path: Path):
    target = tmp_path / "export"
    target.mkdir()
    (target / "adapter_config.json").write_text("{}")
    with written_beside(target) as partial:
        (partial / "config.json").write_text("whole weights")
    assert [entry.name for entry in target.iterdir()] == ["config.json"]


def test_a_shard_holds_what_fits_and_tensors_are_taken_one_by_one(tmp_path: Path):
    """A file is written as soon as the next tensor would be too much for it."""
    seen: list[list[str]] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abcd":
            seen.append(sorted(path.name for path in tmp_path.glob("*.safetensors")))
            yield name, torch.ones(100)

    write_model(tmp_path, {}, tensors(), torch.float32, max_shard_bytes=800)
    assert [len(files) for files in seen] == [0, 0, 0, 1]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 1600
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 1, 2, 2)]
    assert index["weight_map"] == dict(zip("abcd", files, strict=True))
