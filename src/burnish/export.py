"""A checkpoint as a Hugging Face folder: weights or adapters, configuration, tokenizer with its template, and a card of
the run.

The weights are written by whoever knows the model; here they are completed into a folder that loads anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.model.hf_io import written_beside


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
