"""How much arithmetic a model's training takes: what MFU is measured against.

The formula of design.md: 6 FLOPs for each matmul parameter and token (2 forward, 4 backward; the head only at trained
positions) and 6 for each layer, head, head dimension and pair of tokens that see each other, counted twice (causal:
n^2 of a document of n tokens; a sliding window is not deducted). No recompute, no norms, no softmax.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from burnish.model.base import CausalLM

FORMULA = "6 (block_parameters tokens + head_parameters trained_tokens + layers heads head_dim sum(length^2))"


@dataclass(frozen=True, slots=True)
class Work:
    """The three sizes of the formula; `attention_size` is layers * query heads * head dimension."""

    block_parameters: int
    head_parameters: int
    attention_size: int

    def flops(self, lengths: Iterable[int], num_trained_tokens: int) -> int:
        """FLOPs of forward and backward over documents of these lengths."""
        lengths = tuple(lengths)
        blocks, head = self.block_parameters * sum(lengths), self.head_parameters * num_trained_tokens
        return 6 * (blocks + head + self.attention_size * sum(length**2 for length in lengths))


def count_work(model: CausalLM) -> Work:
    """The work of a model of equal heads in all layers. It may be on the meta device: shapes alone are read."""
    config, blocks = model.config, model.blocks()
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    return Work(
        block_parameters=sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2),
        head_parameters=model.head().weight_VD.numel(),
        attention_size=len(blocks) * num_heads * head_dim,
    )
