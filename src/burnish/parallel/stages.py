"""Which layers each part of a pipeline has, which rank holds which parts, and what its schedule asks of a step.

Imports no torch: `burnish plan` and the driver count with it. What runs the parts is pp.py's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from burnish.config import ParallelConfig, RecipeError


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of the model. The first has the embedding before its layers, the last the final norm and the head."""

    index: int
    num_parts: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_parts - 1


def cut_model(parallel: ParallelConfig, layer_costs: Sequence[float], first: float, last: float) -> list[Part]:
    """The parts of a model for `parallel`, of as equal cost as can be.

    Costs are FLOPs a token, or anything in proportion: of each layer, of the embedding (`first`), and of the final norm
    and the head together (`last`; the head costs hidden size x vocabulary for each *trained* token).
    Raises RecipeError where the layers cannot be cut so.
    """
    num_parts = parallel.pp * num_chunks(parallel)
    layers = split_layers(layer_costs, num_parts, first, last, parallel.pp_first_layers, parallel.pp_last_layers)
    return [Part(index, num_parts, part) for index, part in enumerate(layers)]


def num_chunks(parallel: ParallelConfig) -> int:
    """Parts of the model on one rank of the pipeline. Raises RecipeError for a number the schedule cannot run."""
    schedule, asked = parallel.pp_schedule, parallel.pp_chunks
    if schedule in ("gpipe", "1f1b"):
        least, most = 1, 1
    elif schedule == "zbv_zero_bubble":
        least, most = 2, 2
    else:
        least, most = 1, None
    chunks = asked or min(2, most or 2)
    if chunks < least or (most is not None and chunks > most):
        raise RecipeError(
            f"parallel.pp_chunks={chunks}: pp_schedule={schedule} runs {most} part{'s' * (most != 1)} a rank; set "
            "parallel.pp_chunks to null, or parallel.pp_schedule to interleaved_1f1b or interleaved_zero_bubble"
        )
    return chunks


def parts_of(rank: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Indices of the parts that pipeline rank `rank` holds, ascending: in rounds over the ranks, or as a V."""
    if parallel.pp_schedule == "zbv_zero_bubble":
        return rank, 2 * parallel.pp - 1 - rank
    return tuple(rank + parallel.pp * chunk for chunk in range(num_chunks(parallel)))


def rank_of(part: int, parallel: ParallelConfig) -> int:
    """The pipeline rank that holds part `part`."""
    return next(rank for rank in range(parallel.pp) if part in parts_of(rank, parallel))


def num_micro_batches(parallel: ParallelConfig, num: int) -> int:
    """The least number of micro-batches, `num` or more, that the schedule runs.

    1f1b, in whose order gpipe evaluates, takes one a rank at least; interleaved schedules take rounds of equal size, as
    many as pp fits into the number; zbv takes any number.
    """
    match parallel.pp_schedule:
        case "gpipe" | "1f1b":
            return max(num, parallel.pp)
        case "zbv_zero_bubble":
            return num
        case "interleaved_1f1b" | "interleaved_zero_bubble":
            return next(n for n in itertools.count(num) if n % max(1, n // parallel.pp) == 0)


SPLIT = ("interleaved_zero_bubble", "zbv_zero_bubble")
"""Schedules that compute the gradients of weights apart from those of activations, so backward comes twice."""


def splits_backward(parallel: ParallelConfig) -> bool:
    """Whether a pipeline goes backward twice through a block."""
    return parallel.pp > 1 and parallel.pp_schedule in SPLIT


def check_split(parallel: ParallelConfig, recompute: str, is_compiled: bool) -> None:
    """Raises RecipeError where the schedule goes backward twice through what allows it once."""
    if not splits_backward(parallel):
        return
    once = "train.recompute=selective" if recompute == "selective" else "train.compile" if is_compiled else None
    if once:
        raise RecipeError(
            f"parallel.pp_schedule={parallel.pp_schedule} computes the gradients of weights apart from those of "
            f"activations, and {once} goes backward once; turn that off, or set parallel.pp_schedule to "
            "interleaved_1f1b"
        )


def split_layers(
    costs: Sequence[float],
    num_parts: int,
    first: float = 0.0,
    last: float = 0.0,
    first_layers: int | None = None,
    last_layers: int | None = None,
) -> list[range]:
    """Cut layers into `num_parts` runs whose dearest is as cheap as can be, and whose costs are as even as that allows.

    `first` and `last` are added to the costs of the first and the last run. Each run has a layer at least.
    Raises RecipeError where there are too few layers, or those of the first and last run leave too few or too many.
    """
    _check_counts(len(costs), num_parts, first_layers, last_layers)
    until = [0.0]
    for cost in costs:
        until.append(until[-1] + cost)

    def cost_of(part: int, start: int, stop: int) -> float:
        if (part == 0 and first_layers not in (None, stop)) or (
            part == num_parts - 1 and last_layers not in (None, stop - start)
        ):
            return math.inf
        return until[stop] - until[start] + first * (part == 0) + last * (part == num_parts - 1)

    dearest, _ = _cut(len(costs), num_parts, cost_of, max)
    limit = dearest * (1 + 1e-9)

    def unevenness(part: int, start: int, stop: int) -> float:
        cost = cost_of(part, start, stop)
        return cost * cost if cost <= limit else math.inf

    _, stops = _cut(len(costs), num_parts, unevenness, lambda left, right: left + right)
    return [range(start, stop) for start, stop in zip((0, *stops), stops, strict=False)]


def _cut(
    num_layers: int,
    num_parts: int,
    cost_of: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """The least joined cost of all cuts of the layers into parts, and where the parts of that cut end."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (-math.inf if join is max else 0.0, ())}
    for part in range(num_parts):
        best = {
            stop: min(
                (join(cost, cost_of(part, start, stop)), (*stops, stop))
                for start, (cost, stops) in best.items()
                if start < stop
            )
            for stop in range(part + 1, num_layers + 1)
        }
    return best[num_layers]


def _check_counts(num_layers: int, num_parts: int, first_layers: int | None, last_layers: int | None) -> None:
    if num_layers < num_parts:
        raise RecipeError(
            f"parallel.pp x pp_chunks = {num_parts} parts, and the model has {num_layers} layers; each part needs one, "
            f"so lower parallel.pp or parallel.pp_chunks to {num_layers} parts at most"
        )
    fixed = [number for number in (first_layers, last_layers) if number is not None]
    rest, free = num_layers - sum(fixed), num_parts - len(fixed)
    if rest < free or (free == 0 and rest > 0):
        named = {"pp_first_layers": first_layers, "pp_last_layers": last_layers}
        numbers = " and ".join(f"{name}={number}" for name, number in named.items() if number is not None)
        raise RecipeError(
            f"parallel.{numbers} leave {rest} of the model's {num_layers} layers for the {free} other parts, and each "
            "part needs one; "
            + ("set one of them to null" if free == 0 else f"lower them to {num_layers - free} layers together")
        )
