"""The trainer of a world of one process: the five verbs over one model, one optimizer and one device.

Parameters are the master weights; around every forward and backward a copy in the compute type stands in their place,
so that gradients arrive in the master's type whatever runs in between. The loop, the data and the files are elsewhere.
"""

from __future__ import annotations

import difflib
import fnmatch
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from burnish.config import OptimConfig
from burnish.data.order import seed_from
from burnish.model.lm_head import score
from burnish.train.checkpoint import load_checkpoint, read_state, save_checkpoint
from burnish.train.loss import CrossEntropy
from burnish.train.optim import States, build_optimizer, clip_gradients, learning_rate
from burnish.types import Batch, Loss, Sample, Stats, StepInput, TokenScores, UserError, Weighted


class Clock(Protocol):
    """Times a named part of a step: a context manager by name."""

    def __call__(self, name: str) -> Any: ...


@dataclass
class Scorer:
    """Scores packs with `model` on `device`, computing in `compute`: what training and evaluation share."""

    model: Any
    compute: torch.dtype
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    loss: Loss = field(default_factory=CrossEntropy)

    def scores(self, batch: Batch, noise_TD: torch.Tensor | None = None) -> TokenScores:
        """Scores of the trained tokens of a batch on the device. Call it within `compute_parameters`."""
        hidden_TD = self.model(batch.tokens_T, batch.positions_T, batch.documents, noise_TD)
        return score(hidden_TD[batch.trained_K], self.model.head(), batch.targets_K)

    def compute_parameters(self) -> AbstractContextManager[None]:
        """A context in which the model's parameters are of the compute type and pass gradients to the masters."""
        return cast_parameters(self.model, self.compute)

    @torch.no_grad()
    def evaluate(self, inputs: StepInput) -> Stats:
        """Statistics over `inputs`; weights and gradients stay as they are."""
        stats: Stats = {}
        with self.compute_parameters():
            for micro in inputs.batches[0]:
                batch = micro.to(self.device)
                stats = merge(stats, self.loss(self.scores(batch), batch)[1])
        return stats


@dataclass
class LocalTrainer:
    """Trains the model of `scorer`, whose parameters are of the master type and on its device.

    Gradients are added up in `reduce` or the master type, whichever is wider. `clock` times forward_backward and
    optimizer; `neftune_alpha` adds noise drawn from (seed, step, sample).
    """

    scorer: Scorer
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
        self.model, self.device = self.scorer.model, self.scorer.device
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for parameter in self.parameters.values():
            # Gradients of bf16 masters are added up in more than bf16's eight bits.
            parameter.grad_dtype = torch.promote_types(parameter.dtype, self.reduce)
        self.optimizer = build_optimizer(self.parameters, self.optim, self.states, self.seed)

    def step(self, inputs: StepInput) -> Stats:
        """One optimizer step; the update is withheld on the device where the loss or the gradient is not finite."""
        step = self.num_steps + 1
        self.optimizer.zero_grad()
        with self.clock("forward_backward"):
            stats = self.accumulate(inputs, step)
        with self.clock("optimizer"):
            grad_norm = clip_gradients(list(self.parameters.values()), self.optim.clip_norm)
            finite = torch.isfinite(grad_norm) & torch.isfinite(torch.as_tensor(stats["loss"].sum))
            rate = learning_rate(self.optim, step, self.total_steps)
            self.optimizer.step(rate, finite)
        self.num_steps = step
        return stats | {
            "grad_norm": Weighted(grad_norm.detach(), 1.0),
            "lr": Weighted(rate, 1.0),
            "nonfinite_steps": Weighted((~finite).float(), 1.0),
        }

    def accumulate(self, inputs: StepInput, step: int) -> Stats:
        """Add the gradients of every micro-batch of `step` to the parameters."""
        stats: Stats = {}
        with self.scorer.compute_parameters():
            for micro in inputs.batches[0]:
                batch = micro.to(self.device)
                loss_sum, micro_stats = self.loss(self._scores(batch, step), batch)
                (loss_sum / inputs.denominator).backward()
                stats = merge(stats, micro_stats)
        return stats

    def _scores(self, batch: Batch, step: int) -> TokenScores:
        return self.scorer.scores(batch, self._noise(batch.samples, step) if self.neftune_alpha else None)

    def _noise(self, samples: Sequence[Sample], step: int) -> torch.Tensor:
        """NEFTune's noise [T, D]: uniform in +-alpha / sqrt(L*D), drawn anew for each (seed, step, sample)."""
        assert self.neftune_alpha is not None
        size = self.model.config["hidden_size"]
        generator = torch.Generator(self.device)
        parts = []
        for sample in samples:
            # By content, so that neither the pack nor the source's name has a say.
            generator.manual_seed(seed_from(self.seed, step, zlib.crc32(sample.tokens.tobytes()), sample.index) >> 1)
            uniform_LD = torch.rand(len(sample.tokens), size, generator=generator, device=self.device) * 2 - 1
            parts.append(uniform_LD * (self.neftune_alpha / (len(sample.tokens) * size) ** 0.5))
        return torch.cat(parts).to(self.scorer.compute)

    def rehearse(self, inputs: StepInput) -> None:
        """Forward and backward of the first micro-batch, gradients thrown away: memory shows before step 1."""
        with self.scorer.compute_parameters():
            batch = inputs.batches[0][0].to(self.device)
            loss_sum, _ = self.loss(self._scores(batch, 0), batch)
            (loss_sum / inputs.denominator).backward()
        self.optimizer.zero_grad()

    def evaluate(self, inputs: StepInput) -> Stats:
        """Statistics over `inputs` with the scorer's plain loss; weights and gradients stay as they are."""
        return self.scorer.evaluate(inputs)

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


def merge(left: Stats, right: Stats) -> Stats:
    """The statistics of both, weighted values added."""
    return {
        name: left[name] + right[name] if name in left and name in right else (left | right)[name]
        for name in left | right
    }


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


SAVED_BY_SELECTIVE = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What selective recomputation keeps: matrix products and attention, which cost more to compute than to hold."""


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in SAVED_BY_SELECTIVE or "varlen_attn" in str(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_blocks(blocks: Sequence[nn.Module], mode: str) -> None:
    """Wrap the forward of each block for activation checkpointing: `full` keeps its inputs alone, `selective` also the
    results of matrix products and attention. `none` changes nothing.
    """
    if mode == "none":
        return
    selective: dict[str, Callable[[], Any]] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)} if mode == "selective" else {}
    )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **selective)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """torch.compile of each block for packs of any length."""
    for block in blocks:
        block.compile(dynamic=True)


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
