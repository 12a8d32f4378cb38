"""What is refused of a layout before there are ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_config

from burnish.config import RecipeError
from burnish.model.attention import attend_sdpa
from burnish.model.zoo import build
from burnish.parallel.checks import check_layout, is_compiled
from burnish.parallel.degrees import Degrees
from burnish.recipe import recipe_from_dict


def check(world: int, implementation: Any = "native", train: dict[str, Any] | None = None, **parallel: Any) -> None:
    tree = {"model": {"path": "m"}, "data": {"train": ["rows.jsonl"]}, "parallel": parallel, "train": train or {}}
    recipe = recipe_from_dict(tree)
    model = build(tiny_config("qwen3"), attend_sdpa, dtype=torch.float32, device="meta")
    check_layout(model, recipe, Degrees.of(recipe.parallel, world), "cpu", implementation, "as said")


@pytest.mark.parametrize(
    ("world", "keys", "message"),
    [
        (
            4,
            {"tp": 4},
            r"parallel.tp=4 does not divide num_key_value_heads=2 \(it does num_attention_heads=4, "
            r"intermediate_size=\d+\), and every rank .* set parallel.tp to 1 or 2",
        ),
        (
            3,
            {"tp": 3},
            r"does not divide num_attention_heads=4, num_key_value_heads=2, intermediate_size=\d+, and every",
        ),
        (3, {"cp": 3, "cp_kind": "all_to_all"}, r"parallel.cp=3 .* does not divide num_attention_heads=4"),
        (2, {"ep": 2}, r"parallel.ep=2 and etp=1 cut experts, and this model has none"),
        (
            2,
            {"pp": 2, "pp_schedule": "zbv_zero_bubble"},
            r"parallel.pp x pp_chunks = 4 parts, and the model has \d+ layers",
        ),
        (
            2,
            {"pp": 2, "pp_schedule": "interleaved_zero_bubble", "pp_chunks": 1, "train": {"compile": True}},
            r"train.compile goes backward once",
        ),
        (2, {"tp": 2, "implementation": "transformers"}, r"parallel.tp=2 cuts modules of our own, .* \(as said\)"),
        (2, {"pp": 2, "implementation": "transformers"}, r"parallel.pp=2 cuts .* set parallel.pp to 1"),
    ],
)
def test_a_layout_that_a_model_cannot_have_is_refused(world: int, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(world, **keys)


def test_a_model_without_a_layer_of_experts_has_none_to_cut_whatever_its_config_counts() -> None:
    recipe = recipe_from_dict({"model": {"path": "m"}, "data": {"train": ["rows.jsonl"]}, "parallel": {"ep": 2}})
    config = tiny_config("glm4_moe_lite", first_k_dense_replace=3)
    model = build(config, attend_sdpa, dtype=torch.float32, device="meta")
    with pytest.raises(RecipeError, match=r"parallel.ep=2 and etp=1 cut experts, and this model has none"):
        check_layout(model, recipe, Degrees.of(recipe.parallel, 2), "cpu", "native", "as said")


def test_layouts_that_can_be_pass() -> None:
    check(4, tp=2, pp=2)
    check(2, implementation="transformers", dp_replicate=2)
    check(2, pp=2)


def test_compiling_by_itself_leaves_schedules_that_go_backward_twice() -> None:
    def of(schedule: str, pp: int) -> bool:
        parallel = {"pp": pp, "pp_schedule": schedule}
        tree = {"model": {"path": "m"}, "data": {"train": ["rows.jsonl"]}, "parallel": parallel}
        return is_compiled(recipe_from_dict(tree), "cuda")

    assert of("1f1b", 2)
    assert of("zbv_zero_bubble", 1)
    assert not of("zbv_zero_bubble", 2)
