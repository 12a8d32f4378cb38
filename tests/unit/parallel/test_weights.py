"""Weights between files and ranks: every layout holds the values of one process, reads its own part, and writes all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import native_model, tiny_config
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from burnish.config import LoraConfig
from burnish.model import hf_io, zoo
from burnish.model.attention import attend_sdpa
from burnish.model.base import CausalLM
from burnish.model.lora import inject
from burnish.parallel.degrees import Degrees
from burnish.parallel.mesh import Mesh
from burnish.parallel.weights import box_of, export, gather, gather_full, local_part, publish, read_weights
from burnish.types import UserError

CONFIG = tiny_config("qwen3", vocab_size=509, intermediate_size=66, tie_word_embeddings=False)
"""Sizes that neither 2 nor 4 divides, and 66, which 2 divides and 4 does not."""
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
ROWS = ("o_proj", "down_proj")
LAYOUTS = [
    Degrees(dp_shard=2),
    Degrees(tp=2),
    Degrees(dp_shard=2, tp=2),
    Degrees(dp_replicate=2, dp_shard=2),
    Degrees(dp_shard=4),
]


def bare_model(device: str, dtype: torch.dtype = torch.float32) -> CausalLM:
    return zoo.build(CONFIG, attend_sdpa, dtype=dtype, device=device)


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def lay_out(model: CausalLM, mesh: Mesh) -> CausalLM:
    """Cut each matrix as tensor parallelism does, and then everything as FSDP does."""
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        for key, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(0) if kind in COLUMNS else Shard(1) if kind in ROWS else Replicate()
            cut = distribute_tensor(parameter.detach(), mesh.axis("tp"), [placement])
            module.register_parameter(key, nn.Parameter(cut))
    for unit in [*model.blocks(), model]:
        fully_shard(unit, mesh=mesh.shards)
    return model


def check_layout(degrees: Degrees, folder: str) -> dict[str, Any]:
    mesh = Mesh(degrees, torch.device("cpu"))
    whole = native_model(CONFIG, torch.float32)
    values = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    cut = lay_out(whole, mesh)
    for name, parameter in cut.named_parameters():
        local, box = local_part(parameter)
        assert torch.equal(local, values[name][box]), name

    read = lay_out(bare_model("meta", torch.float64), mesh)
    read.to_empty(device="cpu")
    read_weights(Path(folder), read)
    for name, parameter in read.named_parameters():
        local, box = local_part(parameter)
        assert torch.equal(local, values[name][box].double()), name

    drawn = lay_out(bare_model("cpu"), mesh)
    zoo.initialise(drawn, 0, local_part)
    gathered = gather_full(drawn)
    assert gathered.keys() == (values.keys() if dist.get_rank() == 0 else set())
    assert all(torch.equal(gathered[name], values[name]) for name in gathered)
    export(read, Path(folder, "exported"), torch.bfloat16, max_shard_bytes=30_000)
    published = publish(read, list, torch.bfloat16)
    if dist.get_rank() == 0:
        assert published is not None
        stored = load_folder(Path(folder, "exported"))
        assert [name for name, _ in published] == [name for name, _ in read.named_parameters()]
        assert all(torch.equal(tensor, stored[name]) for name, tensor in published)
        assert stored.keys() == dict(published).keys()
    assert publish(read, lambda stream: next(stream)[0]) == (None if dist.get_rank() else "model.embed_tokens.weight")
    return {name: isinstance(parameter, DTensor) for name, parameter in read.named_parameters()}


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_every_layout_reads_and_writes_what_one_process_does(degrees: Degrees, tmp_path: Path):
    model = native_model(CONFIG, torch.float32)
    model.export(tmp_path, torch.float32)
    for folder in ("exported", "alone"):
        (tmp_path / folder).mkdir()
    results = run_ranks(degrees.world, check_layout, degrees, str(tmp_path))
    assert all(all(result.values()) for result in results)  # a plain parameter would have proved nothing
    hf_io.write_model(
        tmp_path / "alone", model.config, dict(model.named_parameters()), torch.bfloat16, max_shard_bytes=30_000
    )
    files = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert len(files) > 5
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == files
    for file in files:
        assert (tmp_path / "exported" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_a_strided_shard_is_cut_after_the_shard_at_its_right():
    from torch.distributed.tensor.placement_types import _StridedShard

    strided = [_StridedShard(0, split_factor=2), Shard(0)]
    places = [(data, tensor) for data in range(2) for tensor in range(2)]
    starts = [box_of([8, 3], [2, 2], place, strided)[0].start for place in places]
    assert starts == [0, 4, 2, 6]
    plain = [box_of([8, 3], [2, 2], place, [Shard(0), Shard(0)])[0].start for place in places]
    assert plain == [0, 2, 4, 6]


def stage_of(rank: int) -> CausalLM:
    """The whole model without the parts that another stage has."""
    model = native_model(CONFIG, torch.float32)
    absent = {0: ["model.layers.1", "model.norm", "lm_head"], 1: ["model.embed_tokens", "model.layers.0"]}
    for name in absent[rank]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    return model


def check_stages(folder: str) -> None:
    full = {name: parameter.shape for name, parameter in bare_model("meta").named_parameters()}
    model = stage_of(dist.get_rank())
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert 0 < len(values) < len(full)
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(UserError, match="unexpected"):
        read_weights(Path(folder), model)
    read_weights(Path(folder), model, full)
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    order = list(gather(dict(model.named_parameters()), torch.bfloat16, list(full)))
    if dist.get_rank() == 0:
        assert [name for name, _ in order] == list(full)
        assert all(tensor.dtype == torch.bfloat16 and tensor.shape == full[name] for name, tensor in order)
    export(model, Path(folder, "exported"), torch.float32, order=list(full))
    published = publish(model, list, order=list(full))
    if dist.get_rank() == 0:
        assert published is not None
        assert [name for name, _ in published] == list(full)
        stored = load_folder(Path(folder, "exported"))
        assert all(torch.equal(tensor, stored[name]) for name, tensor in published)


def test_stages_read_their_names_and_write_all_of_them(tmp_path: Path):
    native_model(CONFIG, torch.float32).export(tmp_path, torch.float32)
    (tmp_path / "exported").mkdir()
    run_ranks(2, check_stages, str(tmp_path))
    exported, original = (load_file(path / "model.safetensors") for path in (tmp_path / "exported", tmp_path))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    assert hf_io.read_config(tmp_path / "exported") == hf_io.read_config(tmp_path)


def check_tied_stages(folder: str) -> None:
    """Rank 0 has the first and last of three parts, as in an interleaved pipeline; the last copies the embedding."""
    config = tiny_config("qwen3", num_hidden_layers=3)
    full = {
        n: p.shape for n, p in zoo.build(config, attend_sdpa, dtype=torch.float32, device="meta").named_parameters()
    }
    kept = {0: [("model.embed_tokens", "model.layers.0"), ("model.layers.2", "model.norm")], 1: [("model.layers.1",)]}
    parts = []
    for names in kept[dist.get_rank()]:
        part = native_model(config, torch.float32, seed=1)
        for name in ("model.embed_tokens", "model.norm", *(f"model.layers.{n}" for n in range(3))):
            if name not in names:
                parent, _, child = name.rpartition(".")
                setattr(part.get_submodule(parent), child, nn.Identity())
        parts.append(part)
    if dist.get_rank() == 0:
        parts[1].lm_head = nn.Linear(32, 512, bias=False)
    read_weights(Path(folder), parts, full)
    export(parts, Path(folder, "exported"), torch.float32, order=list(full))
    assert gather_full(parts).keys() == (set(full) if dist.get_rank() == 0 else set())


def test_parts_of_a_tied_model_are_written_without_the_copy(tmp_path: Path):
    config = tiny_config("qwen3", num_hidden_layers=3)
    native_model(config, torch.float32).export(tmp_path, torch.float32)
    (tmp_path / "exported").mkdir()
    run_ranks(2, check_tied_stages, str(tmp_path))
    assert (tmp_path / "exported/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def read_tied(folder: str) -> str:
    mesh = Mesh(Degrees(dp_shard=2), torch.device("cpu"))
    model = zoo.build(tiny_config("qwen3"), attend_sdpa, dtype=torch.float32, device="cpu")
    with pytest.raises(UserError, match="stored with different values") as caught:
        read_weights(Path(folder), lay_out(model, mesh))
    return str(caught.value)


def test_each_rank_compares_its_part_of_a_weight_stored_twice(tmp_path: Path):
    from safetensors.torch import save_file

    native_model(tiny_config("qwen3"), torch.float32).export(tmp_path, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    save_file(stored, tmp_path / "model.safetensors")
    assert len(set(run_ranks(2, read_tied, str(tmp_path)))) == 1


@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe_lite", "lora"])
def test_what_is_published_is_what_an_export_holds(kind: str, tmp_path: Path):
    """Experts apart and corrections exact, adapters added in."""
    model = native_model(tiny_config("qwen3" if kind == "lora" else kind), torch.float32)
    if kind == "lora":
        inject(model, LoraConfig(rank=4), torch.float32)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(0))
    export(model, tmp_path, torch.bfloat16)
    published = publish(model, dict, torch.bfloat16)
    stored = load_folder(tmp_path)
    assert published is not None
    assert published.keys() == stored.keys()
    for name, tensor in published.items():
        assert tensor.dtype == stored[name].dtype, name
        assert torch.equal(tensor, stored[name]), name


def test_one_process_gathers_without_a_process_group():
    model = native_model(CONFIG, torch.float32)
    gathered = gather_full(model, torch.float64)
    assert list(gathered) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(gathered[name], p.double()) for name, p in model.named_parameters())


def refuse(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


def fill_disk_of_rank_0(degrees: Degrees, folder: str) -> str:
    model = lay_out(native_model(CONFIG, torch.float32), Mesh(degrees, torch.device("cpu")))
    raised = ""
    if dist.get_rank() == 0:
        hf_io.save_file = refuse
    try:
        export(model, Path(folder), torch.bfloat16, max_shard_bytes=30_000)
    except UserError as error:
        raised = str(error)
    dist.barrier()  # which ranks that still wait for each other would not reach
    return raised


def test_a_full_disk_in_an_export_is_told_and_leaves_no_rank_behind(tmp_path: Path):
    first, *others = run_ranks(2, fill_disk_of_rank_0, Degrees(tp=2), str(tmp_path), timeout=30)
    assert "could not be written (Error while serializing: I/O error: No space left on device)" in first
    assert others == [""]


def gather_corrections() -> dict[str, torch.dtype]:
    model = zoo.build(tiny_config("glm4_moe_lite"), attend_sdpa, dtype=torch.float32, device="cpu")
    mesh = Mesh(Degrees(dp_shard=2), torch.device("cpu"))
    for unit in [*model.blocks(), model]:
        fully_shard(unit, mesh=mesh.shards)
    return {name: tensor.dtype for name, tensor in gather_full(model, torch.bfloat16).items()}


def test_corrections_of_routers_travel_as_they_are():
    types, _ = run_ranks(2, gather_corrections)
    exact = {name for name, dtype in types.items() if dtype == torch.float32}
    assert len(exact) == 2
    assert all(name.endswith("e_score_correction_bias") for name in exact)
    assert set(types.values()) == {torch.float32, torch.bfloat16}
