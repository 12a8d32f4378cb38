"""The probe passes what is tight, and each kind of leak is caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_hf_model import make
from tiny import native_model, tiny_config
from torch import Tensor

from burnish.model.probe import ProbeResult, leak_tolerance, probe_isolation
from burnish.types import Documents


def probe(forward: Any, **options: Any) -> ProbeResult:
    return probe_isolation(forward, vocab_size=128, device="cpu", **options)


def as_one(lengths: tuple[int, ...]) -> Documents:
    return Documents(torch.tensor([0, sum(lengths)], dtype=torch.int32), (sum(lengths),))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_native_models_are_tight_to_the_bit(family: str) -> None:
    result = probe(native_model(tiny_config(family), torch.float32))
    assert result.reason is None
    assert result.leak == 0.0
    assert result.restart < 1e-5


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "mamba"])
def test_models_of_transformers_are_tight_to_the_bit_packed_or_in_rows(kind: str) -> None:
    assert probe(make(kind)).reason is None


def test_experts_are_allowed_their_rounding() -> None:
    model = make("mixtral")
    assert leak_tolerance(model.config) == 1e-5
    assert leak_tolerance(make("gpt2").config) == 0.0
    assert probe(model, leak_tolerance=1e-5).reason is None


def test_attention_across_documents_is_caught() -> None:
    model = native_model(tiny_config(), torch.float32)

    def forward(tokens_T: Tensor, positions_T: Tensor, documents: Documents) -> Tensor:
        return model(tokens_T, positions_T, as_one(documents.lengths))

    result = probe(forward)
    assert result.reason is not None
    assert result.leak > 1e-3
    assert "another document of its pack changes" in str(result.reason)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_single_token_that_crosses_a_boundary_is_caught(shift: int) -> None:
    """As a convolution of width two would leak, forwards or backwards."""
    embeddings_VD = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))

    def forward(tokens_T: Tensor, positions_T: Tensor, documents: Documents) -> Tensor:
        return embeddings_VD[tokens_T] + 1e-4 * embeddings_VD[tokens_T.roll(shift)]

    assert probe(forward).reason is not None


def test_positions_that_do_not_restart_are_caught() -> None:
    model = make("gpt2")

    def forward(tokens_T: Tensor, positions_T: Tensor, documents: Documents) -> Tensor:
        return model(tokens_T, torch.arange(len(tokens_T)), documents)

    result = probe(forward)
    assert result.leak == 0.0
    assert "differ by" in str(result.reason)


def test_a_recurrent_state_that_runs_on_is_caught() -> None:
    model = make("mamba")
    model.row_reason = None
    assert probe(model).reason is not None


def test_a_model_that_does_not_look_at_tokens_proves_nothing() -> None:
    result = probe(lambda tokens_T, positions_T, documents: torch.ones(len(tokens_T), 8))
    assert "do not depend on the tokens" in str(result.reason)
    assert result.reason is not None


def test_the_random_state_stays() -> None:
    model = native_model(tiny_config(), torch.float32)
    state = torch.get_rng_state()
    probe(model)
    assert torch.equal(state, torch.get_rng_state())
