"""Models of transformers in our interface, against the same models used the way transformers means them to be."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from burnish.model import hf_model
from burnish.model.hf_model import HFModel, groups_of_similar_length, load_hf_model, packing_obstacle, verify_head
from burnish.model.lm_head import logits, score
from burnish.types import Documents, UserError

VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PACKED: dict[str, dict[str, Any]] = {
    "gemma2": SIZES
    | {"sliding_window": 4, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 0.5, "initializer_range": 0.2},
    "granite": SIZES | {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "attention_multiplier": 0.5},
    "cohere": SIZES | {"logit_scale": 0.0625},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": SIZES,
    "mixtral": SIZES | EXPERTS | {"sliding_window": 4},
}
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")}, "layers of type"),
    "gpt_oss": (SIZES | EXPERTS, "s_aux"),
    "bloom": ({"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "position_ids"),
}
LENGTHS = (9, 17, 5, 10)


def make(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> HFModel:
    config = PACKED[kind] if kind in PACKED else ROWS[kind][0]
    return load_hf_model(
        kind, device="cpu", dtype=dtype, compute_dtype=dtype, init_config=config | changes | {"model_type": kind}
    )


def pack(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, Documents]:
    tokens_T = torch.randint(VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    return tokens_T, positions_T, Documents(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), lengths)


def theirs(model: HFModel, tokens_T: Tensor) -> Tensor:
    """The logits [T, V] that transformers gives each document of `LENGTHS` alone."""
    inner = model.for_generation()
    return torch.cat([inner(input_ids=tokens_L[None]).logits[0] for tokens_L in tokens_T.split(LENGTHS)])


@pytest.mark.parametrize("kind", PACKED)
def test_packed_documents_have_the_logits_of_each_alone(kind: str) -> None:
    model = make(kind)
    tokens_T, positions_T, documents = pack()
    assert model.row_reason is None
    ours_TV = logits(model(tokens_T, positions_T, documents), model.head())
    torch.testing.assert_close(ours_TV, theirs(model, tokens_T), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ROWS)
def test_documents_in_rows_have_the_logits_of_each_alone(kind: str) -> None:
    model = make(kind)
    tokens_T, positions_T, documents = pack()
    assert model.row_reason is not None
    assert ROWS[kind][1] in model.row_reason
    assert "one document a row" in model.attention
    ours_TV = logits(model(tokens_T, positions_T, documents), model.head())
    torch.testing.assert_close(ours_TV, theirs(model, tokens_T), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "mixtral"])
def test_gradients_of_a_pack_and_of_rows_are_those_of_documents_alone(kind: str) -> None:
    model = make(kind)
    tokens_T, positions_T, documents = pack()
    targets_T = tokens_T.roll(-1)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(logprobs_T: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, torch.autograd.grad(logprobs_T.sum(), parameters), strict=True))

    def check() -> None:
        ours = gradients(score(model(tokens_T, positions_T, documents), model.head(), targets_T).logprobs_K)
        for name, gradient in ours.items():
            assert (gradient - expected[name]).norm() <= 2e-5 * expected[name].norm(), name

    expected = gradients(theirs(model, tokens_T).log_softmax(-1).gather(1, targets_T[:, None]))
    check()
    model.run_rows("asked to")
    check()


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_noise_is_added_to_the_embeddings_packed_or_not(kind: str) -> None:
    model = make(kind)
    tokens_T, positions_T, documents = pack()
    noise_TD = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(1)) * 0.01
    plain_TD = model(tokens_T, positions_T, documents)
    packed_TD = model(tokens_T, positions_T, documents, noise_TD)
    model.run_rows("asked to")
    torch.testing.assert_close(model(tokens_T, positions_T, documents, noise_TD), packed_TD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(tokens_T, positions_T, documents, noise_TD * 0), plain_TD, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed_TD, plain_TD, atol=1e-3)


def test_lengths_far_apart_do_not_share_a_row_batch() -> None:
    lengths = (100, 5, 90, 4, 79, 5)
    groups = groups_of_similar_length(lengths)
    assert groups == [[0, 2], [4], [1, 5, 3]]
    assert sum(len(group) * lengths[group[0]] for group in groups) <= 1.25 * sum(lengths)


def test_names_are_those_of_transformers_and_replaced_parameters_are_read() -> None:
    model = make("gpt2")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in model.inner.named_parameters()]
    model.get_submodule("transformer.wte")._parameters["weight"] = torch.zeros(VOCABULARY, 32)  # as casting does
    assert not model.inner.get_input_embeddings().weight.any()


def test_standard_sizes_are_in_the_config_of_every_model() -> None:
    config = make("gpt2").config
    assert (config["hidden_size"], config["num_hidden_layers"], config["max_position_embeddings"]) == (32, 2, 64)


@pytest.mark.parametrize("kind", [*PACKED, *ROWS])
def test_blocks_are_the_decoder_layers(kind: str) -> None:
    blocks = make(kind).blocks()
    assert len(blocks) == 2
    assert type(blocks[0]) is type(blocks[1])


def test_dropout_is_off_whatever_mode_is_asked_for() -> None:
    model = make("gpt2", resid_pdrop=0.5, attn_pdrop=0.5).train()
    torch.testing.assert_close(model(*pack()), model(*pack()))


def test_random_weights_follow_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, other = make("granite"), make("granite")
    torch.rand(3)
    torch.testing.assert_close(one.state_dict(), other.state_dict())
    torch.set_rng_state(state)
    make("granite")
    assert torch.equal(state, torch.get_rng_state())


class Sigmoid(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid()


def test_an_unknown_head_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = make("granite").inner
    inner.set_output_embeddings(Sigmoid(32, VOCABULARY, bias=False))
    with pytest.raises(UserError, match="unknown head"):
        verify_head(inner)
    inner.set_output_embeddings(nn.Sequential(nn.Linear(32, VOCABULARY)))
    with pytest.raises(UserError, match="unknown head, Sequential is not linear"):
        verify_head(inner)
    monkeypatch.setattr(hf_model, "SOFTCAPS", ())
    with pytest.raises(UserError, match="unknown head"):  # although the logits of random weights are far below the cap
        make("gemma2")


def test_a_window_that_attention_does_not_hear_of_prevents_packing() -> None:
    model = make("gpt_neox")
    model.inner.config.sliding_window = 4
    assert packing_obstacle(model) == "it does not tell its attention of the sliding window"


@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "gpt2"])
def test_an_export_loads_with_the_same_logits(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    tokens_T, positions_T, documents = pack()
    model(tokens_T, positions_T, documents)  # leaves our attention in place, which must not reach the config
    model.export(tmp_path, torch.float32)
    inner = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ours_TV = logits(model(tokens_T, positions_T, documents), model.head())
    torch.testing.assert_close(ours_TV, theirs(HFModelView(inner), tokens_T), rtol=1e-4, atol=1e-6)
    again = load_hf_model(tmp_path, device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
    torch.testing.assert_close(again.state_dict(), model.state_dict())


class HFModelView:
    def __init__(self, inner: Any) -> None:
        self.for_generation = lambda: inner


def test_an_export_is_in_the_type_asked_for_and_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = make("gemma2")
    model.export(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118
    assert next(model.parameters()).dtype == torch.float32


def mapped_file(address: int) -> str:
    """The file whose pages lie at an address of this process; nothing where it is memory of its own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, *rest = line.split()
        first, behind = (int(bound, 16) for bound in bounds.split("-"))
        if first <= address < behind:
            return rest[-1] if len(rest) > 4 else ""
    raise AssertionError(f"{address:x} is not mapped")


def test_weights_in_the_checkpoints_type_are_the_pages_of_its_files(tmp_path: Path) -> None:
    make("granite").export(tmp_path, torch.bfloat16)
    types: Any = {"dtype": "auto", "compute_dtype": torch.bfloat16}
    model = load_hf_model(tmp_path, device="meta", **types, storage="cpu")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert mapped_file(parameter.data_ptr()) == str(tmp_path / "model.safetensors"), name


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    make("granite").export(tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"weights of GraniteForCausalLM are missing .* model\.layers\.2"):
        load_hf_model(tmp_path, device="cpu", dtype=torch.float32, compute_dtype=torch.float32)


def test_an_unknown_architecture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of_tomorrow"}))
    with pytest.raises(UserError, match="model_type='of_tomorrow' is unknown"):
        load_hf_model(tmp_path, device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
