"""What a block keeps for its backward, and whether it is compiled: the same numbers for less memory or time."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from burnish.model.base import CausalLM
from burnish.model.moe import MoE
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


def _is_kept(op: Any) -> bool:
    return op in SAVED_BY_SELECTIVE or any(name in str(op) for name in ("varlen_attn", "burnish.ring"))


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(op) else CheckpointPolicy.PREFER_RECOMPUTE


class _Keeping(TorchDispatchMode):
    """Keeps what `_is_kept`, by operator and in order."""

    def __init__(self, kept: defaultdict[Any, deque[Any]]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_kept(func):
            self.kept[func].append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _Giving(_Keeping):
    """Hands out what was kept, in place of computing it again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.kept[func].popleft() if _is_kept(func) else func(*args, **(kwargs or {}))


def _contexts() -> tuple[_Keeping, _Giving]:
    """Those of both runs of a block. torch's own want both to have the same operators, but FSDP2 gathers the weights of
    experts in the middle of a block, and not always in both. torch.compile understands torch's alone.
    """
    kept: defaultdict[Any, deque[Any]] = defaultdict(deque)
    return _Keeping(kept), _Giving(kept)


def recompute_blocks(blocks: Sequence[nn.Module], mode: str, is_compiled: bool = False) -> None:
    """Wrap the forward of each block for activation checkpointing: `full` keeps its inputs alone, `selective` also the
    results of matrix products and attention. `none` changes nothing. Blocks that are compiled as a whole keep by the
    same rule; one with experts never is, and computes again whatever is compiled of it.
    """
    if mode == "none":
        return
    for block in blocks:
        is_whole = is_compiled and not any(isinstance(module, MoE) for module in block.modules())
        contexts = partial(create_selective_checkpoint_contexts, _policy) if is_whole else _contexts
        selective: dict[str, Callable[[], Any]] = {"context_fn": contexts} if mode == "selective" else {}
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
        recompute_blocks(model.blocks()[:: self.every], self.recompute, self.is_compiled)
        if self.is_offloaded:
            offload_activations(model.blocks())
        if self.is_compiled:
            compile_blocks(model.blocks())
