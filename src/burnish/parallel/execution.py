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

from burnish.model.base import CausalLM
from burnish.model.lm_head import score
from burnish.parallel.cp import ContextParallel, cut_tokens, pad
from burnish.parallel.fsdp import Sharding
from burnish.parallel.mesh import Mesh
from burnish.parallel.tp import VocabularyParallel
from burnish.types import Batch, Stats, TokenScores, Weighted

LossOf = Callable[[TokenScores, Batch], tuple[Tensor, Stats]]
NoiseOf = Callable[[Batch], Tensor | None]
"""What is added to the embeddings of a batch, [T, D]; None adds nothing."""


def merge(left: Stats, right: Stats) -> Stats:
    """The statistics of both, weighted values added."""
    return {
        name: left[name] + right[name] if name in left and name in right else (left | right)[name]
        for name in left | right
    }


def without_noise(batch: Batch) -> None:
    """No noise for any batch."""


@dataclass
class Execution:
    """One process: the micro-batches one after the other, each over the whole model, computing in `compute`."""

    model: CausalLM
    compute: torch.dtype
    device: torch.device

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
    """The ranks of a mesh, each with its shards of the model and its part of every batch."""

    mesh: Mesh
    sharding: Sharding
    context: ContextParallel | None = None
    """How packs are cut over cp ranks; None where there is one."""
    vocabulary: VocabularyParallel | None = None
    """How the head is cut over tp ranks; None where there is one."""

    def __post_init__(self) -> None:
        stage_world = dist.get_world_size() // self.mesh.degrees.pp
        self._copies = {name: stage_world / _num_shards(p) for name, p in self.model.named_parameters()}
        """Ranks that hold the same shard of a parameter."""

    def weights(self) -> AbstractContextManager[None]:
        return nullcontext()  # FSDP2 casts what it gathers

    def place(self, batch: Batch) -> Batch:
        multiple = 1 if self.context is None else self.context.multiple
        if self.vocabulary is not None and self.vocabulary.sequence_parallel:
            multiple *= self.mesh.degrees.tp
        padded = pad(batch, multiple)
        return (padded if self.context is None else self.context.cut(padded)).to(self.device)

    def scores(self, hidden_TD: Tensor, batch: Batch) -> TokenScores:
        if self.vocabulary is None:
            return super().scores(hidden_TD, batch)
        hidden_KD = self.vocabulary.gather(hidden_TD)[batch.trained_K]
        return self.vocabulary.score(hidden_KD, self.model.head(), batch.targets_K)

    def _hidden(self, batch: Batch, noise_TD: Tensor | None) -> Tensor:
        if noise_TD is not None:
            noise_TD = cut_tokens(noise_TD, batch.documents)
            noise_TD = noise_TD if self.vocabulary is None else self.vocabulary.cut(noise_TD)
        return super()._hidden(batch, noise_TD)

    def _begin(self, is_last: bool) -> None:
        self.sharding.begin(is_last)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], loss_of: LossOf) -> Stats:
        stats = super().evaluate(batches, loss_of)
        self.sharding.reshard()
        return stats

    def sum(self, stats: Stats) -> Stats:
        names = sorted(stats)
        pairs = torch.tensor(
            [[float(stats[name].sum), float(stats[name].weight)] for name in names],
            dtype=torch.float64,
            device=self.device,
        )
        for axis in ("shard", "dp_replicate"):
            dist.all_reduce(pairs, group=self.mesh.group(axis))
        return {name: Weighted(*pair) for name, pair in zip(names, pairs.unbind(), strict=True)}

    def all_of(self, flag: Tensor) -> Tensor:
        number = flag.float()
        dist.all_reduce(number, op=dist.ReduceOp.MIN)
        return number.bool()

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        squares = [
            global_norm([gradient]).double().square() / self._copies[name]
            for name, gradient in gradients.items()
            if gradient.numel()
        ]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=self.device)
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
