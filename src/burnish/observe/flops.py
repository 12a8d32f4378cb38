"""Model FLOPs and model FLOPs utilisation (MFU), as pure functions of plain numbers.

Counted is the arithmetic the model needs, forward and backward: not what recomputation repeats, nor padding,
nor the embedding look-up, norms and activations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

FORMULA = "FLOPs = 6 * P * tokens + 6 * P_head * trained tokens + 6 * L * H * d * sum(n^2)"
"""P: matmul parameters without the head; L layers of H heads of size d; n: tokens of each document."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model enters `FORMULA`."""

    body_parameters: int
    """Entries of the weight matrices every token is multiplied by: projections and MLPs; no embedding, norm or bias."""
    head_parameters: int
    """Entries of the lm head's matrix, hidden size times vocabulary, tied or not."""
    num_layers: int
    num_heads: int
    """Query heads; grouped key-value heads do not lessen the attention's arithmetic."""
    head_dim: int


def step_flops(shape: ModelShape, document_lengths: Iterable[int], num_trained_tokens: int) -> float:
    """FLOPs of one optimizer step over documents of these lengths, by `FORMULA`.

    A multiply and an add are two FLOPs; the backward pass costs twice the forward: hence 6 per parameter and token
    (Kaplan et al. 2020, appendix B). Causal attention has n^2 / 2 pairs in a document, each met in two products of
    H * d multiply-adds a layer: 6 * H * d * n^2 with the backward pass.
    """
    lengths = list(document_lengths)
    body = 6.0 * shape.body_parameters * sum(lengths)
    head = 6.0 * shape.head_parameters * num_trained_tokens
    attention = 6.0 * shape.num_layers * shape.num_heads * shape.head_dim * sum(length**2 for length in lengths)
    return body + head + attention


def formula_text(shape: ModelShape, device_name: str, peak: float) -> str:
    """`FORMULA` with the model's numbers, and the peak (FLOP/s of one device) the utilisation is measured against."""
    return (
        f"MFU = FLOPs / seconds / peak; {FORMULA}; P = {shape.body_parameters:,}, P_head = {shape.head_parameters:,}, "
        f"L = {shape.num_layers}, H = {shape.num_heads}, d = {shape.head_dim}; "
        f"peak = {peak / 1e12:,.1f} TFLOP/s dense bf16 ({device_name})"
    )


# Dense (not sparse) bf16 tensor throughput with fp32 accumulation, FLOP/s, from the vendors' data sheets and
# architecture white papers. Names are those of `torch.cuda.get_device_name` without the vendor.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"GB[23]00", 2500e12),
    (r"B[23]00", 2250e12),
    (r"H[12]00 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"H[128]00|GH200", 989e12),
    (r"H20", 148e12),
    (r"A[18]00", 312e12),
    (r"A40", 149.7e12),
    (r"A30", 165e12),
    (r"A10G", 70e12),
    (r"A10", 125e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L20", 119.5e12),
    (r"L4", 121e12),
    (r"RTX PRO 6000 Blackwell", 503.8e12),
    (r"RTX 6000 Ada", 364.2e12),
    (r"RTX A6000", 154.8e12),
    (r"RTX 5090", 209.5e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 3090", 71e12),
    (r"MI3(00|25)X", 1307.4e12),
    (r"MI355X", 2500e12),
    (r"MI250X", 191.5e12),  # one of its two dies, which is what PyTorch sees as a device
)

# A slice, a laptop part or a cut-down sibling bears the name of a faster device.
_LESSER = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|SUPER|D)\b")


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device by its `torch.cuda` name; None where it is not known: no MFU is shown."""
    if _LESSER.search(device_name):
        return None
    return next((peak for name, peak in _PEAKS if re.search(rf"(^|\s)({name})(?![A-Za-z0-9])", device_name)), None)
