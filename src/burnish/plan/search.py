"""All layouts of a number of devices, fastest first: of each its time, which is soon counted, and of those that come
first their memory, until enough of them fit.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from burnish.config import ParallelConfig, Recipe, RecipeError
from burnish.parallel.degrees import Degrees
from burnish.parallel.stages import splits_backward
from burnish.plan.layouts import Estimate, Planner

RECOMPUTE = ("none", "selective", "full")
SCHEDULES = ("1f1b", "interleaved_1f1b")
"""Beside the recipe's own. gpipe never takes less time or memory than 1f1b, and with zero bubbles blocks are not
compiled, which no roofline sees.
"""
ALIKE, INSTANT = 1.01, 1e-3
"""Times that differ by a smaller factor, or by fewer seconds, are the same to a roofline."""
OFFLOADED = ("none", "optimizer", "parameters")
DEGREES = ("dp_replicate", "dp_shard", "tp", "cp", "pp", "ep")


@dataclass
class Search:
    """What was found of the layouts of a planner's devices."""

    best: list[Estimate] = field(default_factory=list)
    """The first that fit, one for each set of degrees."""
    is_offloaded: bool = False
    """Whether more is in the host's memory than the recipe says."""
    least: Estimate | None = None
    """That which needs least, where none fits; of those that were looked at."""
    too_large: int = 0
    """How many faster than the first, or all, do not fit."""
    possible: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """How many others cannot be, and why."""


def search(planner: Planner, most: int) -> Search:
    """The first `most` layouts that fit, with more in the host's memory where nothing fits with less."""
    recipe, result = planner.recipe, Search()
    more = OFFLOADED[OFFLOADED.index(recipe.parallel.offload) :]
    steps = [(offload, recipe.train.offload_activations) for offload in more]
    for offload, moves_activations in dict.fromkeys((*steps, (more[-1], True))):
        parallel = recipe.parallel.model_copy(update={"offload": offload})
        train = recipe.train.model_copy(update={"offload_activations": moves_activations})
        result = _search(planner, recipe.model_copy(update={"parallel": parallel, "train": train}), most)
        result.is_offloaded = (parallel, train) != (recipe.parallel, recipe.train)
        if result.best:
            break
    return result


def _search(planner: Planner, recipe: Recipe, most: int) -> Search:
    result = Search()
    estimates = [planner.estimate(*laid_out) for laid_out in possible(planner, recipe, result.refused)]
    estimates.sort(key=_seconds)
    result.possible = len(estimates)
    shown: set[tuple[int, ...]] = set()
    start = 0
    while start < len(estimates) and len(result.best) < most:
        first = estimates[start]
        if _degrees(first) in shown or not _fits(planner, first):
            result.too_large += not result.best
            start += 1
            continue
        alike = max(ALIKE * _seconds(first), _seconds(first) + INSTANT)
        end = bisect_right(estimates, alike, key=_seconds)
        for estimate in sorted(estimates[start:end], key=_complexity):
            if len(result.best) < most and _degrees(estimate) not in shown and _fits(planner, estimate):
                result.best.append(estimate)
                shown.add(_degrees(estimate))
        start = end
    if not result.best:
        result.least = min(estimates, key=lambda estimate: estimate.peak, default=None)
    return result


def _fits(planner: Planner, estimate: Estimate) -> bool:
    limit = planner.limit
    assert limit is not None
    # Updates need no trace.
    if any(rank.optimizer_step().on_device > limit for rank in estimate.ranks):
        return False
    return all(rank.memory.peak <= limit for rank in estimate.ranks)


def _seconds(estimate: Estimate) -> float:
    assert estimate.time is not None
    return estimate.time.total


def _degrees(estimate: Estimate) -> tuple[int, ...]:
    return tuple(getattr(estimate.layout.degrees, name) for name in DEGREES)


def _complexity(estimate: Estimate) -> tuple[float, ...]:
    """Kinds of parallelism first, recomputation next, then what else differs from the defaults."""
    degrees, parallel = estimate.layout.degrees, estimate.recipe.parallel
    kinds = [getattr(degrees, name) for name in DEGREES if name != "dp_shard"]
    return (
        sum(kind > 1 for kind in kinds),
        RECOMPUTE.index(estimate.recipe.train.recompute),
        3 - parallel.zero,
        parallel.etp > 1,
        parallel.cp_kind != "ring",
        parallel.pp_schedule != SCHEDULES[0],
        sum(kinds),
        _seconds(estimate),
    )


def possible(planner: Planner, recipe: Recipe, refused: Counter[str]) -> Iterator[tuple[Recipe, Degrees]]:
    """All layouts of the planner's devices that a run would take; `refused` counts the others by reason."""
    trains = [recipe.train.model_copy(update={"recompute": recompute}) for recompute in RECOMPUTE]
    obstacles: dict[tuple[Any, ...], str | None] = {}
    for parallel in candidates(planner, recipe.parallel):
        degrees = Degrees.of(parallel, planner.degrees.world)
        if degrees.data_ranks > planner.steps.num_packs:
            refused["more data ranks than micro-batches in a step"] += 1
            continue
        for train in trains:
            laid_out = recipe.model_copy(update={"parallel": parallel, "train": train})
            parts = degrees.pp, parallel.pp_schedule
            cut_as = degrees.tp, degrees.cp, parallel.cp_kind, degrees.ep, degrees.etp
            key = cut_as, degrees.pp > 1, splits_backward(parallel), train.recompute
            for subject, find in ((parts, _obstacle_of_parts), (key, _obstacle)):
                if subject not in obstacles:
                    obstacles[subject] = find(planner, laid_out, degrees)
            reason = obstacles[parts] or obstacles[key]
            if reason is None:
                yield laid_out, degrees
            else:
                refused[reason] += 1


def candidates(planner: Planner, base: ParallelConfig) -> Iterator[ParallelConfig]:
    """Layouts of the planner's devices, possible or not. What is offloaded stays as it is in `base`, and so does
    `sequence_parallel`; what takes long to and from the host is not varied further.
    """
    world, per_node = planner.degrees.world, planner.request.devices_per_node
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    within = [n for n in divisors if n <= per_node]
    nodes = world // per_node if world % per_node == 0 else 1
    experts = [n for n in divisors if planner.num_experts % n == 0]
    is_offloaded = base.offload != "none"
    common = {"dp_shard": "auto", "pp_chunks": None, "pp_first_layers": None, "pp_last_layers": None}
    for pp, tp, cp, replicate in product(divisors, within, within, sorted({1, nodes})):
        if world % (pp * tp * cp * replicate):
            continue
        inner = world // pp // replicate
        varied: dict[str, Sequence[Any]] = {
            "sequence_parallel": [base.sequence_parallel if tp > 1 else None],
            "ep": [n for n in experts if inner % n == 0],
            "etp": sorted({1, tp}) if planner.num_experts > 1 else [1],
            "zero": [3] if is_offloaded or inner == tp else [3, 2, 1],
            "cp_kind": ["ring"] if is_offloaded or cp == 1 else ["ring", "all_to_all"],
            "pp_schedule": SCHEDULES[:1]
            if is_offloaded or pp == 1
            else [*dict.fromkeys((*SCHEDULES, base.pp_schedule))],
        }
        degrees = {"pp": pp, "tp": tp, "cp": cp, "dp_replicate": replicate}
        for values in product(*varied.values()):
            keys = common | degrees | dict(zip(varied, values, strict=True))
            if inner % (keys["ep"] * keys["etp"]) == 0:
                yield base.model_copy(update=keys)


def _obstacle_of_parts(planner: Planner, recipe: Recipe, degrees: Degrees) -> str | None:
    try:
        planner.stages(recipe.parallel)
    except RecipeError:
        return "more pipeline parts than layers"
    return None


def _obstacle(planner: Planner, recipe: Recipe, degrees: Degrees) -> str | None:
    """Why a layout cannot be, in words that are alike for alike layouts."""
    try:
        # How many parts there can be is asked once for each number of them.
        planner.check(recipe, replace(degrees, pp=1))
    except RecipeError as error:
        key = re.match(r"parallel\.(\w+)", str(error))
        name = key[1] if key is not None else "the layout"
        return f"{f'cp by {recipe.parallel.cp_kind}' if name == 'cp' else name} does not suit the model"
    return None
