"""What a block keeps for its backward, and whether it is compiled: the same numbers for less memory or time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from burnish.model.base import CausalLM
from burnish.parallel.offload import offload_activations

SAVED_BY_SELECTIVE = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What selective recomputation keeps: matrix products and attention, which cost more to compute than to hold."""


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in SAVED_BY_SELECTIVE or "varlen_attn" in str(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_blocks(blocks: Sequence[nn.Module], mode: str) -> None:
    """Wrap the forward of each block for activation checkpointing: `full` keeps its inputs alone, `selective` also the
    results of matrix products and attention. `none` changes nothing.
    """
    if mode == "none":
        return
    selective: dict[str, Callable[[], Any]] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)} if mode == "selective" else {}
    )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **selective)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """torch.compile of each block for packs of any length."""
    for block in blocks:
        block.compile(dynamic=True)


@dataclass(frozen=True)
class Blocks:
    """How the blocks of a model are wrapped."""

    recompute: Literal["none", "selective", "full"] = "none"
    every: int = 1
    """Of how many blocks in a row the first is recomputed."""
    is_compiled: bool = False
    is_offloaded: bool = False
    """Whether what blocks keep lies in the host's memory."""

    def wrap(self, model: CausalLM) -> None:
        recompute_blocks(model.blocks()[:: self.every], self.recompute)
        if self.is_offloaded:
            offload_activations(model.blocks())
        if self.is_compiled:
            compile_blocks(model.blocks())
