"""A test of the real model at the start of a run: can one document of a pack see another?

It says what it found; whoever called decides whether to go on, packed or one document a row.
Shape suffixes: T tokens of a pack, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from burnish.types import Documents

LENGTHS = (9, 17, 5, 12)
"""Of the probe's documents: longer than the kernels of convolutions, and none a multiple of another."""


class Forward(Protocol):
    """A model, or a function that calls it the way training does (in another dtype, for example)."""

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, documents: Documents, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the probe measured; differences are relative to the largest hidden state of their document."""

    leak: float
    """Largest change of a document's hidden states when another document's tokens change."""
    restart: float
    """Largest difference between a document in the pack and the same document alone."""
    reason: str | None
    """What is wrong, in words; None where packing is safe."""


def leak_tolerance(config: Mapping[str, Any]) -> float:
    """What `probe_isolation` may let through: nothing in a dense model; 1e-5 in one whose experts share their matmuls
    among documents, because the sizes of those, and so their rounding, depend on all tokens of the pack.
    """
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return 1e-5 if any((config.get(key) or 0) > 1 for key in experts) else 0.0


@torch.no_grad()
def probe_isolation(
    forward: Forward,
    *,
    vocab_size: int,
    device: torch.device | str,
    leak_tolerance: float = 0.0,
    restart_tolerance: float = 1e-3,
    lengths: Sequence[int] = LENGTHS,
) -> ProbeResult:
    """Pack a few short documents of random tokens, change them one at a time, and watch the others' hidden states.

    `restart_tolerance` bounds the rounding between a document in a pack and the same document alone: 1e-3 is for
    float32, for bfloat16 allow 5e-2. Leaves the random state alone.
    """
    generator = torch.Generator().manual_seed(0)
    originals = [torch.randint(vocab_size, (length,), generator=generator).to(device) for length in lengths]
    hidden = _forward_each(forward, originals)
    leak = 0.0
    for changed, original in enumerate(originals):
        others = [n for n in range(len(originals)) if n != changed]
        documents = [*originals[:changed], (original + 1) % vocab_size, *originals[changed + 1 :]]
        new = _forward_each(forward, documents)
        if torch.equal(new[changed], hidden[changed]):
            return ProbeResult(
                leak, 0.0, "hidden states do not depend on the tokens, so nothing can be learnt of packing"
            )
        leak = max(leak, *(_difference(new[n], hidden[n]) for n in others))
    alone = [_forward_each(forward, [original])[0] for original in originals]
    restart = max(_difference(packed, single) for packed, single in zip(hidden, alone, strict=True))
    return ProbeResult(leak, restart, _reason(leak, leak_tolerance, restart, restart_tolerance))


def _reason(leak: float, leak_tolerance: float, restart: float, restart_tolerance: float) -> str | None:
    if not leak <= leak_tolerance:
        return f"a document's hidden states change by {leak:.1e} when another document of its pack changes"
    if not restart <= restart_tolerance:
        return f"a document's hidden states in a pack differ by {restart:.1e} from those of the document alone"
    return None


def _forward_each(forward: Forward, documents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Hidden states of each document when all are one pack."""
    lengths = tuple(len(document) for document in documents)
    device = documents[0].device
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    positions_T = torch.cat([torch.arange(length, device=device) for length in lengths])
    return forward(torch.cat(list(documents)), positions_T, Documents(bounds, lengths)).split(lengths)


def _difference(ours_TD: Tensor, theirs_TD: Tensor) -> float:
    return ((ours_TD.double() - theirs_TD.double()).abs().max() / theirs_TD.double().abs().max()).item()
