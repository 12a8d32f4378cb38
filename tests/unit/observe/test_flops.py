"""FLOPs against torch's own counter on a small decoder, and the table of peaks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from burnish.observe.flops import ModelShape, formula_text, peak_flops, step_flops

HIDDEN, INTERMEDIATE, LAYERS, HEADS, HEAD_DIM, VOCABULARY = 32, 64, 2, 4, 8, 512


@pytest.fixture(scope="module")
def counted() -> dict[int, int]:
    """FLOPs of a forward and backward of transformers' Qwen3 over one document, by torch's counter, for two lengths."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        attn_implementation="eager",
    )
    model = Qwen3ForCausalLM(config)
    counts = {}
    for length in (16, 64):
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.arange(length)[None]).logits.sum().backward()
        counts[length] = counter.get_total_flops()
    return counts


def shape() -> ModelShape:
    body = LAYERS * (4 * HIDDEN * HEADS * HEAD_DIM + 3 * HIDDEN * INTERMEDIATE)
    return ModelShape(body, HIDDEN * VOCABULARY, LAYERS, HEADS, HEAD_DIM)


@pytest.mark.parametrize("length", [16, 64])
def test_flops_are_those_torch_counts_with_causal_attention_halved(counted, length):
    # Eager attention computes the whole square, of which causal attention needs half.
    other_half = 6.0 * LAYERS * HEADS * HEAD_DIM * length**2
    assert step_flops(shape(), [length], num_trained_tokens=length) == counted[length] - other_half


def test_head_counts_trained_tokens_and_attention_counts_each_document_alone():
    one = step_flops(shape(), [64], 10)
    assert step_flops(shape(), [64], 11) - one == 6 * HIDDEN * VOCABULARY
    two = step_flops(shape(), [32, 32], 10)
    assert one - two == 6 * LAYERS * HEADS * HEAD_DIM * (64**2 - 2 * 32**2)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", 1307.4e12),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_found_by_device_name_and_unknown_devices_have_none(name, peak):
    assert peak_flops(name) == peak


def test_formula_is_printed_with_the_numbers_it_used():
    text = formula_text(shape(), "NVIDIA H200", 989e12)
    assert "sum(n^2)" in text
    assert f"P = {shape().body_parameters:,}" in text
    assert "989.0 TFLOP/s dense bf16 (NVIDIA H200)" in text
