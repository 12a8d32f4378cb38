"""Learning rates against transformers, updates against torch's AdamW in float64, and steps that must leave no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import Parameter
from transformers import optimization

from burnish.config import OptimConfig
from burnish.parallel.execution import global_norm
from burnish.train.optim import (
    STRETCH,
    Optimizer,
    States,
    build_optimizer,
    learning_rate,
    scale_gradients,
    weight_decays,
)
from burnish.train.states import Coded
from burnish.types import UserError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread, long where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


GOOD, BAD = torch.tensor(True), torch.tensor(False)
TOTAL = 40


def config(**changes: object) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 1e-2, "weight_decay": 0.1} | changes)


# Learning rates


def transformers_rates(make: Callable[..., torch.optim.lr_scheduler.LambdaLR], **arguments: object) -> list[float]:
    """The rate of each of TOTAL steps by a transformers schedule with peak 1e-2."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    schedule = make(optimizer, **arguments)
    return [1e-2 * schedule.lr_lambdas[0](step) for step in range(TOTAL)]


@pytest.mark.parametrize("num_warmup", [0, 5])
@pytest.mark.parametrize(
    ("changes", "make", "arguments"),
    [
        ({"schedule": "constant"}, optimization.get_constant_schedule_with_warmup, {}),
        ({"schedule": "linear"}, optimization.get_linear_schedule_with_warmup, {"num_training_steps": TOTAL}),
        (
            {"schedule": "linear", "min_lr": 1e-3},
            optimization.get_polynomial_decay_schedule_with_warmup,
            {"num_training_steps": TOTAL, "lr_end": 1e-3, "power": 1.0},
        ),
        ({"schedule": "cosine"}, optimization.get_cosine_schedule_with_warmup, {"num_training_steps": TOTAL}),
        (
            {"schedule": "cosine", "min_lr": 1e-3},
            optimization.get_cosine_with_min_lr_schedule_with_warmup,
            {"num_training_steps": TOTAL, "min_lr": 1e-3},
        ),
        (
            {"schedule": "wsd", "min_lr": 1e-3, "decay_ratio": 0.25},
            optimization.get_wsd_schedule,
            {"num_training_steps": TOTAL, "num_decay_steps": 10, "decay_type": "linear", "min_lr_ratio": 0.1},
        ),
    ],
)
def test_rates_after_warm_up_are_those_of_transformers(changes, make, arguments, num_warmup):
    expected = transformers_rates(make, num_warmup_steps=num_warmup, **arguments)
    recipe = config(**changes, warmup_steps=num_warmup)
    rates = [learning_rate(recipe, step, TOTAL) for step in range(1, TOTAL + 1)]
    assert rates[num_warmup:] == pytest.approx(expected[num_warmup:], rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_warm_up_starts_above_zero_and_ends_at_the_peak(schedule):
    recipe = config(schedule=schedule, warmup_steps=4)
    assert [learning_rate(recipe, step, TOTAL) for step in range(1, 6)][:4] == pytest.approx(
        [2.5e-3, 5e-3, 7.5e-3, 1e-2]
    )


def test_inverse_sqrt_is_the_peak_times_the_root_of_warm_up_over_step_above_its_floor():
    recipe = config(schedule="inverse_sqrt", warmup_steps=4, min_lr=4e-3)
    rates = [learning_rate(recipe, step, 100) for step in (5, 16, 100)]
    assert rates == pytest.approx([1e-2 * math.sqrt(4 / 5), 5e-3, 4e-3])
    assert learning_rate(config(schedule="inverse_sqrt", warmup_steps=0), 4, 100) == pytest.approx(5e-3)


def test_warm_up_steps_win_over_the_ratio_which_rounds_up():
    assert learning_rate(config(warmup_ratio=0.26, schedule="constant"), 1, 10) == pytest.approx(1e-2 / 3)
    assert learning_rate(config(warmup_ratio=0.5, warmup_steps=2, schedule="constant"), 1, 10) == pytest.approx(5e-3)


def test_no_schedule_leaves_the_band_from_its_floor_to_its_peak():
    for schedule in ("linear", "cosine", "wsd", "inverse_sqrt"):
        whole = {"decay_ratio": 1.0} if schedule == "wsd" else {}
        recipe = config(schedule=schedule, min_lr=2e-3, warmup_steps=0, **whole)
        assert all(2e-3 <= learning_rate(recipe, step, TOTAL) <= 1e-2 for step in range(1, TOTAL + 20))


# Clipping


def parameters_with_gradients(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    parameters = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((30, 7), (5,), ())]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return parameters


def clip_gradients(parameters: list[Parameter], max_norm: float | None) -> torch.Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = global_norm(gradients)
    scale_gradients(gradients, norm, max_norm)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_equals_torch(dtype, max_norm):
    ours, theirs = parameters_with_gradients(dtype), parameters_with_gradients(dtype)
    norm = clip_gradients(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.dtype is dtype
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs])


def test_norm_is_returned_without_clipping_when_there_is_no_limit():
    parameters = parameters_with_gradients()
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    norm = clip_gradients(parameters, None)
    assert norm == pytest.approx(math.sqrt(sum(float(g.double().square().sum()) for g in before)), rel=1e-6)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True) if p.grad is not None)


def test_norm_of_bf16_gradients_and_of_many_values_is_a_true_fp32_norm():
    parameter = Parameter(torch.zeros(5_000_000, dtype=torch.bfloat16))
    parameter.grad = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = clip_gradients([parameter], None)
    assert norm.dtype is torch.float32
    assert float(norm) == pytest.approx(float(parameter.grad.double().norm()), rel=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_the_gradients(poison):
    parameters = parameters_with_gradients()
    assert parameters[0].grad is not None
    parameters[0].grad[0, 0] = poison
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    assert not clip_gradients(parameters, 1.0).isfinite()
    for parameter, gradient in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)


def test_the_norm_of_no_gradients_is_zero():
    assert clip_gradients([Parameter(torch.zeros(3))], 1.0) == 0


# Updates


def make_parameters(dtype: torch.dtype) -> dict[str, Parameter]:
    """A tensor large enough for int8 with a ragged last block, one below that size, a norm's weight."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"embed.weight": (70, 61), "layer.weight": (8, 16), "norm.weight": (16,)}
    return {
        name: Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in shapes.items()
    }


def set_gradients(parameters: dict[str, Parameter], step: int, poison: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters.values():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (gradient + poison).to(parameter.dtype)


def run(parameters: dict[str, Parameter], optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(parameters, step)
        optimizer.step(1e-2 / step, GOOD)
        optimizer.zero_grad()


def reference(name: str, num_steps: int, recipe: OptimConfig) -> dict[str, Parameter]:
    """torch's unfused optimizer in float64 over the same gradients."""
    parameters = make_parameters(torch.float64)
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    inner = (
        torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, foreach=False)
        if name == "adamw"
        else torch.optim.SGD(groups, lr=1.0, foreach=False)
    )
    for step in range(1, num_steps + 1):
        set_gradients(parameters, step)
        for group in inner.param_groups:
            group["lr"] = 1e-2 / step
        inner.step()
    return parameters


def distance(left: dict[str, Parameter], right: dict[str, Parameter]) -> float:
    return max(float((left[name].detach().double() - right[name].detach().double()).abs().max()) for name in left)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("dtype", "states", "tolerance"),
    [
        (torch.float64, "fp64", 1e-14),
        (torch.float32, "fp32", 1e-6),
        (torch.float64, "fp32", 1e-6),  # narrower states than weights: our own arithmetic
        (torch.float32, "fp64", 1e-6),
        (torch.float32, "bf16", 1e-3),
        (torch.float32, "int8", 2e-3),
        (torch.bfloat16, "fp32", 1e-1),  # some steps of 2^-6, the type's spacing at 4
    ],
)
def test_updates_follow_torch_in_float64(name: str, dtype: torch.dtype, states: States, tolerance: float):
    recipe = config(name=name)
    parameters = make_parameters(dtype)
    run(parameters, build_optimizer(parameters, recipe, states, seed=0), range(1, 9))
    assert distance(parameters, reference(name, 8, recipe)) < tolerance


ALL_KINDS = [
    ("adamw", torch.float32, "fp32"),
    ("adamw", torch.float64, "fp64"),
    ("adamw", torch.float32, "bf16"),
    ("adamw", torch.float32, "int8"),
    ("adamw", torch.bfloat16, "fp32"),
    ("adamw", torch.bfloat16, "int8"),
    ("sgd", torch.float32, "fp32"),
    ("sgd", torch.bfloat16, "fp32"),
]


def everything(parameters: dict[str, Parameter], optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Copies of weights and state."""
    state = {name: t.values() if isinstance(t, Coded) else t for name, t in optimizer.state_tensors().items()}
    return {name: tensor.detach().clone() for name, tensor in {**parameters, **state}.items()}


def fill(parameters: dict[str, Parameter], optimizer: Optimizer, saved: dict[str, torch.Tensor]) -> None:
    for name, tensor in {**parameters, **optimizer.state_tensors()}.items():
        if isinstance(tensor, Coded):
            tensor.take(saved[name])
        else:
            tensor.detach().copy_(saved[name])


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype is right[name].dtype
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(("name", "dtype", "states"), ALL_KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1.0])
def test_a_refused_step_leaves_no_trace(name: str, dtype: torch.dtype, states: States, poison: float):
    parameters, untroubled = make_parameters(dtype), make_parameters(dtype)
    optimizer = build_optimizer(parameters, config(name=name), states, seed=5)
    other = build_optimizer(untroubled, config(name=name), states, seed=5)
    for pair in ((parameters, optimizer), (untroubled, other)):
        run(*pair, range(1, 3))
    before = everything(parameters, optimizer)
    set_gradients(parameters, 3, poison)
    optimizer.step(1e-2, BAD)
    assert_same_bits(everything(parameters, optimizer), before)
    for pair in ((parameters, optimizer), (untroubled, other)):
        run(*pair, range(4, 6))
    assert_same_bits(everything(parameters, optimizer), everything(untroubled, other))


@pytest.mark.parametrize(("name", "dtype", "states"), ALL_KINDS)
def test_a_resumed_run_repeats_the_bits(name: str, dtype: torch.dtype, states: States):
    parameters = make_parameters(dtype)
    optimizer = build_optimizer(parameters, config(name=name), states, seed=5)
    run(parameters, optimizer, range(1, 4))
    saved = everything(parameters, optimizer)
    run(parameters, optimizer, range(4, 7))

    resumed = make_parameters(dtype)
    fresh = build_optimizer(resumed, config(name=name), states, seed=5)
    fill(resumed, fresh, saved)
    run(resumed, fresh, range(4, 7))
    assert_same_bits(everything(resumed, fresh), everything(parameters, optimizer))


def test_state_exists_before_the_first_step_under_flat_names():
    optimizer = build_optimizer(make_parameters(torch.float32), config(), "fp32", seed=0)
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert optimizer.state_tensors().keys() == {f"{k}.{name}" for k in keys for name in make_parameters(torch.float32)}


@pytest.mark.parametrize(("states", "bytes_each"), [("fp32", 8), ("bf16", 4), ("int8", 2 + 8 / 256)])
def test_states_take_the_documented_memory(states: States, bytes_each: float):
    parameters = {"weight": Parameter(torch.zeros(512, 512))}
    tensors = build_optimizer(parameters, config(), states, seed=0).state_tensors()
    held = [
        tensor.store.codes_BK.nbytes + tensor.store.scales_B.nbytes if isinstance(tensor, Coded) else tensor.nbytes
        for name, tensor in tensors.items()
        if not name.startswith("step.")
    ]
    assert sum(held) == bytes_each * 512 * 512


def test_the_seed_decides_the_rounding():
    def weights(seed: int) -> torch.Tensor:
        parameters = make_parameters(torch.bfloat16)
        run(parameters, build_optimizer(parameters, config(), "fp32", seed), range(1, 3))
        return parameters["embed.weight"].detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_parameters_without_gradient_stay():
    for states in ("fp32", "bf16"):
        parameters = make_parameters(torch.float32)
        optimizer = build_optimizer(parameters, config(), states, seed=0)
        before = parameters["norm.weight"].detach().clone()
        set_gradients(parameters, 1)
        parameters["norm.weight"].grad = None
        optimizer.step(1e-2, GOOD)
        assert torch.equal(parameters["norm.weight"], before)
        steps = {name: t for name, t in optimizer.state_tensors().items() if name.startswith("step.")}
        assert steps == {"step.embed.weight": 1.0, "step.layer.weight": 1.0, "step.norm.weight": 0.0}


def test_stretches_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch):
    def weights() -> dict[str, Parameter]:
        parameters = make_parameters(torch.float32)
        run(parameters, build_optimizer(parameters, config(), "int8", seed=0), range(1, 4))
        return parameters

    whole = weights()
    monkeypatch.setitem(STRETCH, "cpu", 512)
    assert distance(weights(), whole) == 0


def fit_quadratic(dtype: torch.dtype, states: States, betas: tuple[float, float]) -> float:
    """Mean squared error of a noisy linear regression after 300 steps, above the noise floor."""
    generator = torch.Generator().manual_seed(0)
    inputs_ND, truth_DK = torch.randn(512, 64, generator=generator), torch.randn(64, 64, generator=generator)
    targets_NK = inputs_ND @ truth_DK
    weight = Parameter(torch.zeros(64, 64, dtype=dtype))
    recipe = config(betas=betas, weight_decay=0.0, schedule="cosine", warmup_steps=0, lr=3e-2)
    optimizer = build_optimizer({"weight": weight}, recipe, states, seed=0)
    for step in range(1, 301):
        rows = torch.randint(0, 512, (64,), generator=generator)
        loss = (inputs_ND[rows] @ weight.float() - targets_NK[rows]).square().mean()
        loss.backward()
        optimizer.step(learning_rate(recipe, step, 300), torch.isfinite(loss.detach()))
        optimizer.zero_grad()
    return float((inputs_ND @ weight.detach().float() - targets_NK).square().mean())


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_narrow_states_converge_as_fp32_does(betas: tuple[float, float]):
    wide = fit_quadratic(torch.float32, "fp32", betas)
    for states in ("bf16", "int8"):
        assert fit_quadratic(torch.float32, states, betas) < 1.1 * wide + 1e-5, states


def test_stochastic_rounding_lets_bf16_weights_learn_from_updates_too_small_for_them():
    """At 1.0 a bf16 weight moves in steps of 2^-8 downwards; updates of 1e-4 all round away to the nearest."""
    for name in ("adamw", "sgd"):
        weight = Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = build_optimizer({"weight": weight}, config(name=name, weight_decay=0.0), "fp32", seed=0)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step(1e-4, GOOD)
        assert float(weight.detach().float().mean()) == pytest.approx(0.99, abs=5e-4)


def test_a_row_without_gradients_does_not_explode_in_int8():
    """An embedding row that is seen once keeps a first moment; its second must not have become zero."""
    weight = Parameter(torch.zeros(32, 256))
    optimizer = build_optimizer({"weight": weight}, config(weight_decay=0.0), "int8", seed=0)
    for step in range(50):
        weight.grad = torch.zeros_like(weight)
        weight.grad[0] = torch.logspace(-8, 0, 256) if step == 0 else 0.0
        weight.grad[1] = 1.0
        optimizer.step(1e-2, GOOD)
    assert float(weight.detach().abs().max()) < 0.6


# Weight decay groups


def test_patterns_decide_which_parameters_decay():
    parameters = make_parameters(torch.float32)
    assert weight_decays(parameters, config()) == {"embed.weight": 0.1, "layer.weight": 0.1, "norm.weight": 0.0}
    by_pattern = weight_decays(parameters, config(no_decay=("embed.*",)))
    assert by_pattern == {"embed.weight": 0.0, "layer.weight": 0.1, "norm.weight": 0.1}
    assert set(weight_decays(parameters, config(no_decay=())).values()) == {0.1}


@pytest.mark.parametrize(("name", "dtype", "states"), ALL_KINDS)
def test_decay_reaches_the_weights_it_is_meant_for(name: str, dtype: torch.dtype, states: States):
    parameters = make_parameters(dtype)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = build_optimizer(parameters, config(name=name, weight_decay=0.5), states, seed=0)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5, GOOD)
    assert torch.equal(parameters["norm.weight"], before["norm.weight"])
    for matrix in ("embed.weight", "layer.weight"):
        torch.testing.assert_close(parameters[matrix].detach(), before[matrix] * 0.75, rtol=1e-2, atol=0)


def test_a_pattern_that_matches_nothing_names_its_neighbours():
    with pytest.raises(UserError, match=r"no_decay pattern 'nrom\.weight' matches no .*norm\.weight"):
        build_optimizer(make_parameters(torch.float32), config(no_decay=("nrom.weight",)), "fp32", seed=0)


def test_frozen_parameters_are_left_out_and_something_must_remain():
    parameters = make_parameters(torch.float32)
    parameters["embed.weight"].requires_grad_(False)
    optimizer = build_optimizer(parameters, config(), "fp32", seed=0)
    assert "exp_avg.embed.weight" not in optimizer.state_tensors()
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer({"w": Parameter(torch.zeros(2), requires_grad=False)}, config(), "fp32", seed=0)
