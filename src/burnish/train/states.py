"""How the optimizer keeps its numbers when they take fewer bits than its arithmetic: bf16, or int8 by blocks.

A store reads and writes a flat stretch of one tensor. Rounding is stochastic, so that small changes are kept on
average, and its noise is a function of (key, position): the same bits on every device and however a tensor is cut.
Holds no optimizer mathematics. Of a sharded tensor a store holds this rank's part; a checkpoint sees the whole.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

BLOCK = 256
"""Values that share one scale in int8."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Of a block that is not zero: below, fp32 has no room to tell its levels apart."""


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`, sharing its memory: all of it where it is no DTensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def like(parameter: Tensor, local: Tensor) -> Tensor:
    """`local` as this rank's part of a tensor laid out as `parameter` is, sharing its memory; any type and device.

    `local` has as many values as this rank's part of `parameter`. Where that is no DTensor, so is the result.
    """
    local = local.view(local_part(parameter).shape)
    if not isinstance(parameter, DTensor):
        return local
    meta = TensorMeta(parameter.shape, parameter.stride(), local.dtype)
    spec = DTensorSpec(parameter.device_mesh, parameter.placements, tensor_meta=meta)
    # Not DTensor.from_local, which would move a part that lies on the host to the mesh's devices.
    return DTensor(local, spec, requires_grad=False)  # pyright: ignore[reportCallIssue]


def place(parameter: Tensor) -> tuple[int, ...]:
    """Where this rank's part of `parameter` begins, by dimension; () for one that begins where the whole does."""
    if not isinstance(parameter, DTensor):
        return ()
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offsets if any(offsets) else ()


def stream_key(*parts: object) -> int:
    """A signed 64-bit number drawn from the text of `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), signed=True)


def random_bits(key: Tensor, start: int, end: int) -> Tensor:
    """Random bits of the positions `start` to `end`, int64 [end - start], of which the upper 48 are to be used.

    `key` is 0-dim int64 on the device of the result. The mixing is splitmix64's (Steele et al., OOPSLA 2014), without
    its last step, which serves the lowest bits alone.
    """
    bits = torch.arange(start, end, device=key.device).mul_(-0x61C8864680B583EB).add_(key)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        # torch shifts int64 with the sign; the mask makes it a logical shift.
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return bits


def take_noise(bits: Tensor, draw: int) -> Tensor:
    """The 16-bit noise of one of the three independent draws (0, 1, 2) that `random_bits` holds: int32 below 65536."""
    return ((bits >> (48 - 16 * draw)) & 0xFFFF).to(torch.int32)


def round_to_bf16(values: Tensor, noise: Tensor) -> Tensor:
    """`values` rounded to one of its two bf16 neighbours, up with the probability that makes it right on average.

    `noise` is int32 in [0, 65536): the 16 bits of fp32 that bf16 lacks.
    """
    bits = values.float().view(torch.int32) + noise
    return bits.bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)


class Store(Protocol):
    """Values of one tensor, addressed flat; `start` is a multiple of BLOCK."""

    def read(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """A copy of the values, [end - start]."""
        ...

    def write(self, start: int, values: Tensor, noise: Tensor, finite: Tensor) -> None:
        """Keep `values` where the 0-dim bool `finite` says so, and the old ones to the bit where it does not."""
        ...

    def saved(self, parameter: Tensor) -> dict[str, Tensor | Coded]:
        """What a checkpoint must hold, by suffix, laid out as `parameter`, this rank's part of which is stored."""
        ...


@dataclass(frozen=True, slots=True)
class FloatStore:
    """One float a value: bf16 rounds stochastically, fp32 and fp64 to the nearest. `tensor` must be contiguous."""

    tensor: Tensor

    def read(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        return self.tensor.view(-1)[start:end].to(dtype, copy=True)

    def write(self, start: int, values: Tensor, noise: Tensor, finite: Tensor) -> None:
        kept = self.tensor.view(-1)[start : start + len(values)]
        narrow = round_to_bf16(values, noise) if kept.dtype is torch.bfloat16 else values.to(kept.dtype)
        kept.copy_(torch.where(finite, narrow, kept))

    def saved(self, parameter: Tensor) -> dict[str, Tensor | Coded]:
        return {"": like(parameter, self.tensor)}


@functools.cache
def dynamic_code(signed: bool, device: torch.device) -> Tensor:
    """The values that an int8 code stands for, ascending in [-1, 1] or (0, 1], fp32 [255] or [254].

    The dynamic code of Dettmers et al. (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861): seven decades,
    the highest with the most levels. The levels end at the upper edge of each decade, not between edges, so that 1 is
    one of them and stochastic rounding stays unbiased up to the largest value of a block. Without a sign there is no
    zero (arXiv 2309.01507): a second moment that fell to zero would divide a first moment that did not.
    """
    decades = []
    for decade in range(7):
        num_levels = 2**decade if signed else 2 ** (decade + 1)
        decades.append(10.0 ** (decade - 6) * torch.linspace(0.1, 1, num_levels + 1, dtype=torch.float64)[1:])
    levels = torch.cat(decades)
    levels = torch.cat((-levels.flip(0), torch.zeros(1, dtype=torch.float64), levels)) if signed else levels
    return levels.to(device, torch.float32)


@dataclass(frozen=True, slots=True)
class Int8Store:
    """A code of 8 bits a value and an fp32 scale, the largest magnitude, for each block of 256: 1.016 bytes a value.

    Values without a sign are kept by their square root, which gives the second moment of AdamW the range of gradients:
    a code of seven decades then spans fourteen of it. A block whose scale is no normal fp32 number becomes zero.
    """

    codes_BK: Tensor  # uint8 [num_blocks, BLOCK]
    scales_B: Tensor
    signed: bool

    @classmethod
    def zeros(cls, num_values: int, signed: bool, device: torch.device) -> Int8Store:
        num_blocks = -(-num_values // BLOCK)
        codes_BK = torch.zeros((num_blocks, BLOCK), dtype=torch.uint8, device=device)
        return cls(codes_BK, torch.zeros(num_blocks, device=device), signed)

    def read(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        values = self.decode(start, end).to(dtype)
        return values if self.signed else values.square_()

    def decode(self, start: int, end: int) -> Tensor:
        """The fp32 numbers that codes and scales stand for, [end - start]: square roots where there is no sign."""
        blocks = slice(start // BLOCK, -(-end // BLOCK))
        codes_BK, levels = self.codes_BK[blocks], dynamic_code(self.signed, self.codes_BK.device)
        values_BK = levels.index_select(0, codes_BK.view(-1).int()).view_as(codes_BK).mul_(self.scales_B[blocks, None])
        return values_BK.view(-1)[: end - start]

    def encode(self, start: int, values: Tensor) -> None:
        """Keep `values` as the nearest codes. What `decode` returned from the same `start` comes back to the bit:

        the largest of a block is its scale, and levels lie further apart than fp32 rounds.
        """
        shares_BK, scales_B = _shares(_in_blocks(values))
        levels = dynamic_code(self.signed, values.device)
        codes_BK = torch.bucketize(shares_BK, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        blocks = slice(start // BLOCK, start // BLOCK + len(codes_BK))
        self.codes_BK[blocks], self.scales_B[blocks] = codes_BK.to(torch.uint8), scales_B

    def write(self, start: int, values: Tensor, noise: Tensor, finite: Tensor) -> None:
        values_BK, scales_B = _shares(_in_blocks(values.float() if self.signed else values.sqrt().float()))
        levels = dynamic_code(self.signed, values.device)
        below_BK = torch.bucketize(values_BK, levels[1:-1], out_int32=True, right=True)
        lower_BK = levels.index_select(0, below_BK.view(-1)).view_as(values_BK)
        upper_BK = levels.index_select(0, below_BK.view(-1) + 1).view_as(values_BK)
        chance_BK = _in_blocks(noise.float().add_(0.5).div_(65536))
        codes_BK = below_BK + (values_BK - lower_BK > chance_BK * (upper_BK - lower_BK))
        blocks = slice(start // BLOCK, start // BLOCK + len(codes_BK))
        self.codes_BK[blocks] = torch.where(finite, codes_BK.to(torch.uint8), self.codes_BK[blocks])
        self.scales_B[blocks] = torch.where(finite, scales_B, self.scales_B[blocks])

    def saved(self, parameter: Tensor) -> dict[str, Tensor | Coded]:
        return {"" if self.signed else ".root": Coded(self, parameter)}


@dataclass(frozen=True, slots=True)
class Coded:
    """A moment of `parameter` that lies in codes; a checkpoint holds what they stand for, which any layout can read."""

    store: Int8Store
    parameter: Tensor

    def values(self) -> Tensor:
        """What the codes stand for, in fp32 and laid out as the parameter; a copy."""
        return like(self.parameter, self.store.decode(0, local_part(self.parameter).numel()))

    def empty(self) -> Tensor:
        """Memory on the host for `take`, which lies beside the optimizer for as long as a checkpoint is loaded."""
        return like(self.parameter, torch.empty(local_part(self.parameter).shape))

    def take(self, values: Tensor) -> None:
        """Keep `values`, laid out as the parameter: exactly where `values()` returned them under the same layout."""
        flat, stretch = local_part(values).view(-1), 2**14 * BLOCK
        for start in range(0, len(flat), stretch):
            self.store.encode(start, flat[start : start + stretch].to(self.store.codes_BK.device))


def _shares(values_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Values as shares of their block's scale, and the scales."""
    scales_B = values_BK.abs().amax(1)
    is_small_B = scales_B < SMALLEST_SCALE
    return values_BK / scales_B.masked_fill(is_small_B, torch.inf)[:, None], scales_B.masked_fill(is_small_B, 0)


def _in_blocks(values: Tensor) -> Tensor:
    """[n] as [num_blocks, BLOCK], padded with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
