"""What may change between a checkpoint and a resume, and what may not."""

import pytest

from burnish.config import Recipe, RecipeError
from burnish.recipe import fields, recipe_from_dict
from burnish.resume import FREE, LATER_KEYS, altering_keys, check_resumable


def make_recipe(*overrides: str) -> Recipe:
    return recipe_from_dict({"model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}}, overrides)


@pytest.mark.parametrize(
    "override",
    ["optim.lr=1e-3", "run.seed=1", "data.shuffle=false", "train.epochs=2", "batch.samples=4", "data.validation=0.1",
     "data.train.0.prompt_key=q", "precision.compute=fp32", "model.freeze=[a]", "train.loss=sample",
     "data.chat_template_kwargs={enable_thinking: false}", "data.train=[{path: a.jsonl}, {path: b.jsonl}]"],
)  # fmt: skip
def test_what_alters_results_is_refused_with_the_difference(override: str) -> None:
    before, now = altering_keys(make_recipe()), altering_keys(make_recipe(override))
    with pytest.raises(RecipeError, match=r"->.*\nundo the change"):
        check_resumable({"recipe": before}, {"recipe": now}, False, "runs/a")
    assert check_resumable({"recipe": before}, {"recipe": now}, True, "runs/a")


@pytest.mark.parametrize(
    "override",
    ["run.dir=x", "batch.tokens_per_micro_batch=9", "run.log_every=7", "checkpoint.every=epoch", "evaluate.every=3",
     "run.trackers=[]", "data.workers=0", "data.train.0.path=b.jsonl", "model.path=elsewhere",
     "data.validation=[{path: v.jsonl}]", "data.cache=c", "parallel.tp=2", "cluster.devices_per_node=4",
     "train.recompute_every=2", "train.offload_activations=true", "checkpoint.step=3"],
)  # fmt: skip
def test_layout_cadence_trackers_and_paths_may_change(override: str) -> None:
    before, now = altering_keys(make_recipe()), altering_keys(make_recipe(override))
    assert check_resumable({"recipe": before}, {"recipe": now}, False, "runs/a") == []


def test_keys_that_an_older_checkpoint_lacks_count_as_what_it_did() -> None:
    now = altering_keys(make_recipe())
    older = {key: value for key, value in now.items() if key not in LATER_KEYS}
    assert check_resumable({"recipe": older}, {"recipe": now}, False, "runs/a") == []
    changed = altering_keys(make_recipe("data.train_reasoning=false"))
    with pytest.raises(RecipeError, match=r"data.train_reasoning: true -> false"):
        check_resumable({"recipe": older}, {"recipe": changed}, False, "runs/a")
    assert set(now) >= set(LATER_KEYS)


def test_contents_are_compared_beside_the_recipe() -> None:
    with pytest.raises(RecipeError, match=r'data: a\.jsonl: "1" -> "2"'):
        check_resumable(
            {"recipe": {}, "data": {"a.jsonl": "1"}}, {"recipe": {}, "data": {"a.jsonl": "2"}}, False, "runs/a"
        )


def test_every_free_key_exists() -> None:
    known = {path for path, _, _ in fields(Recipe)}
    for pattern in FREE:
        plain = pattern.replace(".*.", ".").removesuffix(".*")
        assert plain in known, pattern
