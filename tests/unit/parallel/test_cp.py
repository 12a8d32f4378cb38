"""Context parallelism against one process: attention over ranks is attention over the whole pack."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import native_model, tiny_config
from torch import Tensor

from burnish.config import RecipeError
from burnish.data.pack import Layout, pack
from burnish.model import zoo
from burnish.model.attention import Kernel, attend_sdpa
from burnish.model.lm_head import score
from burnish.parallel import ring
from burnish.parallel.cp import ContextParallel, Kind, check_context_parallel, cut_tokens, pad, pad_to
from burnish.parallel.degrees import Degrees
from burnish.parallel.mesh import Mesh
from burnish.parallel.recompute import recompute_blocks
from burnish.parallel.ring import CPUEngine, Engine, Meeting, PlainEngine, RingAttention, VarlenEngine, tiles
from burnish.parallel.zigzag import Span, deal
from burnish.types import Batch, Documents, Sample

KINDS: tuple[Kind, ...] = ("ring", "all_to_all")
NAMES = ("output", "q", "k", "v")


def batch_of(lengths: tuple[int, ...], seed: int = 0) -> Batch:
    """A pack of documents in this order, of which some tokens are trained with weights of their own."""
    random = np.random.default_rng(seed)
    samples = []
    for index, length in enumerate(lengths):
        weights = random.uniform(0.5, 1.5, length) * (random.random(length) < 0.6)
        weights[0] = 0
        tokens = random.integers(0, 512, length).astype(np.int32)
        samples.append(Sample(tokens, weights.astype(np.float32), index=index))
    return pack(samples, Layout(sum(lengths))).batches[0][0]


def documents_of(*lengths: int) -> Documents:
    return Documents(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), lengths)


def attention_inputs(num_tokens: int, num_kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries of 4 heads, keys and values, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    heads = (4, num_kv_heads, num_kv_heads, 4)
    drawn = [torch.randn(num_tokens, number, 8, generator=generator, dtype=torch.float64) for number in heads]
    return [x.to(dtype) for x in drawn]


def attended(kernel: Kernel, inputs: list[Tensor], documents: Documents, window: int | None) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    *inputs, grad = inputs
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    output = kernel(q, k, v, documents, 0.3, window)
    return [output.detach(), *torch.autograd.grad(output, (q, k, v), grad)]


ENGINES: dict[str, Engine] = {"cpu": CPUEngine(), "plain": PlainEngine(), "varlen": VarlenEngine()}

Case = tuple[tuple[int, ...], int | None, int]
"""Lengths of documents, window, key heads."""

CASES: list[Case] = [
    ((32,), None, 2),
    ((5, 9, 2, 16), None, 2),
    ((1, 1, 27, 3), None, 4),
    ((29, 3), 5, 1),
    ((7, 20, 5), 1, 2),
    ((32,), 11, 4),
    ((4, 4, 4, 4, 4, 4, 4, 4), None, 1),
    ((3, 11, 10, 8), 100, 2),
    ((23, 1, 1, 1, 17, 2, 19), None, 2),
    ((23, 1, 1, 1, 17, 2, 19), 6, 2),
]


def local_attention(kind: Kind, engine: str, cases: list[Case], dtype: torch.dtype) -> list[list[Tensor]]:
    group = dist.group.WORLD
    assert group is not None
    parallel = ContextParallel(group, kind)
    results = []
    for lengths, window, num_kv_heads in cases:
        documents = documents_of(*lengths)
        batch = parallel.cut(batch_of(lengths))
        inputs = [cut_tokens(x, batch.documents) for x in attention_inputs(sum(lengths), num_kv_heads, dtype)]
        kernel = RingAttention(group, ENGINES[engine]).attend if kind == "ring" else parallel.kernel(attend_sdpa)
        results.append(attended(kernel, inputs, documents, window))
    return results


def whole(parts: list[Tensor], kind: Kind, lengths: tuple[int, ...]) -> Tensor:
    """What the ranks hold, in the order of the pack."""
    rows = torch.cat(parts)
    if kind == "all_to_all":
        return rows
    places = [torch.arange(p.start, p.end) for pieces in deal(lengths, len(parts)) for p in pieces]
    return torch.empty_like(rows).index_copy(0, torch.cat(places), rows)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("kind", "engine", "dtype", "tolerance"),
    [
        ("ring", "cpu", torch.float64, 1e-12),
        ("ring", "plain", torch.float64, 1e-12),
        ("ring", "cpu", torch.float32, 1e-5),
        ("ring", "cpu", torch.bfloat16, 6e-2),
        ("all_to_all", "", torch.float64, 1e-12),
        ("all_to_all", "", torch.bfloat16, 6e-2),
    ],
)
def test_attention_over_ranks_is_that_of_the_pack(
    world: int, kind: Kind, engine: str, dtype: torch.dtype, tolerance: float
):
    by_rank = run_ranks(world, local_attention, kind, engine, CASES, dtype)
    for number, (lengths, window, num_kv_heads) in enumerate(CASES):
        inputs = attention_inputs(sum(lengths), num_kv_heads, dtype)
        exact = [x.double() for x in inputs]
        expected = attended(attend_sdpa, exact, documents_of(*lengths), window)
        for name, *parts, reference in zip(NAMES, *(rank[number] for rank in by_rank), expected, strict=True):
            found = whole(parts, kind, lengths)
            assert found.dtype == dtype
            message = f"{name} of {CASES[number]}"
            torch.testing.assert_close(
                found.double(), reference, rtol=tolerance, atol=tolerance, msg=lambda m, s=message: f"{s}: {m}"
            )


def attention_in_a_mesh(kind: Kind) -> list[Tensor]:
    mesh = Mesh(Degrees(cp=2, tp=2), torch.device("cpu"))
    parallel = ContextParallel(mesh.group("cp"), kind)
    batch = parallel.cut(batch_of((13, 3)))
    # Each tp peer has heads of its own.
    heads = [x.chunk(2, dim=1)[mesh.place["tp"]] for x in attention_inputs(16, 2, torch.float64)]
    return attended(
        parallel.kernel(attend_sdpa), [cut_tokens(x, batch.documents) for x in heads], batch.documents, None
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_share_a_pack_need_not_be_neighbours(kind: Kind):
    by_rank = run_ranks(4, attention_in_a_mesh, kind)
    expected = attended(attend_sdpa, attention_inputs(16, 2, torch.float64), documents_of(13, 3), None)
    for *parts, reference in zip(*by_rank, expected, strict=True):
        found = torch.cat([whole(parts[tp::2], kind, (13, 3)) for tp in (0, 1)], dim=1)
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)


def long_attention(engine: str) -> list[Tensor]:
    group = dist.group.WORLD
    assert group is not None
    batch = ContextParallel(group, "ring").cut(batch_of((4096,)))
    inputs = [cut_tokens(x, batch.documents) for x in attention_inputs(4096, 1, torch.float64)]
    return attended(RingAttention(group, ENGINES[engine]).attend, inputs, batch.documents, 300)


@pytest.mark.parametrize("engine", ["cpu", "plain"])
def test_a_window_in_a_long_document_is_cut_into_blocks(engine: str):
    by_rank = run_ranks(2, long_attention, engine)
    expected = attended(attend_sdpa, attention_inputs(4096, 1, torch.float64), documents_of(4096), 300)
    for *parts, reference in zip(*by_rank, expected, strict=True):
        torch.testing.assert_close(whole(parts, "ring", (4096,)), reference, rtol=0, atol=1e-11)
    rows = range(1024)
    for distance in (0, 1024):
        meeting = Meeting.of([Span(rows, rows, distance)], 300, torch.device("cpu"))
        for tile in tiles(meeting, always_blocks=False):
            assert tile.queries.stop - tile.queries.start <= 512
            assert tile.keys.stop - tile.keys.start < 512 + 300, "no more keys than the window of these queries"


class Flash:
    """What torch.ops.aten's FlashAttention computes for documents of queries and keys of different lengths, by formula:
    query i of L stands at key i + M - L, and sees `left` keys before and `right` after that, or all where negative."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, ...]:
        output, lse = torch.zeros_like(q), q.new_full((q.shape[1], len(q)), torch.nan)
        for queries, keys in self._documents(*arguments[:4]):
            scores = self._scores(q[queries], k[keys], arguments[5], **keywords)
            lse[:, queries] = scores.logsumexp(-1)
            output[queries] = torch.einsum("hlm,mhe->lhe", scores.softmax(-1), self._repeated(v[keys], q))
        return output, lse, torch.zeros(2), torch.zeros(0), torch.zeros(0)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        lse: Tensor,
        *arguments: Any,
        **keywords: Any,
    ) -> tuple[Tensor, ...]:
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys in self._documents(*arguments[:4]):
            share = (self._scores(q[queries], k[keys], arguments[5], **keywords) - lse[:, queries, None]).exp()
            dshare = torch.einsum("lhe,mhe->hlm", grad[queries], self._repeated(v[keys], q))
            mean = (grad[queries] * output[queries]).sum(-1).t()[..., None]
            dscores = share * (dshare - mean) * keywords["scale"]
            dq[queries] = torch.einsum("hlm,mhe->lhe", dscores, self._repeated(k[keys], q))
            by_head = (k.shape[1], -1)
            dk[keys] = torch.einsum("hlm,lhe->mhe", dscores, q[queries]).unflatten(1, by_head).sum(2)
            dv[keys] = torch.einsum("hlm,lhe->mhe", share, grad[queries]).unflatten(1, by_head).sum(2)
        return dq, dk, dv

    def _documents(
        self, q_bounds: Tensor, k_bounds: Tensor, longest_q: int, longest_k: int
    ) -> list[tuple[slice, slice]]:
        found = [[slice(*pair) for pair in pairwise(bounds.tolist())] for bounds in (q_bounds, k_bounds)]
        for slices, longest in zip(found, (longest_q, longest_k), strict=True):
            assert max(x.stop - x.start for x in slices) == longest
        return list(zip(*found, strict=True))

    def _scores(
        self, q: Tensor, k: Tensor, is_causal: bool, scale: float, window_size_left: int, window_size_right: int
    ) -> Tensor:
        ahead_LM = torch.arange(len(k)) - (torch.arange(len(q))[:, None] + len(k) - len(q))
        hidden_LM = torch.zeros_like(ahead_LM, dtype=torch.bool)
        if window_size_left >= 0:
            hidden_LM |= ahead_LM < -window_size_left
        if window_size_right >= 0:
            hidden_LM |= ahead_LM > window_size_right
        assert is_causal == ((window_size_left, window_size_right) == (-1, 0))
        scores_HLM = torch.einsum("lhe,mhe->hlm", q, self._repeated(k, q)) * scale
        return scores_HLM.masked_fill(hidden_LM, -torch.inf)

    def _repeated(self, x: Tensor, q: Tensor) -> Tensor:
        return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def flash_attention() -> list[list[Tensor]]:
    vars(torch.ops.aten).update(_flash_attention_forward=Flash().forward, _flash_attention_backward=Flash().backward)
    return local_attention("ring", "varlen", CASES, torch.float64)


def test_the_arguments_of_flash_attention_mean_the_same():
    """Without a GPU the kernel itself cannot run; its arguments, read by its documentation, must give our masks."""
    by_rank = run_ranks(2, flash_attention)
    for number, (lengths, window, num_kv_heads) in enumerate(CASES):
        inputs = attention_inputs(sum(lengths), num_kv_heads, torch.float64)
        expected = attended(attend_sdpa, inputs, documents_of(*lengths), window)
        for *parts, reference in zip(*(rank[number] for rank in by_rank), expected, strict=True):
            torch.testing.assert_close(whole(parts, "ring", lengths), reference, rtol=0, atol=1e-12)


def narrow_values(kind: Kind) -> list[Tensor]:
    group = dist.group.WORLD
    assert group is not None
    parallel = ContextParallel(group, kind)
    batch = parallel.cut(batch_of((13, 3)))
    q, k, v, grad = (cut_tokens(x, batch.documents) for x in attention_inputs(16, 2, torch.float64))
    return attended(parallel.kernel(attend_sdpa), [q, k, v[..., :6], grad[..., :6]], batch.documents, None)


@pytest.mark.parametrize("kind", KINDS)
def test_values_may_be_narrower_than_keys(kind: Kind):
    q, k, v, grad = attention_inputs(16, 2, torch.float64)
    expected = attended(attend_sdpa, [q, k, v[..., :6], grad[..., :6]], documents_of(13, 3), None)
    for *parts, reference in zip(*run_ranks(2, narrow_values, kind), expected, strict=True):
        torch.testing.assert_close(whole(parts, kind, (13, 3)), reference, rtol=0, atol=1e-12)


def softcapped(kind: Kind) -> Tensor:
    group = dist.group.WORLD
    assert group is not None
    parallel = ContextParallel(group, kind)
    batch = parallel.cut(batch_of((13, 3)))
    q, k, v, _ = (cut_tokens(x, batch.documents) for x in attention_inputs(16, 2, torch.float64))
    return parallel.kernel(attend_sdpa)(q, k, v, batch.documents, 0.3, 4, softcap=2.0)


def test_softcap_reaches_the_inner_kernel_and_is_refused_by_a_ring():
    q, k, v, _ = attention_inputs(16, 2, torch.float64)
    expected = attend_sdpa(q, k, v, documents_of(13, 3), 0.3, 4, softcap=2.0)
    found = whole(run_ranks(2, softcapped, "all_to_all"), "all_to_all", (13, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    config = tiny_config(attn_logit_softcapping=2.0)
    with pytest.raises(
        RecipeError, match=r"cp_kind=ring computes no softcap.* 2.0; set parallel.cp_kind to all_to_all"
    ):
        check_context_parallel(config, 2, "ring")
    check_context_parallel(config, 2, "all_to_all")


def test_heads_that_ranks_cannot_share_are_refused():
    with pytest.raises(
        RecipeError, match=r"cp=4 x tp=2 = 8 does not divide num_attention_heads=4.*set parallel.cp to 2"
    ):
        check_context_parallel(tiny_config(), 4, "all_to_all", tp=2)
    check_context_parallel(tiny_config(), 4, "all_to_all")
    check_context_parallel(tiny_config(), 3, "ring")
    check_context_parallel(tiny_config(), 1, "all_to_all", tp=8)


def cut_batches(kind: Kind, lengths: tuple[int, ...]) -> tuple[Batch, Batch]:
    group = dist.group.WORLD
    assert group is not None
    parallel = ContextParallel(group, kind)
    padded = pad(batch_of(lengths), parallel.multiple)
    return padded, parallel.cut(padded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(11, 2, 30), (3, 2), (9,)])
def test_every_trained_token_is_on_one_rank(kind: Kind, lengths: tuple[int, ...]):
    batch = batch_of(lengths)
    by_rank = run_ranks(4, cut_batches, kind, lengths)
    trained = []
    for padded, part in by_rank:
        place_T = part.documents.here_T
        assert place_T is not None
        assert part.documents.lengths == padded.documents.lengths
        assert [s.index for s in part.samples] == list(range(len(lengths)))
        torch.testing.assert_close(part.tokens_T, padded.tokens_T[place_T])
        torch.testing.assert_close(part.positions_T, padded.positions_T[place_T])
        document_T = torch.arange(len(padded.documents.lengths)).repeat_interleave(padded.documents.cu_seqlens.diff())
        torch.testing.assert_close(part.documents.of_tokens(), document_T[place_T])
        columns = (place_T[part.trained_K], part.targets_K, part.weights_K, part.raw_weights_K, part.sources_K)
        trained += zip(*(x.tolist() for x in columns), strict=True)
    columns = (batch.trained_K, batch.targets_K, batch.weights_K, batch.raw_weights_K, batch.sources_K)
    assert sorted(trained) == list(zip(*(x.tolist() for x in columns), strict=True))


def test_padding_is_one_document_that_trains_nothing():
    batch = batch_of((5, 6))
    padded = pad(batch, 8)
    assert padded.documents.lengths == (5, 6, 5)
    assert padded.documents.cu_seqlens.tolist() == [0, 5, 11, 16]
    assert padded.documents.has_padding
    assert padded.documents.num_real == 2
    assert padded.positions_T[11:].tolist() == [0, 1, 2, 3, 4]
    assert len(padded.tokens_T) == 16
    assert padded.trained_K is batch.trained_K
    assert pad(batch, 11) is batch
    assert not batch.documents.has_padding
    assert pad_to(batch, 30).documents.lengths == (5, 6, 19)
    noise_TD = torch.randn(11, 3)
    torch.testing.assert_close(cut_tokens(noise_TD, padded.documents), torch.cat((noise_TD, torch.zeros(5, 3))))
    here = replace(padded.documents, here_T=torch.tensor([12, 3]))
    torch.testing.assert_close(cut_tokens(noise_TD, here), torch.stack((torch.zeros(3), noise_TD[3])))


def loss_and_gradients(config: dict, kernel: Kernel, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
    model = native_model(config, torch.float64, seed)
    replica = zoo.build(config, kernel, dtype=torch.float64, device="cpu")
    replica.load_state_dict(model.state_dict())
    noise_TD = torch.randn(sum(len(s.tokens) for s in batch.samples), 32, generator=torch.Generator().manual_seed(1))
    noise_TD = cut_tokens(noise_TD.double() * 0.1, batch.documents)
    hidden_TD = replica(batch.tokens_T, batch.positions_T, batch.documents, noise_TD)
    scores = score(hidden_TD[batch.trained_K], replica.head(), batch.targets_K)
    loss = -(scores.logprobs_K.double() * batch.weights_K).sum()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in replica.named_parameters() if p.grad is not None}


def model_on_ranks(kind: Kind, config: dict, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    group = dist.group.WORLD
    assert group is not None
    parallel = ContextParallel(group, kind)
    batch = parallel.cut(pad_to(batch_of(lengths), 64))
    return loss_and_gradients(config, parallel.kernel(attend_sdpa), batch)


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("world", "kind", "changes", "lengths"),
    [
        (2, "ring", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}, (40, 3, 12)),
        (4, "ring", {}, (6, 5)),
        (4, "ring", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, (40, 3, 12)),
        (2, "all_to_all", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}, (40, 3, 12)),
        (4, "all_to_all", {"tie_word_embeddings": False}, (6, 5)),
    ],
)
def test_a_model_over_ranks_has_the_gradients_of_one_process(
    world: int, kind: Kind, changes: dict, lengths: tuple[int, ...]
):
    """Uneven documents, noise, frequencies by length; and ranks with nothing but padding."""
    config = tiny_config(**changes)
    expected = loss_and_gradients(config, attend_sdpa, batch_of(lengths))
    by_rank = run_ranks(world, model_on_ranks, kind, config, lengths)
    for name, reference in expected.items():
        found = torch.stack([rank[name] for rank in by_rank]).sum(0)
        assert (found - reference).norm() <= 1e-9 * reference.norm(), name


def shifts(mode: str) -> tuple[int, int]:
    """How often keys, or their gradients, go to the next rank in the forward and the backward of a block."""
    cp, number = ContextParallel(dist.group.WORLD, "ring"), [0]  # pyright: ignore[reportArgumentType]

    class Shift(ring._Shift):
        def __init__(self, x: Tensor, group: dist.ProcessGroup) -> None:
            number[0] += 1
            super().__init__(x, group)

    model = zoo.build(tiny_config(num_hidden_layers=1), cp.kernel(attend_sdpa), dtype=torch.float32, device="cpu")
    zoo.initialise(model, 0)
    recompute_blocks(model.blocks(), mode)
    batch = cp.cut(pad(batch_of((20, 12)), cp.multiple))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ring, "_Shift", Shift)
        hidden_TD = model(batch.tokens_T, batch.positions_T, batch.documents)
        forward = number[0]
        hidden_TD.sum().backward()
    return forward, number[0] - forward


@pytest.mark.parametrize(("mode", "expected"), [("none", 3), ("selective", 3), ("full", 4)])
def test_selective_recomputation_sends_nothing_round_a_ring_again(mode: str, expected: int) -> None:
    """Keys once, and gradients as often as there are ranks."""
    assert run_ranks(2, shifts, mode) == [(1, expected)] * 2
