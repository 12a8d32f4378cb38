"""Rotary position embeddings and their scaling variants, as `transformers` computes them from a config.json.

Two variants choose their frequencies by length. Here that is the length of each document, never of the pack, so that a
document is rotated alike whatever it is packed with. Frequencies are float32 as in `transformers`, because checkpoints
were trained with them; in float64 the same frequencies are used, and the angles are exact.

Shape suffixes: T tokens of a pack, H heads, E head dimension, F = E / 2 rotated pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from burnish.model.base import UnsupportedModel
from burnish.types import Documents, UserError


@dataclass(frozen=True, slots=True)
class Rope:
    """What a config.json says of its rotary embeddings; `settings` are the numbers of the variant `kind`."""

    kind: str
    theta: float
    head_dim: int
    max_positions: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stretch(self) -> float:
        """How many times longer the context is than in pretraining (yarn, longrope)."""
        return self.settings.get("factor") or self.max_positions / self.settings["original_max_position_embeddings"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of scaling: frequencies [F] for a document of `length` tokens, and a factor on cosine and sine."""

    frequencies: Callable[[Rope, int], Tensor]
    attention_factor: Callable[[Rope], float]
    by_length: bool = False
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


def read_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary embeddings of a config.json, in today's form (`rope_parameters`) or the older one
    (`rope_theta` and `rope_scaling`).

    Raises UnsupportedModel for a variant or setting that is not computed here, UserError for a missing number.
    """
    written = config.get("rope_scaling") or config.get("rope_parameters") or {}
    settings = {key: value for key, value in written.items() if value is not None}
    max_positions = config["max_position_embeddings"]
    legacy_kind = settings.pop("type", "default")
    kind = settings.pop("rope_type", legacy_kind)
    theta = settings.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(
            f"partial_rotary_factor={written['partial_rotary_factor']}: only whole heads are rotated"
        )
    variant = VARIANTS.get(kind)
    if variant is None:
        raise UnsupportedModel(f"rope_type={kind!r} is none of {', '.join(VARIANTS)}")
    if "original_max_position_embeddings" in variant.required:
        outer = config.get("original_max_position_embeddings")
        inner = settings.get("original_max_position_embeddings", max_positions)
        settings["original_max_position_embeddings"] = outer or inner
    _check_settings(kind, variant, settings, head_dim)
    return Rope(kind, float(theta), head_dim, max_positions, settings)


def _check_settings(kind: str, variant: Variant, settings: Mapping[str, Any], head_dim: int) -> None:
    missing = variant.required - settings.keys()
    if missing:
        raise UserError(
            f"rope_type={kind!r} needs {', '.join(sorted(missing))}; add it to rope_parameters in config.json"
        )
    unknown = settings.keys() - variant.required - variant.optional
    if unknown:
        raise UnsupportedModel(f"rope_type={kind!r} knows no {', '.join(sorted(unknown))}")
    for name in ("short_factor", "long_factor"):
        if name in settings and len(settings[name]) != head_dim // 2:
            raise UserError(
                f"{name} has {len(settings[name])} numbers; head_dim={head_dim} needs {head_dim // 2}, one for each "
                "rotated pair; correct rope_parameters in config.json"
            )


def _plain(rope: Rope, length: int) -> Tensor:
    """RoPE (arXiv 2104.09864)."""
    return 1.0 / _wavelengths(rope, rope.theta)


def _wavelengths(rope: Rope, theta: float) -> Tensor:
    exponents_F = torch.arange(0, rope.head_dim, 2, dtype=torch.float32, device="cpu") / rope.head_dim
    return theta**exponents_F


def _one(rope: Rope) -> float:
    return 1.0


def _linear(rope: Rope, length: int) -> Tensor:
    """Position interpolation (arXiv 2306.15595)."""
    return _plain(rope, length) / rope.settings["factor"]


def _dynamic(rope: Rope, length: int) -> Tensor:
    """Dynamic NTK scaling: the base grows with a document that is longer than the model was trained for."""
    factor = rope.settings["factor"]
    growth = factor * max(length, rope.max_positions) / rope.max_positions - (factor - 1)
    return 1.0 / _wavelengths(rope, rope.theta * growth ** (rope.head_dim / (rope.head_dim - 2)))


def _yarn(rope: Rope, length: int) -> Tensor:
    """YaRN (arXiv 2309.00071): slow pairs are interpolated, fast ones kept, with a ramp in between."""
    wavelengths_F = _wavelengths(rope, rope.theta)
    keep_F = 1 - _yarn_ramp(rope)
    return 1.0 / (rope.stretch * wavelengths_F) * (1 - keep_F) + 1.0 / wavelengths_F * keep_F


def _yarn_ramp(rope: Rope) -> Tensor:
    """0 for pairs that turn at least `beta_fast` times within the original context, 1 at `beta_slow` or fewer."""

    def pair_of(num_turns: float) -> float:
        original = rope.settings["original_max_position_embeddings"]
        return rope.head_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = pair_of(rope.settings.get("beta_fast") or 32)
    high = pair_of(rope.settings.get("beta_slow") or 1)
    if rope.settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    width = high - low if high != low else 0.001  # a step, without dividing by zero
    return ((torch.arange(rope.head_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)


def _yarn_attention_factor(rope: Rope) -> float:
    def temper(scale: float) -> float:
        return 0.1 * scale * math.log(rope.stretch) + 1.0 if rope.stretch > 1 else 1.0

    stated = rope.settings.get("attention_factor")
    if stated is not None:
        return stated
    scale, scale_all = rope.settings.get("mscale"), rope.settings.get("mscale_all_dim")
    return temper(scale) / temper(scale_all) if scale and scale_all else temper(1.0)


def _longrope(rope: Rope, length: int) -> Tensor:
    """LongRoPE (arXiv 2402.13753): a factor for each pair, of one set up to the original context, of another beyond."""
    is_long = length > rope.settings["original_max_position_embeddings"]
    factors = rope.settings["long_factor" if is_long else "short_factor"]
    return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * _wavelengths(rope, rope.theta))


def _longrope_attention_factor(rope: Rope) -> float:
    stated = rope.settings.get("attention_factor")
    if stated is not None:
        return stated
    original = rope.settings["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(rope.stretch) / math.log(original)) if rope.stretch > 1 else 1.0


def _llama3(rope: Rope, length: int) -> Tensor:
    """Llama 3.1: wavelengths beyond the original context are stretched, short ones kept, with a smooth passage."""
    settings, original = rope.settings, rope.settings["original_max_position_embeddings"]
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    frequencies_F = _plain(rope, length)
    periods_F = 2 * math.pi / frequencies_F
    smooth_F = (original / periods_F - low) / (high - low)
    blended_F = (1 - smooth_F) * frequencies_F / factor + smooth_F * frequencies_F
    stretched_F = torch.where(periods_F > original / low, frequencies_F / factor, blended_F)
    return torch.where(periods_F < original / high, frequencies_F, stretched_F)


_ORIGINAL = "original_max_position_embeddings"

VARIANTS: Mapping[str, Variant] = {
    "default": Variant(_plain, _one),
    "linear": Variant(_linear, _one, required=frozenset({"factor"})),
    "dynamic": Variant(_dynamic, _one, by_length=True, required=frozenset({"factor"}), optional=frozenset({_ORIGINAL})),
    "yarn": Variant(
        _yarn,
        _yarn_attention_factor,
        required=frozenset({_ORIGINAL}),
        optional=frozenset(
            {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
        ),
    ),
    "longrope": Variant(
        _longrope,
        _longrope_attention_factor,
        by_length=True,
        required=frozenset({_ORIGINAL, "short_factor", "long_factor"}),
        optional=frozenset({"factor", "attention_factor"}),
    ),
    "llama3": Variant(_llama3, _one, required=frozenset({_ORIGINAL, "factor", "low_freq_factor", "high_freq_factor"})),
}


class Rotary:
    """Cosine and sine of every token of a pack. Holds no parameters, so it is no module and no cast reaches it."""

    def __init__(self, rope: Rope) -> None:
        self._rope = rope
        self._variant = VARIANTS[rope.kind]
        self._attention_factor = self._variant.attention_factor(rope)
        self._frequencies: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, positions_T: Tensor, documents: Documents, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [T, 1, F] in `dtype`, computed in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        angles_TF = positions_T.to(wide)[:, None] * self._of_tokens(documents, positions_T.device, wide)
        cos_TF, sin_TF = angles_TF.cos() * self._attention_factor, angles_TF.sin() * self._attention_factor
        return cos_TF.to(dtype)[:, None], sin_TF.to(dtype)[:, None]

    def _of_tokens(self, documents: Documents, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Frequencies [F], or [T, F] where the variant goes by the length of a document."""
        if not self._variant.by_length:
            return self._of_length(1, device, dtype)
        by_document_NF = torch.stack([self._of_length(length, device, dtype) for length in documents.lengths])
        return by_document_NF[documents.of_tokens()]

    def _of_length(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Frequencies [F] of a document, copied to the device once, because the host waits for the copy."""
        key = (length, device, dtype)
        if key not in self._frequencies:
            self._frequencies[key] = self._variant.frequencies(self._rope, length).to(device, dtype)
        return self._frequencies[key]


def rotate(x_THE: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+F}) of every head by the angles of its token."""
    first, second = x_THE.chunk(2, dim=-1)
    turned = (first * cos_T1F - second * sin_T1F, second * cos_T1F + first * sin_T1F)
    return torch.cat(turned, dim=-1)
