"""Causal attention within the documents of a pack: the kernels, and the choice of one when a model is built.

A kernel is a plain function that modules call; no module asks which one it has, and none falls back to another.
Shape suffixes: T tokens of a pack, H query heads, G key and value heads, E head dimension, L tokens of a document.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn

from burnish.types import Documents, UserError


class Kernel(Protocol):
    """Attention of a pack: token i sees the tokens j <= i of its own document and no other.

    `scale` multiplies the scores; `window` keeps i - j < window; `softcap` bends a score s to
    softcap * tanh(s / softcap).
    Consecutive H / G query heads share a key and value head. Returns [T, H, E].
    """

    def __call__(
        self,
        q_THE: Tensor,
        k_TGE: Tensor,
        v_TGE: Tensor,
        documents: Documents,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Attention:
    """The kernel a model is built with, and its name to print."""

    name: str
    kernel: Kernel


def never_compiled(kernel: Kernel) -> Kernel:
    """Document lengths change with every pack, and a block with the kernel inside would be compiled anew for each."""
    return cast(Kernel, torch.compiler.disable(kernel))


@never_compiled
def attend_sdpa(
    q_THE: Tensor,
    k_TGE: Tensor,
    v_TGE: Tensor,
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`Kernel` by one scaled_dot_product_attention a document: on any device, in any floating type.

    On a CPU half precision is computed in float32, which is up to three times as fast in backward for short documents.
    """
    tensors = _suit_kernels(q_THE, k_TGE, v_TGE)
    by_document = zip(*(x.split(documents.lengths) for x in tensors), strict=True)
    outputs_LHE = [_attend_document(q, k, v, scale, window, softcap) for q, k, v in by_document]
    return torch.cat(outputs_LHE).to(q_THE.dtype)


def _suit_kernels(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same attention in the type and heads for which the device has a good kernel."""
    is_half = q_THE.dtype in (torch.bfloat16, torch.float16)
    if q_THE.is_cuda and not is_half:
        # FlashAttention alone groups heads on CUDA, and it takes half precision alone; the kernel that does both holds
        # all scores, which is far more than a copy of the heads.
        group = q_THE.shape[1] // k_TGE.shape[1]
        return q_THE, k_TGE.repeat_interleave(group, dim=1), v_TGE.repeat_interleave(group, dim=1)
    if is_half and not q_THE.is_cuda:
        return q_THE.float(), k_TGE.float(), v_TGE.float()
    return q_THE, k_TGE, v_TGE


def _attend_document(
    q_LHE: Tensor, k_LGE: Tensor, v_LGE: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    q_1HLE, k_1GLE, v_1GLE = (x.transpose(0, 1).unsqueeze(0) for x in (q_LHE, k_LGE, v_LGE))
    length = len(q_LHE)
    if softcap is not None:
        output_1HLE = _attend_softcapped(q_1HLE, k_1GLE, v_1GLE, scale, window, softcap)
    else:
        mask_LL = None if window is None or length <= window else _visible(length, window, q_LHE.device)
        output_1HLE = functional.scaled_dot_product_attention(
            q_1HLE, k_1GLE, v_1GLE, mask_LL, is_causal=mask_LL is None, scale=scale, enable_gqa=True
        )
    return output_1HLE.squeeze(0).transpose(0, 1)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [L, L]: row i may see column j."""
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal_LL if window is None else causal_LL.triu(1 - window)


def _attend_softcapped(
    q_1HLE: Tensor, k_1GLE: Tensor, v_1GLE: Tensor, scale: float, window: int | None, softcap: float
) -> Tensor:
    """By the formula of Gemma 2 (arXiv 2408.00118); holds the scores [H, L, L] of a document, which SDPA would not."""
    group = q_1HLE.shape[1] // k_1GLE.shape[1]
    k_1HLE, v_1HLE = (x.repeat_interleave(group, dim=1) for x in (k_1GLE, v_1GLE))
    scores_1HLL = softcap * torch.tanh(q_1HLE @ k_1HLE.transpose(-1, -2) * (scale / softcap))
    hidden_LL = ~_visible(q_1HLE.shape[2], window, q_1HLE.device)
    wide = torch.promote_types(q_1HLE.dtype, torch.float32)
    return scores_1HLL.masked_fill(hidden_LL, -torch.inf).softmax(-1, dtype=wide).to(v_1HLE.dtype) @ v_1HLE


# torch 2.11 takes grouped heads as they are; from 2.12 on it wants to be told.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@never_compiled
def attend_varlen(
    q_THE: Tensor,
    k_TGE: Tensor,
    v_TGE: Tensor,
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`Kernel` by FlashAttention over the whole pack: CUDA, bf16 or fp16, without softcap."""
    _refuse_varlen(_softcap_obstacle(softcap))
    bounds, longest = documents.cu_seqlens, documents.max_length
    left = -1 if window is None else window - 1
    output_THE = varlen_attn(
        q_THE, k_TGE, v_TGE, bounds, bounds, longest, longest, scale=scale, window_size=(left, 0), **_GROUPED
    )
    assert isinstance(output_THE, Tensor)
    return output_THE


def choose_attention(
    asked: Literal["auto", "sdpa", "varlen"], device: torch.device | str, dtype: torch.dtype
) -> Attention:
    """The kernel for activations of `dtype` on `device`; auto is varlen where it can run.

    Choosing varlen activates FlashAttention 3 (Hopper) or 4 (Blackwell) for this process where it is installed.
    Raises UserError where varlen is asked for and cannot run.
    """
    device = torch.device(device)
    check_attention(asked, device, dtype)
    if asked == "sdpa" or (asked == "auto" and _varlen_obstacle(device, dtype)):
        return Attention("sdpa", attend_sdpa)
    return Attention(f"varlen ({_activate_flash_attention(device)})", attend_varlen)


def check_attention(
    asked: Literal["auto", "sdpa", "varlen"],
    device: torch.device | str,
    dtype: torch.dtype,
    softcap: float | None = None,
) -> None:
    """Raises UserError where varlen is asked for and cannot run, on `device` or for scores capped at `softcap`.

    It touches no device.
    """
    if asked == "varlen":
        _refuse_varlen(_varlen_obstacle(torch.device(device), dtype))
        _refuse_varlen(_softcap_obstacle(softcap))


def _refuse_varlen(obstacle: str | None) -> None:
    if obstacle is not None:
        raise UserError(f"model.attention=varlen {obstacle}; set it to sdpa or auto")


def _softcap_obstacle(softcap: float | None) -> str | None:
    return None if softcap is None else f"has no softcap, and this model caps scores at {softcap}"


def _varlen_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA device, and the model is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 or fp16, and precision.compute is {str(dtype).removeprefix('torch.')}"
    return None


_FLASH_ATTENTION = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute.interface")}
"""By compute capability: the generation torch knows, and the module it comes in."""


def _activate_flash_attention(device: torch.device) -> str:
    generation, module = _FLASH_ATTENTION.get(torch.cuda.get_device_capability(device)[0], (None, ""))
    if generation is None or not _is_installed(module):
        return "FA2"
    activate_flash_attention_impl(generation)
    return generation


def _is_installed(module: str) -> bool:
    parts = module.split(".")  # find_spec raises where a parent package is missing, so ask from the outside in
    return all(importlib.util.find_spec(".".join(parts[: i + 1])) for i in range(len(parts)))
