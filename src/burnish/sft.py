"""Supervised fine-tuning: the wiring, and the only file that knows every concrete class.

`SFT` opens what a recipe names, each piece when it is first needed, and runs the loop over it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from burnish.config import ModelConfig, Recipe, RecipeError, dump, read_recipe, recipe_from_dict
from burnish.data.chat import TextTokenizer
from burnish.data.corpus import Corpus, open_corpus
from burnish.data.feed import Feed, Preparation
from burnish.data.pack import Layout, pack
from burnish.data.prepare import Preparer, SourceRows
from burnish.data.rows import Rows
from burnish.data.source import BatchSize, Prefetch, RowsError
from burnish.evaluate import evaluate
from burnish.export import Card, write_export
from burnish.generate import generate
from burnish.length import RunLength, needs_every_row, run_length
from burnish.loop import fit
from burnish.model.hf_io import write_model
from burnish.model.hf_model import HFModel
from burnish.model.probe import leak_tolerance, probe_isolation
from burnish.model.vocabulary import TokenizerFacts, check_vocabulary, stop_ids
from burnish.model.zoo import Loaded, adopt_model, load_model
from burnish.observe.console import Console, logging_to
from burnish.observe.environment import environment, versions
from burnish.observe.flops import ModelShape, formula_text, peak_flops
from burnish.observe.metrics import MetricsWriter, StepWindow, Stopwatch, Utilisation, cut, read
from burnish.observe.report import (
    Generation,
    LengthDistribution,
    RenderedSample,
    Report,
    SourceSummary,
    write_report,
)
from burnish.observe.trackers import open_trackers
from burnish.observe.units import count_text, duration_text
from burnish.resume import altering_keys, check_resumable
from burnish.run import Progress, Run, RunFolder, stop_on_signals, write_text
from burnish.train.checkpoint import checkpoint_folder, latest_checkpoint, load_checkpoint, read_state, recover
from burnish.train.loss import CrossEntropy
from burnish.train.trainer import (
    DTYPES,
    LocalTrainer,
    Scorer,
    cast_parameters,
    compile_blocks,
    freeze_parameters,
    recompute_blocks,
)
from burnish.types import Sample, UserError

LOG = logging.getLogger(__name__)

PICTURED_ROWS = 2_000
"""Rows of a source from whose lengths the report draws its distribution."""
SHOWN_SAMPLES = 3
"""Rendered samples of each source in the report."""


@dataclass(frozen=True)
class Result:
    """What `SFT.train` came to. `interrupted` is the exit status of the signal that ended it, else None."""

    summary: dict[str, Any]
    run_folder: Path
    export: Path | None = None
    interrupted: int | None = None


@dataclass(frozen=True)
class Session:
    """What one run holds besides the pieces of `SFT`: all that ends with it."""

    console: Console
    feed: Feed
    source: Prefetch
    trainer: LocalTrainer
    length: RunLength
    clock: Stopwatch
    identity: dict[str, Any]
    resumed: bool
    held_out: list[Preparation]
    prepared: list[Preparation] | None
    """Of the training rows, where all were prepared first."""


class SFT:
    """Fine-tune by a recipe.

    `recipe` is a Recipe, a mapping of its keys or the path of a YAML file. A loaded transformers model and tokenizer,
    and a data set (a list of rows, a `datasets.Dataset`, or a mapping with `train` and `validation` of such) may be
    passed in; the recipe then need not name them.

    Raises RecipeError at once for a recipe that cannot be run; UserError later for what its files hold.
    """

    def __init__(
        self,
        recipe: Recipe | Mapping[str, Any] | str | Path,
        *,
        model: Any = None,
        dataset: Any = None,
        tokenizer: Any = None,
    ) -> None:
        self.recipe = _as_recipe(recipe, model)
        self._model = model
        self._tokenizer = tokenizer
        is_split = isinstance(dataset, Mapping) and "train" in dataset
        self._train_rows = dataset["train"] if is_split else dataset
        self._validation_rows = dataset.get("validation") if is_split else None
        self.folder = RunFolder(self.recipe.run.dir)
        self._progress = Progress()

    def train(self, resume: str | bool | None = None) -> Result:
        """Train, evaluate, save and export as the recipe says; a run that has finished returns its results.

        `resume` overrides checkpoint.resume: True is `auto`, False `never`, a path a checkpoint.
        """
        how = {None: self.recipe.checkpoint.resume, True: "auto", False: "never"}.get(resume, str(resume))
        with self._opened_folder() as console:
            checkpoint = _checkpoint_to_resume(self.folder, how)
            return self._finished(console, checkpoint) or self._train(console, checkpoint)

    def dry_run(self) -> RunLength:
        """Everything but training: open, check, prepare where that comes first, load, probe, rehearse."""
        with self._opened_folder() as console, ExitStack() as stack:
            return self._session(console, stack, _checkpoint_to_resume(self.folder, "auto")).length

    def evaluate(self) -> dict[str, float]:
        """Held-out loss, perplexity and accuracy of the model as it is now, over the recipe's validation rows."""
        if not self.corpus.validation:
            raise RecipeError("data.validation is empty; name the rows to evaluate on")
        self._check_vocabulary()
        with self._feed(store=None) as feed:
            return evaluate(self._scorer(), feed.held_out(), self._evaluation_layout())

    def export(self, folder: str | Path) -> Path:
        """Write the model as it is now as a Hugging Face folder."""
        return self._write_export(Path(folder), self._progress)

    # --- the pieces, each opened when it is first needed ---

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
        if self._model is not None:
            loaded = adopt_model(self._model, recipe.model, **place)
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
        tokenizer = self._tokenizer
        if tokenizer is None:
            tokenizer = _load_tokenizer(self.recipe.model)
        template = self.recipe.data.chat_template
        if template is not None:
            if not Path(template).is_file():
                raise RecipeError(f"data.chat_template={template}: no such file; give the path of a Jinja template")
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        return tokenizer

    @cached_property
    def generation_config(self) -> dict[str, Any] | None:
        """The model's generation_config.json, where it has one."""
        if self._model is not None:
            settings = getattr(self._model, "generation_config", None)
            return None if settings is None else settings.to_diff_dict()
        file = self.loaded.folder / "generation_config.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @cached_property
    def corpus(self) -> Corpus:
        return open_corpus(self.recipe.data, self.recipe.run.seed, self._train_rows, self._validation_rows)

    @cached_property
    def date(self) -> str:
        """The day that templates see: the recipe's, that of the first start, or today."""
        saved = self.folder.path / "data.json"
        if self.recipe.data.date is not None:
            return self.recipe.data.date
        return json.loads(saved.read_text())["date"] if saved.is_file() else date.today().isoformat()

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        config = self.loaded.model.config
        return TextTokenizer.from_transformers(
            self.tokenizer,
            template_kwargs=self.recipe.data.chat_template_kwargs,
            stop_tokens=stop_ids(self._tokenizer_facts, config, self.generation_config),
            date=self.date,
        )

    @property
    def _tokenizer_facts(self) -> TokenizerFacts:
        tokenizer = self.tokenizer
        return TokenizerFacts(
            largest_id=max(tokenizer.get_vocab().values()),
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            name=f"the tokenizer {self.recipe.model.tokenizer or tokenizer.name_or_path}",
        )

    @property
    def _num_embeddings(self) -> int:
        return self.loaded.model.head().weight_VD.shape[0]

    def _limits(self) -> dict[str, int]:
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
            limits=self._limits(),
            vocab_size=self._num_embeddings,
            train_on=data.train_on,
            over_long=data.over_long,
            truncate_side=data.truncate_side,
        )

    def _feed(self, store: Path | None, store_train: bool = False) -> Feed:
        data = self.recipe.data
        workers = max(1, min(8, (os.cpu_count() or 1) - 1)) if data.workers == "auto" else data.workers
        policies = {"bad": data.bad_rows, "over_long": data.over_long}
        stop_on = frozenset(kind for kind, policy in policies.items() if policy == "error")
        return Feed(self.corpus, self._preparer(), workers, stop_on, store, store_train)

    def _check_vocabulary(self) -> None:
        findings = check_vocabulary(
            self._tokenizer_facts, self.loaded.model.config, self.generation_config, self._num_embeddings
        )
        for warning in findings.warnings:
            LOG.warning(warning)
        if findings.errors:
            raise UserError("; ".join(findings.errors))

    @cached_property
    def layout(self) -> Layout:
        """Packed where the probe proves that documents cannot see each other, else one document a row."""
        budget, packing = self.recipe.batch.tokens_per_micro_batch, self.recipe.batch.packing
        model = self.loaded.model
        if packing == "off":
            reason = "batch.packing=off"
        elif isinstance(model, HFModel) and model.row_reason is not None:
            reason = model.row_reason
        else:
            with cast_parameters(model, self.compute):
                probe = probe_isolation(
                    model,
                    vocab_size=self._num_embeddings,
                    device=self.device,
                    leak_tolerance=leak_tolerance(model.config),
                    restart_tolerance=5e-2 if self.compute == torch.bfloat16 else 1e-3,
                )
            reason = probe.reason
        if reason is None:
            return Layout(budget)
        if packing == "require":
            raise UserError(
                f"batch.packing=require: {reason}; set it to auto to train one document a row, or try another "
                "model.attention or model.implementation"
            )
        LOG.warning("training one document a row, not packed: %s", reason)
        if isinstance(model, HFModel):
            model.run_rows(reason)
        return Layout(budget, packed=False)

    def _evaluation_layout(self) -> Layout:
        budget = self.recipe.evaluate.tokens_per_micro_batch or self.recipe.batch.tokens_per_micro_batch
        return Layout(max(budget, self.layout.tokens_per_micro_batch), packed=self.layout.packed)

    def _scorer(self) -> Scorer:
        return Scorer(self.loaded.model, self.compute, self.device)

    def _trainer(self, total_steps: int, clock: Stopwatch) -> LocalTrainer:
        recipe = self.recipe
        return LocalTrainer(
            scorer=self._scorer(),
            loss=CrossEntropy(recipe.train.label_smoothing, recipe.train.z_loss),
            optim=recipe.optim,
            total_steps=total_steps,
            states=recipe.precision.states,
            seed=recipe.run.seed,
            neftune_alpha=recipe.train.neftune_alpha,
            clock=clock,
        )

    # --- a run ---

    @contextmanager
    def _opened_folder(self) -> Iterator[Console]:
        run = self.recipe.run
        log = self.folder.path / "logs" / "rank-0.log"
        with self.folder.lock(), Console() as console, logging_to(log, run.log_level, console):
            for notice in recover(self.folder.checkpoints):
                LOG.warning(notice)
            yield console

    def _identity(self) -> dict[str, Any]:
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
                "row limit": min(self._limits().values()) if self.recipe.data.over_long != "error" else None,
            },
        }

    def _finished(self, console: Console, checkpoint: Path | None) -> Result | None:
        """The results of a run that has ended, shown; None where there is something left to do."""
        if checkpoint is None or not self.folder.summary.is_file():
            return None
        summary = json.loads(self.folder.summary.read_text(encoding="utf-8"))
        if not summary["finished"] or checkpoint.parent != self.folder.checkpoints:
            return None
        saved = read_state(checkpoint)["identity"]
        differences = check_resumable(
            {"recipe": saved["recipe"]},
            {"recipe": altering_keys(self.recipe)},
            self.recipe.checkpoint.allow_changes,
            str(checkpoint),
        )
        if differences:
            return None
        console.facts(f"{self.folder.path} is finished: nothing left to train", self._result_facts(summary))
        return Result(summary, self.folder.path)

    def _session(self, console: Console, stack: ExitStack, checkpoint: Path | None) -> Session:
        """Everything a run needs, checked and loaded; worker processes and files end with `stack`."""
        recipe, folder = self.recipe, self.folder
        self._set_determinism()
        # Read before anything is written, so that a start from a checkpoint sees the day of the first start.
        identity = self._identity()
        state = None if checkpoint is None else read_state(checkpoint)
        if state is not None:
            for line in check_resumable(state["identity"], identity, recipe.checkpoint.allow_changes, str(checkpoint)):
                LOG.warning("changed since the checkpoint: %s", line)
        self._check_vocabulary()
        self._write_facts()
        order = self.corpus.order(recipe.run.seed, recipe.data.shuffle)
        why_first = "data.prepare=first" if recipe.data.prepare == "first" else needs_every_row(recipe, order)
        cache = folder.path / "prepared" if recipe.data.cache is None else Path(recipe.data.cache)
        feed = stack.enter_context(
            self._feed(cache, store_train=why_first is not None or recipe.data.cache is not None)
        )
        held_out = feed.prepare_held_out()
        prepared = None
        if why_first is not None:
            LOG.info("preparing every row before step 1 (%s)", why_first)
            prepared = feed.prepare_training()
        length = run_length(recipe, order, None if prepared is None else [p.lengths for p in prepared])
        clock = Stopwatch(self.device.type)
        trainer = self._trainer(length.total_steps, clock)
        source = feed.training(order, BatchSize(*recipe.batch.size))
        if state is not None:
            assert checkpoint is not None
            trainer.load(str(checkpoint))
            source.load_state_dict(state["cursor"])
            self._progress = Progress.from_state(state["progress"])
            LOG.info("going on from %s", checkpoint)
        prefetch = Prefetch(source)
        stack.callback(prefetch.close)
        session = Session(
            console, feed, prefetch, trainer, length, clock, identity, state is not None, held_out, prepared
        )
        console.facts(f"burnish sft: {recipe.run.name or folder.path.name}", self._start_facts(session))
        if recipe.train.memory_check:
            self._check_memory(session)
        return session

    def _set_determinism(self) -> None:
        if self.recipe.run.deterministic:
            # cuBLAS is deterministic only with a fixed workspace, set before its first use.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def _check_memory(self, session: Session) -> None:
        """Forward and backward of a full micro-batch at the longest row known, so that too little memory shows now."""
        budget = self.layout.tokens_per_micro_batch
        lengths = [int(p.lengths.max()) for p in [*session.held_out, *(session.prepared or [])] if p.lengths.any()]
        if session.prepared is None:
            lengths += [len(sample.tokens) for sample in session.source.peek()]
        longest = min(max(lengths), budget)
        samples = [_all_trained(longest, i, self._num_embeddings) for i in range(budget // longest)]
        try:
            session.trainer.rehearse(pack(samples, self.layout))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"a full micro-batch of {budget} tokens in rows of {longest} does not fit into the device's memory; "
                "lower batch.tokens_per_micro_batch, or set train.recompute to selective or full, or precision.states "
                f"to bf16 or int8 ({str(error).splitlines()[0]})"
            ) from None

    def _train(self, console: Console, checkpoint: Path | None) -> Result:
        started = time.monotonic()
        with ExitStack() as stack:
            session = self._session(console, stack, checkpoint)
            run = self._run(session, stack)
            first_step = run.progress.step
            with stop_on_signals(run):
                if self.recipe.evaluate.at_start and not session.resumed:
                    run.evaluate_now(session.trainer)
                try:
                    fit(session.trainer, session.source, run)
                except RowsError:
                    run.save(session.trainer, session.source)
                    raise
                if run.interrupted is not None:
                    run.save(session.trainer, session.source)
                    console.notice(
                        f"{run.interrupted.name}: saved step {run.progress.step} of {run.total_steps}; "
                        "run the same command again to go on"
                    )
                    return Result({}, self.folder.path, interrupted=128 + run.interrupted)
            return self._finish(session, run, first_step, time.monotonic() - started)

    def _run(self, session: Session, stack: ExitStack) -> Run:
        """The run's records and cadences, its files cut to what the checkpoint knows."""
        recipe, folder, progress = self.recipe, self.folder, self._progress
        resumed_step = progress.step if session.resumed else None
        for file in (folder.metrics, folder.answers):
            cut(file, -1 if resumed_step is None else resumed_step)
        metrics = MetricsWriter(folder.metrics)
        stack.callback(metrics.close)
        name = recipe.run.name or folder.path.name
        resolved = json.loads(recipe.model_dump_json())
        trackers = open_trackers(recipe.run.trackers, folder.path, name, resolved, resumed_step)
        for tracker in trackers:
            stack.callback(tracker.close)
        held_out, layout = session.feed.held_out(), self._evaluation_layout()
        return Run(
            folder=folder,
            total_steps=session.length.total_steps,
            epoch_ends=session.length.epoch_ends,
            layout=self.layout,
            normalization=recipe.train.loss,
            clock=session.clock,
            window=StepWindow(session.clock, progress.totals, self.device.type, self._utilisation()),
            metrics=metrics,
            trackers=trackers,
            watcher=session.console,
            checkpoint=recipe.checkpoint,
            evaluation=recipe.evaluate,
            evaluate=(lambda trainer: evaluate(trainer, held_out, layout)) if held_out else None,
            answer=self._answers if recipe.evaluate.prompts else None,
            export=lambda step: self._write_export(folder.export(step), progress),
            identity=session.identity,
            log_every=recipe.run.log_every,
            stop_on_nonfinite=recipe.train.on_nonfinite == "stop",
            progress=progress,
            saved_step=resumed_step,
        )

    def _answers(self) -> Sequence[tuple[str, str]]:
        evaluation = self.recipe.evaluate
        answers = generate(
            self.loaded.model, self.tokenizer, evaluation.prompts, max_new_tokens=evaluation.max_new_tokens
        )
        return list(zip(evaluation.prompts, answers, strict=True))

    def _utilisation(self) -> Utilisation | None:
        if self.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.device))
        return None if peak is None else Utilisation(self._model_shape(), peak)

    def _model_shape(self) -> ModelShape:
        model = self.loaded.model
        config, blocks = model.config, model.blocks()
        return ModelShape(
            body_parameters=sum(p.numel() for block in blocks for p in block.parameters() if p.ndim >= 2),
            head_parameters=model.head().weight_VD.numel(),
            num_layers=len(blocks),
            num_heads=config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        )

    # --- the end of a run, and what is said of it ---

    def _finish(self, session: Session, run: Run, first_step: int, seconds: float) -> Result:
        """Export, summary and report."""
        checkpoint, progress = self.recipe.checkpoint, run.progress
        exported_step = progress.step
        if checkpoint.keep_best and progress.best_step not in (None, progress.step):
            assert progress.best_step is not None
            session.trainer.load(str(checkpoint_folder(self.folder.checkpoints, progress.best_step)))
            exported_step = progress.best_step
        export = None
        if checkpoint.export != "never":
            export = self._write_export(self.folder.export(exported_step), progress, exported_step)
        counts = session.source.state_dict()["counts"]
        summary = self._summary(run, counts, seconds, progress.step - first_step, export)
        self.folder.write_json(self.folder.summary.name, summary)
        self._write_report(session, summary, counts)
        session.console.close()
        session.console.facts("finished", self._result_facts(summary))
        return Result(summary, self.folder.path, export)

    def _summary(
        self, run: Run, counts: Mapping[str, Mapping[str, int]], seconds: float, num_steps: int, export: Path | None
    ) -> dict[str, Any]:
        progress = run.progress
        lines = read(self.folder.metrics)
        steps = [line for line in lines if "loss" in line]
        recent = steps[-num_steps:] if num_steps else []
        return {
            "finished": True,
            "stopped_early": run.stopped_early,
            "step": progress.step,
            "total_steps": run.total_steps,
            "runtime_seconds": seconds,
            "samples_per_second": sum(line["samples"] for line in recent) / seconds,
            "tokens_per_second": sum(line["tokens"] for line in recent) / seconds,
            "total_samples": progress.totals.samples,
            "total_tokens": progress.totals.tokens,
            "total_trained_tokens": progress.totals.trained_tokens,
            "final_train_loss": steps[-1]["loss"] if steps else None,
            "first_eval_loss": next((line["eval/loss"] for line in lines if "eval/loss" in line), None),
            "final_eval_loss": progress.last_evaluation.get("eval/loss"),
            "best_eval_loss": progress.best_loss,
            "best_step": progress.best_step,
            "rows": counts,
            "export": None if export is None else str(export),
        }

    def _result_facts(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        facts = [
            (
                "steps",
                f"{summary['step']:,} of {summary['total_steps']:,} in {duration_text(summary['runtime_seconds'])}",
            )
        ]
        facts.append(
            ("tokens", f"{count_text(summary['total_tokens'])}, {count_text(summary['total_trained_tokens'])} trained")
        )
        if summary["final_train_loss"] is not None:
            facts.append(("train loss", f"{summary['final_train_loss']:.4f}"))
        if summary["final_eval_loss"] is not None:
            change = f"{summary['first_eval_loss']:.4f} -> " if summary["first_eval_loss"] is not None else ""
            facts.append(("held-out loss", f"{change}{summary['final_eval_loss']:.4f}"))
        left_out = [
            f"{name}: {number} {kind.replace('_', '-')}"
            for name, kinds in summary["rows"].items()
            for kind, number in kinds.items()
            if kind != "kept"
        ]
        if left_out:
            facts.append(("rows left out", "; ".join(left_out)))
        if summary["export"] is not None:
            facts.append(("export", summary["export"]))
        facts += [("report", str(self.folder.report)), ("metrics", str(self.folder.metrics))]
        if summary["export"] is not None:
            facts.append(("next", f"burnish chat {summary['export']}"))
        return facts

    def _write_facts(self) -> None:
        """recipe.yaml, environment.json, data.json and model/: what the run is made of."""
        folder = self.folder
        write_text(folder.path / "recipe.yaml", dump(self.recipe))
        folder.write_json("environment.json", environment(str(self.device)))
        folder.write_json("data.json", {"date": self.date, **self.corpus.facts()})
        model = folder.path / "model"
        model.mkdir(exist_ok=True)
        folder.write_json("model/config.json", self.loaded.model.config)
        if self.generation_config is not None:
            folder.write_json("model/generation_config.json", self.generation_config)
        self.tokenizer.save_pretrained(str(model))

    def _start_facts(self, session: Session) -> list[tuple[str, str]]:
        recipe, loaded, length = self.recipe, self.loaded, session.length
        trainable = sum(p.numel() for p in session.trainer.parameters.values())
        frozen = loaded.num_parameters - trainable
        parameters = count_text(loaded.num_parameters) + (f", {count_text(frozen)} of them frozen" if frozen else "")
        precision = recipe.precision
        unit, size = recipe.batch.size
        rows = ", ".join(
            f"{s.name} ({s.format}{f', {s.num_rows:,} rows' if s.num_rows is not None else ', streamed'})"
            for s in self.corpus.train
        )
        facts = [
            ("model", f"{loaded.facts['architecture']}, {parameters} parameters, {loaded.facts['implementation']}"),
            ("attention", f"{loaded.attention}, {'packed' if self.layout.packed else 'one document a row'}"),
            ("data", rows),
            ("held out", ", ".join(f"{s.name} ({s.num_rows:,} rows)" for s in self.corpus.validation) or "none"),
            (
                "length",
                f"{length.total_steps:,} steps of {size:,} {unit}, micro-batches of {self.layout.tokens_per_micro_batch:,} tokens",
            ),
            (
                "precision",
                f"compute {precision.compute}, master {precision.master}, states {precision.states}, reduce {precision.reduce}",
            ),
            ("layout", f"one process on {self.device}"),
        ]
        utilisation = self._utilisation()
        if utilisation is not None:
            facts.append(
                ("MFU", formula_text(utilisation.shape, torch.cuda.get_device_name(self.device), utilisation.peak))
            )
        return facts

    def _write_export(self, folder: Path, progress: Progress, step: int | None = None) -> Path:
        recipe, model = self.recipe, self.loaded.model
        dtype = DTYPES[recipe.checkpoint.export_dtype]

        def write_weights(target: Path) -> None:
            if isinstance(model, HFModel):
                model.export(target, dtype)
            else:
                write_model(target, model.config, {n: p.detach() for n, p in model.named_parameters()}, dtype)

        card = Card(
            name=recipe.run.name or self.folder.path.name,
            base_model=recipe.model.path or f"random weights ({recipe.model.init})",
            step=progress.step if step is None else step,
            total_steps=progress.step,
            samples=progress.totals.samples,
            tokens=progress.totals.tokens,
            trained_tokens=progress.totals.trained_tokens,
            held_out_loss=progress.last_evaluation.get("eval/loss"),
            train_loss=None,
            sources={s.name: s.num_rows or 0 for s in self.corpus.train},
            recipe=dump(recipe),
            versions=versions(),
        )
        stops = stop_ids(self._tokenizer_facts, model.config, self.generation_config)
        return write_export(folder, write_weights, self.tokenizer, self.generation_config, stops, card)

    def _write_report(
        self, session: Session, summary: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]]
    ) -> None:
        answers = self.folder.answers.read_text(encoding="utf-8").splitlines() if self.folder.answers.exists() else []
        report = Report(
            title=self.recipe.run.name or self.folder.path.name,
            facts=[*self._start_facts(session), *((f"{n} version", v) for n, v in versions().items())],
            summary=self._result_facts(summary),
            metrics=read(self.folder.metrics),
            sources=self._source_summaries(session, counts),
            samples=self._rendered_samples(session),
            generations=[Generation(**json.loads(line)) for line in answers],
            recipe=dump(self.recipe),
        )
        write_report(self.folder.report, report)

    def _source_summaries(self, session: Session, counts: Mapping[str, Mapping[str, int]]) -> list[SourceSummary]:
        lines = read(self.folder.metrics)
        summaries = []
        for index, source in enumerate(self.corpus.train):
            lengths = [len(row.tokens) for row in self._first_rows(session, index)]
            summaries.append(
                _source_summary(
                    source.name,
                    "train",
                    counts.get(source.name, {}),
                    sum(line.get(f"tokens/{source.name}", 0) for line in lines),
                    sum(line.get(f"trained_tokens/{source.name}", 0) for line in lines),
                    LengthDistribution.of(lengths),
                )
            )
        for source, found in zip(self.corpus.validation, session.held_out, strict=True):
            lengths = LengthDistribution.of(found.lengths[found.lengths > 0].tolist())
            tokens = int(found.lengths.sum())
            summaries.append(
                _source_summary(source.name, "validation", found.counts, tokens, found.num_trained, lengths)
            )
        return summaries

    def _first_rows(self, session: Session, index: int) -> list[Sample]:
        """The kept ones of a source's first rows: enough for a picture of it."""
        if not isinstance(self.corpus.train[index].rows, Rows):
            return []
        return [row for row in islice(session.feed.rows(index), PICTURED_ROWS) if isinstance(row, Sample)]

    def _pieces(self, sample: Sample) -> list[tuple[str, float]]:
        texts = [self.text_tokenizer.decode([token]) for token in sample.tokens]
        return list(zip(texts, sample.loss_weights.tolist(), strict=True))

    def _rendered_samples(self, session: Session) -> list[RenderedSample]:
        return [
            RenderedSample(sample.source, sample.index, self._pieces(sample))
            for index in range(len(self.corpus.train))
            for sample in self._first_rows(session, index)[:SHOWN_SAMPLES]
        ]


def _source_summary(
    name: str, split: str, counts: Mapping[str, int], tokens: int, num_trained: int, lengths: LengthDistribution | None
) -> SourceSummary:
    dropped = {kind.replace("_", "-"): n for kind, n in counts.items() if kind not in ("kept", "cut")}
    kept = counts.get("kept", 0)
    return SourceSummary(
        name, split, kept + sum(dropped.values()), kept, dropped, counts.get("cut", 0), tokens, num_trained, lengths
    )


def _as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path, model: Any) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | Path):
        return read_recipe(recipe)
    tree = dict(recipe)
    if model is not None:
        tree.setdefault("model", {"path": getattr(model, "name_or_path", "") or "the model passed in"})
        tree.setdefault("data", {})
    return recipe_from_dict(tree)


def _load_tokenizer(model: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    place = model.tokenizer or model.path or model.init
    assert place is not None
    try:
        return AutoTokenizer.from_pretrained(
            place, revision=model.revision if place == model.path else "main", trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        key = "model.tokenizer" if model.tokenizer else "model.path" if model.path else "model.init"
        raise UserError(
            f"{key}={place}: no tokenizer could be loaded from it; set model.tokenizer to a folder with a tokenizer.json "
            f"or a hub id ({str(error).splitlines()[0]})"
        ) from None


def _checkpoint_to_resume(folder: RunFolder, how: str) -> Path | None:
    """The checkpoint that `how` (checkpoint.resume) asks for; None to start from the model's own weights."""
    if how == "auto":
        return latest_checkpoint(folder.checkpoints)
    if how == "never":
        if latest_checkpoint(folder.checkpoints) is not None:
            raise RecipeError(
                f"checkpoint.resume=never: run.dir={folder.path} has a checkpoint already; "
                "set another run.dir, or delete that folder"
            )
        return None
    place = Path(how)
    found = place if (place / "state.json").is_file() else latest_checkpoint(place / "checkpoints")
    if found is None:
        raise RecipeError(f"checkpoint.resume={how}: neither a checkpoint (iter_...) nor a run folder with one")
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _all_trained(length: int, index: int, vocab_size: int) -> Sample:
    """A made-up row of the most costly kind, to see whether memory suffices."""
    tokens = np.random.default_rng(index).integers(0, vocab_size, length).astype(np.int32)
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return Sample(tokens, weights, "memory check", index)


def evaluate_folder(model: str, data: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Held-out loss, perplexity and accuracy of a Hugging Face folder or hub id on the rows of `data`.

    Overrides without a dot are keys of the source (`prompt_key=question`), others keys of a recipe.
    """
    own = [f"data.validation.0.{override}" for override in overrides if "." not in override.partition("=")[0]]
    others = [override for override in overrides if "." in override.partition("=")[0]]
    tree = {"model": {"path": model}, "data": {"validation": [{"path": data}]}, "precision": {"compute": "fp32"}}
    return SFT(recipe_from_dict(tree, [*own, *others])).evaluate()


def export_run(run: str, step: int | None = None, out: str | None = None) -> Path:
    """Write a checkpoint of the run folder `run` as a Hugging Face folder; returns where it lies.

    Raises UserError where there is no such run or checkpoint.
    """
    folder = RunFolder(run)
    if not (folder.path / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run folder: it has no recipe.yaml")
    checkpoint = latest_checkpoint(folder.checkpoints) if step is None else checkpoint_folder(folder.checkpoints, step)
    if checkpoint is None or not checkpoint.is_dir():
        there = sorted(path.name for path in folder.checkpoints.glob("iter_*"))
        raise UserError(
            f"{run} has no checkpoint{f' of step {step}' if step else ''}; there are: {', '.join(there) or 'none'}"
        )
    recipe = read_recipe(folder.path / "recipe.yaml")
    # The weights come from the checkpoint, so that the model the run began with need not be there any more.
    model = recipe.model.model_copy(update={"path": None, "init": str(folder.path / "model"), "tokenizer": None})
    sft = SFT(recipe.model_copy(update={"model": model}))
    named = dict(sft.loaded.model.named_parameters())
    state = load_checkpoint(checkpoint, {f"model.{n}": p.detach() for n, p in named.items()}, prefix="model.")
    sft._progress = Progress.from_state(state["progress"])
    return sft.export(out or folder.export(sft._progress.step))
