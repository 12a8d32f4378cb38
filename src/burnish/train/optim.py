"""The optimizer's side of a step: learning rate, gradient clipping, and updates that the device itself can refuse.

Everything here is free of host synchronisation: whether a step counts is a tensor on the device (`finite`).
Computes no gradients and knows no model; how narrow states are kept is states.py's.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from burnish.config import OptimConfig
from burnish.train.states import (
    Coded,
    FloatStore,
    Int8Store,
    Store,
    like,
    local_part,
    place,
    random_bits,
    stream_key,
    take_noise,
)
from burnish.types import UserError

States = Literal["fp32", "bf16", "int8", "fp64"]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Floating types by their names in a recipe."""

SMALLEST_INT8 = 4096
"""Values from which a tensor's moments are worth int8; norms and biases below it keep fp32 and cost next to nothing."""

STRETCH = {"cpu": 2**17}
"""Values updated at a time, which bounds the temporaries of a narrow update: on a CPU to what its caches hold."""

DEFAULT_STRETCH = 2**22
"""The same on any other device, where they take some 200 MB and a kernel is long enough to hide its launch."""


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step`, the one about to be taken, 1 to `total_steps`.

    With w warm-up steps, peak lr and k = step - 1:
    - warm-up, step <= w:  lr * step / w, so that the first step is not taken at 0.
    - constant:            lr
    - linear:              min_lr + (lr - min_lr) * (1 - p),                p = (k - w) / (total_steps - w)
    - cosine:              min_lr + (lr - min_lr) * (1 + cos(pi * p)) / 2,  the same p
    - wsd:                 as linear over the last d = ceil(decay_ratio * total_steps) steps, lr before them
    - inverse_sqrt:        max(min_lr, lr * sqrt(max(1, w) / step))

    After warm-up the first four are those of `transformers.optimization` (linear is its polynomial of power 1).
    """
    num_warmup = config.warmup_steps
    if num_warmup is None:
        num_warmup = math.ceil(config.warmup_ratio * total_steps)
    if step <= num_warmup:
        return config.lr * step / num_warmup
    match config.schedule:
        case "constant":
            return config.lr
        case "inverse_sqrt":
            return max(config.min_lr, config.lr * math.sqrt(max(1, num_warmup) / step))
        case "linear":
            remaining = 1 - _progress(step, num_warmup, total_steps)
        case "cosine":
            remaining = (1 + math.cos(math.pi * _progress(step, num_warmup, total_steps))) / 2
        case "wsd":
            decay_start = max(num_warmup, total_steps - math.ceil(config.decay_ratio * total_steps))
            remaining = 1 - _progress(step, decay_start, total_steps)
    return config.min_lr + (config.lr - config.min_lr) * remaining


def _progress(step: int, start: int, end: int) -> float:
    """How much of the way from `start` finished steps to `end` lies behind when step `step` begins, 0 to 1."""
    return min(1.0, max(0, step - 1 - start) / max(1, end - start))


def scale_gradients(gradients: list[Tensor], norm: Tensor, max_norm: float | None) -> None:
    """Clip: scale all gradients by min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does.

    `norm` is their global L2 norm, 0-dim. Gradients whose norm is not finite are left as they are; such a step is the
    optimizer's to refuse.
    """
    if max_norm is not None and gradients:
        factor = (max_norm / (norm.where(norm.isfinite(), 0.0) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))  # pyright: ignore[reportPrivateImportUsage]


class Optimizer(ABC):
    """Updates named parameters in place from their gradients."""

    @abstractmethod
    def step(self, lr: float, finite: Tensor) -> None:
        """Take one step at learning rate `lr`, or none.

        `finite` is 0-dim on the parameters' device, bool or 0/1. Where it is false, weights, moments and step counters
        stay as they are to the bit. Parameters without a gradient stay too.
        """

    @abstractmethod
    def zero_grad(self) -> None:
        """Drop all gradients."""

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor | Coded]:
        """All state by name ("step.<parameter>", "exp_avg.<parameter>"), live: read to save, fill to resume.

        Moments are laid out as their parameters, whatever the layout; counters are 0-dim.
        """


def build_optimizer(
    named_parameters: Mapping[str, Parameter],
    config: OptimConfig,
    states: States,
    seed: int,
    on_host: bool = False,
    all_names: Collection[str] | None = None,
) -> Optimizer:
    """The optimizer of all parameters that require a gradient, on one device.

    Of a DTensor this rank's part is updated from the part of its gradient, which must be laid out as it is.
    Bytes a parameter beside its weight and gradient, for AdamW with `states`: fp64 16, fp32 8, bf16 4, int8 2.03 (fp32
    for tensors below 4,096 values); SGD none. Fused kernels of torch run where states and weights are one type, fp32 or
    fp64; anything else is computed in fp32 a stretch at a time and rounded stochastically from `seed`. That holds for
    bf16 weights too (`precision.master: bf16`), whose updates would mostly round away otherwise. `on_host` updates on
    the host, in whose memory the states lie, and copies of weights and gradients beside them.

    `all_names` are those of all ranks' trained parameters, where these are a part of them or none.
    Raises UserError where nothing is left to train or a pattern of `optim.no_decay` matches nothing.
    """
    trained = {name: parameter for name, parameter in named_parameters.items() if parameter.requires_grad}
    decays = weight_decays(trained, config, all_names)
    if not trained:
        return NarrowSgd({}, {}, seed)  # torch's optimizers refuse to have nothing to do
    if on_host:
        return HostOptimizer(trained, lambda copies: build_optimizer(copies, config, states, seed, all_names=all_names))
    dtypes = {parameter.dtype for parameter in trained.values()}
    wide = dtypes <= {torch.float32, torch.float64}
    if config.name == "sgd":
        return FusedSgd(trained, decays, config) if wide else NarrowSgd(trained, decays, seed)
    if wide and dtypes == {DTYPES.get(states)}:
        return FusedAdamW(trained, decays, config)
    return NarrowAdamW(trained, decays, config, states, seed)


def weight_decays(
    parameters: Mapping[str, Tensor], config: OptimConfig, all_names: Collection[str] | None = None
) -> dict[str, float]:
    """Each parameter's weight decay: 0 where `optim.no_decay` matches its name or, without that, below two dimensions.

    Raises UserError where there are none of `all_names`, by default those of `parameters`, and for a pattern that
    matches none of them.
    """
    names = list(parameters) if all_names is None else all_names
    if not names:
        raise UserError("model.freeze freezes every parameter, so there is nothing to train; narrow its patterns")
    if config.no_decay is None:
        return {name: config.weight_decay if tensor.dim() >= 2 else 0.0 for name, tensor in parameters.items()}
    exempt: set[str] = set()
    for pattern in config.no_decay:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            near = difflib.get_close_matches(pattern, names, 3, 0.0)
            raise UserError(
                f"optim.no_decay pattern {pattern!r} matches no trained parameter; near it are {', '.join(near)}. "
                "Mend the pattern, or set optim.no_decay to null to exempt all with fewer than two dimensions"
            )
        exempt.update(matched)
    return {name: 0.0 if name in exempt else config.weight_decay for name in parameters}


class FusedSgd(Optimizer):
    """torch's fused SGD without momentum: w -= lr * (g + weight_decay * w). It has no state."""

    def __init__(self, parameters: Mapping[str, Parameter], decays: Mapping[str, float], config: OptimConfig):
        self._parts = _Parts(parameters)
        self._inner = torch.optim.SGD(_groups(self._parts.local, decays), lr=config.lr, fused=True)

    def step(self, lr: float, finite: Tensor) -> None:
        with self._parts.gradients():
            _gated_step(self._inner, lr, finite)

    def zero_grad(self) -> None:
        self._parts.zero_grad()

    def state_tensors(self) -> dict[str, Tensor | Coded]:
        return {}


class FusedAdamW(Optimizer):
    """torch's fused AdamW with moments of the weights' own type."""

    def __init__(self, parameters: Mapping[str, Parameter], decays: Mapping[str, float], config: OptimConfig):
        self._parts = _Parts(parameters)
        self._inner = torch.optim.AdamW(
            _groups(self._parts.local, decays), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
        self._state: dict[str, Tensor | Coded] = {}
        for name, local in self._parts.local.items():
            step = torch.zeros((), device=local.device)
            moments = {key: torch.zeros_like(local) for key in ("exp_avg", "exp_avg_sq")}
            self._inner.state[local] = {"step": step, **moments}
            self._state[f"step.{name}"] = step
            self._state |= {f"{key}.{name}": like(parameters[name], moment) for key, moment in moments.items()}

    def step(self, lr: float, finite: Tensor) -> None:
        with self._parts.gradients():
            _gated_step(self._inner, lr, finite)

    def zero_grad(self) -> None:
        self._parts.zero_grad()

    def state_tensors(self) -> dict[str, Tensor | Coded]:
        return dict(self._state)


class HostOptimizer(Optimizer):
    """The optimizer that `build` makes of copies of the parameters on the host: there its state lies and updates run.

    Weights and gradients are copied there for every step, and weights back; nothing is updated where these lie.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], build: Callable[[Mapping[str, Parameter]], Optimizer]
    ) -> None:
        self._parameters = parameters
        self._copies = {name: Parameter(like(p, _on_host(local_part(p)))) for name, p in parameters.items()}
        self._gradients: dict[str, Tensor] = {}
        self._inner = build(self._copies)

    @torch.no_grad()
    def step(self, lr: float, finite: Tensor) -> None:
        for name, parameter in self._parameters.items():
            gradient, copy = _local_gradient(parameter), self._copies[name]
            if gradient is None:
                copy.grad = None
                continue
            if name not in self._gradients:
                self._gradients[name] = _on_host(gradient)
                if not isinstance(copy, DTensor):
                    copy.grad_dtype = gradient.dtype
            local_part(copy).copy_(local_part(parameter), non_blocking=True)
            self._gradients[name].copy_(gradient, non_blocking=True)
            copy.grad = like(copy, self._gradients[name])
        # On CUDA this waits for the copies before it, too: they are in the same stream.
        self._inner.step(lr, finite.to("cpu"))
        for name, parameter in self._parameters.items():
            if self._copies[name].grad is not None:
                local_part(parameter).copy_(local_part(self._copies[name]), non_blocking=True)

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor | Coded]:
        return self._inner.state_tensors()


def _on_host(tensor: Tensor) -> Tensor:
    """Memory for the values of `tensor` on the host, which a device copies to and from without its waiting."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")


class _Parts:
    """This rank's parts of `parameters` as parameters of their own, for an optimizer of torch: `local`, by name."""

    def __init__(self, parameters: Mapping[str, Parameter]):
        self._whole = parameters
        self.local = {name: Parameter(local_part(parameter)) for name, parameter in parameters.items()}

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Within, the parts have their parts of the gradients."""
        for name, parameter in self._whole.items():
            self.local[name].grad = _local_gradient(parameter)
        yield
        for local in self.local.values():
            local.grad = None

    def zero_grad(self) -> None:
        for parameter in self._whole.values():
            parameter.grad = None


def _local_gradient(parameter: Parameter) -> Tensor | None:
    gradient = parameter.grad
    if isinstance(gradient, DTensor):
        assert isinstance(parameter, DTensor), "a gradient has a layout, and its parameter none"
        assert gradient.placements == parameter.placements, (gradient.placements, parameter.placements)
    return None if gradient is None else local_part(gradient)


def _groups(parameters: Mapping[str, Parameter], decays: Mapping[str, float]) -> list[dict[str, object]]:
    return [
        {"params": [parameters[name] for name in parameters if decays[name] == decay], "weight_decay": decay}
        for decay in sorted(set(decays.values()))
    ]


def _gated_step(optimizer: torch.optim.Optimizer, lr: float, finite: Tensor) -> None:
    """A step of a fused torch optimizer, whose kernels write nothing where `found_inf` is 1 (GradScaler's protocol)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    # GradScaler, too, sets the attribute from outside; since torch 2.4 the fused kernels of a CPU read it as CUDA's do.
    optimizer.found_inf = finite.logical_not().float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter, its step counter and the stores of this rank's part, which an update reads and writes."""

    parameter: Parameter
    step: Tensor  # 0-dim fp32
    weight_decay: float
    key: int
    weight: FloatStore
    moments: Mapping[str, Store]


class NarrowOptimizer(Optimizer):
    """Updates a stretch of one tensor at a time in fp32 (fp64 for fp64 weights) and rounds into the stores.

    The noise of rounding is drawn from (seed, parameter, where this rank's part begins, steps taken, position in it),
    all known on the device: a refused step leaves no trace in it, a resumed run repeats it, and ranks that hold the
    same part draw the same.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        decays: Mapping[str, float],
        moments: Mapping[str, Mapping[str, Store]],
        seed: int,
    ):
        self._slots = {
            name: _Slot(
                parameter,
                torch.zeros((), device=parameter.device),
                decays[name],
                stream_key(seed, name, *place(parameter)),
                FloatStore(local_part(parameter)),
                moments[name],
            )
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def step(self, lr: float, finite: Tensor) -> None:
        finite = finite.bool()
        for slot in self._slots.values():
            gradient = _local_gradient(slot.parameter)
            if gradient is None:
                continue
            self._update(slot, gradient.view(-1), lr, finite)
            slot.step.add_(finite)

    def zero_grad(self) -> None:
        for slot in self._slots.values():
            slot.parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor | Coded]:
        steps: dict[str, Tensor | Coded] = {f"step.{name}": slot.step for name, slot in self._slots.items()}
        return steps | {
            f"{key}.{name}{suffix}": value
            for name, slot in self._slots.items()
            for key, store in slot.moments.items()
            for suffix, value in store.saved(slot.parameter).items()
        }

    def _update(self, slot: _Slot, gradient_N: Tensor, lr: float, finite: Tensor) -> None:
        dtype = torch.float64 if slot.parameter.dtype is torch.float64 else torch.float32
        step = slot.step.double() + 1
        key = step.long() * 0x2545F4914F6CDD1D + slot.key
        stretch = STRETCH.get(gradient_N.device.type, DEFAULT_STRETCH)
        for start in range(0, len(gradient_N), stretch):
            end = min(start + stretch, len(gradient_N))
            stores = {"weight": slot.weight, **slot.moments}
            old = {name: store.read(start, end, dtype) for name, store in stores.items()}
            new = self._advance(old, gradient_N[start:end].to(dtype), step, lr, slot.weight_decay)
            bits = random_bits(key, start, end)
            for draw, (name, store) in enumerate(stores.items()):
                store.write(start, new[name], take_noise(bits, draw), finite)

    @abstractmethod
    def _advance(
        self, values: dict[str, Tensor], gradient: Tensor, step: Tensor, lr: float, weight_decay: float
    ) -> dict[str, Tensor]:
        """The weight and moments after step number `step` (0-dim fp64, from 1); may reuse the memory of `values`."""


class NarrowSgd(NarrowOptimizer):
    """SGD without momentum for bf16 weights: w -= lr * (g + weight_decay * w), rounded stochastically."""

    def __init__(self, parameters: Mapping[str, Parameter], decays: Mapping[str, float], seed: int):
        super().__init__(parameters, decays, {name: {} for name in parameters}, seed)

    def _advance(
        self, values: dict[str, Tensor], gradient: Tensor, step: Tensor, lr: float, weight_decay: float
    ) -> dict[str, Tensor]:
        return {"weight": values["weight"].mul_(1 - lr * weight_decay).add_(gradient, alpha=-lr)}


class NarrowAdamW(NarrowOptimizer):
    """AdamW (arXiv 1711.05101) whose moments, weights or both are narrower than its arithmetic."""

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        decays: Mapping[str, float],
        config: OptimConfig,
        states: States,
        seed: int,
    ):
        moments = {
            name: {key: _zeros(parameter, states, signed) for key, signed in (("exp_avg", True), ("exp_avg_sq", False))}
            for name, parameter in parameters.items()
        }
        super().__init__(parameters, decays, moments, seed)
        self._betas, self._eps = config.betas, config.eps

    def _advance(
        self, values: dict[str, Tensor], gradient: Tensor, step: Tensor, lr: float, weight_decay: float
    ) -> dict[str, Tensor]:
        beta1, beta2 = self._betas
        exp_avg = values["exp_avg"].lerp_(gradient, 1 - beta1)
        exp_avg_sq = values["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(self._eps)
        update = (exp_avg / denominator).mul_(lr / (1 - beta1**step))
        weight = values["weight"].mul_(1 - lr * weight_decay).sub_(update)
        return {"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _zeros(parameter: Parameter, states: States, signed: bool) -> Store:
    local = local_part(parameter)
    # By the size of the whole, so that no layout changes what a checkpoint holds.
    if states == "int8" and parameter.numel() >= SMALLEST_INT8:
        return Int8Store.zeros(local.numel(), signed, local.device)
    return FloatStore(torch.zeros_like(local, dtype=DTYPES.get(states, torch.float32)))
