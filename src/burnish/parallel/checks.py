"""Whether a model can be laid out as a recipe says: every rule at once, asked before there are ranks.

Training and `burnish plan` ask the same. The rules stand with what they are about; here are those that span several.
"""

from __future__ import annotations

from typing import Literal

from burnish.config import ParallelConfig, Recipe, RecipeError, TrainConfig
from burnish.model.base import CausalLM
from burnish.model.moe import routers_of
from burnish.parallel.apply import layer_costs
from burnish.parallel.cp import check_context_parallel
from burnish.parallel.degrees import Degrees
from burnish.parallel.divisible import check_tensor_parallel
from burnish.parallel.ep import check_expert_parallel
from burnish.parallel.stages import check_split, cut_model, splits_backward

CUTTING = ("tp", "cp", "pp", "ep")
"""Kinds of parallelism that cut modules of our own."""


def is_compiled(recipe: Recipe, device: str) -> bool:
    """Whether blocks are compiled on `device`, cpu or cuda. auto leaves it where a schedule goes backward twice."""
    compile_blocks = recipe.train.compile
    if compile_blocks == "auto":
        return device == "cuda" and not splits_backward(recipe.parallel)
    return compile_blocks


def check_layout(
    model: CausalLM,
    recipe: Recipe,
    degrees: Degrees,
    device: str,
    implementation: Literal["native", "transformers"],
    reason: str,
) -> None:
    """Raises RecipeError where `model`, on meta or not, cannot be trained by ranks as `degrees` says, or has no routers
    for the keys that are about them.

    `reason` says why its modules are of that `implementation`.
    """
    parallel = recipe.parallel
    # A config may count experts that no layer has, where all layers are dense ones.
    is_sparse = implementation == "native" and bool(routers_of(model))
    _check_routing(recipe.train, is_sparse)
    if implementation == "transformers":
        _check_whole(parallel, reason)
        return
    check_tensor_parallel(model.config, degrees.tp)
    check_context_parallel(model.config, degrees.cp, parallel.cp_kind, degrees.tp)
    check_expert_parallel(model.config if is_sparse else {}, degrees)
    check_split(parallel, recipe.train.recompute, is_compiled(recipe, device))
    if degrees.pp > 1:
        cut_model(parallel, *layer_costs(model))


def _check_whole(parallel: ParallelConfig, reason: str) -> None:
    cut = next((name for name in CUTTING if getattr(parallel, name) > 1), None)
    if cut is not None:
        raise RecipeError(
            f"parallel.{cut}={getattr(parallel, cut)} cuts modules of our own, and this model runs those of "
            f"transformers ({reason}), over which dp_shard and dp_replicate alone can spread; set parallel.{cut} to 1, "
            "or model.implementation to native where the architecture has one"
        )


def _check_routing(train: TrainConfig, is_sparse: bool) -> None:
    for key in ("router_aux_loss", "router_z_loss", "router_bias_rate"):
        value = getattr(train, key)
        if value and not is_sparse:
            raise RecipeError(
                f"train.{key}={value:g} is about routers of experts, and no layer of this model has any of ours; "
                f"set train.{key} to 0"
            )
