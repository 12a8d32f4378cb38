"""Commands on what is there already: measure a model's folder, export a checkpoint of a run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from burnish.components import Components, DriverComponents
from burnish.export import SavedWeights
from burnish.model.lora import settings_of
from burnish.model.zoo import locate
from burnish.outcome import export_model
from burnish.rank import Rank
from burnish.recipe import read_recipe, recipe_from_dict
from burnish.run import Progress, RunFolder
from burnish.sft import SFT
from burnish.train.checkpoint import SavedTensors, checkpoint_folder, latest_checkpoint, verify_checkpoint
from burnish.types import UserError


def evaluate_folder(model: str, data: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Held-out loss, perplexity and accuracy on the rows of `data`: of a Hugging Face folder or hub id, or of a folder
    of adapters beside the base that it names.

    Overrides without a dot are keys of the source (`prompt_key=question`), others keys of a recipe.
    """
    if (Path(model) / "recipe.yaml").is_file():
        exports = sorted((Path(model) / "hf").glob("step-*"), key=lambda path: path.stat().st_mtime)
        remedy = f"give {exports[-1]}" if exports else f"run `burnish export {model}` first"
        raise UserError(f"{model} is a run folder, not a model; {remedy}")
    is_recipe_key = {override: "." in override.partition("=")[0] for override in overrides}
    keys = [override if dotted else f"data.validation.0.{override}" for override, dotted in is_recipe_key.items()]
    named: dict[str, Any] = {"model": {"path": model}}
    if (Path(model) / "adapter_config.json").is_file():
        base, lora = settings_of(Path(model))
        tokenizer = model if (Path(model) / "tokenizer_config.json").is_file() else None
        named = {"model": {"path": base, "tokenizer": tokenizer}, "lora": lora}
    tree = {
        **named,
        "data": {"validation": [{"path": data}], "date": date.today().isoformat()},
        "precision": {"compute": "fp32"},
    }
    return SFT(recipe_from_dict(tree, keys)).evaluate()


def export_run(run: str, step: int | None = None, out: str | None = None) -> Path:
    """Write a checkpoint of the run folder `run` as a Hugging Face folder; returns where it lies.

    Raises UserError where there is no such run or checkpoint.
    """
    folder = RunFolder(run)
    if not (folder.path / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run folder: it has no recipe.yaml; name the run.dir of a recipe")
    checkpoint = latest_checkpoint(folder.checkpoints) if step is None else checkpoint_folder(folder.checkpoints, step)
    if checkpoint is None or not checkpoint.is_dir():
        there = ", ".join(sorted(path.name for path in folder.checkpoints.glob("iter_*"))) or "none"
        raise UserError(f"{run} has no checkpoint{'' if step is None else f' of step {step}'}; there are: {there}")
    verify_checkpoint(checkpoint)
    recipe = read_recipe(folder.path / "recipe.yaml")
    tensors = SavedTensors(checkpoint)
    progress = Progress.from_state(tensors.state["progress"])
    target = Path(out) if out else folder.export(progress.step)
    # Weights come from the checkpoint and the rest from RUN/model, so that what the run began with may be gone.
    own, is_merged = str(folder.path / "model"), recipe.lora is not None and recipe.lora.merge
    data = recipe.data.model_copy(update={"chat_template": None})  # RUN/model has it already
    begun = {"path": None, "init": own} if recipe.model.init or not is_merged else {}
    model = recipe.model.model_copy(update={**begun, "tokenizer": own})
    opened = recipe.model_copy(update={"model": model, "data": data})
    if not is_merged:
        parts = DriverComponents(opened, folder.path)
        is_adapter, base = recipe.lora is not None, recipe.model.path
        weights = SavedWeights(tensors, parts.loaded.model, is_adapter=is_adapter, base_model=base)
        return export_model(weights, parts, recipe, folder, progress, target)
    try:
        origin = locate(model)
    except UserError as error:
        raise UserError(
            f"{checkpoint} holds adapters alone, and to add them in, as lora.merge says, takes the model they were "
            f"trained beside: {error}"
        ) from None
    if recipe.model.init or origin.implementation == "transformers":
        whole = Components(opened, folder.path)  # neither draws nor reads one tensor at a time
        rank = Rank(whole)
        rank.load_weights(checkpoint)
        return export_model(rank, whole, recipe, folder, progress, target)
    parts = DriverComponents(opened, folder.path)
    weights = SavedWeights(tensors, parts.loaded.model, origin.folder)
    return export_model(weights, parts, recipe, folder, progress, target)
