"""One dense decoder for Llama, Qwen2 and Qwen3, with Hugging Face's parameter names, and the parts others share.

Knows nothing of layouts, and of packing only `Documents`. Parameters are made uninitialised; a checkpoint or
`zoo.initialise` writes them. Where a config.json asks for something that is not computed here, it is refused.

Shape suffixes: T tokens of a pack, D hidden size, H query heads, G key and value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from burnish.model.attention import Kernel
from burnish.model.base import CausalLM, UnsupportedModel
from burnish.model.hf_io import as_stored, named_weights, write_model
from burnish.model.lm_head import Head
from burnish.model.rope import Rope, Rotary, read_rope, rotate
from burnish.types import Documents, UserError


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's code fixes beyond its config.json.

    `required` are sizes whose silent defaults in `transformers` are one checkpoint's and would surprise in another.
    `qkv_bias` None leaves the biases of all four projections to `attention_bias`. `keys` are what others than the
    dense decoder read of the config, `only` further keys with the one value that is computed.
    """

    required: tuple[str, ...] = ()
    qkv_bias: bool | None = None
    qk_norm: bool = False
    has_mlp_bias: bool = False
    has_windows: bool = True
    keys: frozenset[str] = frozenset()
    only: Mapping[str, Any] = field(default_factory=dict)


LLAMA = Family(has_mlp_bias=True, has_windows=False)
QWEN2 = Family(required=("num_key_value_heads",), qkv_bias=True)
QWEN3 = Family(required=("num_key_value_heads", "head_dim"), qk_norm=True)


@dataclass(frozen=True, slots=True)
class DenseShape:
    """What the modules need to know of a config.json. `windows` has one entry a layer; None sees the whole past."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    is_tied: bool
    windows: tuple[int | None, ...]
    rope: Rope


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_READ = {
    *_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings",
}  # fmt: skip
_WINDOW_KEYS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_ONLY = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "mlp_bias": False,
    "use_sliding_window": False,
    "use_mrope": False,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
"""Keys with the one value that is computed here, unless the family reads them."""
_NO_EFFECT = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "initializer_range", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "name_or_path", "pretraining_tp", "torchscript",
    "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate", "chunk_size_feed_forward",
    "tie_encoder_decoder", "is_decoder", "id2label", "label2id", "problem_type", "finetuning_task",
    "task_specific_params", "max_length",
    "min_length", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "tokenizer_class",
    "max_window_layers", "max_sequence_length",
    "gradient_checkpointing", "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
"""Keys that change no hidden state: bookkeeping, token ids, generation, and which layers a window would be in."""


def read_shape(config: Mapping[str, Any], family: Family) -> DenseShape:
    """The shape a config.json describes.

    Raises UnsupportedModel for a feature that is not computed here, UserError for a config that contradicts itself.
    """
    _refuse_unknown(config, family)
    missing = [key for key in (*_SIZES, *family.required) if config.get(key) is None]
    if missing:
        raise UserError(f"config.json has no {', '.join(missing)}; a model cannot be built without, so add it")
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    head_dim = config.get("head_dim") or hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise UserError(
            f"config.json: num_key_value_heads={num_kv_heads} does not divide num_attention_heads={num_heads}; "
            "correct it"
        )
    attention_bias = bool(config.get("attention_bias"))
    return DenseShape(
        vocab_size=config["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias and family.qkv_bias is None,
        mlp_bias=family.has_mlp_bias and bool(config.get("mlp_bias")),
        qk_norm=family.qk_norm,
        is_tied=bool(config.get("tie_word_embeddings")),
        windows=_read_windows(config) if family.has_windows else (None,) * config["num_hidden_layers"],
        rope=read_rope(config, head_dim),
    )


def _refuse_unknown(config: Mapping[str, Any], family: Family) -> None:
    read = _READ | family.keys | (_WINDOW_KEYS if family.has_windows else set())
    read |= {"mlp_bias"} if family.has_mlp_bias else set()
    only = _ONLY | dict(family.only)
    for key, value in config.items():
        if key in read or key in _NO_EFFECT or key.startswith("_") or value is None:
            continue
        if key not in only:
            raise UnsupportedModel(f"config.json has {key}={value!r}, which the native decoder does not know")
        if value != only[key]:
            raise UnsupportedModel(f"config.json has {key}={value!r}; the native decoder computes {only[key]!r} alone")


def _read_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    num_layers = config["num_hidden_layers"]
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(kinds) != num_layers:
        raise UserError(
            f"config.json: layer_types has {len(kinds)} entries for num_hidden_layers={num_layers}; correct it"
        )
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModel(f"config.json has layer_types of {', '.join(sorted(unknown))}")
    if "sliding_attention" in kinds and window is None:
        raise UserError(
            "config.json: layer_types has sliding_attention, but no window is set; set use_sliding_window and "
            "sliding_window, or make every layer full_attention"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), in float32 at least and rounded before the weight is applied."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions and, in Qwen3, norms on queries and keys."""

    def __init__(self, shape: DenseShape, window: int | None, kernel: Kernel) -> None:
        super().__init__()
        query_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=shape.output_bias)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.head_dim = shape.head_dim
        self.scale = shape.head_dim**-0.5
        self.window = window
        self.kernel = kernel

    def forward(self, hidden_TD: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        q_THE = self.q_proj(hidden_TD).unflatten(-1, (-1, self.head_dim))
        k_TGE = self.k_proj(hidden_TD).unflatten(-1, (-1, self.head_dim))
        v_TGE = self.v_proj(hidden_TD).unflatten(-1, (-1, self.head_dim))
        q_THE, k_TGE = rotate(self.q_norm(q_THE), *rotary), rotate(self.k_norm(k_TGE), *rotary)
        mixed_THE = self.kernel(q_THE, k_TGE, v_TGE, documents, self.scale, self.window)
        return self.o_proj(mixed_THE.flatten(1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden_TD)) * self.up_proj(hidden_TD))


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, shape: DenseShape, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = mlp

    def forward(self, hidden_TD: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        hidden_TD = hidden_TD + self.self_attn(self.input_layernorm(hidden_TD), rotary, documents)
        return hidden_TD + self.mlp(self.post_attention_layernorm(hidden_TD))


class Decoder(nn.Module):
    """Embedding, blocks and the final norm."""

    def __init__(self, shape: DenseShape, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.rotary = Rotary(shape.rope)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, documents: Documents, noise_TD: Tensor | None) -> Tensor:
        hidden_TD = self.embed_tokens(tokens_T)
        if noise_TD is not None:
            hidden_TD = hidden_TD + noise_TD.to(hidden_TD.dtype)
        rotary = self.rotary(positions_T, documents, hidden_TD.dtype)
        for block in self.layers:
            hidden_TD = block(hidden_TD, rotary, documents)
        return self.norm(hidden_TD)


class DecoderLM(CausalLM):
    """A decoder of `blocks` and its head; a tied head is the embedding itself, and no second parameter.

    Every token's embedding is trained, that of a padding token too: packs hold none for padding's sake.
    """

    def __init__(self, config: dict[str, Any], shape: DenseShape, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.model = Decoder(shape, blocks)
        if shape.is_tied:
            self.aliases = {"lm_head.weight": "model.embed_tokens.weight"}
        else:
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, documents: Documents, noise_TD: Tensor | None = None
    ) -> Tensor:
        return self.model(tokens_T, positions_T, documents, noise_TD)

    def head(self) -> Head:
        return Head((self.model.embed_tokens if self.shape.is_tied else self.lm_head).weight)

    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)

    def export(
        self,
        folder: Path,
        dtype: torch.dtype,
        weights: Iterator[tuple[str, Tensor]] | None = None,
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        write_model(
            folder, self.config, as_stored(self, weights or named_weights(self).items()), dtype, max_shard_bytes
        )


class DenseLM(DecoderLM):
    """Llama, Qwen2 or Qwen3."""

    def __init__(self, config: dict[str, Any], kernel: Kernel, family: Family) -> None:
        shape = read_shape(config, family)
        blocks = [
            Block(
                shape,
                Attention(shape, window, kernel),
                MLP(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias),
            )
            for window in shape.windows
        ]
        super().__init__(config, shape, blocks)
