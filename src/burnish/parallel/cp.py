"""Context parallelism: the tokens of a pack over several ranks, and attention that spans them.

`ContextParallel` cuts batches and makes the kernel a model is built with; the model sees fewer tokens and nothing else.
Of the kernels, all-to-all is here and the ring in ring.py. Documents stay documents in both.

Shape suffixes: T tokens of a pack or those at hand, K trained tokens, H query heads, G key and value heads,
E head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from burnish.config import RecipeError
from burnish.model.attention import Kernel, never_compiled
from burnish.parallel.exchange import exchange
from burnish.parallel.ring import RingAttention, no_softcap
from burnish.parallel.zigzag import deal
from burnish.types import Batch, Documents

Kind = Literal["ring", "all_to_all"]


def pad(batch: Batch, multiple: int) -> Batch:
    """`batch` with its number of tokens rounded up to a multiple of `multiple`."""
    return pad_to(batch, -(-batch.num_tokens // multiple) * multiple)


def pad_to(batch: Batch, num_tokens: int) -> Batch:
    """`batch` filled up to `num_tokens`, its last document of which nothing is trained: one more, or a longer one."""
    documents, missing = batch.documents, num_tokens - batch.num_tokens
    assert missing >= 0, (num_tokens, batch.num_tokens)
    if not missing:
        return batch
    *real, padding = documents.lengths if documents.has_padding else (*documents.lengths, 0)
    bounds_N = documents.cu_seqlens[: len(real) + 1]
    positions = torch.arange(padding, padding + missing, device=batch.positions_T.device)
    return replace(
        batch,
        tokens_T=functional.pad(batch.tokens_T, (0, missing)),
        positions_T=torch.cat((batch.positions_T, positions)),
        documents=Documents(
            torch.cat((bounds_N, bounds_N[-1:] + padding + missing)), (*real, padding + missing), has_padding=True
        ),
    )


def cut_tokens(x_T: Tensor, documents: Documents) -> Tensor:
    """Of a tensor [T, ...] over a pack's tokens, with those of its padding or without, the tokens at hand.

    Padding that `x_T` does not have is zero.
    """
    missing = sum(documents.lengths) - len(x_T)
    padded_T = torch.cat((x_T, x_T.new_zeros(missing, *x_T.shape[1:]))) if missing else x_T
    return padded_T if documents.here_T is None else padded_T[documents.here_T]


@dataclass(frozen=True, slots=True)
class ContextParallel:
    """The ranks of `group` share each pack; all of them get the same batches."""

    group: dist.ProcessGroup
    kind: Kind

    @property
    def multiple(self) -> int:
        """What the number of tokens of a pack must be a multiple of."""
        return self.group.size() * (2 if self.kind == "ring" else 1)

    def cut(self, batch: Batch) -> Batch:
        """This rank's part of a batch that is padded to `multiple`; every trained token is on exactly one rank."""
        num_tokens, device = batch.num_tokens, batch.tokens_T.device
        assert num_tokens % self.multiple == 0, (num_tokens, self.multiple)
        ranges = self._ranges(batch.documents.lengths)
        here_T = torch.cat([torch.arange(start, end) for start, end in ranges]).to(device)
        place_T = torch.full((num_tokens,), -1, device=device)
        place_T[here_T] = torch.arange(len(here_T), device=device)
        place_K = place_T[batch.trained_K]
        kept_K = place_K >= 0
        return replace(
            batch,
            tokens_T=batch.tokens_T[here_T],
            positions_T=batch.positions_T[here_T],
            documents=replace(batch.documents, here_T=here_T),
            trained_K=place_K[kept_K],
            targets_K=batch.targets_K[kept_K],
            weights_K=batch.weights_K[kept_K],
            raw_weights_K=batch.raw_weights_K[kept_K],
            sources_K=batch.sources_K[kept_K],
        )

    def _ranges(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """From where to where the tokens of this rank go, in a pack of documents of these lengths."""
        rank, size = self.group.rank(), self.group.size()
        if self.kind == "ring":
            return [(piece.start, piece.end) for piece in deal(lengths, size)[rank]]
        length = sum(lengths) // size
        return [(rank * length, (rank + 1) * length)]

    def kernel(self, inner: Kernel) -> Kernel:
        """Attention over the tokens at hand. all_to_all runs `inner` on whole packs; a ring computes by itself."""
        kernel = RingAttention(self.group) if self.kind == "ring" else AllToAllAttention(self.group, inner)
        return never_compiled(kernel.attend)


def check_context_parallel(config: Mapping[str, Any], cp: int, kind: Kind, tp: int = 1) -> None:
    """Raises RecipeError where the model of a config.json cannot be computed by `cp` ranks."""
    if cp == 1:
        return
    softcap = config.get("attn_logit_softcapping")
    if kind == "ring" and softcap is not None:
        raise RecipeError(no_softcap(softcap))
    heads = config["num_attention_heads"]
    if kind == "all_to_all" and heads % (cp * tp):
        largest = math.gcd(heads // tp, cp) if heads % tp == 0 else 1
        raise RecipeError(
            f"parallel.cp={cp} x tp={tp} = {cp * tp} does not divide num_attention_heads={heads}, and with "
            f"cp_kind=all_to_all each rank computes whole heads; set parallel.cp to {largest}, or cp_kind to ring"
        )


class AllToAllAttention:
    """Attention over contiguous slices of a pack by swapping tokens for heads (arXiv 2309.14509): each rank computes
    some heads of the whole pack by `inner`. `attend` is a `Kernel`."""

    def __init__(self, group: dist.ProcessGroup, inner: Kernel) -> None:
        self._group = group
        self._inner = inner

    def attend(
        self,
        q_THE: Tensor,
        k_TGE: Tensor,
        v_TGE: Tensor,
        documents: Documents,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        size, num_kv_heads = self._group.size(), k_TGE.shape[1]
        assert len(q_THE) * size == sum(documents.lengths), (len(q_THE), documents.lengths)
        # Fewer key heads than ranks are repeated just so often that each rank has whole ones.
        times = math.lcm(num_kv_heads, size) // num_kv_heads
        k_TGE, v_TGE = (x.repeat_interleave(times, dim=1) if times > 1 else x for x in (k_TGE, v_TGE))
        q_THE, k_TGE, v_TGE = (self._swap_in(x) for x in (q_THE, k_TGE, v_TGE))
        return self._swap_out(self._inner(q_THE, k_TGE, v_TGE, documents, scale, window, softcap))

    def _swap_in(self, x_THE: Tensor) -> Tensor:
        """[T of the rank, all heads, E] -> [T of the pack, heads of the rank, E]."""
        by_rank = x_THE.unflatten(1, (self._group.size(), -1)).transpose(0, 1)
        return exchange(by_rank.flatten(0, 1), self._group)

    def _swap_out(self, x_THE: Tensor) -> Tensor:
        by_rank = exchange(x_THE, self._group).unflatten(0, (self._group.size(), -1))
        return by_rank.transpose(0, 1).flatten(1, 2)
