"""Adapters on data-parallel and tensor layouts: loss, gradients, first values and files are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import native_model, tiny_config
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from burnish.config import LoraConfig
from burnish.model import hf_io, zoo
from burnish.model.attention import attend_sdpa
from burnish.model.base import CausalLM
from burnish.model.lm_head import score
from burnish.model.lora import initialise_adapters, inject, merge, read_adapter, trained, write_adapter
from burnish.parallel.degrees import Degrees
from burnish.parallel.lora import cut_adapters
from burnish.parallel.mesh import Mesh
from burnish.parallel.tp import VocabularyParallel, parallelize
from burnish.parallel.weights import export, export_adapter, gather, local_part, read_weights
from burnish.types import Documents

CONFIG = tiny_config("qwen2", tie_word_embeddings=False)
KINDS = [
    LoraConfig(rank=4, alpha=8, rslora=True),
    LoraConfig(rank=3, alpha=8, kind="dora", modules_to_save=("embed_tokens", "norm")),
]
LAYOUTS = [
    (Degrees(dp_shard=2), False),
    (Degrees(tp=2), False),
    (Degrees(tp=2), True),
    (Degrees(dp_shard=2, tp=2), True),
]
NUM_TOKENS = 12


def pack(data_rank: int) -> tuple[Tensor, Tensor, Documents, Tensor]:
    """Tokens, positions, documents and targets of one data rank."""
    tokens_T = torch.arange(NUM_TOKENS) * (5 + 2 * data_rank) % 511 + 1
    positions_T = torch.cat((torch.arange(7), torch.arange(5)))
    documents = Documents(torch.tensor([0, 7, 12], dtype=torch.int32), (7, 5))
    return tokens_T, positions_T, documents, tokens_T.roll(-1)


def loss_of(model: CausalLM, data_rank: int, vocabulary: VocabularyParallel | None = None) -> Tensor:
    tokens_T, positions_T, documents, targets_T = pack(data_rank)
    hidden_TD = model(tokens_T, positions_T, documents)
    if vocabulary is None:
        return -score(hidden_TD, model.head(), targets_T).logprobs_K.sum() / NUM_TOKENS
    return -vocabulary.score(vocabulary.gather(hidden_TD), model.head(), targets_T).logprobs_K.sum() / NUM_TOKENS


def disturb(model: CausalLM) -> None:
    """Make fresh adapters do something, the same on every layout."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model).values():
        whole = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        local, box = local_part(parameter)
        local += whole[box]


def alone(lora: LoraConfig, num_data_ranks: int) -> tuple[CausalLM, float]:
    """One process on the packs of all data ranks, with gradients."""
    model = native_model(CONFIG, torch.float64)
    inject(model, lora, torch.float64)
    initialise_adapters(model, seed=3)
    disturb(model)
    loss = sum((loss_of(model, data_rank) for data_rank in range(num_data_ranks)), torch.zeros(()))
    loss.backward()
    return model, loss.item()


def run_layout(degrees: Degrees, sequence_parallel: bool, folder: str) -> list[dict[str, Any]]:
    mesh = Mesh(degrees, torch.device("cpu"))
    return [run_kind(mesh, sequence_parallel, lora, Path(folder, lora.kind)) for lora in KINDS]


def run_kind(mesh: Mesh, sequence_parallel: bool, lora: LoraConfig, folder: Path) -> dict[str, Any]:
    model = zoo.build(CONFIG, attend_sdpa, dtype=torch.float64, device="meta")
    inject(model, lora, torch.float64)
    vocabulary = None
    if mesh.degrees.tp > 1:
        parallelize(model, mesh.axis("tp"), sequence_parallel)
        cut_adapters(model, mesh.axis("tp"), sequence_parallel)
        vocabulary = VocabularyParallel(mesh.axis("tp"), sequence_parallel)
    for unit in [*model.blocks(), model]:
        fully_shard(unit, mesh=mesh.shards)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    model.to_empty(device="cpu")
    read_weights(folder.parent / "base", model)
    initialise_adapters(model, 3, local_part)
    first = dict(gather(trained(model)))
    disturb(model)
    loss = loss_of(model, mesh.data_rank, vocabulary)
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
    gradients = {name: p.grad for name, p in trained(model).items()}
    assert all(isinstance(gradient, DTensor) for gradient in gradients.values())
    export_adapter(model, folder / "adapter", torch.float64, "base")
    export(model, folder / "merged", torch.float64)
    again = dict(gather(trained(model)))
    for parameter in trained(model).values():
        local_part(parameter)[0].zero_()
    read_adapter(str(folder / "adapter"), model, lora, part_of=local_part)
    kept = dict(gather(trained(model)))
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    full = dict(gather({name: gradient for name, gradient in gradients.items() if gradient is not None}))
    return {"loss": loss.item(), "data_rank": mesh.data_rank, "first": first, "gradients": full}


@pytest.mark.parametrize(("degrees", "sequence_parallel"), LAYOUTS, ids=str)
def test_a_layout_trains_what_one_process_does(degrees: Degrees, sequence_parallel: bool, tmp_path: Path):
    for folder in ("base", *(f"{lora.kind}/{part}" for lora in KINDS for part in ("adapter", "merged"))):
        (tmp_path / folder).mkdir(parents=True)
    native_model(CONFIG, torch.float64).export(tmp_path / "base", torch.float64)
    results = run_ranks(degrees.world, run_layout, degrees, sequence_parallel, str(tmp_path))
    for number, lora in enumerate(KINDS):
        compare(lora, degrees.data_ranks, [result[number] for result in results], tmp_path / lora.kind)


def compare(lora: LoraConfig, num_data_ranks: int, results: list[dict[str, Any]], folder: Path) -> None:
    """Hold what the ranks found and wrote against one process."""
    fresh = native_model(CONFIG, torch.float64)
    inject(fresh, lora, torch.float64)
    initialise_adapters(fresh, seed=3)
    model, loss = alone(lora, num_data_ranks)
    losses = {result["data_rank"]: result["loss"] for result in results}
    assert sum(losses.values()) == pytest.approx(loss, rel=1e-12)
    first, gradients = results[0]["first"], results[0]["gradients"]
    assert first.keys() == gradients.keys() == trained(model).keys()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(first[name], trained(fresh)[name].detach(), rtol=1e-12, atol=0)
        assert parameter.grad is not None
        difference = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-10, (name, difference)

    for part in ("adapter", "merged"):
        (folder / "alone" / part).mkdir(parents=True)
    write_adapter(folder / "alone/adapter", model, trained(model), torch.float64, "base")
    merged = merge(iter(hf_io.named_weights(model).items()), model, trained(model))
    hf_io.write_model(folder / "alone/merged", model.config, merged, torch.float64)
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        ours, theirs = load_file(folder / file), load_file(folder / "alone" / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-10, atol=1e-12)
    for file in ("adapter/adapter_config.json", "merged/config.json"):
        assert (folder / file).read_text() == (folder / "alone" / file).read_text()
