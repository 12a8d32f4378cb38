"""What of a model tensor-parallel ranks must divide. Imports no torch: `burnish plan` and the driver ask."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

from burnish.config import RecipeError


def check_tensor_parallel(config: Mapping[str, Any], tp: int) -> None:
    """Raises RecipeError where `tp` ranks cannot have equal shares of the heads and MLP columns of a config.json."""
    sizes = _shared_sizes(config)
    if not any(size % tp for size in sizes.values()):
        return
    undivided = ", ".join(f"{name}={size}" for name, size in sizes.items() if size % tp)
    divided = ", ".join(f"{name}={size}" for name, size in sizes.items() if size % tp == 0)
    beside = f" (it does {divided})" if divided else ""
    common = gcd(*sizes.values())
    *others, last = [str(degree) for degree in range(1, common + 1) if common % degree == 0]
    remedy = f"{', '.join(others)} or {last}" if others else last
    raise RecipeError(
        f"parallel.tp={tp} does not divide {undivided}{beside}, and every rank holds an equal share of each; "
        f"set parallel.tp to {remedy}"
    )


def _shared_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    sizes = {"num_attention_heads": config["num_attention_heads"]}
    if config.get("kv_lora_rank") is None:  # latent attention makes keys and values for every query head
        sizes["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    sizes["intermediate_size"] = config["intermediate_size"]
    if config.get("n_shared_experts"):
        sizes["moe_intermediate_size x n_shared_experts"] = config["moe_intermediate_size"] * config["n_shared_experts"]
    return sizes
