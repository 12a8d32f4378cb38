"""The trainer of one rank: the five verbs over its part of the model and of the optimizer.

Parameters are the master weights, whole or in shards; how a step runs over them, and over how many ranks, is the
execution's. The loop, the data and the files are elsewhere.
"""

from __future__ import annotations

import difflib
import fnmatch
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from burnish.config import OptimConfig
from burnish.data.order import seed_from
from burnish.parallel.execution import Execution, without_noise
from burnish.train.checkpoint import load_checkpoint, read_state, save_checkpoint
from burnish.train.loss import CrossEntropy
from burnish.train.optim import States, build_optimizer, learning_rate, scale_gradients
from burnish.types import Batch, Loss, Stats, StepInput, UserError, Weighted


class Clock(Protocol):
    """Times a named part of a step: a context manager by name."""

    def __call__(self, name: str) -> Any: ...


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
    optimizer; `neftune_alpha` adds noise drawn from (seed, step, sample).
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
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.model, self.device = self.execution.model, self.execution.device
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._shards = {name: _shard_of(parameter) for name, parameter in self.parameters.items()}
        for shard in self._shards.values():
            # Gradients of bf16 masters are added up in more than bf16's eight bits.
            shard.grad_dtype = torch.promote_types(shard.dtype, self.reduce)
        self.optimizer = build_optimizer(self._shards, self.optim, self.states, self.seed)

    def step(self, inputs: StepInput) -> Stats:
        """One optimizer step; the update is withheld on the device where the loss or the gradient is not finite."""
        step = self.num_steps + 1
        self.zero_grad()
        with self.clock("forward_backward"):
            stats = self.accumulate(inputs, step)
        with self.clock("optimizer"):
            shards = self._with_gradients()
            grad_norm = self.execution.norm({name: s.grad for name, s in shards.items() if s.grad is not None})
            scale_gradients(shards.values(), grad_norm, self.optim.clip_norm)
            finite = torch.isfinite(grad_norm)
            if stats:
                finite = finite & torch.isfinite(torch.as_tensor(stats["loss"].sum))
            finite = self.execution.all_of(finite)
            rate = learning_rate(self.optim, step, self.total_steps)
            self.optimizer.step(rate, finite)
        self.num_steps = step
        return stats | {
            "grad_norm": Weighted(grad_norm.detach(), 1.0),
            "lr": Weighted(rate, 1.0),
            "nonfinite_steps": Weighted((~finite).float(), 1.0),
        }

    def accumulate(self, inputs: StepInput, step: int) -> Stats:
        """Add the gradients of every micro-batch of `step` to the parameters; returns statistics over all ranks."""
        noise_of = partial(self._noise, step) if self.neftune_alpha else without_noise
        batches, denominator = inputs.batches[0], inputs.denominator
        return self.execution.sum(self.execution.forward_backward(batches, self.loss, denominator, noise_of))

    def _with_gradients(self) -> dict[str, nn.Parameter]:
        """The shards that the optimizer updates, with the gradients that the parameters have now."""
        for name, parameter in self.parameters.items():
            if isinstance(parameter, DTensor):
                gradient = parameter.grad
                assert gradient is None or isinstance(gradient, DTensor)
                shard = self._shards[name]
                shard.grad = None if gradient is None else gradient.to_local().to(shard.grad_dtype)
        return self._shards

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.optimizer.zero_grad()
        for parameter in self.parameters.values():
            parameter.grad = None

    def _noise(self, step: int, batch: Batch) -> torch.Tensor:
        """NEFTune's noise [T, D]: uniform in +-alpha / sqrt(L*D), drawn anew for each (seed, step, sample)."""
        assert self.neftune_alpha is not None
        size = self.model.config["hidden_size"]
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

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a resume needs that is a tensor, by the name it has in a checkpoint. Tied weights appear once."""
        model = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        optimizer = {f"optim.{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}
        return model | optimizer

    def save(self, folder: str, state: dict[str, Any]) -> None:
        """Write the checkpoint of the steps finished so far below `folder`."""
        random = self._random_states()
        own = {"num_steps": self.num_steps, "random_state_bytes": {kind: len(r) for kind, r in random.items()}}
        tensors = self.tensors() | {f"rng.{kind}": tensor for kind, tensor in random.items()}
        save_checkpoint(folder, self.num_steps, tensors, state | own)

    def load(self, folder: str) -> dict[str, Any]:
        """Continue from the checkpoint in `folder`, whatever device wrote it; returns the state it was saved with."""
        sizes = read_state(folder)["random_state_bytes"]
        random = {kind: torch.empty(size, dtype=torch.uint8) for kind, size in sizes.items()}
        state = load_checkpoint(folder, self.tensors() | {f"rng.{kind}": tensor for kind, tensor in random.items()})
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)
        self.num_steps = state["num_steps"]
        return state

    def _random_states(self) -> dict[str, torch.Tensor]:
        """torch's own random states by device, uint8. Training draws from none of them; what a model brings may."""
        states = {"cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def publish(self) -> Mapping[str, torch.Tensor]:
        """The master weights by their Hugging Face names."""
        return dict(self.model.named_parameters())


def _shard_of(parameter: nn.Parameter) -> nn.Parameter:
    """What of a parameter lies on this rank, in the same memory."""
    if not isinstance(parameter, DTensor):
        return parameter
    whole = parameter.detach()
    assert isinstance(whole, DTensor)
    return nn.Parameter(whole.to_local())


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
