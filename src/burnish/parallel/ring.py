"""Attention in a ring: the keys and values of a pack go round the ranks that share it, and back come their gradients.

What of two chunks meets is plain arithmetic on the bounds of documents (`meet`); an `Engine` computes it. Partial
outputs are added up by the log-sum-exp of their scores; no rank ever holds scores of a whole pack.

Shape suffixes: T tokens at hand, L queries and M keys that meet, H query heads, G key and value heads, R = H / G,
E head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from burnish.config import RecipeError
from burnish.types import Documents


def no_softcap(softcap: float) -> str:
    """Why a model with this softcap is refused."""
    return (
        f"parallel.cp_kind=ring computes no softcap, and this model caps attention scores at {softcap}; "
        "set parallel.cp_kind to all_to_all"
    )


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two of 2 * size chunks that a rank of a ring holds. Chunk c has c + 1 chunks to see, so an early and a late
    one together are the same work on every rank."""
    return rank, 2 * size - 1 - rank


class Pair(NamedTuple):
    """Queries [q_start, q_end) of a pack, from the left edge of a chunk, and what they see of another chunk: keys
    [k_start, k_end), to its right edge.

    `lengths` of the queries' documents, of which `first` is the first. Either queries and keys are the same tokens,
    each seeing itself and what is before it in its document, or the keys come before the queries and all are of one
    document. Every query sees a key.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    first: int
    lengths: tuple[int, ...]

    @property
    def is_same(self) -> bool:
        return self.q_start == self.k_start


def meet(queries: range, keys: range, bounds: Sequence[int], window: int | None) -> Pair | None:
    """What of two chunks of a pack with documents at `bounds` has to do with each other; None: nothing."""
    if keys.start > queries.start:
        return None
    first = bisect_right(bounds, queries.start) - 1
    if queries == keys:
        inside = bounds[first + 1 : bisect_left(bounds, queries.stop)]
        edges = [queries.start, *inside, queries.stop]
        lengths = tuple(end - start for start, end in pairwise(edges))
        return Pair(queries.start, queries.stop, keys.start, keys.stop, first, lengths)
    # Documents are contiguous, so only the one with the first query can reach back to another chunk.
    q_end, k_start = min(queries.stop, bounds[first + 1]), max(keys.start, bounds[first])
    if window is not None:
        q_end, k_start = min(q_end, keys.stop + window - 1), max(k_start, queries.start - window + 1)
    if q_end <= queries.start or k_start >= keys.stop:
        return None
    return Pair(queries.start, q_end, k_start, keys.stop, first, (q_end - queries.start,))


class RingAttention:
    """Attention over the two chunks of a pack that `chunks_of` gives a rank: keys and values go round the group
    (arXiv 2310.01889), and every rank adds up what its queries see of them. `attend` is a `Kernel` without softcap."""

    def __init__(self, group: dist.ProcessGroup, engine: Engine | None = None) -> None:
        self._group = group
        self._engine = engine

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
        if softcap is not None:
            raise RecipeError(no_softcap(softcap))
        assert len(q_THE) * self._group.size() == sum(documents.lengths), (len(q_THE), documents.lengths)
        size = v_TGE.shape[2]
        kv_2TGE = torch.stack((k_TGE, functional.pad(v_TGE, (0, k_TGE.shape[2] - size))))
        engine = self._engine or _engine_for(q_THE)
        task = Task(self._group, engine, documents, scale, window)
        return cast(Tensor, _Ring.apply(q_THE, kv_2TGE, task))[..., :size]


@dataclass(frozen=True, slots=True)
class Task:
    """One attention over a ring: what does not need gradients."""

    group: dist.ProcessGroup
    engine: Engine
    documents: Documents
    scale: float
    window: int | None

    def pairs(self, step: int) -> Iterator[tuple[slice, slice, Pair]]:
        """What this rank does with the keys that are here after `step` shifts: rows of its queries, rows of the keys,
        and what they are."""
        size, rank = self.group.size(), self.group.rank()
        bounds = [0, *accumulate(self.documents.lengths)]
        length = bounds[-1] // (2 * size)
        for i, q_chunk in enumerate(chunks_of(rank, size)):
            for j, k_chunk in enumerate(chunks_of((rank - step) % size, size)):
                queries, keys = (range(chunk * length, (chunk + 1) * length) for chunk in (q_chunk, k_chunk))
                pair = meet(queries, keys, bounds, self.window)
                if pair is not None:
                    rows = slice(i * length, i * length + pair.q_end - pair.q_start)
                    yield rows, slice((j + 1) * length - pair.k_end + pair.k_start, (j + 1) * length), pair


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THE: Tensor, kv_2TGE: Tensor, task: Task) -> Tensor:
        wide = torch.promote_types(q_THE.dtype, torch.float32)
        output_THE = torch.zeros_like(q_THE, dtype=wide)
        lse_TH = output_THE.new_full(q_THE.shape[:2], -torch.inf)
        here, size = kv_2TGE, task.group.size()
        for step in range(size):
            arriving = _Shift(here, task.group) if step < size - 1 else None
            for rows, columns, pair in task.pairs(step):
                k_MGE, v_MGE = here[:, columns]
                part = task.engine.forward(q_THE[rows], k_MGE, v_MGE, pair, task)
                _merge(output_THE[rows], lse_TH[rows], *part)
            here = arriving.wait() if arriving else here
        output_THE = output_THE.to(q_THE.dtype)
        ctx.task = task
        ctx.save_for_backward(q_THE, kv_2TGE, output_THE, lse_TH)
        return output_THE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        q_THE, kv_2TGE, output_THE, lse_TH = ctx.saved_tensors
        task, (grad_THE,) = ctx.task, gradients
        wide = torch.promote_types(q_THE.dtype, torch.float32)
        dq_THE = torch.zeros_like(q_THE, dtype=wide)
        # The gradients of keys travel with them, one shift behind, and are at home after as many shifts as ranks.
        behind: _Shift | None = None
        here, size = kv_2TGE, task.group.size()
        for step in range(size):
            arriving = _Shift(here, task.group) if step < size - 1 else None
            dkv_2TGE = torch.zeros_like(here, dtype=wide)
            known = Known(grad_THE, q_THE, here[0], here[1], output_THE, lse_TH)
            for rows, columns, pair in task.pairs(step):
                dq_LHE, dk_MGE, dv_MGE = task.engine.backward(known.at(rows, columns), pair, task)
                dq_THE[rows] += dq_LHE
                dkv_2TGE[0, columns] += dk_MGE
                dkv_2TGE[1, columns] += dv_MGE
            if behind:
                dkv_2TGE += behind.wait()
            here = arriving.wait() if arriving else here
            behind = _Shift(dkv_2TGE, task.group)
        assert behind is not None
        return dq_THE.to(q_THE.dtype), behind.wait().to(kv_2TGE.dtype), None


class _Shift:
    """A tensor on its way to the next rank of a ring, and that of the rank before to here."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        self._sent, self._received = x, torch.empty_like(x)
        send = dist.P2POp(dist.isend, self._sent, group=group, group_peer=(rank + 1) % size)
        receive = dist.P2POp(dist.irecv, self._received, group=group, group_peer=(rank - 1) % size)
        self._works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received


def _merge(output_LHE: Tensor, lse_LH: Tensor, part_LHE: Tensor, part_lse_LH: Tensor) -> None:
    """Add to an attention over some keys that over others, in place. lse: log-sum-exp of the scores."""
    new_LH = torch.logaddexp(lse_LH, part_lse_LH)
    output_LHE *= (lse_LH - new_LH).exp()[..., None]
    output_LHE += part_LHE * (part_lse_LH - new_LH).exp()[..., None]
    lse_LH.copy_(new_LH)


class Known(NamedTuple):
    """What gradients of a pair or tile are computed from; output and log-sum-exp are those over all keys."""

    grad_LHE: Tensor
    q_LHE: Tensor
    k_MGE: Tensor
    v_MGE: Tensor
    output_LHE: Tensor
    lse_LH: Tensor

    def at(self, queries: slice, keys: slice) -> Known:
        q, k = queries, keys
        return Known(self.grad_LHE[q], self.q_LHE[q], self.k_MGE[k], self.v_MGE[k], self.output_LHE[q], self.lse_LH[q])


class Engine(Protocol):
    """Attention of one pair on one rank, with what adding up needs."""

    def forward(self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, pair: Pair, task: Task) -> tuple[Tensor, Tensor]:
        """Output [L, H, E] and log-sum-exp of the scores [L, H]."""
        ...

    def backward(self, known: Known, pair: Pair, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        """What this pair adds to the gradients of q, k and v."""
        ...


def _engine_for(q_THE: Tensor) -> Engine:
    if not q_THE.is_cuda:
        return CPUEngine()
    return VarlenEngine() if q_THE.dtype in (torch.bfloat16, torch.float16) else PlainEngine()


class VarlenEngine:
    """One FlashAttention over all documents of a pair: CUDA, bf16 or fp16."""

    def forward(self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, pair: Pair, task: Task) -> tuple[Tensor, Tensor]:
        arguments, left, right = self._arguments(pair, task)
        output_LHE, lse_HL, *_ = torch.ops.aten._flash_attention_forward(
            q_LHE, k_MGE, v_MGE, *arguments, False, scale=task.scale, window_size_left=left, window_size_right=right
        )
        return output_LHE, lse_HL.t()

    def backward(self, known: Known, pair: Pair, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        arguments, left, right = self._arguments(pair, task)
        # Read only with dropout, of which there is none.
        random_state = torch.zeros(2, dtype=torch.uint64, device=known.q_LHE.device)
        return torch.ops.aten._flash_attention_backward(
            known.grad_LHE.contiguous(), *known[1:5], known.lse_LH.t().contiguous(), *arguments,
            random_state, random_state.new_empty(0),
            scale=task.scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip

    def _arguments(self, pair: Pair, task: Task) -> tuple[tuple[Any, ...], int, int]:
        """Bounds and greatest lengths of queries and keys, dropout and causality; then the window's two sides."""
        bounds = task.documents.cu_seqlens[pair.first : pair.first + len(pair.lengths) + 1]
        q_bounds = bounds.clamp(pair.q_start, pair.q_end) - pair.q_start
        k_bounds = bounds.clamp(pair.k_start, pair.k_end) - pair.k_start
        longest = max(pair.lengths)
        most_keys = longest if pair.is_same else pair.k_end - pair.k_start
        left, right = (-1 if task.window is None else task.window - 1), 0
        if not pair.is_same:
            # FlashAttention lets the last query stand at the last key, here it stands so much later.
            right, left = -1, (-1 if task.window is None else left - (pair.q_end - pair.k_end))
        return (q_bounds, k_bounds, longest, most_keys, 0.0, (left, right) == (-1, 0)), left, right


class Tile(NamedTuple):
    """Queries and keys of a pair, as rows of it, of one document; the first query is `distance` after the first key."""

    queries: slice
    keys: slice
    distance: int

    def hidden(self, window: int | None, device: torch.device) -> Tensor:
        """bool [L, M]: which queries do not see which keys."""
        q_L1 = torch.arange(self.queries.start, self.queries.stop, device=device)[:, None]
        k_M = torch.arange(self.keys.start, self.keys.stop, device=device)
        back_LM = (q_L1 - self.queries.start) - (k_M - self.keys.start) + self.distance
        return back_LM < 0 if window is None else (back_LM < 0) | (back_LM >= window)


BLOCK = 512
"""Queries of a tile that holds scores or a mask: what is held grows with a document's length, not with its square."""


def tiles(pair: Pair, window: int | None, always_blocks: bool) -> Iterator[Tile]:
    """A pair cut by documents, and those in blocks of queries where a window bites or `always_blocks`."""
    start = 0
    for length in pair.lengths:
        num_keys = length if pair.is_same else pair.k_end - pair.k_start
        distance = pair.q_start - pair.k_start
        bites = window is not None and distance + length > window
        step = BLOCK if bites or always_blocks else length
        for q in range(0, length, step):
            q_end = min(q + step, length)
            k = 0 if window is None else max(0, q + distance - window + 1)
            k_end = min(num_keys, q_end + distance)
            yield Tile(slice(start + q, start + q_end), slice(start + k, start + k_end), q + distance - k)
        start += length


class TiledEngine(ABC):
    """Attention of a pair tile by tile, in float32 at least; subclasses compute a tile."""

    always_blocks = False

    def forward(self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, pair: Pair, task: Task) -> tuple[Tensor, Tensor]:
        q_LHE, k_MGE, v_MGE = map(_widened, (q_LHE, k_MGE, v_MGE))
        parts = [
            self._forward(q_LHE[tile.queries], k_MGE[tile.keys], v_MGE[tile.keys], tile, task)
            for tile in tiles(pair, task.window, self.always_blocks)
        ]
        outputs_LHE, lse_LH = zip(*parts, strict=True)
        return torch.cat(outputs_LHE), torch.cat(lse_LH)

    def backward(self, known: Known, pair: Pair, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        known = Known(*map(_widened, known))
        dq_LHE, dk_MGE, dv_MGE = map(torch.zeros_like, (known.q_LHE, known.k_MGE, known.v_MGE))
        for tile in tiles(pair, task.window, self.always_blocks):
            dq_LHE[tile.queries], dk, dv = self._backward(known.at(tile.queries, tile.keys), tile, task)
            dk_MGE[tile.keys] += dk
            dv_MGE[tile.keys] += dv
        return dq_LHE, dk_MGE, dv_MGE

    @abstractmethod
    def _forward(self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, tile: Tile, task: Task) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the queries of one tile."""

    @abstractmethod
    def _backward(self, known: Known, tile: Tile, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values that one tile adds."""


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class CPUEngine(TiledEngine):
    """By torch's own kernel for the CPU, which scaled_dot_product_attention runs but does not show."""

    def _forward(self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, tile: Tile, task: Task) -> tuple[Tensor, Tensor]:
        is_causal, mask_LM = self._mask(q_LHE, tile, task)
        output_1HLE, lse_1HL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_heads_first, (q_LHE, k_MGE, v_MGE)), 0.0, is_causal, attn_mask=mask_LM, scale=task.scale
        )
        return _tokens_first(output_1HLE), lse_1HL[0].t()

    def _backward(self, known: Known, tile: Tile, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        is_causal, mask_LM = self._mask(known.q_LHE, tile, task)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(_heads_first, known[:5]), known.lse_LH.t()[None], 0.0, is_causal, attn_mask=mask_LM, scale=task.scale
        )
        dq_LHE, dk_MGE, dv_MGE = map(_tokens_first, gradients)
        return dq_LHE, dk_MGE, dv_MGE

    def _mask(self, q_LHE: Tensor, tile: Tile, task: Task) -> tuple[bool, Tensor | None]:
        """Whether the kernel's own causal mask is meant, or else the mask to add to the scores, if one is."""
        length, num_keys = tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
        is_past = num_keys <= tile.distance + 1
        bites = task.window is not None and tile.distance + length > task.window
        if not bites and (is_past or (tile.distance == 0 and length == num_keys)):
            return not is_past, None
        hidden_LM = tile.hidden(task.window, q_LHE.device)
        return False, q_LHE.new_zeros(hidden_LM.shape).masked_fill(hidden_LM, -torch.inf)


def _heads_first(x_THE: Tensor) -> Tensor:
    return x_THE.transpose(0, 1)[None]


def _tokens_first(x_1HTE: Tensor) -> Tensor:
    return x_1HTE[0].transpose(0, 1)


class PlainEngine(TiledEngine):
    """By matrix products, on any device in any type; a suffix R counts the query heads of a key head."""

    always_blocks = True

    def _forward(self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, tile: Tile, task: Task) -> tuple[Tensor, Tensor]:
        scores_GRLM = self._scores(q_LHE, k_MGE, tile, task)
        lse_GRL = scores_GRLM.logsumexp(-1)
        output_LGRE = torch.einsum("grlm,mge->lgre", (scores_GRLM - lse_GRL[..., None]).exp(), v_MGE)
        return output_LGRE.flatten(1, 2), lse_GRL.flatten(0, 1).t()

    def _backward(self, known: Known, tile: Tile, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        grad_LHE, q_LHE, k_MGE, v_MGE, output_LHE, lse_LH = known
        by_key_head = (k_MGE.shape[1], -1)
        q_LGRE, grad_LGRE = q_LHE.unflatten(1, by_key_head), grad_LHE.unflatten(1, by_key_head)
        lse_GRL = lse_LH.t().unflatten(0, by_key_head)
        mean_GRL = (grad_LHE * output_LHE).sum(-1).t().unflatten(0, by_key_head)
        share_GRLM = (self._scores(q_LHE, k_MGE, tile, task) - lse_GRL[..., None]).exp()
        dshare_GRLM = torch.einsum("lgre,mge->grlm", grad_LGRE, v_MGE)
        dscores_GRLM = share_GRLM * (dshare_GRLM - mean_GRL[..., None]) * task.scale
        dq_LGRE = torch.einsum("grlm,mge->lgre", dscores_GRLM, k_MGE)
        dk_MGE = torch.einsum("grlm,lgre->mge", dscores_GRLM, q_LGRE)
        dv_MGE = torch.einsum("grlm,lgre->mge", share_GRLM, grad_LGRE)
        return dq_LGRE.flatten(1, 2), dk_MGE, dv_MGE

    def _scores(self, q_LHE: Tensor, k_MGE: Tensor, tile: Tile, task: Task) -> Tensor:
        q_LGRE = q_LHE.unflatten(1, (k_MGE.shape[1], -1))
        scores_GRLM = torch.einsum("lgre,mge->grlm", q_LGRE, k_MGE) * task.scale
        return scores_GRLM.masked_fill_(tile.hidden(task.window, q_LHE.device), -torch.inf)
