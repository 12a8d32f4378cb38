"""The trainer of one rank: the verbs of `Trainer` over its part of the model and of the optimizer.

Parameters are the master weights, whole or in shards; how a step runs over them, and over how many ranks, is the
execution's. The loop, the data and the files are elsewhere.
"""

from __future__ import annotations

import difflib
import fnmatch
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from burnish.config import OptimConfig
from burnish.data.order import seed_from
from burnish.model.moe import load_of
from burnish.parallel.execution import Execution, without_noise
from burnish.parallel.weights import publish
from burnish.train.checkpoint import Checkpointer, load_checkpoint, name_of_rank
from burnish.train.loss import CrossEntropy
from burnish.train.optim import States, build_optimizer, learning_rate, scale_gradients
from burnish.train.states import Coded, local_part
from burnish.types import Batch, Loss, Stats, StepInput, UserError, Weighted


class Clock(Protocol):
    """Times a named part of a step: a context manager by name."""

    def __call__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Routing:
    """Weights of the routers' losses, and the step by which a load is made even; all 0 leave routers alone."""

    aux_loss: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.0


@dataclass
class Scorer:
    """Measures what `execution` runs by `loss`, plain negative log-likelihood unless told otherwise; trains nothing."""

    execution: Execution
    loss: Loss = field(default_factory=CrossEntropy)

    def evaluate(self, inputs: StepInput) -> Stats:
        """Statistics over `inputs`, of all ranks; weights and gradients stay as they are."""
        return self.execution.sum(self.execution.evaluate(inputs.batches[0], self.loss))


@dataclass
class LocalTrainer:
    """Trains what `execution` holds: parameters of the master type, in shards where there are several ranks.

    Gradients are added up in `reduce` or the master type, whichever is wider. `clock` times forward_backward and
    optimizer; `neftune_alpha` adds noise drawn from (seed, step, sample). `updates_on_host` keeps the optimizer's state
    in the host's memory.
    """

    execution: Execution
    loss: Loss
    optim: OptimConfig
    total_steps: int
    states: States = "fp32"
    seed: int = 42
    neftune_alpha: float | None = None
    reduce: torch.dtype = torch.float32
    clock: Clock = lambda name: nullcontext()
    routing: Routing = Routing()
    updates_on_host: bool = False
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.device = self.execution.device
        self.parameters = {n: p for n, p in self.execution.parameters().items() if p.requires_grad}
        for parameter in self.parameters.values():
            if not isinstance(parameter, DTensor):
                # Gradients of bf16 masters are added up in more than bf16's eight bits.
                parameter.grad_dtype = torch.promote_types(parameter.dtype, self.reduce)
        self.optimizer = build_optimizer(
            self.parameters,
            self.optim,
            self.states,
            self.seed,
            on_host=self.updates_on_host,
            all_names=self.execution.trained_names(),
        )
        self._checkpointer = Checkpointer()
        self._routers = self.execution.routers()
        for router in self._routers.values():
            router.aux, router.z = self.routing.aux_loss, self.routing.z_loss

    def step(self, inputs: StepInput) -> Stats:
        """One optimizer step; the update is withheld on the device where the loss or the gradient is not finite."""
        step = self.num_steps + 1
        self.zero_grad()
        for router in self._routers.values():
            router.begin(inputs.num_tokens, self.device)
        self._num_tokens = inputs.num_tokens
        with self.clock("forward_backward"):
            stats = self.accumulate(inputs, step)
        with self.clock("optimizer"):
            gradients = {name: local_part(p.grad) for name, p in self.parameters.items() if p.grad is not None}
            grad_norm = self.execution.norm(gradients)
            scale_gradients(list(gradients.values()), grad_norm, self.optim.clip_norm)
            finite = torch.isfinite(grad_norm)
            if stats:
                finite = finite & torch.isfinite(torch.as_tensor(stats["loss"].sum))
            finite = self.execution.all_of(finite)
            rate = learning_rate(self.optim, step, self.total_steps)
            self.optimizer.step(rate, finite.to(self.execution.storage))
            loads = self._balance(finite) if self.execution.is_sparse else {}
            self.execution.after_update()
        self.num_steps = step
        return (
            stats
            | loads
            | {
                "grad_norm": Weighted(grad_norm.detach(), 1.0),
                "lr": Weighted(rate, 1.0),
                "nonfinite_steps": Weighted((~finite).float(), 1.0),
            }
        )

    def _balance(self, finite: torch.Tensor) -> Stats:
        """Correct the routers by the loads of the whole step, and say how even those were, averaged over layers."""
        counts = self.execution.sum_loads({name: r.counts_E.double() for name, r in self._routers.items()})
        for name, router in self._routers.items():
            # A step whose update is withheld changes nothing here either.
            router.update_bias(self.routing.bias_rate, counts[name] * finite)
        sums = {name: torch.stack((r.aux_sum, r.z_sum)).double() for name, r in self._routers.items()}
        own = torch.zeros(5, dtype=torch.float64, device=self.device)
        for name, losses in self.execution.sum_loads(sums).items():
            own += torch.stack((*load_of(counts[name]), *losses, own.new_ones(())))
            self._routers[name].begin(None)
        load_max, unused, aux, z, num_layers = self.execution.everywhere(own)
        loads = {"router_load_max": Weighted(load_max, num_layers), "router_load_unused": Weighted(unused, num_layers)}
        tokens = num_layers * self._num_tokens
        losses = {"router_aux_loss": Weighted(aux, tokens)} if self.routing.aux_loss else {}
        return loads | losses | ({"router_z_loss": Weighted(z, tokens)} if self.routing.z_loss else {})

    def accumulate(self, inputs: StepInput, step: int) -> Stats:
        """Add the gradients of every micro-batch of `step` to the parameters; returns statistics over all ranks."""
        noise_of = partial(self._noise, step) if self.neftune_alpha else without_noise
        batches, denominator = inputs.batches[0], inputs.denominator
        return self.execution.sum(self.execution.forward_backward(batches, self.loss, denominator, noise_of))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.optimizer.zero_grad()

    def _noise(self, step: int, batch: Batch) -> torch.Tensor:
        """NEFTune's noise [T, D]: uniform in +-alpha / sqrt(L*D), drawn anew for each (seed, step, sample)."""
        assert self.neftune_alpha is not None
        size = self.execution.model.config["hidden_size"]
        generator = torch.Generator(self.device)
        parts = [torch.zeros(0, size, device=self.device)]
        for sample in batch.samples:
            # By content, so that neither the pack nor the source's name has a say.
            generator.manual_seed(seed_from(self.seed, step, zlib.crc32(sample.tokens.tobytes()), sample.index) >> 1)
            uniform_LD = torch.rand(len(sample.tokens), size, generator=generator, device=self.device) * 2 - 1
            parts.append(uniform_LD * (self.neftune_alpha / (len(sample.tokens) * size) ** 0.5))
        noise_TD = torch.cat(parts).to(self.execution.compute)
        return nn.functional.pad(noise_TD, (0, 0, 0, batch.num_tokens - len(noise_TD)))

    def rehearse(self, inputs: StepInput) -> None:
        """Forward and backward of the first micro-batch, gradients thrown away: memory shows before step 1."""
        self.accumulate(replace(inputs, batches=[inputs.batches[0][:1]]), 0)
        self.zero_grad()

    def evaluate(self, inputs: StepInput) -> Stats:
        """Statistics over `inputs` with plain negative log-likelihood; weights and gradients stay as they are."""
        return Scorer(self.execution).evaluate(inputs)

    def tensors(self) -> dict[str, torch.Tensor | Coded]:
        """What a resume needs of model and optimizer, by its name in a checkpoint. Tied weights appear once."""
        model = {f"model.{name}": tensor.detach() for name, tensor in self.execution.state().items()}
        return model | {f"optim.{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}

    def prepare_saves(self) -> None:
        """Allocate now what the first save would allocate while training waits for it."""
        self._checkpointer.prepare(self.tensors() | self._of_rank(self._random_states()))

    def save(
        self, folder: str, state: dict[str, Any], keep: int | None = None, protect: Set[int] = frozenset()
    ) -> None:
        """Copy the state of the steps finished so far, and write it below `folder` while training goes on.

        Once it is complete, `retain` deletes what `keep` and `protect` leave out. Raises what the save before came to.
        """
        random = self._random_states()
        own = {"num_steps": self.num_steps, "experts_whole": self.execution.model.is_stored_whole}
        tensors = self.tensors() | self._of_rank(random)
        self._checkpointer.save(folder, self.num_steps, tensors, state | own, keep=keep, protect=protect)

    def finish_saves(self) -> None:
        """Return when the last save is on the disk. Raises CheckpointError where it could not be written."""
        self._checkpointer.wait()

    def load(self, folder: str) -> dict[str, Any]:
        """Continue from the checkpoint in `folder`, whatever layout wrote it; returns the state it was saved with.

        Its files are taken for whole: `verify_checkpoint` comes before.
        """
        self.finish_saves()
        random = self._random_states()
        state = load_checkpoint(folder, self.tensors() | self._of_rank(random), verified=True)
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)
        self.num_steps = state["num_steps"]
        self.execution.after_update()
        return state

    @staticmethod
    def _of_rank(random: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return {name_of_rank(f"rng.{kind}", rank): tensor for kind, tensor in random.items()}

    def _random_states(self) -> dict[str, torch.Tensor]:
        """torch's own random states by device, uint8. Training draws from none of them; what a model brings may."""
        states = {"cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def publish(
        self, take: Callable[[Iterator[tuple[str, torch.Tensor]]], Any], dtype: torch.dtype | None = None
    ) -> Any:
        """What `take` makes of the weights on rank 0: whole, by a checkpoint's names and one after the other.

        As `parallel.weights.publish`.
        """
        return publish(self.execution.stages, take, dtype, self.execution.weight_names())


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> int:
    """Exclude the parameters whose names fit one of the shell patterns from training; returns how many values that is.

    Raises UserError for a pattern that fits none.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(named, pattern)
        if not names:
            near = difflib.get_close_matches(pattern, named, 3, 0.3)
            raise UserError(
                f"model.freeze={pattern} fits no parameter; near names: {', '.join(near) or ', '.join(named)}"
            )
        for name in names:
            named[name].requires_grad_(False)
    return sum(parameter.numel() for parameter in named.values() if not parameter.requires_grad)
