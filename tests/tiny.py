"""Tiny things that tests are made of: a chat template and model configurations of our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

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
    """A config.json of a model with some ten thousand parameters; `family` is its model_type."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
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
    return config | EXPERTS.get(family, {}) | changes


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
_LATENT: dict[str, Any] = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "num_hidden_layers": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "glm4_moe_lite": _LATENT | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "v_head_dim": 16},
    "deepseek_v3": _LATENT | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
}
"""What the families with experts have beyond the others: two of eight for each token, one shared by all or none."""


def random_peer(config: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """transformers' model of a config, its weights larger than usual and its norms and biases away from 1 and 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {k: value for k, value in config.items() if value is not None or k == "q_lora_rank"}
    torch.manual_seed(seed)
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    peer.config._experts_implementation = "eager"  # their grouped matmul takes not every size
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(5)
        for name, buffer in peer.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    return peer


def native_model(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> CausalLM:
    """Our own module for `config` on the CPU, with random weights drawn from `seed`."""
    from burnish.model import zoo
    from burnish.model.attention import choose_attention

    model = zoo.build(config, choose_attention("sdpa", "cpu", dtype).kernel, dtype=dtype, device="cpu")
    zoo.initialise(model, seed)
    return model
