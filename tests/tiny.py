"""Tiny things that tests are made of: a chat template and model configurations of our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from burnish.model.base import CausalLM

CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}"
    "{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if not (tools and loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""A ChatML template of our own: multi-turn, system, tools, tool calls."""


def tiny_config(family: str = "qwen3", **changes: object) -> dict[str, Any]:
    """A config.json of a model with some ten thousand parameters: llama, qwen2 or qwen3."""
    config: dict[str, Any] = {
        "architectures": [
            {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
        ],
        "model_type": family,
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    return config | changes


def native_model(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> CausalLM:
    """Our own module for `config` on the CPU, with random weights drawn from `seed`."""
    from burnish.model import zoo
    from burnish.model.attention import choose_attention

    model = zoo.build(config, choose_attention("sdpa", "cpu", dtype).kernel, dtype=dtype, device="cpu")
    zoo.initialise(model, seed)
    return model
