"""The verbs of one rank, asked of many: what travels to which, and what comes back."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import native_model, tiny_config

from burnish.components import RankComponents
from burnish.data.pack import Layout, pack
from burnish.model.vocabulary import TokenizerFacts
from burnish.observe.metrics import Stopwatch
from burnish.parallel.degrees import Degrees
from burnish.parallel.mesh import Mesh
from burnish.parallel.weights import export, local_part
from burnish.rank import RankGroup, answering_device, packed, unpacked
from burnish.recipe import recipe_from_dict
from burnish.types import Sample, StepInput, Weighted


@dataclass
class FakeRanks:
    """Ranks that answer from a table, and keep what they were asked."""

    answers: dict[str, list[Any]]
    asked: list[tuple[str, Sequence[Any] | None]] = field(default_factory=list)
    given: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        return 4

    def call(self, method: str, *args: Any, by_rank: Sequence[Any] | None = None) -> list[Any]:
        self.asked.append((method, by_rank))
        self.given.append(args)
        return self.answers[method]


def inputs(data_ranks: int) -> StepInput:
    samples = []
    for number, length in enumerate((5, 9, 3, 7)):
        weights = np.ones(length, np.float32)
        weights[0] = 0
        samples.append(Sample(np.arange(length, dtype=np.int32) + 10 * number, weights, "rows", number))
    return pack(samples, Layout(16, data_ranks))


def group(answers: dict[str, list[Any]]) -> tuple[RankGroup, FakeRanks]:
    ranks = FakeRanks(answers)
    return RankGroup(ranks, Degrees(dp_shard=2, tp=2)), ranks  # pyright: ignore[reportArgumentType]


def test_a_step_is_the_same_behind_the_wire() -> None:
    step = inputs(2)
    for rank, sent in enumerate(packed(step)):
        there = unpacked(sent)
        assert there.denominator == step.denominator
        assert there.num_trained_tokens == step.num_trained_tokens
        found, expected = list(there.batches[0]), list(step.batches[rank])
        assert len(found) == len(expected) > 0
        for one, two in zip(found, expected, strict=True):
            assert one.tokens_T.tolist() == two.tokens_T.tolist()
            assert one.targets_K.tolist() == two.targets_K.tolist()
            assert one.weights_K.tolist() == two.weights_K.tolist()
            assert one.documents.lengths == two.documents.lengths


def test_peers_of_a_data_rank_share_one_object_and_one_rank_tells_the_statistics() -> None:
    told = ({"loss": (6.0, 3.0)}, {})
    trainer, ranks = group({"step_packs": [(None, {}), told, (None, {}), told]})
    assert trainer.step(inputs(2)) == {"loss": Weighted(6.0, 3.0)}
    ((_, by_rank),) = ranks.asked
    assert by_rank is not None
    assert by_rank[0] is by_rank[1]
    assert by_rank[2] is by_rank[3]
    assert by_rank[0] is not by_rank[2]


def shards_of_transformers(folder: str) -> tuple[int, int]:
    """How many values of a model in bf16 there are here, in fp32, and how many in all."""
    keys: dict[str, Any] = {"data": {}, "model": {"path": folder, "implementation": "transformers"}}
    mesh = Mesh(Degrees(dp_shard=2), torch.device("cpu"))
    parts = RankComponents(recipe_from_dict(keys), Path(folder), mesh=mesh)
    stored = load_file(Path(folder, "model.safetensors"))
    parameters = parts.execution.parameters()
    assert parameters.keys() == stored.keys()
    for name, parameter in parameters.items():
        local, box = local_part(parameter)
        assert local.dtype == torch.float32
        assert torch.equal(local, stored[name].float()[box]), name
    return sum(local_part(p)[0].numel() for p in parameters.values()), parts.loaded.num_parameters


def test_a_model_of_transformers_is_cut_on_the_host_and_widened_as_it_is_cut(tmp_path: Path) -> None:
    native_model(tiny_config(), torch.float32).export(tmp_path, torch.bfloat16)
    (first, whole), (second, _) = run_ranks(2, shards_of_transformers, str(tmp_path))
    assert first + second == whole
    assert 0.4 * whole < first < 0.6 * whole


LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 20, "head_dim": 64, "vocab_size": 4096}
"""Sizes of a model of 210 MB in fp32, of which no tensor has more than 9 MB."""
SHARD = 2 * 10**7
"""Bytes of a file."""


def allow(num_bytes: float) -> None:
    """Let this process allocate so much beside what it has, the pages of a file that it maps included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + int(num_bytes), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def start_and_export(folder: Path, parallel: dict[str, Any]) -> int:
    """Bytes of this rank's weights, which are read and exported in little more memory than they and a file take."""
    held, mesh = 0, Mesh(Degrees(**parallel), torch.device("cpu"))
    for name in ("small", "large"):
        keys: dict[str, Any] = {"data": {}, "model": {"path": str(folder / name)}, "precision": {"compute": "fp32"}}
        parts = RankComponents(recipe_from_dict(keys | {"parallel": parallel}), folder, mesh=mesh)
        if name == "large":  # modules, and the threads of groups, are there by now
            allow(sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) / 2 + 3 * SHARD)
        execution = parts.execution
        if name == "large":
            allow(4 * SHARD)
        export(execution.stages, folder / f"{name}-exported", torch.float32, execution.weight_names(), SHARD)
        held = sum(local_part(parameter)[0].nbytes for parameter in execution.parameters().values())
    return held


@pytest.mark.parametrize("parallel", [{"dp_shard": 2}, {"tp": 2}], ids=str)
def test_no_rank_holds_the_whole_model_at_a_start_or_an_export(tmp_path: Path, parallel: dict[str, Any]) -> None:
    for name, config in (("small", tiny_config()), ("large", tiny_config() | LARGE)):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-exported").mkdir()
        native_model(config, torch.float32).export(tmp_path / name, torch.float32, max_shard_bytes=SHARD)
    held = run_ranks(2, start_and_export, tmp_path, parallel)
    files = sorted((tmp_path / "large").glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in files)
    assert whole > 10 * SHARD
    assert max(held) < 0.52 * whole
    for file in files:
        assert file.read_bytes() == (tmp_path / "large-exported" / file.name).read_bytes()


def test_the_parts_of_a_step_take_as_long_as_on_the_slowest_rank() -> None:
    times = [{"forward_backward": forward, "optimizer": 3.0 - forward} for forward in (1.0, 2.0, 0.5, 1.5)]
    trainer, _ = group({"prepare": [None] * 4, "step_packs": [({"loss": (6.0, 3.0)}, of_rank) for of_rank in times]})
    stopwatch = Stopwatch()
    trainer.prepare(2, stopwatch)
    trainer.step(inputs(2))
    trainer.step(inputs(2))
    assert stopwatch.take() == {"forward_backward": 4.0, "optimizer": 5.0}
    assert stopwatch.take() == {}


def test_prompts_are_answered_in_calls_of_few_between_gathering_and_dropping_the_model() -> None:
    trainer, ranks = group({"gather_model": [None] * 4, "answers": [[[7]] * 8, [], [], []], "drop_model": [None] * 4})
    prompts = [[n, n + 1] for n in range(16)]
    assert trainer.answers(prompts, TokenizerFacts(9, None, 1, 0), 5) == [[7]] * 16
    assert [method for method, _ in ranks.asked] == ["gather_model", "answers", "answers", "drop_model"]
    assert [given[0] for given in ranks.given[1:3]] == [prompts[:8], prompts[8:]]


def test_ranks_are_told_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank may have another working directory than the driver."""
    monkeypatch.chdir(tmp_path)
    names = ("save", "fault", "load", "load_weights", "export")
    trainer, ranks = group({name: [{}] * 4 for name in names})
    trainer.save("runs/a", {})
    trainer.fault("runs/a")
    trainer.load("runs/a")
    trainer.load_weights(Path("runs/a"))
    trainer.export(Path("runs/a"), torch.bfloat16)
    assert [Path(given[0]) for given in ranks.given] == [tmp_path / "runs/a"] * 5


@pytest.mark.parametrize(("num_bytes", "device"), [(89, "cuda:0"), (91, "cpu")])
def test_a_model_that_the_device_has_no_room_for_answers_on_the_host(
    num_bytes: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free are 70 of the device, and 30 that the allocator holds for nobody."""
    for name, value in {"mem_get_info": (70, 1000), "memory_reserved": 50, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert answering_device(torch.device("cuda:0"), num_bytes) == torch.device(device)


def test_memory_is_that_of_the_fullest_rank() -> None:
    found = [{"memory/peak_gib": peak, "memory/allocated_gib": 8 - peak} for peak in (1.0, 7.0, 2.0, 3.0)]
    trainer, _ = group({"memory": found})
    assert trainer.memory() == {"memory/peak_gib": 7.0, "memory/allocated_gib": 7.0}
