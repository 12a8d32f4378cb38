"""Supervised fine-tuning: recipe in, checkpoints, export and report out. It wires what the other modules make."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from burnish.cluster.launch import (
    check_devices,
    driving,
    end_after,
    is_local,
    joined_device,
    known_world,
    open_ranks,
    with_restarts,
)
from burnish.cluster.phases import phase
from burnish.cluster.ranks import ClusterError, LostRanks
from burnish.components import Components, DriverComponents
from burnish.config import Recipe, RecipeError
from burnish.data.feed import Feed, Preparation
from burnish.data.pack import Layout, pack
from burnish.data.source import BatchSize, Prefetch, RowsError
from burnish.evaluate import evaluate
from burnish.length import RunLength, needs_every_row, run_length
from burnish.loop import fit
from burnish.model.attention import check_attention
from burnish.model.hf_io import check_weights, locate_tensors
from burnish.model.lora import check_adapter
from burnish.observe.console import Console, logging_to
from burnish.observe.metrics import MetricsWriter, StepWindow, Stopwatch, cut
from burnish.observe.trackers import check_trackers, open_trackers
from burnish.outcome import (
    dropped_warnings,
    export_model,
    result_facts,
    start_facts,
    summarise,
    write_facts,
    write_run_report,
)
from burnish.parallel.checks import check_layout
from burnish.parallel.degrees import Degrees
from burnish.rank import Rank, RankGroup, choose_layout, evaluation_layout
from burnish.recipe import read_recipe, recipe_from_dict
from burnish.resume import altering_keys, check_resumable
from burnish.run import Progress, Run, RunFolder
from burnish.signals import stop_on_signals
from burnish.train.checkpoint import (
    TRACKER,
    checkpoint_folder,
    damaged,
    fault_of,
    find_checkpoint,
    read_state,
    recover,
    verify_checkpoint,
)
from burnish.train.optim import weight_decays
from burnish.types import Sample, StepInput, UserError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What `SFT.train` came to. `interrupted` is the exit status of the signal that ended it, else None."""

    summary: dict[str, Any]
    run_folder: Path
    export: Path | None = None
    interrupted: int | None = None


@dataclass(frozen=True)
class Session:
    """What one run holds besides its components: all that ends with it."""

    console: Console
    facts: list[tuple[str, str]]
    """What was said of it at its start."""
    feed: Feed
    source: Prefetch[StepInput]
    trainer: Rank | RankGroup
    layout: Layout
    length: RunLength
    clock: Stopwatch
    identity: dict[str, Any]
    held_out: list[Preparation]
    prepared: list[Preparation] | None
    """Of the training rows, where all were prepared first."""
    progress: Progress | None
    """Where the checkpoint stood that the run goes on from; None at a first start."""


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
        self.folder = RunFolder(self.recipe.run.dir)
        is_split = isinstance(dataset, Mapping) and "train" in dataset
        self._given = {
            "given_tokenizer": tokenizer,
            "train_rows": dataset["train"] if is_split else dataset,
            "validation_rows": dataset.get("validation") if is_split else None,
        }
        self._given_model = model
        self.is_alone = _is_alone(self.recipe)
        if model is not None and not self.is_alone:
            why = (
                "parallel.offload=parameters reads weights piece by piece into the host's memory"
                if _is_one_process(self.recipe)
                else "the recipe's cluster and parallel have several ranks"
            )
            raise RecipeError(
                f"a model that is passed in lies in this process, and {why}; save it to a folder and name that in "
                "model.path"
            )
        find_device = partial(joined_device, self.recipe.cluster, self.recipe.run.device)
        self.parts = (
            self._whole
            if self.is_alone
            else DriverComponents(self.recipe, self.folder.path, **self._given, find_device=find_device)
        )
        self._progress = Progress()
        self._is_restart = False
        """Whether ranks were lost before, and the run may go on with fewer."""
        self._saved_weights: Path | None = None
        """A checkpoint whose weights are to be loaded before the model is used, since its run had ended already."""

    @cached_property
    def _whole(self) -> Components:
        """The pieces of the run in this process, its model whole."""
        return Components(self.recipe, self.folder.path, given_model=self._given_model, **self._given)

    def train(self, resume: str | bool | None = None) -> Result:
        """Train, evaluate, save and export as the recipe says; a run that has finished returns its results.

        `resume` overrides checkpoint.resume: True is `auto`, False `never`, a path a checkpoint. A run that loses ranks
        goes on from its last checkpoint as often as cluster.max_restarts says.
        """
        how = {None: self.recipe.checkpoint.resume, True: "auto", False: "never"}.get(resume, str(resume))
        with self._opened_folder() as console:
            before = _tracked(self.folder)

            def start(restarts: int) -> Result:
                self._is_restart = restarts > 0
                # Until this run has saved, a restart begins where the first start did.
                has_saved = _tracked(self.folder) != before
                return self._train(console, *(("auto", None) if has_saved else (how, self.recipe.checkpoint.step)))

            return with_restarts(start, self.recipe.cluster.max_restarts)

    def _train(self, console: Console, how: str, step: int | None) -> Result:
        with ExitStack() as stack:
            find = partial(_checkpoint_to_resume, self.folder, how, step)
            checkpoint = find(self._look)
            finished = self._finished(console, checkpoint)
            if finished is not None:
                return finished
            session = self._session(console, stack, checkpoint, find)
            run = self._run(session, stack)
            status = self._fit(session, run)
            if status is not None:
                return Result({}, self.folder.path, interrupted=status)
            return self._finish(session, run)

    def dry_run(self) -> RunLength:
        """Everything but training: open, check, prepare where that comes first, load, probe, rehearse."""
        with self._opened_folder() as console, ExitStack() as stack:
            config = self.recipe.checkpoint
            find = partial(_checkpoint_to_resume, self.folder, config.resume, config.step)
            length = self._session(console, stack, find(self._look), find).length
            console.notice("dry run: all checks passed, nothing was trained")
            return length

    def evaluate(self) -> dict[str, float]:
        """Held-out loss, perplexity and accuracy of the model as it is now, over the recipe's validation rows."""
        if not self.parts.corpus.validation:
            raise RecipeError("data.validation is empty; name the rows to evaluate on")
        self.parts.check_vocabulary()
        rank = self._rank_with_saved_weights()
        with TemporaryDirectory() as store, self.parts.feed(Path(store)) as feed:
            feed.prepare_held_out()
            return evaluate(rank, feed.held_out(), evaluation_layout(self.recipe, choose_layout(self.recipe, rank)))

    def export(self, folder: str | Path) -> Path:
        """Write the model as it is now as a Hugging Face folder; returns it."""
        rank = self._rank_with_saved_weights()
        return export_model(rank, self.parts, self.recipe, self.folder, self._progress, Path(folder))

    def _rank_with_saved_weights(self) -> Rank:
        """The model in this process, with the weights of the run's end where that was elsewhere or before."""
        rank = Rank(self._whole)
        if self._saved_weights is not None:
            self._progress = Progress.from_state(rank.load_weights(self._saved_weights)["progress"])
            self._saved_weights = None
        return rank

    def _check_layout(self) -> None:
        """Raises UserError where the recipe does not suit the ranks, as far as they are known, or the model, where its
        devices cannot be had, and where what it names is not there or does not fit.

        Ranks ask again how many they are.
        """
        recipe, parallel, device = self.recipe, self.recipe.parallel, self.parts.device.type
        check_trackers(recipe.run.trackers)
        check_devices(recipe.cluster, device)
        world = known_world(recipe.cluster, device)
        degrees = Degrees.least(parallel) if world is None else Degrees.of(parallel, world)
        loaded = self.parts.loaded
        check_layout(loaded.model, recipe, degrees, device, loaded.implementation, loaded.reason)
        weight_decays({n: p for n, p in loaded.model.named_parameters() if p.requires_grad}, recipe.optim)
        if self.is_alone:
            return
        # In one process they were read already.
        softcap = loaded.model.config.get("attn_logit_softcapping")
        check_attention(recipe.model.attention, device, self.parts.compute, softcap)
        if recipe.model.init is None and loaded.implementation == "native":
            check_weights(loaded.folder, loaded.model)
        elif recipe.model.init is None:
            locate_tensors(loaded.folder)
        if recipe.lora is not None and recipe.lora.path is not None:
            check_adapter(recipe.lora.path, loaded.model, recipe.lora)

    @contextmanager
    def _ranks(self) -> Iterator[Rank | RankGroup]:
        """Who trains: this process, or ranks of a cluster, which end with the block."""
        if self.is_alone:
            os.environ.update({name: str(value) for name, value in self.recipe.cluster.env.items()})
            if self.parts.device.index is not None:
                torch.cuda.set_device(self.parts.device)
            rank = Rank(self.parts)
            try:
                yield rank
            except Exception:
                _finish_after_failure(rank)
                raise
            return
        recipe, parallel = self.recipe, self.recipe.parallel
        phase(f"rows: {', '.join(dict.fromkeys(source.name for source in self.parts.corpus.sources))}")
        if recipe.data.renderer is not None:
            phase(f"plug-ins imported: {recipe.data.renderer}")
        found = self.parts.loaded.folder.absolute()
        pinned = _pinned(recipe, found)
        ranks = open_ranks(
            recipe.cluster,
            "burnish.rank:SeatedRank",
            (json.loads(pinned.model_dump_json()), str(self.folder.path.resolve()), str(found)),
            device=self.parts.device.type,
            logs=self.folder.path.resolve() / "logs",
            log_level=recipe.run.log_level,
            fits=(lambda world: _fits(recipe, world)) if self._is_restart else None,
        )
        group = None
        try:
            group = RankGroup(ranks, Degrees.of(parallel, ranks.world_size))
            yield group
        except BaseException as error:
            if group is not None and isinstance(error, Exception) and not isinstance(error, ClusterError):
                _finish_after_failure(group)
            ranks.kill()
            raise
        ranks.close()

    @contextmanager
    def _opened_folder(self) -> Iterator[Console]:
        log = self.folder.path / "logs" / "rank-0.log"
        with (
            driving(os.environ),
            self.folder.lock(),
            Console() as console,
            logging_to(log, self.recipe.run.log_level, console),
        ):
            for notice in (*recover(self.folder.checkpoints), *self.recipe.idle_keys):
                LOG.warning(notice)
            yield console

    @property
    def _look(self) -> Callable[[Path], object]:
        """How a checkpoint is looked at before there are ranks, which would share the reading of large files."""
        return verify_checkpoint if self.is_alone else read_state

    def _finished(self, console: Console, checkpoint: Path | None) -> Result | None:
        """The results of a run that has ended, shown; None where there is something left to do."""
        if checkpoint is None or checkpoint.parent != self.folder.checkpoints or not self.folder.summary.is_file():
            return None
        summary = json.loads(self.folder.summary.read_text(encoding="utf-8"))
        saved, now = read_state(checkpoint)["identity"], {"recipe": altering_keys(self.recipe)}
        if check_resumable(saved, now, self.recipe.checkpoint.allow_changes, str(checkpoint)):
            return None
        if read_state(checkpoint)["num_steps"] < summary["step"]:
            return None  # its end is damaged, or an earlier step was asked for
        if not self.is_alone and fault_of(checkpoint) is not None:
            return None  # which its ranks will find
        best = summary["best_step"] if self.recipe.checkpoint.keep_best else None
        self._saved_weights = checkpoint if best is None else checkpoint_folder(self.folder.checkpoints, best)
        console.facts(f"{self.folder.path} is finished: nothing left to train", result_facts(summary, self.folder))
        return Result(summary, self.folder.path, None if summary["export"] is None else Path(summary["export"]))

    def _session(self, console: Console, stack: ExitStack, checkpoint: Path | None, find: Find) -> Session:
        """Everything a run needs, checked and loaded; worker processes and files end with `stack`.

        Where ranks see that `checkpoint` is damaged, `find` looks for another.
        """
        recipe, parts, folder = self.recipe, self.parts, self.folder
        stack.enter_context(parts.determinism())
        if not parts.corpus.train:
            raise RecipeError("data.train is empty; name at least one source, such as [{path: rows.jsonl}]")
        self._check_layout()
        identity = parts.identity()
        state = self._state_of(checkpoint, identity)
        parts.check_vocabulary()
        order = parts.corpus.order(recipe.run.seed, recipe.data.shuffle)
        why_first = "data.prepare=first" if recipe.data.prepare == "first" else needs_every_row(recipe, order)
        store = folder.path / "prepared" if recipe.data.cache is None else Path(recipe.data.cache)
        store_train = why_first is not None or recipe.data.cache is not None
        feed = stack.enter_context(parts.feed(store, store_train))
        if recipe.data.cache is None:
            for stale in (path for path in store.glob("*/rows.bin") if path.parent.name not in feed.keys):
                shutil.rmtree(stale.parent)
        for source_name in (source.name for source in parts.corpus.validation):
            LOG.info("preparing the held-out rows of %s", source_name)
        held_out, prepared = feed.prepare_held_out(), None
        if why_first is not None:
            LOG.info("preparing every row before step 1 (%s)", why_first)
            prepared = feed.prepare_training()
        length = run_length(recipe, order, None if prepared is None else [p.lengths for p in prepared])
        trainer = stack.enter_context(self._ranks())
        if checkpoint is not None and not self.is_alone and trainer.fault(str(checkpoint)) is not None:
            checkpoint = find(partial(_verify, trainer))  # which says what is wrong, and what is taken for it
            state = self._state_of(checkpoint, identity)
        layout = choose_layout(recipe, trainer)
        clock = Stopwatch(parts.device.type if self.is_alone else "cpu")
        trainer.prepare(length.total_steps, clock, None if checkpoint is None else str(checkpoint))
        source, progress = feed.training(order, BatchSize(*recipe.batch.size)), None
        if state is not None:
            source.load_state_dict(state["cursor"])
            progress = self._known_here(Progress.from_state(state["progress"]))
            LOG.info("going on from %s", checkpoint)
        prefetch = Prefetch(source, partial(pack, layout=layout, normalization=recipe.train.loss))
        stack.callback(prefetch.close)
        facts = start_facts(parts, length, layout, trainer)
        console.facts(f"burnish sft: {recipe.run.name or folder.path.name}", facts)
        session = Session(
            console, facts, feed, prefetch, trainer, layout, length, clock, identity, held_out, prepared, progress
        )
        if recipe.train.memory_check:
            self._check_memory(session)
        return session

    def _state_of(self, checkpoint: Path | None, identity: dict[str, Any]) -> dict[str, Any] | None:
        """What was saved with `checkpoint`, from which a run of this identity may go on."""
        if checkpoint is None:
            return None
        state, allow = read_state(checkpoint), self.recipe.checkpoint.allow_changes
        for line in check_resumable(state["identity"], identity, allow, str(checkpoint)):
            LOG.warning("changed since the checkpoint: %s", line)
        return state

    def _known_here(self, progress: Progress) -> Progress:
        """`progress` without a best step whose checkpoint is not in this folder, and so could never be exported."""
        best = progress.best_step
        if not self.recipe.checkpoint.keep_best or best is None or best == progress.step:
            return progress
        if checkpoint_folder(self.folder.checkpoints, best).is_dir():
            return progress
        LOG.warning(
            "the best step so far, %d, has no checkpoint in %s; the best is looked for anew", best, self.folder.path
        )
        return replace(progress, best_step=None, best_loss=None)

    def _check_memory(self, session: Session) -> None:
        """Forward and backward of a full micro-batch at the longest row known, so that too little memory shows now."""
        layout = session.layout
        budget = layout.tokens_per_micro_batch
        lengths = [int(p.lengths.max()) for p in [*session.held_out, *(session.prepared or [])] if p.lengths.any()]
        if session.prepared is None:
            lengths += [len(sample.tokens) for sample in session.source.peek().samples]
        longest = min(max(lengths), budget)
        number = budget // longest * layout.data_ranks
        samples = [_all_trained(longest, index, self.parts.num_embeddings) for index in range(number)]
        session.trainer.rehearse(pack(samples, layout), longest)

    def _run(self, session: Session, stack: ExitStack) -> Run:
        """The run's records and cadences, its files cut to what the checkpoint knows."""
        recipe, parts, folder = self.recipe, self.parts, self.folder
        progress = self._progress = session.progress or Progress()
        resumed_step = None if session.progress is None else progress.step
        write_facts(parts, folder, session.prepared, session.held_out)
        folder.summary.unlink(missing_ok=True)  # of an earlier end, beyond which this run goes
        for file in (folder.metrics, folder.answers):
            cut(file, -1 if resumed_step is None else resumed_step)
        metrics = MetricsWriter(folder.metrics)
        stack.callback(metrics.close)
        name, resolved = recipe.run.name or folder.path.name, json.loads(recipe.model_dump_json())
        trackers = open_trackers(recipe.run.trackers, folder.path, name, resolved, resumed_step)
        for tracker in trackers:
            stack.callback(tracker.close)
        held_out, layout = session.feed.held_out(), evaluation_layout(recipe, session.layout)
        utilisation = parts.utilisation(session.trainer.world_size, session.trainer.device_name())
        return Run(
            folder=folder,
            total_steps=session.length.total_steps,
            epoch_ends=session.length.epoch_ends,
            clock=session.clock,
            window=StepWindow(session.clock, progress.totals, utilisation, session.trainer.memory),
            metrics=metrics,
            trackers=trackers,
            watcher=session.console,
            save_config=recipe.checkpoint,
            evaluate_config=recipe.evaluate,
            held_out_loss=(lambda trainer: evaluate(trainer, held_out, layout)) if held_out else None,
            answers=(lambda: self._answers(session.trainer)) if recipe.evaluate.prompts else None,
            export=lambda step: export_model(session.trainer, parts, recipe, folder, progress, folder.export(step)),
            identity=session.identity,
            log_every=recipe.run.log_every,
            stop_on_nonfinite=recipe.train.on_nonfinite == "stop",
            progress=progress,
            saved_step=resumed_step if checkpoint_folder(folder.checkpoints, progress.step).is_dir() else None,
        )

    def _answers(self, trainer: Rank | RankGroup) -> Sequence[tuple[str, str]]:
        from burnish.generate import encode  # transformers takes seconds to import

        asked, tokenizer = self.recipe.evaluate, self.parts.tokenizer
        prompts = [encode(tokenizer, prompt) for prompt in asked.prompts]
        ids = trainer.answers(prompts, self.parts.tokenizer_facts, asked.max_new_tokens)
        return list(zip(asked.prompts, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True))

    def _fit(self, session: Session, run: Run) -> int | None:
        """Run the loop; returns the exit status of the signal that ended it, None where it came to its end."""
        ranks, grace = session.trainer, self.recipe.cluster.grace
        with stop_on_signals(run, ranks.end_at_once, lambda status: end_after(grace, ranks.kill, status)):
            if self.recipe.evaluate.at_start and session.progress is None:
                run.evaluate_now(session.trainer)
                if self.recipe.checkpoint.keep_best:
                    run.save(session.trainer, session.source)  # training may never do better
            try:
                fit(session.trainer, session.source, run)
            except RowsError as error:
                run.save(session.trainer, session.source)
                session.trainer.finish_saves()
                raise RowsError(
                    f"{error}\nstep {run.progress.step} is saved: once the row is mended or the recipe drops it, "
                    "start again with checkpoint.allow_changes=true"
                ) from None
            except LostRanks:
                if run.interrupted is None:
                    raise
                # Who ends a host tells its ranks as well; there is nothing to start again for.
                LOG.warning("ranks were lost while the run was ending; the last checkpoint stands")
                return 128 + run.interrupted
            if run.interrupted is not None:
                run.save(session.trainer, session.source)
            session.trainer.finish_saves()  # behind this block a signal ends the run as it is
        if run.interrupted is None:
            return None
        session.console.close()
        session.console.notice(
            f"{run.interrupted.name}: saved step {run.progress.step} of {run.total_steps}; "
            "run the same command again to go on"
        )
        return 128 + run.interrupted

    def _finish(self, session: Session, run: Run) -> Result:
        """Export, summary and report of a run that came to its end."""
        checkpoint, progress, exported = self.recipe.checkpoint, run.progress, None
        if checkpoint.keep_best and progress.best_step not in (None, progress.step):
            best = checkpoint_folder(self.folder.checkpoints, progress.best_step)
            session.trainer.finish_saves()
            _verify(session.trainer, best)
            progress = self._progress = Progress.from_state(session.trainer.load(str(best))["progress"])
        elif progress.step != run.saved_step:
            run.save(session.trainer, session.source)  # a run that goes on from the end of another folder's
        if checkpoint.export != "never":
            target = self.folder.export(progress.step)
            exported = export_model(session.trainer, self.parts, self.recipe, self.folder, progress, target)
        session.trainer.finish_saves()
        if not self.is_alone:
            self._saved_weights = checkpoint_folder(self.folder.checkpoints, progress.step)
        sources = self.parts.corpus.validation
        held_out = {s.name: found for s, found in zip(sources, session.held_out, strict=True)}
        summary = summarise(run, session.source.state_dict(), held_out, exported)
        write_run_report(self.parts, self.folder, session.feed, session.held_out, session.facts, summary)
        self.folder.write_json(self.folder.summary.name, summary)
        session.console.close()
        session.console.facts("finished", result_facts(summary, self.folder))
        for line in dropped_warnings(summary):
            LOG.warning(line)
        return Result(summary, self.folder.path, exported)


def _is_alone(recipe: Recipe) -> bool:
    """Whether the run's trainer is not sharded, and lies in this process."""
    return _is_one_process(recipe) and recipe.parallel.offload != "parameters"


def _is_one_process(recipe: Recipe) -> bool:
    is_on_cpu = recipe.run.device == "cpu" or not torch.cuda.is_available()
    return is_local(recipe.cluster, "cpu" if is_on_cpu else "cuda")


def _pinned(recipe: Recipe, found: Path) -> Recipe:
    """The recipe with the commit of a model of the hub, which was found in the folder `found` of the hub's cache."""
    path = recipe.model.path
    if path is None or Path(path).expanduser().is_dir():
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": found.name})})


def _finish_after_failure(trainer: Rank | RankGroup) -> None:
    """Have a save under way finished where something else ends the run, which is what is raised."""
    try:
        trainer.finish_saves()
    except ClusterError:
        return  # ranks that failed have ended, and their saves with them
    except UserError as error:
        LOG.warning("the save under way failed, too: %s", error)


def _fits(recipe: Recipe, world: int) -> bool:
    try:
        Degrees.of(recipe.parallel, world)
    except RecipeError:
        return False
    return True


def _as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path, model: Any) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | Path):
        return read_recipe(recipe)
    tree = {"data": {}, **recipe}
    if model is not None and "model" not in tree:
        tree["model"] = {"path": getattr(model, "name_or_path", "") or "the model passed in"}
    return recipe_from_dict(tree)


def _tracked(folder: RunFolder) -> tuple[str, int] | None:
    """Which save was the last, and when; None where there was none."""
    tracker = folder.checkpoints / TRACKER
    return (tracker.read_text(), tracker.stat().st_mtime_ns) if tracker.is_file() else None


Find = Callable[[Callable[[Path], object]], Path | None]
"""The checkpoint to go on from, of those in which a function finds no damage; None to start anew."""


def _checkpoint_to_resume(
    folder: RunFolder, how: str, step: int | None, verify: Callable[[Path], object]
) -> Path | None:
    """The checkpoint that `how` (checkpoint.resume) asks for; None to start from the model's own weights.

    A checkpoint elsewhere is where a run begins; once the folder has checkpoints of its own, it goes on from those.
    `verify` is as in `find_checkpoint`.
    """
    own = find_checkpoint(folder.checkpoints, step if how == "auto" else None, verify)
    if how == "auto":
        return own
    if how == "never":
        if own is not None:
            raise RecipeError(
                f"checkpoint.resume=never: run.dir={folder.path} has a checkpoint already; "
                "set another run.dir, or delete that folder"
            )
        return None
    place = Path(how)
    if (place / "state.json").is_file():
        verify(place)
        found = place
    else:
        found = find_checkpoint(place / "checkpoints", step, verify)
    if found is None:
        raise RecipeError(f"checkpoint.resume={how}: neither a checkpoint (iter_...) nor a run folder with one")
    is_own = found.resolve().parent == folder.checkpoints.resolve()
    return found if is_own or own is None else own


def _verify(trainer: Rank | RankGroup, checkpoint: Path) -> None:
    """`verify_checkpoint` by those who train."""
    fault = trainer.fault(str(checkpoint))
    if fault is not None:
        raise damaged(checkpoint, fault)


def _all_trained(length: int, number: int, vocab_size: int) -> Sample:
    """A made-up row of the most costly kind, to see whether memory suffices."""
    tokens = np.random.default_rng(number).integers(0, vocab_size, length).astype(np.int32)
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return Sample(tokens, weights, "memory check", number)
