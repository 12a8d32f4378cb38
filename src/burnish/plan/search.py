"""All layouts of a number of devices, those that cannot be left out, by the time of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from burnish.config import ParallelConfig, Recipe, RecipeError
from burnish.parallel.degrees import Degrees
from burnish.parallel.divisible import check_tensor_parallel
from burnish.plan.layouts import RECOMPUTE, Estimate, Planner
from burnish.plan.memory import gib


def search(planner: Planner) -> tuple[list[Estimate], Counter[str]]:
    """All layouts of the planner's devices that fit, fastest first, and how many others were dropped for what."""
    dropped: Counter[str] = Counter()
    fitting: list[Estimate] = []
    limit = planner.limit
    assert limit is not None
    obstacles: dict[tuple[Any, ...], str | None] = {}
    for parallel in candidates(planner):
        degrees = Degrees.of(parallel, planner.degrees.world)
        if degrees.data_ranks > planner.steps.num_packs:
            dropped["more data ranks than micro-batches in a step"] += 1
            continue
        for recompute in RECOMPUTE:
            train = planner.recipe.train.model_copy(update={"recompute": recompute})
            recipe = planner.recipe.model_copy(update={"parallel": parallel, "train": train})
            key = (degrees.tp, degrees.cp, degrees.pp, degrees.ep, recompute)
            if key not in obstacles:
                obstacles[key] = _obstacle(planner, recipe, degrees)
            reason = obstacles[key]
            if reason is not None:
                dropped[reason] += 1
                continue
            estimate = planner.estimate(recipe, degrees)
            if estimate.peak > limit:
                dropped[f"needs more than {gib(limit)} GiB on a rank"] += 1
            else:
                fitting.append(estimate)
    return sorted(fitting, key=_rank), dropped


def _rank(estimate: Estimate) -> tuple[float, ...]:
    """By time to three digits; of equals the one with more room, and that with fewer kinds of parallelism."""
    assert estimate.time is not None
    degrees = estimate.layout.degrees
    return float(f"{estimate.time.total:.3g}"), degrees.tp * degrees.cp * degrees.pp * degrees.ep, estimate.peak


def candidates(planner: Planner) -> Iterator[ParallelConfig]:
    """Layouts of the planner's devices, possible or not; offload and schedule stay the recipe's."""
    world, per_node = planner.degrees.world, planner.request.devices_per_node
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    nodes = world // per_node if world % per_node == 0 else 1
    experts = [n for n in divisors if planner.num_experts % n == 0]
    for pp in divisors:
        for tp in (n for n in divisors if n <= per_node):
            for cp in (n for n in divisors if n <= per_node):
                for replicate in sorted({1, nodes}):
                    if world % (pp * tp * cp * replicate):
                        continue
                    inner = world // pp // replicate
                    for ep in (n for n in experts if inner % n == 0):
                        for zero in (1, 2, 3) if inner // tp > 1 else (3,):
                            keys = {"pp": pp, "tp": tp, "cp": cp, "dp_replicate": replicate, "ep": ep, "zero": zero}
                            yield planner.recipe.parallel.model_copy(update={**keys, "dp_shard": "auto", "etp": 1})


def _obstacle(planner: Planner, recipe: Recipe, degrees: Degrees) -> str | None:
    """Why a layout cannot be, in words that are alike for alike layouts."""
    checks: tuple[tuple[str, Callable[[], object]], ...] = (
        ("tp does not divide heads or columns", lambda: check_tensor_parallel(planner.model.config, degrees.tp)),
        ("more pipeline parts than layers", lambda: planner.stages(recipe.parallel)),
        ("the model cannot be computed so", lambda: planner.check(recipe, degrees)),
    )
    for reason, check in checks:
        try:
            check()
        except RecipeError:
            return reason
    return None
