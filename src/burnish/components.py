"""The pieces of a fine-tuning: model, tokenizer, rows, layout, trainer, each opened when it is first needed.

They are what a recipe names or what was passed in from Python; nothing here runs or writes anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from burnish.config import ModelConfig, Recipe, RecipeError
from burnish.data.chat import TextTokenizer
from burnish.data.corpus import Corpus, open_corpus
from burnish.data.feed import Feed
from burnish.data.pack import Layout
from burnish.data.prepare import Preparer, SourceRows
from burnish.data.rows import Rows
from burnish.data.turns import Selection
from burnish.model.base import model_shape
from burnish.model.probe import leak_tolerance, probe_isolation
from burnish.model.vocabulary import TokenizerFacts, check_vocabulary, stop_ids
from burnish.model.zoo import Loaded, adopt_model, load_model
from burnish.observe.flops import peak_flops
from burnish.observe.metrics import Stopwatch, Utilisation
from burnish.parallel.execution import Execution
from burnish.parallel.recompute import compile_blocks, recompute_blocks
from burnish.parts import read_template
from burnish.resume import altering_keys
from burnish.train.loss import CrossEntropy
from burnish.train.optim import DTYPES
from burnish.train.trainer import LocalTrainer, Scorer, freeze_parameters
from burnish.types import UserError

LOG = logging.getLogger(__name__)


@dataclass
class Components:
    """What `recipe` and the run folder at `folder` come to. The other fields are objects passed in instead."""

    recipe: Recipe
    folder: Path
    given_model: Any = None
    given_tokenizer: Any = None
    train_rows: Any = None
    validation_rows: Any = None

    @cached_property
    def device(self) -> torch.device:
        asked = self.recipe.run.device
        if asked == "cuda" and not torch.cuda.is_available():
            raise RecipeError(
                "run.device=cuda: torch finds no CUDA device; install a CUDA build of torch or set it to cpu"
            )
        return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")

    @cached_property
    def compute(self) -> torch.dtype:
        return DTYPES[self.recipe.precision.compute]

    @cached_property
    def loaded(self) -> Loaded:
        """The model with its first weights, frozen, recomputed and compiled as the recipe says."""
        recipe = self.recipe
        place = {
            "device": self.device,
            "dtype": DTYPES[recipe.precision.master],
            "compute_dtype": self.compute,
        }
        if self.given_model is not None:
            loaded = adopt_model(self.given_model, recipe.model, **place)
        else:
            loaded = load_model(recipe.model, **place, seed=recipe.run.seed)
        freeze_parameters(loaded.model, recipe.model.freeze)
        recompute_blocks(loaded.model.blocks(), recipe.train.recompute)
        if recipe.train.compile is True or (recipe.train.compile == "auto" and self.device.type == "cuda"):
            compile_blocks(loaded.model.blocks())
        return loaded

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer, with the recipe's chat template in place of its own where it names one."""
        tokenizer = self.given_tokenizer
        if tokenizer is None:
            tokenizer = _load_tokenizer(self.recipe.model, self.loaded.folder)
        template = self.recipe.data.chat_template
        if template is not None:
            tokenizer.chat_template = read_template(template)
        return tokenizer

    @cached_property
    def generation_config(self) -> dict[str, Any] | None:
        """The model's generation_config.json, where it has one."""
        if self.given_model is not None:
            settings = getattr(self.given_model, "generation_config", None)
            return None if settings is None else settings.to_diff_dict()
        file = self.loaded.folder / "generation_config.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @cached_property
    def corpus(self) -> Corpus:
        """The rows; training rows may be missing, for whoever only evaluates."""
        return open_corpus(self.recipe.data, self.recipe.run.seed, self.train_rows, self.validation_rows)

    @cached_property
    def date(self) -> str:
        """The day that templates see: the recipe's, that of the first start, or today."""
        saved = self.folder / "data.json"
        if self.recipe.data.date is not None:
            return self.recipe.data.date
        return json.loads(saved.read_text())["date"] if saved.is_file() else date.today().isoformat()

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        config = self.loaded.model.config
        return TextTokenizer.from_transformers(
            self.tokenizer,
            template_kwargs=self.recipe.data.chat_template_kwargs,
            renderer=self.recipe.data.renderer,
            stop_tokens=stop_ids(self.tokenizer_facts, config, self.generation_config),
            date=self.date,
        )

    @cached_property
    def tokenizer_facts(self) -> TokenizerFacts:
        tokenizer = self.tokenizer
        return TokenizerFacts(
            largest_id=max(tokenizer.get_vocab().values()),
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            name=f"the tokenizer {self.recipe.model.tokenizer or tokenizer.name_or_path}",
        )

    @property
    def num_embeddings(self) -> int:
        return self.loaded.model.head().weight_VD.shape[0]

    @property
    def limits(self) -> dict[str, int]:
        """What limits a row's length, by name, tokens."""
        config = self.loaded.model.config
        limits = {"batch.tokens_per_micro_batch": self.recipe.batch.tokens_per_micro_batch}
        if config.get("max_position_embeddings"):
            limits["the model's max_position_embeddings"] = config["max_position_embeddings"]
        if self.recipe.data.max_length is not None:
            limits["data.max_length"] = self.recipe.data.max_length
        return limits

    def _preparer(self) -> Preparer:
        data = self.recipe.data
        return Preparer(
            sources=tuple(
                SourceRows(s.name, s.rows if isinstance(s.rows, Rows) else None, s.format, s.config)
                for s in self.corpus.sources
            ),
            tokenizer=self.text_tokenizer,
            limits=self.limits,
            vocab_size=self.num_embeddings,
            selection=Selection(data.train_on, data.train_reasoning, data.train_tool_calls, data.open_turns),
            turn_per_sample=data.turn_per_sample,
            over_long=data.over_long,
            truncate_side=data.truncate_side,
        )

    def feed(self, store: Path | None, store_train: bool = False) -> Feed:
        data = self.recipe.data
        workers = max(1, min(8, _num_cores() - 1)) if data.workers == "auto" else data.workers
        policies = {"bad": data.bad_rows, "over_long": data.over_long}
        stop_on = frozenset(kind for kind, policy in policies.items() if policy == "error")
        return Feed(self.corpus, self._preparer(), workers, stop_on, store, store_train)

    def check_vocabulary(self) -> None:
        findings = check_vocabulary(
            self.tokenizer_facts, self.loaded.model.config, self.generation_config, self.num_embeddings
        )
        for warning in findings.warnings:
            LOG.warning(warning)
        if findings.errors:
            raise UserError("; ".join(findings.errors))

    @cached_property
    def layout(self) -> Layout:
        """Packed where the probe proves that documents cannot see each other, else one document a row."""
        budget, packing, model = self.recipe.batch.tokens_per_micro_batch, self.recipe.batch.packing, self.loaded.model
        if packing == "off":
            return Layout(budget, kind="single" if model.row_reason is None else "rows")
        reason = model.row_reason or self._leak()
        if reason is None:
            return Layout(budget)
        if packing == "require":
            raise UserError(
                f"batch.packing=require: {reason}; set it to auto to train one document a row, or try another "
                "model.attention or model.implementation"
            )
        LOG.warning("training one document a row, not packed: %s", reason)
        model.run_rows(reason)
        return Layout(budget, kind="rows")

    def _leak(self) -> str | None:
        """How documents of a pack see each other in the real model; None where they do not."""
        model = self.loaded.model
        with self.execution.weights():
            return probe_isolation(
                model,
                vocab_size=self.num_embeddings,
                device=self.device,
                leak_tolerance=leak_tolerance(model.config),
                restart_tolerance=5e-2 if self.compute == torch.bfloat16 else 1e-3,
            ).reason

    def evaluation_layout(self) -> Layout:
        budget = self.recipe.evaluate.tokens_per_micro_batch or self.recipe.batch.tokens_per_micro_batch
        return Layout(budget, kind=self.layout.kind)

    @cached_property
    def execution(self) -> Execution:
        return Execution(self.loaded.model, self.compute, self.device)

    def scorer(self) -> Scorer:
        return Scorer(self.execution)

    def trainer(self, total_steps: int, clock: Stopwatch) -> LocalTrainer:
        recipe = self.recipe
        return LocalTrainer(
            execution=self.execution,
            loss=CrossEntropy(recipe.train.label_smoothing, recipe.train.z_loss),
            optim=recipe.optim,
            total_steps=total_steps,
            states=recipe.precision.states,
            seed=recipe.run.seed,
            neftune_alpha=recipe.train.neftune_alpha,
            reduce=DTYPES[recipe.precision.reduce],
            clock=clock,
        )

    def utilisation(self) -> Utilisation | None:
        if self.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.device))
        return None if peak is None else Utilisation(model_shape(self.loaded.model), peak)

    def identity(self) -> dict[str, Any]:
        """What a resume compares: the recipe's keys that alter results, and the content of what its paths lead to."""
        config = {
            k: v for k, v in self.loaded.model.config.items() if k not in ("_name_or_path", "transformers_version")
        }
        return {
            "recipe": altering_keys(self.recipe),
            "data": self.corpus.fingerprints(),
            "inputs": {
                "tokenizer and chat template": self.text_tokenizer.fingerprint,
                "model config": _digest(config),
                "row limit": min(self.limits.values()) if self.recipe.data.over_long != "error" else None,
            },
        }

    @contextmanager
    def determinism(self) -> Iterator[None]:
        """Within, torch takes deterministic kernels alone, where the recipe asks for that."""
        before = torch.are_deterministic_algorithms_enabled()
        if self.recipe.run.deterministic:
            # cuBLAS is deterministic only with a fixed workspace, set before its first use.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def _load_tokenizer(model: ModelConfig, folder: Path) -> Any:
    """The tokenizer that the recipe names, or the one in the model's folder. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    place = model.tokenizer or str(folder)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer could be loaded from {place}; set model.tokenizer to a folder with a tokenizer.json or a "
            f"hub id ({str(error).splitlines()[0]})"
        ) from None


def _num_cores() -> int:
    """The cores this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
