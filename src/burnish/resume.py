"""Whether a run may go on from a checkpoint: what of the recipe and its inputs alters results, and how it differs."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from typing import Any

from burnish.config import Recipe, RecipeError

FREE = (
    "run.dir",
    "run.name",
    "run.device",
    "run.deterministic",
    "run.log_every",
    "run.log_level",
    "run.trackers",
    "checkpoint.*",
    "evaluate.*",
    "parallel.*",
    "cluster.*",
    "batch.tokens_per_micro_batch",
    "batch.packing",
    "train.recompute",
    "train.recompute_every",
    "train.offload_activations",
    "train.compile",
    "train.memory_check",
    "train.on_nonfinite",
    "data.workers",
    "data.prepare",
    "data.cache",
    "data.date",
    "data.chat_template",
    "data.train.*.path",
    "data.train.*.split",
    "data.train.*.config",
    "data.train.*.slice",
    "data.train.*.name",
    "data.validation.*",
    "lora.merge",
    "lora.path",
    "model.path",
    "model.init",
    "model.revision",
    "model.tokenizer",
    "model.attention",
    "model.trust_remote_code",
)
"""Keys that may change between a checkpoint and a resume: layout, cadences, trackers and paths. What a path leads to is
compared by content. Everything else alters results: data, order, model and optimizer."""


LATER_KEYS = {
    "train.router_aux_loss": 0.0,
    "train.router_z_loss": 0.0,
    "train.router_bias_rate": 0.0,
    "data.train_reasoning": True,
    "data.train_tool_calls": True,
    "data.turn_per_sample": False,
    "data.open_turns": "report",
    "data.renderer": None,
    "lora": None,
}
"""Keys that checkpoints of earlier versions lack, and what those versions did."""


def altering_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that alter results, flat, with their values."""
    flat = dict(_flatten(json.loads(recipe.model_dump_json()), ""))
    return {key: value for key, value in flat.items() if not _is_free(key)}


def _is_free(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, free) or fnmatch.fnmatchcase(key, f"{free}.*") for free in FREE)


def _flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or path == "data.chat_template_kwargs":
        yield path, value
        return
    for key, item in items:
        yield from _flatten(item, f"{path}.{key}".lstrip("."))


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], allow_changes: bool, place: str) -> list[str]:
    """The differences between two identities ({"recipe": {...}, "data": {...}, ...}), a line each.

    Raises RecipeError that shows them where there are any and `allow_changes` is not set. `place` is the checkpoint's.
    """
    later = {key: value for key, value in LATER_KEYS.items() if key in current.get("recipe", {})}
    saved = {**saved, "recipe": {**later, **saved.get("recipe", {})}}
    differences = [
        f"{key if group == 'recipe' else f'{group}: {key}'}: {_shown(before.get(key))} -> {_shown(now.get(key))}"
        for group in current
        for before, now in [(saved.get(group, {}), current[group])]
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key)
    ]
    if differences and not allow_changes:
        listed = "\n".join(f"  {line}" for line in differences)
        raise RecipeError(
            f"{place} was made by a run that differs in what alters results:\n{listed}\n"
            "undo the change, set another run.dir, or set checkpoint.allow_changes=true to go on with it"
        )
    return differences


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
