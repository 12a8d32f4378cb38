"""How many steps a run has, and where its epochs end."""

import numpy as np
import pytest

from burnish.config import Recipe, RecipeError
from burnish.data.order import Order
from burnish.data.source import SampleLengths
from burnish.length import RunLength, needs_every_row, run_length
from burnish.recipe import recipe_from_dict


def make_recipe(*overrides: str) -> Recipe:
    return recipe_from_dict(
        {"model": {"path": "m"}, "data": {"train": [{"path": "a"}]}, "batch": {"samples": 4}}, overrides
    )


def lengths_of(rows: list[list[int]]) -> SampleLengths:
    tokens = [length for row in rows for length in row]
    return SampleLengths(np.array(tokens, np.int32), np.cumsum([0, *map(len, rows)]))


ORDER = Order([10], [None], seed=0)


def test_epochs_in_steps_with_the_last_batch_of_each_partial() -> None:
    assert run_length(make_recipe("train.epochs=2"), ORDER) == RunLength(6, frozenset({3, 6}))
    assert run_length(make_recipe("train.epochs=0.5"), ORDER) == RunLength(2, frozenset())
    assert run_length(make_recipe("train.epochs=2.1"), ORDER).total_steps == 7
    assert run_length(make_recipe("train.steps=7"), ORDER) == RunLength(7, frozenset({3, 6}))


def test_dropped_rows_and_token_batches_need_every_row() -> None:
    assert needs_every_row(make_recipe(), ORDER) is None
    assert needs_every_row(make_recipe("data.over_long=drop"), ORDER) == "data.over_long=drop"
    assert needs_every_row(make_recipe("data.over_long=drop", "train.steps=5"), ORDER) is None
    tokens = make_recipe("batch.samples=null", "batch.tokens=25")
    assert needs_every_row(tokens, ORDER) == "batch.tokens=25"
    seven_of_ten = lengths_of([[], [], [], *[[5]] * 7])
    dropped = run_length(make_recipe("data.over_long=drop"), ORDER, [seven_of_ten])
    assert dropped == RunLength(2, frozenset({2}))
    assert run_length(tokens, ORDER, [lengths_of([[10]] * 10)]) == RunLength(5, frozenset({5}))
    assert run_length(make_recipe("batch.samples=null", "batch.tokens=25", "train.steps=3"), ORDER) == RunLength(3)


def test_epochs_of_rows_with_several_samples_end_behind_the_last_sample() -> None:
    turns = make_recipe("data.turn_per_sample=true")
    assert needs_every_row(turns, ORDER) == "data.turn_per_sample=true"
    several = lengths_of([[5] * number for number in range(10)])  # 45 samples
    assert run_length(turns, ORDER, [several]) == RunLength(12, frozenset({12}))
    half = make_recipe("data.turn_per_sample=true", "train.epochs=1.5")
    assert run_length(half, ORDER, [several]) == RunLength(18, frozenset({12}))
    assert run_length(make_recipe("data.turn_per_sample=true", "train.steps=3"), ORDER) == RunLength(3)


def test_endless_data_has_no_epochs() -> None:
    endless = Order([None], [None], seed=0)
    assert run_length(make_recipe("train.steps=3"), endless) == RunLength(3)
    with pytest.raises(RecipeError, match=r"evaluate\.every=epoch.*number of steps"):
        run_length(make_recipe("train.steps=3", "evaluate.every=epoch"), endless)
