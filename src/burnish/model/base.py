"""What every causal language model offers the trainer, whoever wrote its modules.

Shape suffixes: T tokens of a pack, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.model.lm_head import Head
from burnish.observe.flops import ModelShape
from burnish.types import Documents, UserError


class UnsupportedModel(UserError):
    """A model that our own modules do not compute; those of `transformers` may."""


class CausalLM(nn.Module):
    """A language model up to its last norm; the head is handed out as data, because logits are never made as a whole.

    Parameters carry Hugging Face's names, so that `named_parameters` is what is read from and written to a checkpoint.
    """

    config: dict[str, Any]
    """The model's config.json."""
    aliases: Mapping[str, str] = {}
    """Names under which a checkpoint may hold a parameter a second time: tied weights."""
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

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """Write config.json and safetensors in `dtype` into an existing folder, as `transformers` reads them."""
        raise NotImplementedError


def model_shape(model: CausalLM) -> ModelShape:
    """What MFU counts by, of a model of equal heads in all layers; shapes alone are read, so it may be on meta."""
    config, blocks = model.config, model.blocks()
    num_heads = config["num_attention_heads"]
    return ModelShape(
        body_parameters=sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2),
        head_parameters=model.head().weight_VD.numel(),
        num_layers=len(blocks),
        num_heads=num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
    )
