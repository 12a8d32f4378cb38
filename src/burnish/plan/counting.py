"""What `burnish plan` counts: the parameters of a model without weights, and the rows, tokens and steps of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from burnish.config import Recipe, RecipeError
from burnish.data.chat import caught
from burnish.data.pack import first_fit
from burnish.data.prepare import StreamedRow
from burnish.data.rows import Rows
from burnish.model import zoo
from burnish.model.base import CausalLM, UnsupportedModel, expert_share
from burnish.model.hf_io import find_folder, read_config
from burnish.model.moe import set_compute
from burnish.parallel.trace import Micro, planned_attention
from burnish.parts import InspectedSource, Parts
from burnish.plan.memory import BYTES, Sizes
from burnish.plan.request import Request
from burnish.train.optim import DTYPES
from burnish.train.trainer import freeze_parameters
from burnish.types import RowError, UserError

SAMPLED_ROWS = 1_000
DRAWS = 4
"""Steps that are drawn from the sampled rows to see how they pack."""


def read_model_config(recipe: Recipe) -> dict[str, Any]:
    """The config.json of the recipe's model, a folder, a file or of the hub's cache. Raises UserError without one."""
    model = recipe.model
    place = model.init if model.init is not None else str(model.path)
    source = Path(place).expanduser()
    if not source.exists():
        if model.init is not None:
            raise UserError(f"model.init={place}: no such file; give a config.json or its folder")
        source = find_folder(place, model.revision)
    return zoo.complete(read_config(source))


def build_on_meta(config: dict[str, Any], recipe: Recipe, device: Literal["cpu", "cuda"]) -> CausalLM:
    """The recipe's model with what is frozen and adapted, in the compute type and without values."""
    compute, parallel = DTYPES[recipe.precision.compute], recipe.parallel
    attention = planned_attention(recipe.model.attention, device, compute, parallel.cp, parallel.cp_kind)
    asked = recipe.model.implementation
    try:
        model = None if asked == "transformers" else zoo.build(config, attention.kernel, dtype=compute, device="meta")
        if model is not None:
            set_compute(model, compute, device)
    except UnsupportedModel:
        zoo.choose_implementation(asked, config)  # says why native modules cannot be had, if they must
        model = None
    if model is None:
        from transformers import AutoConfig, AutoModelForCausalLM  # seconds

        from burnish.model.hf_model import HFModel

        remote = recipe.model.trust_remote_code
        described = AutoConfig.for_model(**config)
        with torch.device("meta"):
            inner = AutoModelForCausalLM.from_config(described, dtype=compute, trust_remote_code=remote)
        model = HFModel(inner, attention)
    if recipe.lora is not None:
        from burnish.model.lora import inject

        inject(model, recipe.lora, compute)
    freeze_parameters(model, recipe.model.freeze)
    return model


def is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "wpe"))


def is_tied(model: CausalLM) -> bool:
    head = model.head().weight_VD
    return any(parameter is head for name, parameter in model.named_parameters() if is_embedding(name))


@dataclass(frozen=True)
class Counts:
    """Parameters by part, exact. `active` are those that a token meets."""

    parts: dict[str, int]
    total: int
    trained: int
    active: int


def count_parameters(model: CausalLM) -> Counts:
    """Every parameter once: a tied head is the embedding."""
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[_part_of(name)] += parameter.numel()
    share = expert_share(model.config)
    return Counts(
        parts={name: parts[name] for name in PART_NAMES if parts[name]},
        total=parts.total(),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        active=parts.total() - round(parts["experts"] * (1 - share)),
    )


PART_NAMES = ("embedding", "attention", "MLP", "experts", "shared experts", "router", "norms", "head", "adapters")


def _part_of(name: str) -> str:
    if "lora_" in name:
        return "adapters"
    if is_embedding(name):
        return "embedding"
    if "norm" in name or "ln_" in name:
        return "norms"
    if "shared_expert" in name:
        return "shared experts"
    if ".experts." in name:
        return "experts"
    if ".gate." in name or ".router." in name:
        return "router"
    if "attn" in name or "attention" in name:
        return "attention"
    return "head" if "lm_head" in name or "embed_out" in name else "MLP"


# --- the rows ---


@dataclass(frozen=True)
class RowSample:
    """Lengths and trained tokens of sampled rows; `num_rows` are all training rows, None where that is not known."""

    lengths: tuple[int, ...]
    trained: tuple[int, ...]
    num_rows: int | None
    source: str
    left_out: int = 0
    """Sampled rows of which there is no sample."""

    @property
    def mean(self) -> float:
        return sum(self.lengths) / len(self.lengths)


def sample_rows(recipe: Recipe, request: Request) -> RowSample:
    """Rows as they will be trained, or as `--tokens-per-row` states them. Raises UserError where there are none."""
    if request.tokens_per_row is not None:
        if request.tokens_per_row > recipe.batch.tokens_per_micro_batch:
            raise RecipeError(
                f"--tokens-per-row={request.tokens_per_row} is more than batch.tokens_per_micro_batch="
                f"{recipe.batch.tokens_per_micro_batch}; raise that, or state fewer"
            )
        length = request.tokens_per_row
        text = f"{length:,} tokens each, all trained, as --tokens-per-row says"
        return RowSample((length,), (max(1, length - 1),), request.rows, text)
    try:
        return _read_sample(recipe, request)
    except UserError as error:
        raise type(error)(f"{error}; or plan without rows: --tokens-per-row N, with --rows N") from None


def _read_sample(recipe: Recipe, request: Request) -> RowSample:
    parts = Parts(recipe)
    sources = [source for source in parts.sources if source.split == "train"]
    sizes = [source.num_rows for source in sources]
    known = sum(size for size in sizes if size is not None)
    lengths, trained, left_out = [], [], 0
    for number, source in enumerate(sources):
        size = sizes[number]
        quota = SAMPLED_ROWS // len(sources) if size is None else math.ceil(SAMPLED_ROWS * size / known)
        for row in _spread(source, number, quota):
            rows = caught(parts.preparer.parts, row)
            made = [] if isinstance(rows, RowError) else parts.tokenizer.encode_batch(rows, parts.selection)
            fitted = [e if isinstance(e, RowError) else caught(parts.preparer.fit, e) for e in made]
            whole = [encoded for encoded in fitted if not isinstance(encoded, RowError)]
            left_out += not whole
            lengths += [len(encoded.tokens) for encoded in whole]
            trained += [int(np.count_nonzero(encoded.loss_weights)) for encoded in whole]
    if not sum(trained):
        raise UserError("no sampled row of data.train has a token to train; `burnish inspect` says why")
    share = recipe.data.validation if isinstance(recipe.data.validation, float) else 0.0
    num_rows = None if None in sizes else round(known * (1 - share))
    text = f"{len(lengths):,} sampled" + (f" of {num_rows:,}" if num_rows is not None else " of a stream")
    return RowSample(tuple(lengths), tuple(trained), num_rows, text, left_out)


def _spread(source: InspectedSource, number: int, quota: int) -> Iterator[StreamedRow]:
    """Rows from all over a source, or the first ones of a stream."""
    if not isinstance(source.rows, Rows):
        yield from source.read(number, quota)
        return
    for index in np.linspace(0, len(source.rows) - 1, min(quota, len(source.rows))).round().astype(int).tolist():
        yield StreamedRow(number, index, source.rows.where(index), caught(source.rows.__getitem__, index))


@dataclass(frozen=True)
class Steps:
    """A typical step, and how many there are; None where rows end nowhere known."""

    num_samples: float
    num_tokens: float
    num_trained: float
    num_packs: int
    micro: Micro
    """The fullest micro-batch seen."""
    lengths: tuple[int, ...]
    total: int | None


def draw_steps(recipe: Recipe, rows: RowSample) -> Steps:
    """Steps of rows drawn from the sample, cut as training cuts them."""
    unit, size = recipe.batch.size
    count = size if unit == "samples" else max(1, int(size / rows.mean))
    generator = np.random.default_rng(recipe.run.seed)
    lengths_N, trained_N = np.array(rows.lengths), np.array(rows.trained)
    draws, packs = [], []
    for _ in range(DRAWS):
        picked = generator.integers(0, len(lengths_N), count)
        bins = first_fit(lengths_N[picked].tolist(), recipe.batch.tokens_per_micro_batch)
        draws.append((picked, bins))
        packs.append(len(bins))
    picked, fullest = max(
        ((picked, chosen) for picked, bins in draws for chosen in bins), key=lambda p: lengths_N[p[0][p[1]]].sum()
    )
    chosen = picked[fullest]
    total = recipe.train.steps
    if total is None and rows.num_rows is not None:
        kept = rows.num_rows * len(rows.lengths) / (len(rows.lengths) + rows.left_out)
        total = max(1, math.ceil(kept * recipe.train.epochs / count - 1e-6))
    first = draws[0][0]
    return Steps(
        num_samples=count,
        num_tokens=count * rows.mean,
        num_trained=count * sum(rows.trained) / len(rows.trained),
        num_packs=math.ceil(sum(packs) / DRAWS),
        micro=Micro(tuple(lengths_N[chosen].tolist()), int(trained_N[chosen].sum())),
        lengths=tuple(lengths_N[first].tolist()),
        total=total,
    )


def checkpoint_bytes(counts: Counts, recipe: Recipe) -> float:
    """Masters and the optimizer's states; of adapters these alone, without the base that is never updated.

    int8 states are saved as the fp32 that their codes stand for, so that any layout can read them.
    """
    sizes = Sizes.of(recipe)
    states = sizes.moments * BYTES["fp32"] if recipe.precision.states == "int8" else sizes.states
    frozen = 0 if recipe.lora is not None else (counts.total - counts.trained) * sizes.frozen
    return counts.trained * (sizes.master + states) + frozen


def export_bytes(counts: Counts, recipe: Recipe) -> float:
    """What is exported: the model, or adapters alone where they are not merged into it."""
    value = 4 if recipe.checkpoint.export_dtype == "fp32" else 2
    is_whole = recipe.lora is None or recipe.lora.merge
    return value * (counts.total - counts.parts.get("adapters", 0) if is_whole else counts.trained)
