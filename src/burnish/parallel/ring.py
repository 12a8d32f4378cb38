"""Attention in a ring: the keys and values of a pack go round the ranks that share it, and back come their gradients.

Which tokens a rank holds and what of them meets is said by zigzag.py; an `Engine` computes it. Partial outputs are
added up by the log-sum-exp of their scores; no rank ever holds scores of a whole pack.

Shape suffixes: T tokens at hand, L queries and M keys that meet, H query heads, G key and value heads, R = H / G,
E head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from burnish.config import RecipeError
from burnish.parallel.zigzag import Span, deal, spans
from burnish.types import Documents


def no_softcap(softcap: float) -> str:
    """Why a model with this softcap is refused."""
    return (
        f"parallel.cp_kind=ring computes no softcap, and this model caps attention scores at {softcap}; "
        "set parallel.cp_kind to all_to_all"
    )


class Meeting(NamedTuple):
    """Queries of a rank and keys that are here, of some documents; between them lie the rows of others.

    `queries` and `keys` are rows of them, in order, `q_lengths` and `k_lengths` how many of each document; `q_bounds`
    and `k_bounds` (int32, on the device) where those begin and end among the rows. `distance` as of `zigzag.Span`;
    where it is more than 0 there is one document. `window` is None where it keeps nothing from anyone.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    q_bounds: Tensor
    k_bounds: Tensor
    distance: int | None
    window: int | None

    @classmethod
    def of(cls, spans: Sequence[Span], window: int | None, device: torch.device) -> Meeting:
        """Of spans that can be computed at once."""
        queries, keys = [span.queries for span in spans], [span.keys for span in spans]
        q_lengths, k_lengths = tuple(map(len, queries)), tuple(map(len, keys))
        return cls(
            queries=_rows_of(queries, device),
            keys=_rows_of(keys, device),
            q_lengths=q_lengths,
            k_lengths=k_lengths,
            q_bounds=torch.tensor([0, *accumulate(q_lengths)], dtype=torch.int32).to(device),
            k_bounds=torch.tensor([0, *accumulate(k_lengths)], dtype=torch.int32).to(device),
            distance=spans[0].distance,
            window=None if spans[0].distance is None else window,
        )


def _rows_of(ranges: Sequence[range], device: torch.device) -> slice | Tensor:
    """The rows of `ranges`, without a copy where nothing lies between them."""
    if all(one.stop == other.start for one, other in pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    return torch.cat([torch.arange(rows.start, rows.stop) for rows in ranges]).to(device)


class RingAttention:
    """Attention over the pieces of a pack that `zigzag.deal` gives a rank: keys and values go round the group
    (arXiv 2310.01889), and every rank adds up what its queries see of them. `attend` is a `Kernel` without softcap."""

    def __init__(self, group: dist.ProcessGroup, engine: Engine | None = None) -> None:
        self._group = group
        self._engine = engine
        self._known: tuple[Documents, int | None, list[list[Meeting]]] | None = None

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
        task = Task(self._group, engine, scale, self._meetings(documents, window, q_THE.device))
        return cast(Tensor, _Ring.apply(q_THE, kv_2TGE, task))[..., :size]

    def _meetings(self, documents: Documents, window: int | None, device: torch.device) -> list[list[Meeting]]:
        """By step what this rank computes; all layers of a model ask for the same."""
        if self._known is None or self._known[0] is not documents or self._known[1] != window:
            rank, size = self._group.rank(), self._group.size()
            pieces = deal(documents.lengths, size)
            steps = [spans(pieces[rank], pieces[(rank - step) % size], window) for step in range(size)]
            meetings = [[Meeting.of(together, window, device) for together in step] for step in steps]
            self._known = documents, window, meetings
        return self._known[2]


@dataclass(frozen=True, slots=True)
class Task:
    """One attention over a ring: what does not need gradients. `meetings` are those after each number of shifts."""

    group: dist.ProcessGroup
    engine: Engine
    scale: float
    meetings: list[list[Meeting]]


_TASKS: dict[int, Task] = {}
"""Those of the moment: an operator of torch takes numbers, and no objects."""


@torch.library.custom_op("burnish::ring", mutates_args=())
def go_round(q_THE: Tensor, kv_2TGE: Tensor, task: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a ring's forward, of all of it: what recomputation keeps as one, or computes again."""
    ring = _TASKS[task]
    wide = torch.promote_types(q_THE.dtype, torch.float32)
    output_THE = torch.zeros_like(q_THE, dtype=wide)
    lse_TH = output_THE.new_full(q_THE.shape[:2], -torch.inf)
    here, size = kv_2TGE, ring.group.size()
    for step in range(size):
        arriving = _Shift(here, ring.group) if step < size - 1 else None
        for meeting in ring.meetings[step]:
            k_MGE, v_MGE = here[:, meeting.keys]
            part = ring.engine.forward(q_THE[meeting.queries], k_MGE, v_MGE, meeting, ring.scale)
            _merge(output_THE, lse_TH, meeting.queries, *part)
        here = arriving.wait() if arriving else here
    return output_THE.to(q_THE.dtype), lse_TH


@go_round.register_fake
def _(q_THE: Tensor, kv_2TGE: Tensor, task: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_THE.dtype, torch.float32)
    return torch.empty_like(q_THE), q_THE.new_empty(q_THE.shape[:2], dtype=wide)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THE: Tensor, kv_2TGE: Tensor, task: Task) -> Tensor:
        _TASKS[id(task)] = task
        output_THE, lse_TH = go_round(q_THE, kv_2TGE, id(task))
        del _TASKS[id(task)]
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
            for meeting in task.meetings[step]:
                queries, keys = meeting.queries, meeting.keys
                dq_LHE, dk_MGE, dv_MGE = task.engine.backward(known.at(queries, keys), meeting, task.scale)
                dq_THE[queries] += dq_LHE
                dkv_2TGE[0, keys] += dk_MGE
                dkv_2TGE[1, keys] += dv_MGE
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


def _merge(output_THE: Tensor, lse_TH: Tensor, rows: slice | Tensor, part_LHE: Tensor, part_lse_LH: Tensor) -> None:
    """Add to an attention over some keys that of `rows` over others, in place. lse: log-sum-exp of the scores."""
    output_LHE, lse_LH = output_THE[rows], lse_TH[rows]
    new_LH = torch.logaddexp(lse_LH, part_lse_LH)
    output_LHE *= (lse_LH - new_LH).exp()[..., None]
    output_LHE += part_LHE * (part_lse_LH - new_LH).exp()[..., None]
    lse_LH.copy_(new_LH)
    if isinstance(rows, Tensor):  # what it picks are copies
        output_THE[rows], lse_TH[rows] = output_LHE, lse_LH


class Known(NamedTuple):
    """What gradients of a meeting or tile are computed from; output and log-sum-exp are those over all keys."""

    grad_LHE: Tensor
    q_LHE: Tensor
    k_MGE: Tensor
    v_MGE: Tensor
    output_LHE: Tensor
    lse_LH: Tensor

    def at(self, queries: slice | Tensor, keys: slice | Tensor) -> Known:
        q, k = queries, keys
        return Known(self.grad_LHE[q], self.q_LHE[q], self.k_MGE[k], self.v_MGE[k], self.output_LHE[q], self.lse_LH[q])


class Engine(Protocol):
    """Attention of one meeting on one rank, with what adding up needs."""

    def forward(
        self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, meeting: Meeting, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output [L, H, E] and log-sum-exp of the scores [L, H]."""
        ...

    def backward(self, known: Known, meeting: Meeting, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """What this meeting adds to the gradients of q, k and v."""
        ...


def _engine_for(q_THE: Tensor) -> Engine:
    if not q_THE.is_cuda:
        return CPUEngine()
    return VarlenEngine() if q_THE.dtype in (torch.bfloat16, torch.float16) else PlainEngine()


class VarlenEngine:
    """One FlashAttention over all documents of a meeting: CUDA, bf16 or fp16."""

    def forward(
        self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, meeting: Meeting, scale: float
    ) -> tuple[Tensor, Tensor]:
        arguments, left, right = self._arguments(meeting)
        output_LHE, lse_HL, *_ = torch.ops.aten._flash_attention_forward(
            q_LHE, k_MGE, v_MGE, *arguments, False, scale=scale, window_size_left=left, window_size_right=right
        )
        return output_LHE, lse_HL.t()

    def backward(self, known: Known, meeting: Meeting, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        arguments, left, right = self._arguments(meeting)
        # Read only with dropout, of which there is none.
        random_state = torch.zeros(2, dtype=torch.uint64, device=known.q_LHE.device)
        return torch.ops.aten._flash_attention_backward(
            known.grad_LHE.contiguous(), *known[1:5], known.lse_LH.t().contiguous(), *arguments,
            random_state, random_state.new_empty(0),
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip

    def _arguments(self, meeting: Meeting) -> tuple[tuple[Any, ...], int, int]:
        """Bounds and greatest lengths of queries and keys, dropout and causality; then the window's two sides."""
        bounds, longest = (meeting.q_bounds, meeting.k_bounds), (max(meeting.q_lengths), max(meeting.k_lengths))
        left, right = (-1 if meeting.window is None else meeting.window - 1), (0 if meeting.distance == 0 else -1)
        if meeting.distance and meeting.window is not None:
            # FlashAttention lets the last query stand at the last key, here it stands so much later.
            left -= meeting.distance + meeting.q_lengths[0] - meeting.k_lengths[0]
        return (*bounds, *longest, 0.0, (left, right) == (-1, 0)), left, right


class Tile(NamedTuple):
    """Queries and keys of a meeting, as rows of it, of one document; the first query is `distance` after the first
    key."""

    queries: slice
    keys: slice
    distance: int
    window: int | None

    @property
    def bites(self) -> bool:
        """Whether the window hides keys from some of the queries."""
        return self.window is not None and self.distance + self.queries.stop - self.queries.start > self.window

    def hidden(self, device: torch.device) -> Tensor:
        """bool [L, M]: which queries do not see which keys."""
        q_L1 = torch.arange(self.queries.start, self.queries.stop, device=device)[:, None]
        k_M = torch.arange(self.keys.start, self.keys.stop, device=device)
        back_LM = (q_L1 - self.queries.start) - (k_M - self.keys.start) + self.distance
        return back_LM < 0 if self.window is None else (back_LM < 0) | (back_LM >= self.window)


BLOCK = 512
"""Queries of a tile that holds scores or a mask: what is held grows with a document's length, not with its square."""


def tiles(meeting: Meeting, always_blocks: bool) -> Iterator[Tile]:
    """A meeting cut by documents, and those in blocks of queries where a window bites or `always_blocks`."""
    q_start, k_start, window = 0, 0, meeting.window
    for length, num_keys in zip(meeting.q_lengths, meeting.k_lengths, strict=True):
        # Who sees all keys can as well stand at the last.
        distance = num_keys - 1 if meeting.distance is None else meeting.distance
        bites = window is not None and distance + length > window
        step = BLOCK if bites or always_blocks else length
        for q in range(0, length, step):
            q_end = min(q + step, length)
            k = 0 if window is None else max(0, q + distance - window + 1)
            k_end = min(num_keys, q_end + distance)
            rows, columns = slice(q_start + q, q_start + q_end), slice(k_start + k, k_start + k_end)
            yield Tile(rows, columns, q + distance - k, window)
        q_start, k_start = q_start + length, k_start + num_keys


class TiledEngine(ABC):
    """Attention of a meeting tile by tile, in float32 at least; subclasses compute a tile."""

    always_blocks = False

    def forward(
        self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, meeting: Meeting, scale: float
    ) -> tuple[Tensor, Tensor]:
        q_LHE, k_MGE, v_MGE = map(_widened, (q_LHE, k_MGE, v_MGE))
        parts = [
            self._forward(q_LHE[tile.queries], k_MGE[tile.keys], v_MGE[tile.keys], tile, scale)
            for tile in tiles(meeting, self.always_blocks)
        ]
        outputs_LHE, lse_LH = zip(*parts, strict=True)
        return torch.cat(outputs_LHE), torch.cat(lse_LH)

    def backward(self, known: Known, meeting: Meeting, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        known = Known(*map(_widened, known))
        dq_LHE, dk_MGE, dv_MGE = map(torch.zeros_like, (known.q_LHE, known.k_MGE, known.v_MGE))
        for tile in tiles(meeting, self.always_blocks):
            dq_LHE[tile.queries], dk, dv = self._backward(known.at(tile.queries, tile.keys), tile, scale)
            dk_MGE[tile.keys] += dk
            dv_MGE[tile.keys] += dv
        return dq_LHE, dk_MGE, dv_MGE

    @abstractmethod
    def _forward(self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the queries of one tile."""

    @abstractmethod
    def _backward(self, known: Known, tile: Tile, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values that one tile adds."""


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class CPUEngine(TiledEngine):
    """By torch's own kernel for the CPU, which scaled_dot_product_attention runs but does not show."""

    def _forward(self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        is_causal, mask_LM = self._mask(q_LHE, tile)
        output_1HLE, lse_1HL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_heads_first, (q_LHE, k_MGE, v_MGE)), 0.0, is_causal, attn_mask=mask_LM, scale=scale
        )
        return _tokens_first(output_1HLE), lse_1HL[0].t()

    def _backward(self, known: Known, tile: Tile, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        is_causal, mask_LM = self._mask(known.q_LHE, tile)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(_heads_first, known[:5]), known.lse_LH.t()[None], 0.0, is_causal, attn_mask=mask_LM, scale=scale
        )
        dq_LHE, dk_MGE, dv_MGE = map(_tokens_first, gradients)
        return dq_LHE, dk_MGE, dv_MGE

    def _mask(self, q_LHE: Tensor, tile: Tile) -> tuple[bool, Tensor | None]:
        """Whether the kernel's own causal mask is meant, or else the mask to add to the scores, if one is."""
        length, num_keys = tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
        is_past = num_keys <= tile.distance + 1
        if not tile.bites and (is_past or (tile.distance == 0 and length == num_keys)):
            return not is_past, None
        hidden_LM = tile.hidden(q_LHE.device)
        return False, q_LHE.new_zeros(hidden_LM.shape).masked_fill(hidden_LM, -torch.inf)


def _heads_first(x_THE: Tensor) -> Tensor:
    return x_THE.transpose(0, 1)[None]


def _tokens_first(x_1HTE: Tensor) -> Tensor:
    return x_1HTE[0].transpose(0, 1)


class PlainEngine(TiledEngine):
    """By matrix products, on any device in any type; a suffix R counts the query heads of a key head."""

    always_blocks = True

    def _forward(self, q_LHE: Tensor, k_MGE: Tensor, v_MGE: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        scores_GRLM = self._scores(q_LHE, k_MGE, tile, scale)
        lse_GRL = scores_GRLM.logsumexp(-1)
        output_LGRE = torch.einsum("grlm,mge->lgre", (scores_GRLM - lse_GRL[..., None]).exp(), v_MGE)
        return output_LGRE.flatten(1, 2), lse_GRL.flatten(0, 1).t()

    def _backward(self, known: Known, tile: Tile, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        grad_LHE, q_LHE, k_MGE, v_MGE, output_LHE, lse_LH = known
        by_key_head = (k_MGE.shape[1], -1)
        q_LGRE, grad_LGRE = q_LHE.unflatten(1, by_key_head), grad_LHE.unflatten(1, by_key_head)
        lse_GRL = lse_LH.t().unflatten(0, by_key_head)
        mean_GRL = (grad_LHE * output_LHE).sum(-1).t().unflatten(0, by_key_head)
        share_GRLM = (self._scores(q_LHE, k_MGE, tile, scale) - lse_GRL[..., None]).exp()
        dshare_GRLM = torch.einsum("lgre,mge->grlm", grad_LGRE, v_MGE)
        dscores_GRLM = share_GRLM * (dshare_GRLM - mean_GRL[..., None]) * scale
        dq_LGRE = torch.einsum("grlm,mge->lgre", dscores_GRLM, k_MGE)
        dk_MGE = torch.einsum("grlm,lgre->mge", dscores_GRLM, q_LGRE)
        dv_MGE = torch.einsum("grlm,lgre->mge", share_GRLM, grad_LGRE)
        return dq_LGRE.flatten(1, 2), dk_MGE, dv_MGE

    def _scores(self, q_LHE: Tensor, k_MGE: Tensor, tile: Tile, scale: float) -> Tensor:
        q_LGRE = q_LHE.unflatten(1, (k_MGE.shape[1], -1))
        scores_GRLM = torch.einsum("lgre,mge->grlm", q_LGRE, k_MGE) * scale
        return scores_GRLM.masked_fill_(tile.hidden(q_LHE.device), -torch.inf)
