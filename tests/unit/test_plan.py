"""What `burnish plan` counts, refuses and says."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from rich.text import Text
from tiny import ARCHITECTURES, native_model, tiny_config
from torch.distributed.tensor import DTensor

from burnish.cli import main
from burnish.config import Recipe
from burnish.observe.flops import peak_flops
from burnish.observe.memory import Live
from burnish.observe.plan_terminal import Section, draw
from burnish.parallel.degrees import Degrees
from burnish.parallel.mesh import Mesh
from burnish.parallel.tp import parallelize
from burnish.parallel.trace import Micro, Trace, cut
from burnish.plan.counting import build_on_meta, count_parameters
from burnish.plan.layouts import Planner, RankModels
from burnish.plan.memory import Layout, Rank, RankModel, Sizes, rank_memory, total
from burnish.plan.report import to_paste
from burnish.plan.request import Request
from burnish.plan.search import possible, search
from burnish.plan.timing import HARDWARE, bubble
from burnish.recipe import parse_yaml, read_recipe, recipe_from_dict
from burnish.train.checkpoint import SavedTensors

MODELS = Path(__file__).parents[2] / "examples" / "models"


def recipe_of(**sections: Any) -> Recipe:
    return recipe_from_dict({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}} | sections)


def config_of(name: str) -> dict[str, Any]:
    return json.loads((MODELS / f"{name}.json").read_text(encoding="utf-8"))


def test_parameters_are_those_published() -> None:
    recipe = recipe_of()
    qwen = count_parameters(build_on_meta(config_of("qwen3-4b"), recipe, "cuda"))
    assert qwen.total == qwen.active == qwen.trained == 4_022_468_096
    config = config_of("glm-4.7-flash")
    glm = count_parameters(build_on_meta(config, recipe, "cuda"))
    sparse = build_on_meta(config, recipe, "cuda").blocks()[-1]
    # The published files hold a layer that predicts a further token: a block with its own embedding, head, three
    # norms and a projection of two hidden states to one. Nothing here trains it.
    D, V = config["hidden_size"], config["vocab_size"]
    further = sum(p.numel() for p in sparse.parameters()) + 2 * V * D + 2 * D * D + 3 * D
    corrections = 47 * config["n_routed_experts"]  # of the routers, which are no parameters
    assert 31_221_488_576 - further - glm.total in (0, corrections)
    assert glm.parts["experts"] == 46 * 64 * 3 * 2048 * 1536
    assert glm.total - glm.active == glm.parts["experts"] * 60 // 64


def test_frozen_parameters_and_adapters_are_told_from_trained_ones() -> None:
    frozen = recipe_of(model={"path": "m", "freeze": ["model.embed_tokens.*"]})
    counts = count_parameters(build_on_meta(tiny_config(), frozen, "cpu"))
    assert counts.total - counts.trained == counts.parts["embedding"] == 512 * 32
    adapted = count_parameters(build_on_meta(tiny_config(), recipe_of(lora={"rank": 4}), "cpu"))
    assert adapted.trained == adapted.parts["adapters"]


def test_live_counts_a_storage_once_and_until_it_is_gone() -> None:
    x = torch.empty(10, device="meta")
    with Live() as live:
        y = x + 1
        z = y.view(2, 5)
        assert live.bytes == 40
        w = y * 2
        del y, z
        assert (live.bytes, live.peak) == (40, 80)
        del w
        assert live.bytes == 0


def test_live_tells_some_storages_from_the_others() -> None:
    x = torch.empty(10, device="meta")
    with Live(lambda tensor: tensor.ndim == 2) as live:
        y = x + 1
        z = x.expand(3, 10) * 2
        del y
        w = x + 1
        assert (live.bytes, live.apart) == (160, 120)
        del z, w
        assert live.peaks == {0: 40, 120: 40}
        assert (live.bytes, live.apart, live.peak) == (0, 0, 160)


def local_shapes(config: dict[str, Any], sequence_parallel: bool) -> dict[str, tuple[int, ...]]:
    model = native_model(config, torch.float32)
    parallelize(model, Mesh(Degrees(tp=2), torch.device("cpu")).axis("tp"), sequence_parallel)
    return {n: tuple(p.to_local().shape if isinstance(p, DTensor) else p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=str)
def test_a_cut_model_is_what_a_tensor_parallel_rank_holds(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    model = build_on_meta(config, recipe_of(), "cpu")
    cut(model, Degrees(tp=2), True)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == run_ranks(2, local_shapes, config, True)[0]


def test_sequence_parallelism_keeps_less() -> None:
    kept = []
    for sequence_parallel in (False, True):
        model = build_on_meta(tiny_config(), recipe_of(), "cuda")
        cut(model, Degrees(tp=2), sequence_parallel)
        kept.append(Trace(model, Micro((64, 64), 100), "cuda")["none"].blocks[0].kept)
    whole = Trace(build_on_meta(tiny_config(), recipe_of(), "cuda"), Micro((64, 64), 100), "cuda")["none"]
    assert whole.blocks[0].kept / 2 < kept[1] < kept[0] < whole.blocks[0].kept


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_kept_bytes_grow_with_tokens_alone(mode: str) -> None:
    one, two = (
        Trace(build_on_meta(tiny_config(), recipe_of(), "cuda"), Micro((n,), n // 2), "cuda")[mode] for n in (256, 512)
    )
    assert two.blocks[0].kept == pytest.approx(2 * one.blocks[0].kept, rel=0.01)
    if mode == "full":
        assert one.blocks[0].kept == 256 * 32 * 2  # its input, in bf16


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_trace_of_all_experts_tells_what_a_rank_with_some_of_them_holds(mode: str, tp: int) -> None:
    # Wide experts, so that their gradients make the fullest moment of backward, and where it is, depend on ep.
    config = tiny_config("qwen3_moe", moe_intermediate_size=512)
    recipe, micro, degrees = recipe_of(), Micro((96, 32), 90), Degrees(tp=tp, dp_shard=4 // tp, ep=4)
    spread = RankModels(config, recipe, micro, "cuda").of(recipe, degrees).footprints[mode]
    model = build_on_meta(config, recipe, "cuda")
    cut(model, degrees, True)
    traced = Trace(model, micro.part(1, tp), "cuda")[mode]
    all_experts = (
        RankModels(config, recipe, micro, "cuda").of(recipe, Degrees(tp=tp, dp_shard=4 // tp)).footprints[mode]
    )
    counts = 32 * 8  # of tokens by expert
    for seen, told in ((traced.blocks, spread.blocks), (traced.later_blocks, spread.later_blocks)):
        for name in ("kept", "forward", "backward", "host"):
            assert getattr(told[0], name) == pytest.approx(getattr(seen[0], name), abs=counts), name
    assert all_experts.blocks[0].backward > spread.blocks[0].backward + 2**17


def test_what_a_rank_holds_is_what_is_left_of_its_model() -> None:
    config, recipe = tiny_config("glm4_moe_lite"), recipe_of(model={"path": "m", "freeze": ["model.layers.0.*"]})
    degrees = Degrees(tp=2, dp_shard=2, ep=2, etp=2)
    held = RankModels(config, recipe, Micro((64,), 40), "cuda").of(recipe, degrees)
    model = build_on_meta(config, recipe, "cuda")
    cut(model, degrees, True)
    assert [block.all.total for block in held.blocks] == [
        sum(p.numel() for p in b.parameters()) for b in model.blocks()
    ]
    content = total((*held.blocks, held.embedding, held.head))
    assert content.all.total == sum(p.numel() for p in model.parameters())
    assert content.trained.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert content.all.experts == sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)


def sharded(zero: int, world: int, **parallel: Any) -> tuple[RankModel, Layout, Recipe]:
    recipe = recipe_of()
    recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"zero": zero, **parallel})})
    degrees = Degrees(dp_shard=world // parallel.get("pp", 1), pp=parallel.get("pp", 1))
    model = RankModels(tiny_config(num_hidden_layers=4), recipe, Micro((64,), 40), "cuda").of(recipe, degrees)
    return model, Layout(recipe.parallel, degrees, Sizes.of(recipe), 4), recipe


def test_each_stage_of_zero_needs_less_than_the_one_before() -> None:
    peaks = []
    for zero in (1, 2, 3):
        model, layout, _ = sharded(zero, 8)
        peaks.append(rank_memory(model, layout, [range(4)], 0).peak)
    assert peaks[0] > peaks[1] > peaks[2]


def test_shards_add_up_to_the_model() -> None:
    model, layout, _ = sharded(3, 8)
    memory = rank_memory(model, layout, [range(4)], 0)
    whole = total((*model.blocks, model.embedding, model.head)).all.total
    assert 8 * memory.optimizer_step.device["weights"] == pytest.approx(whole * 4)
    assert 8 * memory.optimizer_step.device["gradients"] == pytest.approx(whole * 4)


@pytest.mark.parametrize(
    ("schedule", "chunks", "in_flight", "waiting"),
    [("gpipe", None, [8, 8], 1 / 8), ("1f1b", None, [2, 1], 1 / 8), ("interleaved_1f1b", 2, [5, 3], 1 / 16)],
)
def test_a_pipeline_keeps_and_waits_as_its_schedule_says(
    schedule: str, chunks: int | None, in_flight: list[int], waiting: float
) -> None:
    parallel = recipe_of().parallel.model_copy(update={"pp": 2, "pp_schedule": schedule, "pp_chunks": chunks})
    layout = Layout(parallel, Degrees(pp=2), Sizes.of(recipe_of()), 8)
    assert [layout.in_flight(rank) for rank in range(2)] == in_flight
    assert bubble(layout) == pytest.approx(1 + waiting)


def test_offload_moves_bytes_to_the_host() -> None:
    model, layout, _ = sharded(3, 2)
    here = rank_memory(model, layout, [range(4)], 0).optimizer_step.device
    for offload, gone in (("optimizer", {"optimizer"}), ("parameters", {"weights", "gradients", "optimizer"})):
        _, there, _ = sharded(3, 2, offload=offload)
        step = rank_memory(model, there, [range(4)], 0).optimizer_step
        assert gone.isdisjoint(step.device)
        # The states' home has copies of weights and gradients, too, and updates with less in hand at a time.
        assert step.host["weights"] == here["weights"]
        assert step.host["gradients"] == here["gradients"]
        assert 0 < step.host["optimizer"] <= here["optimizer"]


def test_offloaded_activations_are_the_host_s() -> None:
    model = build_on_meta(tiny_config(hidden_size=256), recipe_of(), "cuda")
    micro = Micro((512, 512), 700)
    kept = Trace(model, micro, "cuda")["none"].blocks[0]
    moved = Trace(model, micro, "cuda", offload_activations=True)["none"].blocks[0]
    assert kept.host == 0
    assert moved.kept < 0.1 * kept.kept < moved.host


def test_what_a_block_keeps_on_the_host_comes_back_to_a_gpu_while_the_next_goes_backward() -> None:
    recipe, config = recipe_of(train={"offload_activations": True}), tiny_config(hidden_size=256, num_hidden_layers=4)
    model = RankModels(config, recipe, Micro((512, 512), 700), "cuda").of(recipe, Degrees())
    found = []
    for device in ("cuda", "cpu"):
        layout = Layout(recipe.parallel, Degrees(), Sizes.of(recipe), 1, device, offloads_activations=True)
        moments = Rank(model, layout, [range(4)], 0)._forward_backward()
        found.append([moment.device["activations"] for moment in moments if moment.name == "a backward"])
    host = model.footprints["none"].blocks[0].host
    assert host > 0
    assert [gpu - cpu for gpu, cpu in zip(*found, strict=True)] == [host, host, host, 0]


@pytest.mark.parametrize("name", HARDWARE)
def test_hardware_has_the_peak_that_mfu_is_measured_by(name: str) -> None:
    assert HARDWARE[name].flops == peak_flops(f"NVIDIA {name}")


# --- the command ---


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return written(tmp_path, tiny_config())


def planned(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json", "-"]) == status
    return json.loads(capsys.readouterr().out)


STATED = ("--tokens-per-row", "32", "--rows", "160")


def test_a_plan_counts_steps_and_bytes(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = planned(capsys, recipe_file, *STATED, "--hardware", "h100")
    assert tree["steps"] == 10
    assert tree["step"]["tokens"] == 512
    assert tree["step"]["micro_batches"] == 2
    assert tree["parameters"]["total"] == sum(tree["parameters"]["parts"].values())
    assert tree["checkpoint_bytes"] == tree["parameters"]["total"] * 12
    assert tree["fits"] is True
    assert tree["seconds"]["step"] == pytest.approx(sum(v for k, v in tree["seconds"].items() if k != "step"))


def test_a_number_of_devices_that_nobody_said_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, tiny_config(), "cluster: {address: auto, num_nodes: 2}\n")
    said = {}
    for arguments in ((), ("--devices", "4"), ("cluster.devices_per_node=4",)):
        assert main(["plan", str(file), *STATED, *arguments]) == 0
        said[arguments] = capsys.readouterr().out
    assert "2 devices, the least that the recipe may have; --devices N plans for more" in said.pop(())
    assert not any("the least that the recipe may have" in out for out in said.values())


def test_what_does_not_fit_is_said_by_the_exit_status(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, recipe_file, *STATED, "--memory", "0.0001", status=3)["fits"] is False


def layout_overrides(layout: dict[str, Any]) -> list[str]:
    return [f"{key}={str(value).lower()}" for key, value in layout.items()]


def test_a_searched_layout_costs_what_its_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path, tiny_config("qwen3_moe", num_hidden_layers=4))
    arguments = (*STATED, "--hardware", "H100", "--devices", 4)
    layouts = planned(capsys, recipe, *arguments, "--fit")["layouts"]
    assert len({layout["layout"]["parallel.ep"] for layout in layouts}) > 1
    for searched in layouts:
        tree = planned(capsys, recipe, *layout_overrides(searched["layout"]), *arguments)
        assert {key: tree[key] for key in searched} == searched


def test_the_simplest_of_equals_comes_first(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = planned(capsys, recipe_file, *STATED, "--hardware", "H100", "--devices", 2, "--fit")["layouts"][0]
    names = ("dp_replicate", "tp", "cp", "pp", "ep", "etp")
    assert [first["layout"][f"parallel.{name}"] for name in names] == [1] * 6
    assert first["layout"]["parallel.zero"] == 3
    assert first["layout"]["train.recompute"] == "none"


def test_a_search_offloads_where_nothing_fits_without(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (recipe_file, *STATED, "--hardware", "H100", "--devices", 2, "--fit")
    needs = {}
    for offload in ("none", "optimizer", "parameters"):
        tree = planned(capsys, *arguments, "--memory", 80, f"parallel.offload={offload}")
        assert {layout["layout"]["parallel.offload"] for layout in tree["layouts"]} == {offload}
        needs[offload] = min(m["peak"] for layout in tree["layouts"] for m in layout["memory_bytes"])
    # Not all layouts were shown, so that others may need less: half of it does not do.
    memory = needs["none"] / 2 / 0.92 / 2**30
    layouts = planned(capsys, *arguments, "--memory", memory)["layouts"]
    assert layouts
    assert all(
        layout["layout"]["parallel.offload"] != "none" or layout["layout"]["train.recompute"] == "full"
        for layout in layouts
    )


def test_what_nothing_fits_in_is_said_with_what_would_do(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(recipe_file), *STATED, "--hardware", "H100", "--devices", "2", "--fit", "--memory", "0.0001")
    assert main(["plan", *arguments]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "no layout of 2 devices fits in 0.000 GiB, offloaded or not; the least is 0.00" in said
    assert "offload parameters" in said


def written(folder: Path, config: dict[str, Any], more: str = "") -> Path:
    (folder / "model.json").write_text(json.dumps(config))
    file = folder / "recipe.yaml"
    file.write_text(
        f"model: {{init: {folder / 'model.json'}, tokenizer: none}}\n"
        f"data: {{train: [{{path: {folder / 'rows.jsonl'}}}]}}\n"
        "batch: {samples: 16, tokens_per_micro_batch: 256}\n" + more
    )
    return file


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"num_hidden_layers": 8, "num_key_value_heads": 4}),
        ("qwen3_moe", {"num_hidden_layers": 4}),
        ("glm4_moe_lite", {"num_hidden_layers": 5}),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
    ],
)
@pytest.mark.parametrize("more", ["", "parallel: {pp_schedule: zbv_zero_bubble, pp: 2, pp_first_layers: 1}\n"])
def test_a_run_takes_what_a_search_proposes(tmp_path: Path, family: str, changes: dict[str, Any], more: str) -> None:
    config = tiny_config(family, **changes) if family in ARCHITECTURES else {"model_type": family, **changes}
    file = written(tmp_path, config, more)
    request = Request(str(file), devices=8, devices_per_node=4, tokens_per_row=32, rows=160, hardware="H100", fit=True)
    recipe = read_recipe(str(file), ["batch.tokens_per_micro_batch=32"])
    planner, refused = Planner(request, recipe), Counter[str]()
    proposed = list(possible(planner, recipe, refused))
    assert proposed
    best = search(planner, 10).best
    for estimate in best:
        pasted = parse_yaml("\n".join(to_paste(estimate).notes), "pasted")
        tree = parse_yaml(file.read_text(), str(file)) | pasted
        proposed.append((recipe_from_dict(tree), estimate.layout.degrees))
        assert not proposed[-1][0].idle_keys
    for laid_out, degrees in (*proposed[::11], *proposed[-len(best) :]):
        checked = recipe_from_dict(laid_out.model_dump(mode="json"))
        assert Planner(replace(request, fit=False), checked).degrees == degrees


def test_fit_ranks_by_time_and_counts_what_it_drops(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = planned(capsys, recipe_file, *STATED, "--hardware", "H100", "--fit", "--devices", 4)
    times = [layout["seconds"]["step"] for layout in tree["layouts"]]
    assert all(before < max(1.01 * after, after + 1e-3) for before, after in pairwise(times))
    keys = [layout["layout"] for layout in tree["layouts"]]
    names = ("dp_replicate", "dp_shard", "cp", "tp", "pp")
    for layout in keys:
        world = 1
        for name in names:
            world *= layout[f"parallel.{name}"]
        assert world == 4
    assert len({tuple(layout[f"parallel.{name}"] for name in (*names, "ep")) for layout in keys}) == len(keys)
    # Two key heads cannot be shared by four ranks, and two micro-batches not by four data ranks.
    assert all(layout["parallel.tp"] < 4 for layout in keys)
    assert set(tree["dropped"]) >= {
        "tp does not suit the model",
        "more data ranks than micro-batches in a step",
    }


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["precision.states=int8"],
        ["precision.master=bf16", "precision.states=bf16"],
        ["optim.name=sgd", "model.freeze=[model.embed_tokens.*]", "checkpoint.export_dtype=fp32"],
        ["lora={rank: 8}"],
        ["lora={rank: 8, merge: false}"],
    ],
    ids=str,
)
def test_a_checkpoint_and_an_export_have_the_size_foretold(
    tmp_path: Path,
    chatml_tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
) -> None:
    file = written(tmp_path, tiny_config(hidden_size=128, intermediate_size=256))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one and two", "completion": "three"}\n' * 32)
    places = [f"model.tokenizer={chatml_tokenizer}", f"run.dir={tmp_path / 'run'}", "run.trackers=[]"]
    overrides = [*overrides, *places, "run.device=cpu", "train.steps=1"]
    assert main(["sft", str(file), *overrides]) == 0
    capsys.readouterr()
    tree = planned(capsys, file, *overrides, *STATED)
    (folder,) = (tmp_path / "run" / "checkpoints").glob("iter_*")
    tensors = SavedTensors(folder)
    held = sum(tensors[name].nbytes for name in tensors)
    assert 0 <= held - tree["checkpoint_bytes"] < 8_000  # random states, counts of steps
    assert 0 <= size_of(folder) - held < 20_000 + 3_000 * len(tensors)  # what torch writes about each
    exported = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
    assert 0 <= exported - tree["export_bytes"] < 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "H1000"), "--hardware=H1000 is not known; take A100, H100, H200, B200"),
        (("--peak", "100"), "--peak=100 needs --bandwidth"),
        (("--fit",), "--fit ranks layouts by time and memory; give --hardware"),
        (("--tokens-per-row", "300"), "--tokens-per-row=300 is more than batch.tokens_per_micro_batch=256"),
    ],
)
def test_what_cannot_be_planned_is_said_before_anything_is_printed(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["plan", str(recipe_file), *STATED, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_keys_that_do_nothing_are_told_beside_the_plan(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe_file), *STATED, "parallel.pp_schedule=gpipe", "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)
    assert "warning: parallel.pp_schedule=gpipe has no effect with parallel.pp=1; " in said.err


PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
WRITTEN_COMMANDS = re.findall(r"^burnish plan (.*?) *(?:#.*)?$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", WRITTEN_COMMANDS)
def test_a_command_of_the_page_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    chatml_tokenizer: Path,
    command: str,
) -> None:
    config = tiny_config("qwen3_moe", num_hidden_layers=4, max_position_embeddings=4096)
    file = written(tmp_path, config, f"run: {{dir: {tmp_path / 'run'}}}\n")
    text = file.read_text().replace("tokenizer: none", f"tokenizer: {chatml_tokenizer}")
    file.write_text(text.replace("samples: 16, tokens_per_micro_batch: 256", "samples: 64"))
    rows = '{"prompt": "one and two", "completion": "three"}\n'
    (tmp_path / "rows.jsonl").write_text(rows * 64)
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *shlex.split(command)]) == 0
    out = capsys.readouterr().out
    assert "memory of a rank" in out
    assert "a step" in out or "--hardware" not in command
    assert (tmp_path / "plan.json").exists() == ("--json" in command)


def test_the_refusal_of_the_page_is_the_command_s(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = written(tmp_path, config_of("glm-4.7-flash"))
    assert main(["plan", str(file), *STATED, "parallel.tp=8"]) == 2
    (said,) = re.findall(r"burnish: error: (.*)\n", capsys.readouterr().err)
    assert " ".join(said.split()) in " ".join(PAGE.split())


def test_missing_rows_are_said_with_a_way_without(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe_file)]) != 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "--tokens-per-row N" in err


def test_tables_hold_to_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen()
    rows = [("a long name of a part of memory", *["123.4"] * 3)]
    columns = ("GiB", *[f"pipeline rank {n}, 12 layers" for n in range(3)])
    draw(screen, "plan", [("rows", "word " * 40)], [Section("memory", columns, rows, ("note " * 40,))])
    assert max(len(Text.from_ansi(line)) for line in screen.getvalue().splitlines()) <= 80
