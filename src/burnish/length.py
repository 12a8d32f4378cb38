"""How long a run is: its optimizer steps and the steps at which epochs end, from the recipe and the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

from burnish.config import Recipe, RecipeError
from burnish.data.order import Order
from burnish.data.source import BatchSize, SampleLengths, count_steps


@dataclass(frozen=True)
class RunLength:
    """`epoch_ends` are the steps after which an epoch of the data is complete, up to `total_steps`."""

    total_steps: int
    epoch_ends: frozenset[int] = frozenset()


def needs_every_row(recipe: Recipe, order: Order) -> str | None:
    """Why every row must be prepared before the length of the run is known; None where their number is enough."""
    wants_epochs = "epoch" in (recipe.checkpoint.every, recipe.evaluate.every)
    if not order.has_epochs or (recipe.train.steps is not None and not wants_epochs):
        return None
    return _unknown_steps(recipe)


def _unknown_steps(recipe: Recipe) -> str | None:
    """What makes the steps of an epoch depend on more than the number of its rows."""
    if recipe.batch.size[0] == "tokens":
        return f"batch.tokens={recipe.batch.tokens}"
    if recipe.data.turn_per_sample:
        return "data.turn_per_sample=true"
    dropping = [f"data.{k}=drop" for k in ("bad_rows", "over_long") if getattr(recipe.data, k) == "drop"]
    return dropping[0] if dropping else None


def run_length(recipe: Recipe, order: Order, lengths: Sequence[SampleLengths] | None = None) -> RunLength:
    """The length of the run that `recipe` asks for over rows in `order`.

    `lengths` are those of every source's samples; they are needed where `needs_every_row`.
    Raises RecipeError where the recipe speaks of epochs and the data has none.
    """
    if not order.has_epochs:
        for key, every in (("checkpoint.every", recipe.checkpoint.every), ("evaluate.every", recipe.evaluate.every)):
            if every == "epoch":
                raise RecipeError(
                    f"{key}=epoch: a stream or a mixture of weighted sources has no epochs; set it to a number of steps"
                )
        assert recipe.train.steps is not None, "the recipe asks for steps where data has no end"
        return RunLength(recipe.train.steps)
    size = BatchSize(*recipe.batch.size)
    unknown = _unknown_steps(recipe)
    if lengths is None and unknown is not None:
        assert recipe.train.steps is not None, f"the length depends on every row: {unknown}"
        return RunLength(recipe.train.steps)

    def steps_of_epochs() -> Iterator[int]:
        epoch = 0
        while True:
            if lengths is not None:
                yield max(1, count_steps(order, lengths, size, epoch))
            else:
                yield -(-order.epoch_length // size.count)
            epoch += 1

    if recipe.train.steps is not None:
        total = recipe.train.steps
    else:
        whole, part = divmod(recipe.train.epochs, 1)
        counts = steps_of_epochs()
        total = sum(next(counts) for _ in range(int(whole)))
        # A float such as 2.1 leaves 0.10000000000000009: do not let that make a step.
        total += math.ceil(part * next(counts) - 1e-6) if part else 0
    return RunLength(total, frozenset(takewhile(lambda end: end <= total, accumulate(steps_of_epochs()))))
