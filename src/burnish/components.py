"""The pieces of a fine-tuning: model, execution, tokenizer, rows, each opened when it is first needed.

They are what a recipe names or what was passed in from Python; nothing here runs or writes anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from burnish.config import ModelConfig, Recipe, RecipeError
from burnish.data.chat import TextTokenizer
from burnish.data.corpus import Corpus, open_corpus
from burnish.data.feed import Feed
from burnish.data.prepare import Preparer, SourceRows
from burnish.data.rows import Rows
from burnish.data.turns import Selection
from burnish.model.attention import choose_attention
from burnish.model.base import CausalLM, model_shape
from burnish.model.hf_io import fingerprint_weights
from burnish.model.lora import initialise_adapters, inject, read_adapter
from burnish.model.probe import leak_tolerance, probe_isolation
from burnish.model.vocabulary import TokenizerFacts, check_vocabulary, stop_ids
from burnish.model.zoo import (
    Loaded,
    adopt_model,
    build,
    describe_model,
    initialise,
    load_by_transformers,
    load_model,
    locate,
    shallow,
)
from burnish.observe.flops import peak_flops
from burnish.observe.metrics import Utilisation
from burnish.parallel.apply import Parallelism, Precision, load_weights
from burnish.parallel.checks import is_compiled
from burnish.parallel.execution import Execution, MeshExecution
from burnish.parallel.mesh import Mesh
from burnish.parallel.recompute import Blocks
from burnish.parts import read_template
from burnish.resume import altering_keys
from burnish.train.optim import DTYPES
from burnish.train.trainer import freeze_parameters
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
        """This process's."""
        asked, cluster = self.recipe.run.device, self.recipe.cluster
        if asked == "cuda" and cluster.address is None and not torch.cuda.is_available():
            raise RecipeError(
                "run.device=cuda: torch finds no CUDA device; install a CUDA build of torch or set it to cpu"
            )
        if asked == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        mapping = cluster.device_mapping if cluster.address is None else None  # which counts devices of other hosts
        return torch.device("cuda" if mapping is None else f"cuda:{mapping[0]}")

    @cached_property
    def compute(self) -> torch.dtype:
        return DTYPES[self.recipe.precision.compute]

    @cached_property
    def loaded(self) -> Loaded:
        """The model with its first weights, frozen, recomputed and compiled as the recipe says."""
        recipe = self.recipe
        place = {
            "device": self.device,
            "dtype": self.held,
            "compute_dtype": self.compute,
        }
        if self.given_model is not None:
            loaded = adopt_model(self.given_model, recipe.model, **place)
        else:
            loaded = load_model(recipe.model, **place, seed=recipe.run.seed)
        self._adapt(loaded.model)
        self.blocks.wrap(loaded.model)
        return loaded

    def _adapt(self, model: CausalLM) -> None:
        """Put adapters into a model that has its weights, and give them their first values; freeze what is frozen."""
        lora, seed = self.recipe.lora, self.recipe.run.seed
        if lora is not None:
            inject(model, lora, self.precision.master)
            if lora.path is None:
                initialise_adapters(model, seed)
            else:
                read_adapter(lora.path, model, lora)
        freeze_parameters(model, self.recipe.model.freeze)

    @property
    def held(self) -> torch.dtype:
        """The type of the model's weights: that of masters, or where adapters alone are trained that of forward."""
        return self.precision.master if self.recipe.lora is None else self.precision.compute

    @property
    def blocks(self) -> Blocks:
        train = self.recipe.train
        return Blocks(
            train.recompute,
            train.recompute_every,
            is_compiled(self.recipe, self.device.type),
            train.offload_activations,
        )

    @property
    def precision(self) -> Precision:
        precision = self.recipe.precision
        return Precision(*(DTYPES[name] for name in (precision.master, precision.compute, precision.reduce)))

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
        return TokenizerFacts.of(self.tokenizer, self.recipe.model.tokenizer)

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

    def leak(self) -> str | None:
        """How documents of a pack see each other in the model; None where they do not."""
        return self._probe(self.loaded.model, self.execution.weights())

    def _probe(self, model: CausalLM, weights: AbstractContextManager[None]) -> str | None:
        with weights:
            return probe_isolation(
                model,
                vocab_size=self.num_embeddings,
                device=self.device,
                leak_tolerance=leak_tolerance(model.config),
                restart_tolerance=5e-2 if self.compute == torch.bfloat16 else 1e-3,
            ).reason

    @cached_property
    def execution(self) -> Execution:
        return Execution(self.loaded.model, self.compute, self.device)

    def utilisation(self, world_size: int, device_name: str) -> Utilisation | None:
        """What MFU is measured by, of all ranks together; None on devices without a known peak."""
        peak = peak_flops(device_name)
        return None if peak is None else Utilisation(model_shape(self.loaded.model), peak * world_size)

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
                # Checkpoints of adapters do not hold what they were trained beside.
                **({"base weights": fingerprint_weights(self.loaded.folder)} if self._reads_base else {}),
            },
        }

    @property
    def _reads_base(self) -> bool:
        return self.recipe.lora is not None and self.recipe.model.path is not None and self.given_model is None

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


@dataclass
class DriverComponents(Components):
    """The pieces of a run whose ranks are elsewhere: of the model names, shapes and config, and no weights."""

    find_device: Callable[[], str | None] = lambda: None
    """What ranks on other hosts have, cpu or cuda; None where it is what this one has."""

    @cached_property
    def device(self) -> torch.device:
        """The kind of the ranks'."""
        found = self.find_device()
        return super().device if found is None else torch.device(found)

    @cached_property
    def loaded(self) -> Loaded:
        described = describe_model(self.recipe.model, self.held)
        if self.recipe.lora is not None:
            inject(described.model, self.recipe.lora, self.precision.master)
        freeze_parameters(described.model, self.recipe.model.freeze)
        return described


@dataclass
class RankComponents(Components):
    """The pieces of one rank of several: its part of the model, cut and loaded as `mesh` says."""

    mesh: Mesh | None = None
    found: Path | None = None
    """The folder that the driver found the model in."""

    @cached_property
    def device(self) -> torch.device:
        assert self.mesh is not None
        return self.mesh.device

    @cached_property
    def loaded(self) -> Loaded:
        return self._on_mesh[0]

    @cached_property
    def execution(self) -> MeshExecution:
        return self._on_mesh[1]

    @cached_property
    def _on_mesh(self) -> tuple[Loaded, MeshExecution]:
        assert self.mesh is not None
        recipe, precision = self.recipe, self.precision
        parallelism = Parallelism(self.mesh, recipe.parallel)
        origin = locate(recipe.model, self.found)
        if origin.implementation == "transformers":
            # It makes its modules its own way, so each rank has all of it on the host for a moment: as pages of the
            # checkpoint's files, where its types are those of the files, or become so when they are sharded.
            widens = self.held == torch.float32 and recipe.lora is None and not recipe.model.init
            loaded = load_by_transformers(
                recipe.model,
                origin,
                device=self.device,
                dtype="auto" if widens else self.held,
                compute_dtype=precision.compute,
                seed=recipe.run.seed,
                storage="cpu",
            )
            self._adapt(loaded.model)
            held = self.held if widens else None
            return loaded, parallelism.shard_loaded(loaded.model, precision, self.blocks, held)
        attention = choose_attention(recipe.model.attention, self.device, precision.compute)
        kernel = parallelism.kernel(attention.kernel)
        shapes = {"dtype": self.held, "device": "meta", "compute": precision.compute}
        execution = parallelism.apply(
            partial(build, origin.config, kernel, **shapes),
            precision,
            self.blocks,
            partial(freeze_parameters, patterns=recipe.model.freeze),
            recipe.lora,
        )
        load_weights(execution, None if recipe.model.init else origin.folder, recipe.run.seed, recipe.lora)
        name = attention.name if parallelism.context is None else f"{recipe.parallel.cp_kind} over {attention.name}"
        return Loaded(execution.whole, origin.implementation, origin.reason, name, origin.folder), execution

    def leak(self) -> str | None:
        """As of one process, of the model itself where it is of transformers, else of two layers like its own."""
        if self.loaded.implementation == "transformers":
            reason = self._probe(self.execution.model, self.execution.weights())
            self.execution.sharding.reshard()
            return reason
        config = dict(self.loaded.model.config)
        attention = choose_attention(self.recipe.model.attention, self.device, self.compute)
        small = build(shallow(config), attention.kernel, dtype=self.compute, device=self.device, compute=self.compute)
        initialise(small, self.recipe.run.seed)
        return self._probe(small, nullcontext())


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
