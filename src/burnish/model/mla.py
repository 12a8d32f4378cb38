"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) and the decoders built of it: GLM-4.7-Flash, DeepSeek-V3.

Keys and values are made whole for every pack: there is no cache here that would keep them small. Layers that predict
further tokens (MTP) are neither read nor trained.

Shape suffixes: T tokens of a pack, D hidden size, H heads, E size of a head, L latent size, R rotated size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from burnish.model.attention import Kernel
from burnish.model.base import UnsupportedModel
from burnish.model.dense import DenseShape, Family, RMSNorm, read_shape
from burnish.model.moe import MoELM, MoEShape, checked
from burnish.model.rope import Rope, rotate
from burnish.types import Documents, UserError


@dataclass(frozen=True, slots=True)
class LatentShape:
    """What the attention needs to know beyond `DenseShape`. Queries without a latent have `query_rank` None."""

    query_rank: int | None
    latent_size: int
    plain_dim: int
    """Of a head's queries and keys: the part without positions."""
    rotated_dim: int
    """The part with positions, which all heads' keys share."""
    value_dim: int
    has_bias: bool
    is_interleaved: bool
    """Rotated pairs are neighbours, not half a head apart."""
    scale: float


_SIZES = (
    "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "norm_topk_prob",
    "routed_scaling_factor", "n_group", "topk_group", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "rms_norm_eps",
)  # fmt: skip
_ONLY = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1}
_KEYS = {
    *_SIZES, "q_lora_rank", "rope_interleave", "first_k_dense_replace", "num_nextn_predict_layers", "qk_head_dim",
    "output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "auto_map",
}  # fmt: skip

GLM4_MOE_LITE = Family(
    required=_SIZES, has_windows=False, keys=frozenset({*_KEYS, "mlp_layer_types", "num_local_experts"}), only=_ONLY
)
DEEPSEEK_V3 = Family(required=(*_SIZES, "first_k_dense_replace"), has_windows=False, keys=frozenset(_KEYS), only=_ONLY)


def read_latent_shape(config: Mapping[str, Any], rope: Rope) -> LatentShape:
    """The attention of a config.json. Raises UserError where it is silent, UnsupportedModel for grouped heads."""
    if "q_lora_rank" not in config:
        raise UserError("config.json has no q_lora_rank; add it, or null where queries have no latent")
    num_heads, num_kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if num_kv_heads not in (None, num_heads):
        raise UnsupportedModel(
            f"config.json has num_key_value_heads={num_kv_heads}; latent attention has as many as num_attention_heads"
        )
    plain, rotated = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    return LatentShape(
        query_rank=config["q_lora_rank"],
        latent_size=config["kv_lora_rank"],
        plain_dim=plain,
        rotated_dim=rotated,
        value_dim=config["v_head_dim"],
        has_bias=bool(config.get("attention_bias")),
        is_interleaved=config.get("rope_interleave", True) is not False,
        scale=(plain + rotated) ** -0.5 * _temper(rope) ** 2,
    )


def _temper(rope: Rope) -> float:
    """How much queries and keys each grow where the context is stretched, where the config says so (YaRN's mscale)."""
    strength, factor = rope.settings.get("mscale_all_dim"), rope.settings.get("factor", 1.0)
    return 0.1 * strength * math.log(factor) + 1.0 if strength and factor > 1 else 1.0


def read_sigmoid_moe(config: Mapping[str, Any]) -> MoEShape:
    """The expert blocks of a config.json. Raises UserError where it contradicts itself."""
    num_layers, kinds = config["num_hidden_layers"], config.get("mlp_layer_types")
    num_dense = config.get("first_k_dense_replace")
    is_sparse = tuple(layer >= (1 if num_dense is None else num_dense) for layer in range(num_layers))
    if kinds is not None:
        if len(kinds) != num_layers or set(kinds) - {"dense", "sparse"}:
            raise UserError(
                f"config.json: mlp_layer_types must be num_hidden_layers={num_layers} times dense or sparse; correct it"
            )
        by_kind = tuple(kind == "sparse" for kind in kinds)
        if num_dense is not None and by_kind != is_sparse:
            raise UserError(
                f"config.json: mlp_layer_types and first_k_dense_replace={num_dense} disagree; remove the wrong one"
            )
        is_sparse = by_kind
    return checked(
        MoEShape(
            num_experts=config["n_routed_experts"],
            top_k=config["num_experts_per_tok"],
            intermediate_size=config["moe_intermediate_size"],
            normalises=config["norm_topk_prob"],
            is_sparse=is_sparse,
            scores="sigmoid",
            scale=config["routed_scaling_factor"],
            num_shared=config["n_shared_experts"],
            num_groups=config["n_group"],
            top_groups=config["topk_group"],
        )
    )


class LatentAttention(nn.Module):
    """Keys and values of all heads from one latent, and one rotated key for all heads."""

    def __init__(self, shape: DenseShape, latent: LatentShape, kernel: Kernel) -> None:
        super().__init__()
        hidden_size, query_size = shape.hidden_size, shape.num_heads * (latent.plain_dim + latent.rotated_dim)
        if latent.query_rank is None:
            self.q_proj = nn.Linear(hidden_size, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, latent.query_rank, bias=latent.has_bias)
            self.q_a_layernorm = RMSNorm(latent.query_rank, 1e-6)
            self.q_b_proj = nn.Linear(latent.query_rank, query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, latent.latent_size + latent.rotated_dim, bias=latent.has_bias)
        # The norms of latents have an eps of their own, whatever rms_norm_eps is.
        self.kv_a_layernorm = RMSNorm(latent.latent_size, 1e-6)
        kv_size = shape.num_heads * (latent.plain_dim + latent.value_dim)
        self.kv_b_proj = nn.Linear(latent.latent_size, kv_size, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * latent.value_dim, hidden_size, bias=latent.has_bias)
        self.latent = latent
        self.kernel = kernel

    def forward(self, hidden_TD: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        plain, rotated, value = self.latent.plain_dim, self.latent.rotated_dim, self.latent.value_dim
        q_THE = self._queries(hidden_TD).unflatten(-1, (-1, plain + rotated))
        q_plain_THE, q_rotated_THR = q_THE.split([plain, rotated], dim=-1)
        latent_TL, k_rotated_TR = self.kv_a_proj_with_mqa(hidden_TD).split([self.latent.latent_size, rotated], dim=-1)
        kv_THE = self.kv_b_proj(self.kv_a_layernorm(latent_TL)).unflatten(-1, (-1, plain + value))
        k_plain_THE, v_THE = kv_THE.split([plain, value], dim=-1)
        k_rotated_T1R = self._turn(k_rotated_TR[:, None], rotary)
        q_THE = torch.cat([q_plain_THE, self._turn(q_rotated_THR, rotary)], dim=-1)
        k_THE = torch.cat([k_plain_THE, k_rotated_T1R.expand(-1, k_plain_THE.shape[1], -1)], dim=-1)
        mixed_THE = self._mix(q_THE, k_THE, v_THE, documents)
        return self.o_proj(mixed_THE.flatten(1))

    def _queries(self, hidden_TD: Tensor) -> Tensor:
        if self.latent.query_rank is None:
            return self.q_proj(hidden_TD)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_TD)))

    def _turn(self, x_THR: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self.latent.is_interleaved:
            # Queries and keys are laid out anew alike, so that their products stay the same.
            x_THR = x_THR.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(x_THR, *rotary)

    def _mix(self, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, documents: Documents) -> Tensor:
        """Attention by a kernel that wants all heads of one size: zeros change neither scores nor what is cut off."""
        size = max(q_THE.shape[-1], v_THE.shape[-1])
        q_THE, k_THE, padded_THE = (functional.pad(x, (0, size - x.shape[-1])) for x in (q_THE, k_THE, v_THE))
        return self.kernel(q_THE, k_THE, padded_THE, documents, self.latent.scale)[..., : v_THE.shape[-1]]


class LatentMoE(MoELM):
    """Latent attention and a sigmoid router: GLM-4.7-Flash and DeepSeek-V3."""

    def __init__(self, config: dict[str, Any], kernel: Kernel, family: Family) -> None:
        # Rotary positions are those of the rotated part alone.
        shape = read_shape(config | {"head_dim": config.get("qk_rope_head_dim")}, family)
        latent = read_latent_shape(config, shape.rope)
        num_further = config.get("num_nextn_predict_layers") or 0
        if num_further:
            config = config | {"num_nextn_predict_layers": 0}
        super().__init__(config, shape, read_sigmoid_moe(config), partial(LatentAttention, shape, latent, kernel))
        first = shape.num_layers
        self.unread = tuple(f"model.layers.{layer}." for layer in range(first, first + num_further))
