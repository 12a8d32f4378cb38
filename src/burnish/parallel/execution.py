"""How the micro-batches of a step run over a model: in one process, or on the ranks of a mesh.

What differs between layouts of one step stands here and is passed to the trainer; the trainer asks for no layout.
Shape suffixes: T tokens of a pack, D hidden size, K trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from burnish.model.base import CausalLM, saved_buffers
from burnish.model.hf_io import named_weights
from burnish.model.lm_head import score
from burnish.model.lora import without_base
from burnish.model.moe import Router, routers_of
from burnish.parallel.cp import ContextParallel, cut_tokens, pad
from burnish.parallel.fsdp import Sharding
from burnish.parallel.mesh import Mesh
from burnish.parallel.pp import PipelineEngine, fill_up, own_parameters
from burnish.parallel.tp import VocabularyParallel
from burnish.types import Batch, Stats, TokenScores, Weighted, merge

LossOf = Callable[[TokenScores, Batch], tuple[Tensor, Stats]]
NoiseOf = Callable[[Batch], Tensor | None]
"""What is added to the embeddings of a batch, [T, D]; None adds nothing."""


def without_noise(batch: Batch) -> None:
    """No noise for any batch."""


@dataclass
class Execution:
    """One process: the micro-batches one after the other, each over the whole model, computing in `compute`."""

    model: CausalLM
    compute: torch.dtype
    device: torch.device

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters on this rank, each of which it updates, by name."""
        return dict(self.model.named_parameters())

    def trained_names(self) -> list[str]:
        """The names of the parameters that are trained on any rank."""
        return [name for name, parameter in self._all_layers().named_parameters() if parameter.requires_grad]

    def weight_names(self) -> list[str]:
        """The names of the whole model's weights in order, those of adapters aside."""
        return list(named_weights(self._all_layers()))

    def _all_layers(self) -> CausalLM:
        """The model with the layers of all ranks, for its names; it may be on meta."""
        return self.model

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model on this rank, by name: parameters, but not those of a base that only
        adapters are trained beside, and persistent buffers."""
        return without_base(self.model, self.parameters() | saved_buffers(self.model))

    @property
    def is_sparse(self) -> bool:
        """Whether any layer of the model has experts."""
        return bool(routers_of(self._all_layers()))

    def routers(self) -> dict[str, Router]:
        """The routers of this rank's layers, by the names of those."""
        return {name: router for model in self.stages for name, router in routers_of(model).items()}

    @property
    def storage(self) -> torch.device:
        """Where parameters and their gradients lie between steps."""
        return self.device

    @property
    def stages(self) -> list[CausalLM]:
        """The parts of the model on this rank, in order."""
        return [self.model]

    def sum_loads(self, loads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of tensors by layer, each added up over the ranks that route other tokens."""
        return dict(loads)

    def everywhere(self, values: Tensor) -> Tensor:
        """Values of this rank's layers, added up over the parts of the model."""
        return values

    def after_update(self) -> None:
        """Comes after every change of the weights by other means than a forward or backward."""

    def weights(self) -> AbstractContextManager[None]:
        """A context in which a forward of the model takes weights of the compute type; gradients reach the masters."""
        return cast_parameters(self.model, self.compute)

    def place(self, batch: Batch) -> Batch:
        """This rank's part of a batch of its data rank, on the device."""
        return batch.to(self.device)

    def scores(self, hidden_TD: Tensor, batch: Batch) -> TokenScores:
        """Scores of the trained tokens of a placed batch, by the hidden states of all of its tokens."""
        return score(hidden_TD[batch.trained_K], self.model.head(), batch.targets_K)

    def forward_backward(
        self, batches: Sequence[Batch], loss_of: LossOf, denominator: float, noise_of: NoiseOf = without_noise
    ) -> Stats:
        """Add to the parameters' gradients those of the summed loss of `batches`, divided by `denominator`.

        Returns the sum of the batches' statistics on this rank.
        """
        stats: Stats = {}
        with self.weights():
            for number, whole in enumerate(batches):
                self._begin(is_last=number == len(batches) - 1)
                batch = self.place(whole)
                loss_sum, of_batch = loss_of(self.scores(self._hidden(batch, noise_of(whole)), batch), batch)
                (loss_sum / denominator).backward()
                stats = merge(stats, of_batch)
        return stats

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], loss_of: LossOf) -> Stats:
        """The sum of the batches' statistics on this rank; weights and gradients stay as they are."""
        stats: Stats = {}
        with self.weights():
            for whole in batches:
                batch = self.place(whole)
                stats = merge(stats, loss_of(self.scores(self._hidden(batch, None), batch), batch)[1])
        return stats

    def _begin(self, is_last: bool) -> None:
        """Comes before each micro-batch of a step."""

    def _hidden(self, batch: Batch, noise_TD: Tensor | None) -> Tensor:
        return self.model(batch.tokens_T, batch.positions_T, batch.documents, noise_TD)

    def sum(self, stats: Stats) -> Stats:
        """Statistics over all ranks."""
        return stats

    def all_of(self, flag: Tensor) -> Tensor:
        """Whether the 0-dim bool `flag` holds on every rank."""
        return flag

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The L2 norm of this rank's `gradients` (local shards, by parameter) and those of all others, 0-dim."""
        return global_norm(gradients.values())


@dataclass
class MeshExecution(Execution):
    """The ranks of a mesh, each with its shards of the model and its part of every batch.

    `model` is the first of this rank's parts of a pipeline, or all of the model; `whole` is that on meta, for its names
    and shapes. `context` and `vocabulary` say how packs are cut over cp ranks and the head over tp ranks, `pipeline`
    how micro-batches go through the parts; each is None where there is one rank.
    """

    mesh: Mesh
    sharding: Sharding
    whole: CausalLM
    context: ContextParallel | None = None
    vocabulary: VocabularyParallel | None = None
    pipeline: PipelineEngine | None = None

    @property
    def stages(self) -> list[CausalLM]:
        """The parts of the model on this rank."""
        return [self.model] if self.pipeline is None else list(self.pipeline.stages.values())

    def _all_layers(self) -> CausalLM:
        return self.whole

    @property
    def storage(self) -> torch.device:
        return torch.device("cpu") if self.sharding.is_offloaded else self.device

    def parameters(self) -> dict[str, nn.Parameter]:
        return super().parameters() if self.pipeline is None else own_parameters(self.pipeline.stages)

    def state(self) -> dict[str, Tensor]:
        buffers = {name: buffer for model in self.stages for name, buffer in saved_buffers(model).items()}
        return without_base(self.model, self.parameters() | buffers)

    def sum_loads(self, loads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not loads:
            return {}
        table = torch.stack(list(loads.values()))
        for axis in ("shard", "dp_replicate", "tp") if self._cuts_residuals else ("shard", "dp_replicate"):
            dist.all_reduce(table, group=self.mesh.group(axis))
        return dict(zip(loads, table.unbind(), strict=True))

    def everywhere(self, values: Tensor) -> Tensor:
        if self.mesh.degrees.pp > 1:
            dist.all_reduce(values, group=self.mesh.group("pp"))
        return values

    def after_update(self) -> None:
        if self.pipeline is not None:
            self.pipeline.refresh_tied()

    def weights(self) -> AbstractContextManager[None]:
        return nullcontext()  # FSDP2 casts what it gathers

    @property
    def _multiple(self) -> int:
        """What the number of tokens of a pack must be a multiple of."""
        multiple = 1 if self.context is None else self.context.multiple
        return multiple * self.mesh.degrees.tp if self._cuts_residuals else multiple

    @property
    def _cuts_residuals(self) -> bool:
        return self.vocabulary is not None and self.vocabulary.sequence_parallel

    def place(self, batch: Batch) -> Batch:
        padded = pad(batch, self._multiple)
        return (padded if self.context is None else self.context.cut(padded)).to(self.device)

    def rows(self, batch: Batch) -> int:
        """How many rows a placed batch's hidden states have between blocks."""
        return len(batch.tokens_T) // (self.mesh.degrees.tp if self._cuts_residuals else 1)

    def scores(self, hidden_TD: Tensor, batch: Batch) -> TokenScores:
        last = self.model if self.pipeline is None else self.pipeline.last
        assert last is not None, "this rank has no head"
        if self.vocabulary is None:
            return score(hidden_TD[batch.trained_K], last.head(), batch.targets_K)
        hidden_KD = self.vocabulary.gather(hidden_TD)[batch.trained_K]
        return self.vocabulary.score(hidden_KD, last.head(), batch.targets_K)

    def forward_backward(
        self, batches: Sequence[Batch], loss_of: LossOf, denominator: float, noise_of: NoiseOf = without_noise
    ) -> Stats:
        if self.pipeline is None:
            return super().forward_backward(batches, loss_of, denominator, noise_of)
        wholes = fill_up(batches, self.pipeline.parallel, self._multiple)
        placed = [self.place(batch) for batch in wholes]
        return self.pipeline.forward_backward(
            placed,
            lambda hidden_TD, batch: loss_of(self.scores(hidden_TD, batch), batch),
            denominator,
            lambda number: self._own_noise(noise_of(wholes[number]), placed[number]),
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], loss_of: LossOf) -> Stats:
        if self.pipeline is None:
            stats = super().evaluate(batches, loss_of)
            self.sharding.reshard()
            return stats
        placed = [self.place(batch) for batch in fill_up(batches, self.pipeline.parallel, self._multiple)]
        return self.pipeline.evaluate(placed, lambda hidden_TD, batch: loss_of(self.scores(hidden_TD, batch), batch))

    def _hidden(self, batch: Batch, noise_TD: Tensor | None) -> Tensor:
        return super()._hidden(batch, self._own_noise(noise_TD, batch))

    def _own_noise(self, noise_TD: Tensor | None, batch: Batch) -> Tensor | None:
        """Of the noise of a whole pack that of this rank's tokens."""
        if noise_TD is None:
            return None
        here_TD = cut_tokens(noise_TD, batch.documents)
        return here_TD if self.vocabulary is None else self.vocabulary.cut(here_TD)

    def _begin(self, is_last: bool) -> None:
        self.sharding.begin(is_last)

    def sum(self, stats: Stats) -> Stats:
        names = sorted(stats)
        values = [value for name in names for value in (stats[name].sum, stats[name].weight)]
        # What is on the device stays there, and what is not is sent at once: the host waits for nothing.
        known = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in values], dtype=torch.float64)
        pairs = known.to(self.device)
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                pairs[index] = value.detach()
        pairs = pairs.unflatten(0, (len(names), 2))
        for axis in ("shard", "dp_replicate"):
            dist.all_reduce(pairs, group=self.mesh.group(axis))
        return {name: Weighted(*pair) for name, pair in zip(names, pairs.unbind(), strict=True)}

    def all_of(self, flag: Tensor) -> Tensor:
        number = flag.to(self.device, torch.float32)
        dist.all_reduce(number, op=dist.ReduceOp.MIN)
        return number.bool()

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        stage_world = dist.get_world_size() // self.mesh.degrees.pp
        parameters = self.parameters()
        squares = [
            # Each shard counts once, however many ranks hold it.
            global_norm([gradient]).double().square() * _num_shards(parameters[name]) / stage_world
            for name, gradient in gradients.items()
            if gradient.numel()
        ]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        total = total.to(self.device)
        dist.all_reduce(total)
        return total.sqrt()


def _num_shards(parameter: Tensor) -> int:
    """Into how many pieces a parameter is cut over the ranks of its mesh."""
    if not isinstance(parameter, DTensor):
        return 1
    number = 1
    for axis, placement in enumerate(parameter.placements):
        if not placement.is_replicate():  # a strided shard is none by is_shard()
            number *= parameter.device_mesh.size(axis)
    return number


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all of `tensors` together: 0-dim, fp32, or fp64 where one of them is."""
    tensors = list(tensors)
    if not tensors:
        return torch.zeros(())
    dtype = torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors) else torch.float32
    if tensors[0].device.type == "cpu":
        # The CPU kernel adds up in sequence: 0.5 % short on 60 million fp32 values, 2e-7 in pieces of this size.
        tensors = [piece for tensor in tensors for piece in tensor.reshape(-1).split(2**16)]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors]))


@contextmanager
def cast_parameters(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, each parameter of another type is replaced by a copy in `dtype`; backward must run within, too.

    Backward included, because recomputed blocks read the parameters again. A tied parameter has one copy.
    """
    slots = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype != dtype and parameter.is_floating_point()
    ]
    copies = {parameter: parameter.to(dtype) for parameter in dict.fromkeys(p for _, _, p in slots)}
    for module, name, parameter in slots:
        module._parameters[name] = copies[parameter]  # pyright: ignore[reportArgumentType] - a tensor stands in
    try:
        yield
    finally:
        for module, name, parameter in slots:
            module._parameters[name] = parameter
