"""Activations on the host: the same numbers, no weight moved, each tensor once."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from tiny import native_model, tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.parallel import offload
from burnish.parallel.offload import offload_activations
from burnish.parallel.recompute import SAVED_BY_SELECTIVE, Blocks, recompute_blocks
from burnish.types import Documents


def gradients(blocks: Blocks, config: dict[str, Any]) -> dict[str, Tensor]:
    model = native_model(config, torch.float32)
    blocks.wrap(model)
    tokens_T = torch.arange(40) % 7
    documents = Documents(torch.tensor([0, 25, 40], dtype=torch.int32), (25, 15))
    model(tokens_T, torch.arange(40), documents).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_offloaded_activations_change_no_number(recompute: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 0)
    config = tiny_config(family, num_hidden_layers=3)
    expected = gradients(Blocks(), config)
    found = gradients(Blocks(recompute, is_offloaded=True), config)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # A copy is contiguous; grouped matmuls round otherwise where their rows were not.
        assert torch.equal(found[name], gradient) or family == "qwen3_moe", name
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_weights_and_small_tensors_stay_and_a_tensor_moves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Tensor] = []

    class Copy(offload._Copy):
        def __init__(self, tensor: Tensor, copies: offload._Copies) -> None:
            moved.append(tensor)
            super().__init__(tensor, copies)

    monkeypatch.setattr(offload, "_Copy", Copy)
    monkeypatch.setattr(offload, "SMALLEST", 5000)
    block = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh())
    offload.offload_activations([block])
    x, small = torch.randn(32, 64, requires_grad=True), torch.randn(2, 64, requires_grad=True)
    block(x).sum().backward()
    assert [tuple(tensor.shape) for tensor in moved] == [(32, 64), (32, 64)], "the input and the result of tanh"
    moved.clear()
    block(small).sum().backward()
    assert not moved
    moved.clear()
    doubled = torch.nn.Module()
    doubled.forward = lambda x: x.exp() * x * x.sin()
    offload.offload_activations([doubled])
    doubled(x).sum().backward()
    assert len({(t.data_ptr(), t.shape) for t in moved}) == len(moved)


def test_what_a_block_kept_is_fetched_when_the_backward_of_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, before it is asked for; nothing of another micro-batch, and of a micro-batch's last block nothing."""
    events: list[tuple[str, float]] = []

    class Copy(offload._Copy):
        def fetch(self) -> None:
            events.append(("fetch", self._host[0, 0].item()))

        def back(self) -> Tensor:
            tensor = super().back()
            events.append(("back", tensor[0, 0].item()))
            return tensor

    class Named(torch.nn.Module):
        """Keeps two tensors, which begin with a number."""

        def forward(self, x_TD: Tensor, number: float) -> Tensor:
            one, two = (torch.full_like(x_TD, number + part) for part in (0.0, 0.5))
            return x_TD * one * two

    monkeypatch.setattr(offload, "SMALLEST", 0)
    monkeypatch.setattr(offload, "_Copy", Copy)
    blocks = [Named() for _ in range(3)]
    offload_activations(blocks)
    outputs = []
    for start in (0, 3):
        x_TD = torch.ones(2, 2, requires_grad=True)
        for number, block in enumerate(blocks, start):
            x_TD = block(x_TD, float(number))
        outputs.append(x_TD)
    for output in reversed(outputs):
        output.sum().backward()
    expected = []
    for first in (3.0, 0.0):
        for number in (first + 2, first + 1, first):
            fetched = [("fetch", number - 1), ("fetch", number - 0.5)] if number > first else []
            expected += [*fetched, ("back", number + 0.5), ("back", number)]
    assert events == expected


def test_every_second_block_is_recomputed_and_full_keeps_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = native_model(tiny_config("qwen3", num_hidden_layers=4), torch.float32)
    calls: list[int] = []
    for number, block in enumerate(model.blocks()):
        block.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))  # pyright: ignore
    Blocks("full", every=2).wrap(model)
    documents = Documents(torch.tensor([0, 9], dtype=torch.int32), (9,))
    model(torch.arange(9), torch.arange(9), documents).sum().backward()
    assert calls == [0, 1, 2, 3, 2, 0]


class Products(TorchDispatchMode):
    """Counts matrix products and everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[bool] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func in SAVED_BY_SELECTIVE] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe_lite"])
def test_selective_computes_no_product_again(family: str) -> None:
    counts = {}
    for mode in ("none", "selective", "full"):
        model = native_model(tiny_config(family), torch.float32)
        recompute_blocks(model.blocks(), mode)
        documents = Documents(torch.tensor([0, 9], dtype=torch.int32), (9,))
        hidden_TD = model(torch.arange(9), torch.arange(9), documents)
        with Products() as products:
            hidden_TD.sum().backward()
        counts[mode] = products.counts
    assert counts["selective"][True] == counts["none"][True] < counts["full"][True]
    assert counts["selective"][False] > counts["none"][False]


def test_a_block_that_has_run_keeps_no_tensor_that_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 0)
    weight = torch.randn(4, 4, requires_grad=True)
    seen: list[weakref.ref[torch.Tensor]] = []

    class Doubled(torch.nn.Module):
        def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
            inside_TD = x_TD @ weight
            seen.append(weakref.ref(inside_TD))
            return inside_TD.sin()

    block = Doubled()
    offload_activations([block])
    output_TD = block(torch.randn(3, 4))
    assert seen[0]() is None
    output_TD.sum().backward()
    assert weight.grad is not None
