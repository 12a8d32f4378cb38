"""A checkpoint as a Hugging Face folder: weights or adapters, configuration, tokenizer with its template, and a card of
the run.

Of a run that goes on the weights are written by whoever holds them, and those of a checkpoint straight from its files,
without a whole model; here they are completed into a folder that loads anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.model import lora
from burnish.model.base import CausalLM
from burnish.model.hf_io import each_weight, named_weights, written_beside
from burnish.train.checkpoint import SavedTensors


@dataclass(frozen=True)
class Card:
    """The facts of a run that stand in its model card."""

    name: str
    base_model: str | None
    """Folder or hub id; None for random weights."""
    step: int
    samples: int
    tokens: int
    trained_tokens: int
    held_out_loss: float | None
    sources: Mapping[str, int | None]
    """Rows by source, None for a stream."""
    recipe: str
    """The resolved recipe, YAML."""
    versions: Mapping[str, str]
    is_adapter: bool = False
    """Whether the folder holds adapters to the base model alone."""

    def text(self) -> str:
        """The card as README.md: YAML front matter that the Hugging Face hub reads, and Markdown."""
        library = "peft" if self.is_adapter else "transformers"
        front = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [burnish, sft]"]
        if self.base_model is not None and "/" in self.base_model and not Path(self.base_model).exists():
            front.append(f"base_model: {self.base_model}")
        loss = [] if self.held_out_loss is None else [f"| held-out loss | {self.held_out_loss:.4f} |"]
        rows = ", ".join(
            f"{name} ({'streamed' if count is None else f'{count:,} rows'})" for name, count in self.sources.items()
        )
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            *front,
            "---",
            "",
            f"# {self.name}",
            "",
            f"{'Adapters trained' if self.is_adapter else 'Fine-tuned'} by burnish from "
            f"{'random weights' if self.base_model is None else f'`{self.base_model}`'}.",
            "",
            "| | |",
            "|---|---|",
            f"| step | {self.step:,} |",
            f"| samples | {self.samples:,} |",
            f"| tokens | {self.tokens:,}, of which {self.trained_tokens:,} trained |",
            *loss,
            *([f"| data | {rows} |"] if rows else []),
            f"| versions | {versions} |",
            "",
            "## Recipe",
            "",
            "```yaml",
            self.recipe.rstrip(),
            "```",
            "",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class SavedWeights:
    """The weights of a checkpoint, written one tensor after the other by a model that is on meta.

    `base` is where those lie that adapters were trained beside, or None where they are not needed; `is_adapter` writes
    the adapters alone, to `base_model`.
    """

    tensors: SavedTensors
    model: CausalLM
    base: Path | None = None
    is_adapter: bool = False
    base_model: str | None = None

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """Write config.json and weights, or an adapter, into an existing folder."""
        self.model.is_stored_whole = self.tensors.state.get("experts_whole", False)
        if self.is_adapter:
            trained = {name: self.tensors[f"model.{name}"] for name in lora.trained(self.model)}
            lora.write_adapter(folder, self.model, trained, dtype, self.base_model)
        else:
            self.model.export(folder, dtype, self._weights())

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.base is None:
            return ((name, self.tensors[f"model.{name}"]) for name in named_weights(self.model))
        adapters = {name: self.tensors[f"model.{name}"] for name in lora.trained(self.model) if ".lora_" in name}
        weights = (
            (name, self.tensors.get(f"model.{name}", tensor)) for name, tensor in each_weight(self.base, self.model)
        )
        return lora.merge(weights, self.model, adapters)


def write_export(
    folder: Path,
    write_weights: Callable[[Path], None],
    tokenizer: Any,
    generation: Mapping[str, Any] | None,
    stop_ids: Sequence[int],
    card: Card,
) -> Path:
    """Write `folder` as a whole or not at all, over an older one; returns it.

    `write_weights` fills a folder with config.json and safetensors, or with adapters in peft's format; `tokenizer` is
    transformers' own with the template it was trained with, and `generation` the model's generation_config, whose eos
    becomes `stop_ids`.
    """
    settings = dict(generation or {}) | {"eos_token_id": stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)}
    if not stop_ids:
        del settings["eos_token_id"]
    for kind in ("bos", "pad"):
        own = getattr(tokenizer, f"{kind}_token_id", None)
        if own is not None:
            settings.setdefault(f"{kind}_token_id", own)
    with written_beside(folder) as beside:
        write_weights(beside)
        tokenizer.save_pretrained(str(beside))
        (beside / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (beside / "README.md").write_text(card.text(), encoding="utf-8")
    return folder
