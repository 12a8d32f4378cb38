"""What a micro-batch holds in memory, found by running the model's own modules on the meta device: nothing is computed
and nothing allocated, and whatever the modules keep for their backward is counted as it is.

A rank's part of a model is a smaller model. Sends nothing and knows no data ranks.
Shape suffixes: T tokens of a pack, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, cast
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from burnish.model.attention import Attention, Kernel, attend_sdpa, check_attention
from burnish.model.base import CausalLM
from burnish.model.lm_head import CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES, MIN_BLOCK, score
from burnish.model.moe import Dispatch, Experts, MoE, compute_one_by_one, count, rows_by_expert, weighted_sums
from burnish.observe.memory import Live
from burnish.parallel.degrees import Degrees
from burnish.parallel.offload import SMALLEST
from burnish.parallel.recompute import recompute_blocks
from burnish.parallel.ring import go_round
from burnish.parallel.tp import READS_ALL
from burnish.types import Documents

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Pass:
    """Bytes of a part of a model in one micro-batch, its input and its output's gradient included."""

    kept: int
    """From its forward to its backward."""
    forward: int
    """At most in its forward."""
    backward: int
    """At most in its backward, with what was kept and with gradients that are made there, and not held before."""
    host: int
    """Beside `kept`, in the host's memory."""
    by_experts: tuple[tuple[int, int], ...]
    """Bytes of gradients of experts that may be there in backward, and the most of all else meanwhile."""

    def spread(self, ep: int) -> Pass:
        """That of a rank with one of `ep` parts of the experts, and as many tokens for them."""
        return replace(self, backward=max(experts // ep + others for experts, others in self.by_experts))


@dataclass(frozen=True, slots=True)
class Shell:
    """Bytes of all but the blocks in one micro-batch: embedding, rotary positions, last norm, head and loss.

    Each but `hidden` counts the hidden states [T, D], or their gradient, that pass through the blocks.
    """

    hidden: int
    before: int
    """While the blocks run forward."""
    head: int
    """At most between the blocks' forward and their backward."""
    after: int
    """While the blocks run backward."""
    end: int
    """At most after it."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Every block in order, and the shell, in the first micro-batch of a step and in later ones."""

    blocks: tuple[Pass, ...]
    later_blocks: tuple[Pass, ...]
    shell: Shell
    later_shell: Shell

    def spread(self, ep: int) -> Footprint:
        """That of a rank with one of `ep` parts of the experts, and as many tokens for them."""
        kinds = {one: one.spread(ep) for one in {*self.blocks, *self.later_blocks}}
        blocks, later_blocks = (tuple(kinds[one] for one in blocks) for blocks in (self.blocks, self.later_blocks))
        return replace(self, blocks=blocks, later_blocks=later_blocks)


@contextmanager
def _fused(device: Literal["cpu", "cuda"]) -> Iterator[None]:
    """Within, scaled_dot_product_attention on meta is the fused kernel of `device`, and not the sum of its parts."""
    own = functional.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if device == "cpu":
            kernel = aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _attend_varlen(
    q_THE: Tensor,
    k_TGE: Tensor,
    v_TGE: Tensor,
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Keeps what FlashAttention over a whole pack keeps: queries, keys, values, output, a number a head and token."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THE, k_TGE, v_TGE))
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0].squeeze(0).transpose(0, 1)


def planned_attention(
    asked: Literal["auto", "sdpa", "varlen"],
    device: Literal["cpu", "cuda"],
    compute: torch.dtype,
    cp: int = 1,
    kind: Literal["ring", "all_to_all"] = "ring",
) -> Attention:
    """The kernel that training would choose on `device`, over `cp` ranks, to be run on meta.

    Raises UserError as `choose_attention` does.
    """
    check_attention(asked, device, compute)
    half = compute in (torch.bfloat16, torch.float16)
    alone = Attention("sdpa", attend_sdpa)
    if device == "cuda" and half and asked != "sdpa":
        alone = Attention("varlen", _attend_varlen)
    if cp == 1:
        return alone
    return Attention(kind, _attend_ring if kind == "ring" else partial(_attend_all_to_all, cp, alone.kernel))


def _attend_ring(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, documents: Documents, scale: float, *_: Any, **__: Any
) -> Tensor:
    """Keeps and holds what `ring.RingAttention` does."""
    size = v_TGE.shape[2]
    kv_2TGE = torch.stack((k_TGE, functional.pad(v_TGE, (0, k_TGE.shape[2] - size))))
    return cast(Tensor, _Ring.apply(q_THE, kv_2TGE))[..., :size]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THE: Tensor, kv_2TGE: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        wide = torch.promote_types(q_THE.dtype, torch.float32)
        passing = [torch.empty_like(q_THE, dtype=wide), torch.empty_like(kv_2TGE), torch.empty_like(q_THE, dtype=wide)]
        del passing
        output_THE, lse_TH = go_round(q_THE, kv_2TGE, 0)
        ctx.save_for_backward(q_THE, kv_2TGE, output_THE, lse_TH)
        return output_THE

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_THE, kv_2TGE, *_ = ctx.saved_tensors
        wide = torch.promote_types(q_THE.dtype, torch.float32)
        dq_THE, dkv_2TGE = torch.empty_like(q_THE, dtype=wide), torch.empty_like(kv_2TGE, dtype=wide)
        # Keys on their way here, their gradients on both ways, and what one pair adds.
        moving = [torch.empty_like(kv_2TGE), *(torch.empty_like(dkv_2TGE) for _ in range(3))]
        del moving
        return dq_THE.to(q_THE.dtype), dkv_2TGE.to(kv_2TGE.dtype)


def _attend_all_to_all(
    cp: int,
    inner: Kernel,
    q_THE: Tensor,
    k_TGE: Tensor,
    v_TGE: Tensor,
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`cp.AllToAllAttention`, of whose exchanges nothing is sent."""
    times = math.lcm(k_TGE.shape[1], cp) // k_TGE.shape[1]
    k_TGE, v_TGE = (x.repeat_interleave(times, dim=1) if times > 1 else x for x in (k_TGE, v_TGE))
    swapped = (x.unflatten(1, (cp, -1)).transpose(0, 1).flatten(0, 1) for x in (q_THE, k_TGE, v_TGE))
    lengths = (len(q_THE) * cp,)
    pack = Documents(_integers(2), lengths)
    q_THE, k_TGE, v_TGE = (_exchanged(x) for x in swapped)
    output_THE = inner(q_THE, k_TGE, v_TGE, pack, scale, window, softcap)
    return _exchanged(output_THE).unflatten(0, (cp, -1)).transpose(0, 1).flatten(1, 2)


CUT = {
    0: ("*.[qkv]_proj", "*.q_b_proj", "*.kv_b_proj", "*.gate_proj", "*.up_proj", "*embed_tokens", "lm_head"),
    1: ("*.o_proj", "*.down_proj"),
}
"""Modules that tensor-parallel ranks share, by the dimension along which `tp.py` cuts their weights."""


def cut(model: CausalLM, degrees: Degrees, sequence_parallel: bool) -> None:
    """Make of `model`, which is on meta, the part of one rank of `degrees`, but for pipeline and data parallelism.

    Every expert-parallel rank is taken to get as many tokens as it sends.
    """
    tp = degrees.tp
    for name, parameter in model.named_parameters():
        parameter.data = parameter.new_empty(local_shape(name, parameter.shape, degrees))
    for name, module in model.named_modules() if tp > 1 else ():
        dim, own = _cut_dimension(name), list(module.parameters(recurse=False))
        if sequence_parallel and isinstance(module, READS_ALL):
            module.register_forward_pre_hook(lambda _, args: (_Resized.apply(args[0], len(args[0]) * tp), *args[1:]))
        if sequence_parallel and own and (dim == 1 or name.endswith("embed_tokens")):
            module.register_forward_hook(lambda _, __, output: _Resized.apply(output, len(output) // tp))
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        if degrees.world > 1:
            layer.dispatch = cast(Dispatch, partial(_dispatch, degrees, sequence_parallel))


def _cut_dimension(name: str) -> int | None:
    """Along which `tp.py` and `lora.py` cut the parameters of a module; None where every rank has them whole."""
    layer, _, adapter = name.removesuffix(".base_layer").partition(".lora_")
    dim = next((dim for dim in CUT if any(fnmatchcase(layer, pattern) for pattern in CUT[dim])), None)
    whole = {0: "A", 1: ("B", "magnitude")}.get(dim) if dim is not None else None
    return None if adapter and whole and adapter.startswith(whole) else dim


def local_shape(name: str, shape: Sequence[int], degrees: Degrees) -> tuple[int, ...]:
    """What a rank has of a parameter, before data ranks share it."""
    dim, pieces = _cut_dimension(name.rpartition(".")[0]), {}
    if ".experts." in name and len(shape) > 2:
        pieces = {0: degrees.ep, 2 if len(shape) == 4 or name.endswith("down_proj") else 1: degrees.etp}
    elif dim is not None and (len(shape) == 2 or dim == 0):
        pieces = {dim: degrees.tp}
    return tuple(-(-size // pieces.get(number, 1)) for number, size in enumerate(shape))


def _dispatch(
    degrees: Degrees,
    sequence_parallel: bool,
    hidden_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    experts: Experts,
) -> Tensor:
    """`ep.ExpertRanks.dispatch`, of whose exchanges nothing is sent."""
    length = inside = len(hidden_TD)
    if degrees.etp > 1 and sequence_parallel:
        inside = length * degrees.tp
    elif degrees.etp == 1 and not sequence_parallel:
        inside = -(-length // degrees.tp)
    if inside != length:
        hidden_TD, indices_TK, weights_TK = (
            cast(Tensor, _Resized.apply(x, inside)) for x in (hidden_TD, indices_TK, weights_TK)
        )
    rows_RD, order_R = rows_by_expert(hidden_TD, indices_TK)
    counts = count(indices_TK.flatten(), len(experts.down_proj))
    outputs_RD = experts(_exchanged(_exchanged(rows_RD)), counts)
    back_RD = _exchanged(_exchanged(outputs_RD))
    outputs_TD = weighted_sums(back_RD, order_R, weights_TK, hidden_TD.dtype)
    return outputs_TD if inside == length else cast(Tensor, _Resized.apply(outputs_TD, length))


def _compute_evenly(rows_RD: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """`compute_one_by_one`, which would look at numbers of rows; here every expert has as many."""
    share, rest = divmod(len(rows_RD), len(down_EDF))
    even_E = torch.tensor([share + (expert < rest) for expert in range(len(down_EDF))])
    return compute_one_by_one(rows_RD, even_E, gate_up_E2FD, down_EDF)


class _Resized(torch.autograd.Function):
    """As many rows as after a gather, a scatter or an exchange; in backward as many as before."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, length: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.length = len(x_TD)
        return x_TD.new_empty(length, *x_TD.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.new_empty(ctx.length, *grad.shape[1:]), None


def _exchanged(x: Tensor) -> Tensor:
    """As many rows of others."""
    return cast(Tensor, _Resized.apply(x, len(x)))


@dataclass(frozen=True)
class Micro:
    """A micro-batch of documents of these lengths with `num_trained` trained tokens."""

    lengths: tuple[int, ...]
    num_trained: int

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def part(self, cp: int, tp: int) -> Micro:
        """What of it one of cp ranks holds, padded so that tp ranks can cut it further."""
        length = -(-self.num_tokens // (cp * tp)) * tp
        if cp > 1:
            return Micro((length,), -(-self.num_trained // cp))
        padding = length - self.num_tokens
        return Micro((*self.lengths, padding) if padding else self.lengths, self.num_trained)


class Trace(dict[str, Footprint]):
    """The footprint of `model` by mode of recomputation, each made when it is first asked for.

    The model is on meta with parameters of the compute type, frozen as they are in training. Parameters are not
    counted, and gradients as if the parameters were leaves: in their type.
    """

    def __init__(
        self, model: CausalLM, micro: Micro, device: Literal["cpu", "cuda"], offload_activations: bool = False
    ) -> None:
        super().__init__()
        for experts in (module for module in model.modules() if isinstance(module, Experts)):
            if experts.compute is compute_one_by_one:
                experts.compute = _compute_evenly
        self._model = model
        self._device: Literal["cpu", "cuda"] = device
        self._is_offloaded = offload_activations
        with _fused(device):
            self._calls, embedding, self._shells = _trace_shell(model, micro, device)
        self._reached = _reached_by_gradients(embedding, model.blocks())

    def __missing__(self, mode: str) -> Footprint:
        blocks, host = self._model.blocks(), _Host()
        recompute_blocks(blocks, mode)
        for block in blocks if self._is_offloaded else ():
            block.forward = partial(host.forward, block, block.forward)
        kinds: dict[Any, tuple[Pass, Pass]] = {}
        passes = []
        with _fused(self._device):
            for block, (args, kwargs), needs in zip(blocks, self._calls, self._reached, strict=True):
                kind = (needs, *((name, p.shape, p.requires_grad) for name, p in block.named_parameters()))
                if kind not in kinds:
                    kinds[kind] = _trace_block(block, args, kwargs, needs, host)
                passes.append(kinds[kind])
        for block in blocks:
            block.__dict__.pop("forward", None)
        for parameter in self._model.parameters():
            parameter.grad = None
        first, later = zip(*passes, strict=True)
        self[mode] = Footprint(first, later, *self._shells)
        return self[mode]


class _Given(torch.autograd.Function):
    """A tensor like `like`, as whatever runs before makes it; its gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, like: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.new_empty(()), None


class _Taken(torch.autograd.Function):
    """Lets go of a tensor, and makes its gradient in backward."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.like = output.shape, output.dtype
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        shape, dtype = ctx.like
        return torch.empty(shape, dtype=dtype, device="meta")


class _Host:
    """The host's memory, to which blocks move what they keep as `offload.py` does it."""

    def __init__(self) -> None:
        self.bytes = 0

    def forward(self, block: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
        weights = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
        moved: dict[tuple[Any, ...], tuple[Tensor, _Away]] = {}  # with the tensors, which stay until the block ends

        def pack(tensor: Tensor) -> Tensor | _Away:
            memory = tensor.untyped_storage()._cdata
            if tensor.nbytes < SMALLEST or memory in weights:
                return tensor
            place = (memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
            if place not in moved:
                moved[place] = tensor, _Away(self, tensor)
            return moved[place][1]

        with saved_tensors_hooks(pack, lambda packed: packed.back() if isinstance(packed, _Away) else packed):
            output = forward(*inputs)
        moved.clear()
        return output

    def free(self, size: int) -> None:
        self.bytes -= size


class _Away:
    """A tensor that is on the host."""

    def __init__(self, host: _Host, tensor: Tensor) -> None:
        self._shape, self._dtype = tensor.shape, tensor.dtype
        host.bytes += tensor.nbytes
        finalize(self, host.free, tensor.nbytes)

    def back(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device="meta")


def _trace_block(
    block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], needs: bool, host: _Host
) -> tuple[Pass, Pass]:
    """The passes of a block in the first micro-batch and in another; `needs` a gradient of its input."""
    like, *others = args
    anchor = torch.empty((), dtype=like.dtype, device="meta", requires_grad=needs)
    sizes = {(len(p), p.numel()) for name, p in block.named_parameters() if ".experts." in name and p.ndim > 2}
    passes = []
    with Live(lambda tensor: tensor.ndim > 2 and (len(tensor), tensor.numel()) in sizes) as live:
        for _ in range(2):
            held, apart = live.bytes, live.apart
            live.begin_peak()
            output = block(_Given.apply(anchor, like), *others, **kwargs)
            kept, forward, moved = live.bytes - held - output.nbytes, live.peak - held, host.bytes
            end = cast(Tensor, _Taken.apply(output))
            del output
            live.begin_peak()
            if end.requires_grad:
                end.backward()
            by_experts = tuple((own - apart, others - held + apart) for own, others in live.peaks.items())
            passes.append(Pass(kept, forward, live.peak - held, moved, by_experts))
            del end
    return passes[0], passes[1]


class _Seam(torch.autograd.Function):
    """Where the blocks would be: tells `moments` when forward and backward come by."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, moments: _Moments) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.moments = moments
        moments.forward()
        return hidden_TD.view_as(hidden_TD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.moments.backward()
        return grad, None


class _Moments:
    """What is alive when the shell comes to the blocks, and at most in between."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._held = live.bytes
        live.begin_peak()
        self.before = self.head = self.after = 0
        self.reached = False
        """Whether a gradient of what the blocks read is needed."""

    def forward(self) -> None:
        self.before = self._live.bytes - self._held
        self._live.begin_peak()

    def backward(self) -> None:
        self.head = self._live.peak - self._held
        self.after = self._live.bytes - self._held
        self._live.begin_peak()

    def shell(self, hidden: int) -> Shell:
        last = self._live.peak - self._held
        return Shell(hidden, self.before, max(self.head, 0 if self.after else last), self.after, last)


def _trace_shell(
    model: CausalLM, micro: Micro, device: Literal["cpu", "cuda"]
) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], bool, tuple[Shell, Shell]]:
    """What the blocks are called with, whether the first needs a gradient of its input, and the shell in the first
    micro-batch and in another.
    """
    T, K = micro.num_tokens, micro.num_trained
    tokens_T, positions_T, trained_K, targets_K = (_integers(size) for size in (T, T, K, K))
    documents = Documents(_integers(len(micro.lengths) + 1), micro.lengths)
    calls, shells = [], []
    with Live() as live:
        moments = _Moments(live)
        for _ in range(2):
            moments = _Moments(live)
            with _passed_through(model.blocks(), moments) as made:
                hidden_TD = model(tokens_T, positions_T, documents)
            block = _block_width(K, hidden_TD.dtype, device)
            scores = score(hidden_TD[trained_K], model.head(), targets_K, block)
            hidden = hidden_TD.nbytes
            if len(hidden_TD) < T:
                hidden_TD = cast(Tensor, _Resized.apply(hidden_TD, T))
            calls.append(made)
            del hidden_TD
            loss = -scores.logprobs_K.sum()
            del scores
            loss.backward()
            del loss
            shells.append(moments.shell(hidden))
    return calls[0], moments.reached, (shells[0], shells[1])


def _integers(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device="meta")


def _block_width(num_trained: int, dtype: torch.dtype, device: Literal["cpu", "cuda"]) -> int:
    """The width that `score` takes by itself on `device`."""
    size = CPU_BLOCK_BYTES if device == "cpu" else DEVICE_BLOCK_BYTES
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return max(size // (max(num_trained, 1) * wide) // 64 * 64, MIN_BLOCK)


@contextmanager
def _passed_through(blocks: Sequence[nn.Module], moments: _Moments) -> Iterator[list[Any]]:
    """Within, the blocks hand on their input. Yields the arguments of each."""
    calls: list[Any] = []

    def hand_on(hidden_TD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(((hidden_TD.new_empty(()).expand(hidden_TD.shape), *args), kwargs))
        if len(calls) > 1:
            return hidden_TD
        moments.reached = hidden_TD.requires_grad
        if not hidden_TD.requires_grad and any(p.requires_grad for block in blocks for p in block.parameters()):
            hidden_TD = hidden_TD.detach().requires_grad_()
        return cast(Tensor, _Seam.apply(hidden_TD, moments))

    for block in blocks:
        block.forward = hand_on
    try:
        yield calls
    finally:
        for block in blocks:
            del block.forward


def _reached_by_gradients(embedding: bool, blocks: Sequence[nn.Module]) -> list[bool]:
    """Of each block whether its input needs a gradient: something before it is trained."""
    reached = []
    for block in blocks:
        reached.append(embedding)
        embedding = embedding or any(p.requires_grad for p in block.parameters())
    return reached
