"""A rank of a run: its part of the model, and all that is asked of it; and the same asked of many ranks at once.

`Rank` works where it is. `RankGroup` has the same verbs, carried out by a `Rank` in every process of a cluster; the
driver then holds no weights, and what travels to a rank are the packs of its data rank.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from burnish.cluster.phases import phase
from burnish.cluster.ranks import Place, Ranks
from burnish.components import Components, RankComponents
from burnish.config import Recipe
from burnish.data.pack import Layout, Packs
from burnish.model.vocabulary import TokenizerFacts
from burnish.observe.metrics import Stopwatch, fetched, memory_of
from burnish.observe.units import count_text
from burnish.parallel import weights
from burnish.parallel.degrees import Degrees
from burnish.parallel.mesh import Mesh
from burnish.recipe import recipe_from_dict
from burnish.train.checkpoint import fault_of, load_checkpoint
from burnish.train.loss import CrossEntropy
from burnish.train.optim import DTYPES
from burnish.train.trainer import Clock, LocalTrainer, Routing, Scorer
from burnish.types import Stats, StepInput, UserError, Weighted

LOG = logging.getLogger(__name__)


class Rank:
    """One rank, which has what `parts` open; `trainer` is there once `prepare` was called."""

    degrees = Degrees()
    world_size = 1

    def __init__(self, parts: Components) -> None:
        self.parts = parts
        self.trainer: LocalTrainer | None = None

    @property
    def _trainer(self) -> LocalTrainer:
        assert self.trainer is not None, "prepare comes first"
        return self.trainer

    def attention(self) -> str:
        """The attention kernel, in words."""
        return self.parts.loaded.attention

    def row_reason(self) -> str | None:
        """Why the model runs one document a row; None where it runs packs."""
        return self.parts.execution.model.row_reason

    def leak(self) -> str | None:
        """How documents of a pack see each other in the real model; None where they do not."""
        return self.parts.leak()

    def run_rows(self, reason: str) -> None:
        """From now on run one document a row."""
        self.parts.execution.model.run_rows(reason)

    def device_name(self) -> str:
        """What torch calls the device: NVIDIA H100 80GB HBM3, or cpu."""
        device = self.parts.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

    def memory(self) -> dict[str, float]:
        """As of `observe.metrics.memory_of`; of several ranks the largest of each."""
        return memory_of(self.parts.device.type)

    def prepare(self, total_steps: int, clock: Clock | None = None, checkpoint: str | None = None) -> None:
        """Make the trainer of a run of `total_steps` steps, as `checkpoint` left it; `clock` times its parts."""
        recipe = self.parts.recipe
        self.trainer = LocalTrainer(
            execution=self.parts.execution,
            loss=CrossEntropy(recipe.train.label_smoothing, recipe.train.z_loss),
            optim=recipe.optim,
            total_steps=total_steps,
            states=recipe.precision.states,
            seed=recipe.run.seed,
            neftune_alpha=recipe.train.neftune_alpha,
            reduce=DTYPES[recipe.precision.reduce],
            routing=Routing(recipe.train.router_aux_loss, recipe.train.router_z_loss, recipe.train.router_bias_rate),
            updates_on_host=recipe.parallel.offload == "optimizer",
            clock=clock or (lambda name: nullcontext()),
        )
        self.trainer.prepare_saves()
        if checkpoint is not None:
            self.load(checkpoint)

    def step(self, inputs: StepInput) -> Stats:
        """One optimizer step, on the first data rank's batches of `inputs`."""
        return self._trainer.step(inputs)

    def rehearse(self, inputs: StepInput, longest: int) -> None:
        """Forward and backward of the first micro-batch, of rows of `longest` tokens, gradients thrown away.

        Raises UserError where the device's memory does not suffice.
        """
        try:
            self._trainer.rehearse(inputs)
        except torch.OutOfMemoryError as error:
            budget = self.parts.recipe.batch.tokens_per_micro_batch
            raise UserError(
                f"a full micro-batch of {budget} tokens in rows of {longest} does not fit into the device's memory; "
                "lower batch.tokens_per_micro_batch, or set train.recompute to selective or full, or precision.states "
                f"to bf16 or int8 ({str(error).splitlines()[0]})"
            ) from None

    def evaluate(self, inputs: StepInput) -> Stats:
        """Statistics over `inputs` with plain negative log-likelihood."""
        return Scorer(self.parts.execution).evaluate(inputs)

    def save(
        self, folder: str, state: dict[str, Any], keep: int | None = None, protect: Set[int] = frozenset()
    ) -> None:
        """As `LocalTrainer.save`."""
        self._trainer.save(folder, state, keep, protect)

    def finish_saves(self) -> None:
        """Return when the last save is on the disk."""
        if self.trainer is not None:
            self.trainer.finish_saves()

    def fault(self, checkpoint: str) -> str | None:
        """What is wrong with the files of a checkpoint, of which each rank reads a share; None where they are whole."""
        fault = fault_of(checkpoint)
        if fault is None:
            phase(f"checkpoint verified: {Path(checkpoint).name}")
        return fault

    def load(self, folder: str) -> dict[str, Any]:
        """Continue from a checkpoint that is whole; returns the state it was saved with."""
        state = self._trainer.load(folder)
        phase(f"checkpoint loaded: {Path(folder).name}")
        return state

    def load_weights(self, folder: Path) -> dict[str, Any]:
        """Take the weights alone of a checkpoint; returns the state it was saved with."""
        execution = self.parts.execution
        into = {f"model.{name}": tensor.detach() for name, tensor in execution.state().items()}
        state = load_checkpoint(folder, into, prefix="model.")
        execution.after_update()
        return state

    def kill(self) -> None:
        """There is no process beside this one."""

    def end_at_once(self, status: int) -> NoReturn:
        """End the run as it is, now."""
        self.kill()
        os._exit(status)

    def publish(self, take: Callable[[Iterator[tuple[str, Tensor]]], Any], dtype: torch.dtype | None = None) -> Any:
        """As `LocalTrainer.publish`."""
        return self._trainer.publish(take, dtype)

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """Write config.json and weights, or an adapter, into an existing folder, which rank 0 sees."""
        execution, lora = self.parts.execution, self.parts.recipe.lora
        if lora is not None and not lora.merge:
            base = self.parts.recipe.model.path
            weights.export_adapter(execution.stages, folder, dtype, base)
        else:
            weights.export(execution.stages, folder, dtype, execution.weight_names())

    def answers(
        self, prompts: Sequence[Sequence[int]], tokenizer: TokenizerFacts, max_new_tokens: int
    ) -> list[list[int]]:
        """The ids of a greedy answer to each prompt, which are ids too; `tokenizer` says what ends one."""
        from burnish.generate import as_hf_model, continue_all  # transformers takes seconds to import

        return continue_all(as_hf_model(self.parts.execution.model), tokenizer, prompts, max_new_tokens)


def answering_device(device: torch.device, num_bytes: int) -> torch.device:
    """Where a whole model of that size answers: on `device`, or on the host where it does not fit beside the rest."""
    if device.type != "cuda":
        return device
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if num_bytes <= ANSWERING_SHARE * free:
        return device
    LOG.warning(
        "answering evaluate.prompts on the host, which is slow: the whole model takes %.1f GiB, and %s has %.1f free",
        num_bytes / 2**30,
        device,
        free / 2**30,
    )
    return torch.device("cpu")


ANSWERING_SHARE = 0.9
"""What of the free memory the weights of a model that answers may take; the rest is for keys and values."""


class SeatedRank(Rank):
    """A rank in a process of its own, which gets packs and gives numbers.

    `folder` is that of the run, `found` the one that the driver found the model in.
    """

    parts: RankComponents

    def __init__(self, place: Place, recipe: dict[str, Any], folder: str, found: str | None = None) -> None:
        checked = recipe_from_dict(recipe)
        mesh = Mesh(Degrees.of(checked.parallel, place.world_size), torch.device(place.device))
        parts = RankComponents(checked, Path(folder), mesh=mesh, found=None if found is None else Path(found))
        self._held = ExitStack()  # to the end of this process
        self._held.enter_context(parts.determinism())
        super().__init__(parts)
        self._stopwatch = Stopwatch(parts.device.type)
        self._whole: Any = None
        phase("modules imported, mesh")
        held = sum(weights.local_part(p)[0].numel() for p in parts.execution.parameters().values())
        phase(f"weights loaded: {count_text(held)} of {count_text(parts.loaded.num_parameters)} parameters")

    def prepare(self, total_steps: int, clock: Clock | None = None, checkpoint: str | None = None) -> None:
        """As of any rank; times are told with a step's statistics."""
        super().prepare(total_steps, clock or self._stopwatch, checkpoint)
        phase("ready")

    def step_packs(self, packs: Mapping[str, Any]) -> tuple[Numbers | None, dict[str, float]]:
        """`step` of what `packed` made: statistics, where this rank has them, and the seconds of its parts."""
        return self._numbers(self.step(unpacked(packs))), self._stopwatch.take()

    def rehearse_packs(self, longest: int, packs: Mapping[str, Any]) -> None:
        """`rehearse` of what `packed` made."""
        self.rehearse(unpacked(packs), longest)

    def evaluate_packs(self, packs: Mapping[str, Any]) -> Numbers | None:
        """`evaluate` of what `packed` made."""
        return self._numbers(self.evaluate(unpacked(packs)))

    def _numbers(self, stats: Stats) -> Numbers | None:
        return fetched(stats) if "loss" in stats else None

    def gather_model(self) -> None:
        """Make the whole model on rank 0, in the compute type, from what all ranks hold; `answers` needs it."""
        from burnish.generate import as_hf_model

        execution, compute = self.parts.execution, self.parts.compute
        device = self.parts.device
        if dist.get_rank() == 0:
            device = answering_device(device, self.parts.loaded.num_parameters * compute.itemsize)
        whole = weights.gather_full(execution.stages, compute, device)
        if dist.get_rank() == 0:
            self._whole = as_hf_model(execution.whole, whole)

    def answers(
        self, prompts: Sequence[Sequence[int]], tokenizer: TokenizerFacts, max_new_tokens: int
    ) -> list[list[int]]:
        """As of any rank, of the model that `gather_model` made; on other ranks than 0 none."""
        from burnish.generate import continue_all

        return [] if self._whole is None else continue_all(self._whole, tokenizer, prompts, max_new_tokens)

    def drop_model(self) -> None:
        """Give back what `gather_model` took."""
        self._whole = None


Numbers = dict[str, tuple[float, float]]
"""Statistics by name, as sum and weight."""


def packed(inputs: StepInput) -> list[dict[str, Any]]:
    """What each data rank needs of a step, in few arrays."""
    facts = {
        name: getattr(inputs, name)
        for name in ("denominator", "num_samples", "num_tokens", "num_trained_tokens", "capacity", "num_padding")
    }
    packs = []
    for rank in inputs.batches:
        assert isinstance(rank, Packs)
        packs.append({**rank.flat(), **facts})
    return packs


def unpacked(packs: Mapping[str, Any]) -> StepInput:
    """The step again, of one data rank."""
    facts = {
        name: packs[name]
        for name in ("denominator", "num_samples", "num_tokens", "num_trained_tokens", "capacity", "num_padding")
    }
    return StepInput(batches=[Packs.of_flat(packs)], samples=(), **facts)


@dataclass
class RankGroup:
    """Many ranks behind the verbs of one; the loop's trainer where there are several processes."""

    ranks: Ranks
    degrees: Degrees
    _stopwatch: Stopwatch | None = None

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @cached_property
    def _data_ranks(self) -> list[int]:
        return [self.degrees.data_rank(rank) for rank in range(self.degrees.world)]

    def _call_with(self, method: str, inputs: StepInput, *args: Any) -> list[Any]:
        packs = packed(inputs)
        return self.ranks.call(method, *args, by_rank=[packs[data_rank] for data_rank in self._data_ranks])

    @staticmethod
    def _stats(found: Sequence[Numbers | None]) -> Stats:
        numbers = next(numbers for numbers in found if numbers is not None)
        return {name: Weighted(*pair) for name, pair in numbers.items()}

    def kill(self) -> None:
        self.ranks.kill()

    def end_at_once(self, status: int) -> NoReturn:
        self.kill()
        os._exit(status)

    def attention(self) -> str:
        return self.ranks.call("attention")[0]

    def row_reason(self) -> str | None:
        return self.ranks.call("row_reason")[0]

    def leak(self) -> str | None:
        return next((reason for reason in self.ranks.call("leak") if reason is not None), None)

    def run_rows(self, reason: str) -> None:
        self.ranks.call("run_rows", reason)

    def device_name(self) -> str:
        return self.ranks.call("device_name")[0]

    def memory(self) -> dict[str, float]:
        found = self.ranks.call("memory")
        return {name: max(of_rank[name] for of_rank in found) for name in found[0]}

    def prepare(self, total_steps: int, stopwatch: Stopwatch | None = None, checkpoint: str | None = None) -> None:
        """As of a rank; `stopwatch` is told of each part of a step how long it took the slowest rank."""
        self._stopwatch = stopwatch
        self.ranks.call("prepare", total_steps, None, None if checkpoint is None else _everywhere(checkpoint))
        phase("every rank ready")

    def step(self, inputs: StepInput) -> Stats:
        numbers, times = zip(*self._call_with("step_packs", inputs), strict=True)
        if self._stopwatch is not None:
            for name in times[0]:
                self._stopwatch.add(name, max(of_rank[name] for of_rank in times))
        return self._stats(numbers)

    def rehearse(self, inputs: StepInput, longest: int) -> None:
        self._call_with("rehearse_packs", inputs, longest)

    def evaluate(self, inputs: StepInput) -> Stats:
        return self._stats(self._call_with("evaluate_packs", inputs))

    def save(
        self, folder: str, state: dict[str, Any], keep: int | None = None, protect: Set[int] = frozenset()
    ) -> None:
        self.ranks.call("save", _everywhere(folder), state, keep, protect)

    def finish_saves(self) -> None:
        self.ranks.call("finish_saves")

    def fault(self, checkpoint: str) -> str | None:
        return self.ranks.call("fault", _everywhere(checkpoint))[0]

    def load(self, folder: str) -> dict[str, Any]:
        return self.ranks.call("load", _everywhere(folder))[0]

    def load_weights(self, folder: Path) -> dict[str, Any]:
        return self.ranks.call("load_weights", Path(_everywhere(folder)))[0]

    def publish(self, take: Callable[[Iterator[tuple[str, Tensor]]], Any], dtype: torch.dtype | None = None) -> Any:
        return self.ranks.call("publish", take, dtype)[0]

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        self.ranks.call("export", Path(_everywhere(folder)), dtype)

    def answers(
        self, prompts: Sequence[Sequence[int]], tokenizer: TokenizerFacts, max_new_tokens: int
    ) -> list[list[int]]:
        """As of a rank, in calls of few prompts: while rank 0 answers those, the others wait for the next call."""
        from burnish.generate import BATCH_SIZE

        self.ranks.call("gather_model")
        answers: list[list[int]] = []
        for start in range(0, len(prompts), BATCH_SIZE):
            few = prompts[start : start + BATCH_SIZE]
            answers += self.ranks.call("answers", few, tokenizer, max_new_tokens)[0]
        self.ranks.call("drop_model")
        return answers


def _everywhere(folder: str | Path) -> str:
    """A path as ranks understand it, whose working directory may be another."""
    return str(Path(folder).resolve())


def choose_layout(recipe: Recipe, rank: Rank | RankGroup) -> Layout:
    """How steps are cut: packed where the probe proves that documents cannot see each other, else a document a row."""
    budget, packing, data_ranks = recipe.batch.tokens_per_micro_batch, recipe.batch.packing, rank.degrees.data_ranks
    if packing == "off":
        return Layout(budget, data_ranks, "single" if rank.row_reason() is None else "rows")
    reason = rank.row_reason() or rank.leak()
    if reason is None:
        return Layout(budget, data_ranks)
    if packing == "require":
        raise UserError(
            f"batch.packing=require: {reason}; set it to auto to train one document a row, or try another "
            "model.attention or model.implementation"
        )
    LOG.warning("training one document a row, not packed: %s", reason)
    rank.run_rows(reason)
    return Layout(budget, data_ranks, "rows")


def evaluation_layout(recipe: Recipe, layout: Layout) -> Layout:
    """How held-out rows are cut where steps are cut as `layout` says."""
    budget = recipe.evaluate.tokens_per_micro_batch or recipe.batch.tokens_per_micro_batch
    return replace(layout, tokens_per_micro_batch=budget)
