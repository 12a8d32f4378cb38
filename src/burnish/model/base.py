"""What every causal language model offers the trainer, whoever wrote its modules.

Shape suffixes: T tokens of a pack, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.model.lm_head import Head
from burnish.observe.flops import ModelShape
from burnish.types import Documents, UserError


class UnsupportedModel(UserError):
    """A model that our own modules do not compute; those of `transformers` may."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter whose first dimension counts experts, and which checkpoints hold whole or in pieces.

    Expert e of it is the tensor `pieces[0].format(e)`. Where there are several pieces, the second dimension counts
    them, and a checkpoint that has the parameter whole has that dimension and the next as one.
    """

    pieces: tuple[str, ...]


class CausalLM(nn.Module):
    """A language model up to its last norm; the head is handed out as data, because logits are never made as a whole.

    Parameters carry Hugging Face's names, so that `named_parameters` is what is read from and written to a checkpoint.
    """

    config: dict[str, Any]
    """The model's config.json."""
    aliases: Mapping[str, str] = {}
    """Names under which a checkpoint may hold a parameter a second time: tied weights."""
    stacks: Mapping[str, Stack] = {}
    """How checkpoints hold the parameters that are stacked over experts, by parameter."""
    is_stored_whole: bool = False
    """Whether the checkpoint that was read holds those whole, and an export is to."""
    unread: tuple[str, ...] = ()
    """Beginnings of names of what a checkpoint may hold beyond this model: layers that predict further tokens."""
    row_reason: str | None = None
    """Why documents run one a row; None where they run packed."""

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, documents: Documents, noise_TD: Tensor | None = None
    ) -> Tensor:
        """Hidden states [T, D] after the final norm; `noise_TD` is added to the embeddings (NEFTune)."""
        raise NotImplementedError

    def head(self) -> Head:
        """The output layer with the weights of this moment."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order: the units of recompute, compile and sharding."""
        raise NotImplementedError

    def run_rows(self, reason: str) -> None:
        """From now on run one document a row. Raises UserError where there is no other way than packed."""
        raise UserError(f"{reason}; this model has no other way to run; set model.implementation=transformers")

    def export(
        self,
        folder: Path,
        dtype: torch.dtype,
        weights: Iterator[tuple[str, Tensor]] | None = None,
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        """Write config.json and safetensors in `dtype` into an existing folder, as `transformers` reads them.

        `weights` are taken one after the other in place of the model's own, of which they have the names.
        """
        raise NotImplementedError


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What of a model is saved and no parameter, because no gradient reaches it: the corrections of routers."""
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def model_shape(model: CausalLM) -> ModelShape:
    """What MFU counts by, of a model of equal heads in all layers; shapes alone are read, so it may be on meta.

    Of stacked experts those count that a token goes to. Where keys and values differ in size, as in multi-head latent
    attention, head_dim is their mean, because each enters one of attention's two products.
    """
    config, blocks = model.config, model.blocks()
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    if "kv_lora_rank" in config:
        head_dim = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]) // 2
    share = expert_share(config)
    return ModelShape(
        body_parameters=sum(
            round(p.numel() * share) if ".experts." in name and p.ndim > 2 else p.numel()
            for block in blocks
            for name, p in block.named_parameters()
            if p.ndim == 2 or ".experts." in name
        ),
        head_parameters=model.head().weight_VD.numel(),
        num_layers=len(blocks),
        num_heads=num_heads,
        head_dim=head_dim,
    )


def expert_share(config: Mapping[str, Any]) -> float:
    """The part of a layer's routed experts that a token goes to, by a config.json; 1 where it has none."""
    sizes = (config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    num_experts = next((size for size in sizes if size), None)
    return 1.0 if num_experts is None else config["num_experts_per_tok"] / num_experts
