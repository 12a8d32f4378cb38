"""Recipes: what is read, what is refused and in which words, what is shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.config import Recipe, RecipeError
from burnish.names import KEYS, VALUES, plain, remedy_for_key
from burnish.recipe import dump, fields, help_text, json_schema, parse_yaml, read_recipe, recipe_from_dict

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}}


def fault(*overrides: str, tree: dict[str, Any] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict(BASE if tree is None else tree, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr=1: no such key; did you mean optim.lr?"),
        ("seed=3", "seed=3: no such key; did you mean run.seed?"),
        ("data.train.0.promt_key=q", 'data.train.0.promt_key="q": no such key; did you mean data.train.0.prompt_key?'),
        ("zzz=1", "zzz=1: no such key; the keys here are batch, checkpoint, cluster, data"),
        ("optim.lr=fast", 'optim.lr="fast": must be a valid number'),
        ("optim.lr=-1", "optim.lr=-1: must be greater than 0"),
        ("batch.samples=1.5", "batch.samples=1.5: must be a valid integer"),
        ("batch.samples=true", "batch.samples=true: must be a valid integer"),
        ("data.shuffle=yes", 'data.shuffle="yes": must be a valid boolean'),
        ("data.over_long=cut", "data.over_long=\"cut\": must be 'error', 'drop' or 'truncate'"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("checkpoint.every=0", "checkpoint.every=0: must be a number of steps (1 or more), a fraction of the run"),
        ("evaluate.every=weekly", "evaluate.every=\"weekly\": must be a number of steps"),
        ("data.validation=2", "data.validation=2: as a number it is the fraction"),
        ("data.train_on={last: 2}", "must be assistant, last, all, {last_n: 2} or {roles: [user, assistant]}"),
        ("data.train_on=asistant", "did you mean assistant?"),
        ("data.train_on={last_n: 0}", "last_n must be a number of turns, 1 or more"),
        ("data.train_on={roles: user}", "roles must be a list of names, such as {roles: [user, assistant]}"),
        ("data={train: a, train_on: all, train_reasoning: false}", "data.train_reasoning=false is about the turns of"),
        ("data={train: a, train_on: all, open_turns: close}", "data.open_turns=close is about the turns of"),
        ("data={train: a, train_on: {roles: [user]}, turn_per_sample: true}", "data.turn_per_sample=true makes"),
        ("data={train: a, renderer: deepseek_v32, chat_template: x}", "both write the prompts"),
        ("data.train_on={roles: [asistant]}", "no message has the role 'asistant'; did you mean assistant?"),
        ("data.workers=-1", "data.workers=-1: must be greater than or equal to 0 or must be 'auto'"),
        ("precision.compute=fp8", "must be 'bf16', 'fp32' or 'fp64'; set it to bf16, the narrowest there is here"),
        ("precision.compute=bf61", "must be 'bf16', 'fp32' or 'fp64'; did you mean bf16?"),
        ("strategy=3", "strategy=3: no such key; the keys here are batch"),
        ("path=m", "path=\"m\": no such key; did you mean data.train.path or lora.path or model.path?"),
        ("cluster.device=cpu", "no such key; did you mean run.device?"),
        ("parallel.pp_schedule=ZBVZeroBubble", "; set it to zbv_zero_bubble"),
        ("parallel.pp_schedule=GPipe", "; did you mean gpipe?"),
        ("run.trackers=tensorboard", "must be a list, such as [a, b]"),
        ("optim=1", "optim=1: must be a mapping of keys"),
        ("data.date=2026-02-30", 'data.date="2026-02-30": must be a day as YYYY-MM-DD'),
        ("data.date=tomorrow", "data.date"),
        (
            "parallel.offload=nvme",
            "parallel.offload=nvme: shards are not written to disks; set it to parameters, which holds them and the "
            "optimizer in the host's memory",
        ),
        ("optim.min_lr=1", "optim.min_lr=1 is above the peak optim.lr=1e-05; set it to 1e-05 or less"),
        ("optim={schedule: constant, min_lr: 1e-6}", "optim.min_lr=1e-06 has no effect with optim.schedule=constant"),
        ("optim.decay_ratio=0.2", "optim.decay_ratio=0.2 has no effect with optim.schedule=cosine"),
        ("model.init=config.json", "exactly one of model.path and model.init"),
        ("checkpoint.keep_best=true", "checkpoint.keep_best needs a held-out loss; set data.validation"),
        ("batch.samples=null", "batch.samples=null and batch.tokens=null leave no batch size"),
        ("data.train=[{path: a, streaming: true}]", "set train.steps"),
        ("data.train=[{path: a, weight: 1}]", "the mixture has no end"),
        ("data.train=[{path: a, weight: 1}, {path: b}]", "must sum to less than 1"),
        ("evaluate.tokens_per_micro_batch=9", "is less than batch.tokens_per_micro_batch=16384"),
        ("run", "is not of the form a.b=value"),
        ("data.train.3.path=x", "data.train has 1 items"),
        ("optim.lr.x=1", None),
    ],
)  # fmt: skip
def test_a_fault_is_told_in_one_message(override: str, message: str | None) -> None:
    if message is None:
        assert fault(override)
    else:
        assert message in fault(override)


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("parallel.tensor_parallel=2", "set parallel.tp"),
        ("tp_size=2", "set parallel.tp"),
        ("train.Tensor-Model-Parallel-Size=2", "set parallel.tp"),
        ("cluster.num_gpus_per_node=8", "set cluster.devices_per_node"),
        ("parallel.vpp=2", "set parallel.pp_chunks (with parallel.pp_schedule: interleaved_1f1b)"),
        ("parallel.zero_stage=3", "set parallel.zero (1, 2 or 3; stage 0 is parallel.dp_replicate: N with "
         "parallel.dp_shard: 1)"),
        ("zero_optimization={stage: 2}", "set parallel.zero ("),
        ("batch.per_device_train_batch_size=1", "set batch.samples (the samples of a whole step, "),
        ("train.gradient_accumulation_steps=1", "set batch.samples (the samples of a whole step, "),
        ("batch.global_batch_size=1", "set batch.samples"),
        ("lora.r=8", "set lora.rank"),
        ("lora.use_dora=true", "set lora.kind=dora"),
        ("evaluate.steps=8", "set evaluate.every (steps, a fraction of the run, epoch or null)"),
        ("train.learing_rate=1", "set optim.lr"),
        ("parallel.tensor=2", "set parallel.tp"),
        ("lora.type=dora", "set lora.kind"),
        ("use_liger_kernel=true", "leave it out: the lm head is cut into chunks always"),
    ],
)  # fmt: skip
def test_a_key_of_another_project_is_answered_with_ours(override: str, remedy: str) -> None:
    message = fault(override)
    assert f": no such key; {remedy}" in message
    assert message.endswith(remedy) or remedy[-1] in "( "


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.zero=0", "parallel.zero=0: must be 1, 2 or 3; plain data parallelism is parallel.dp_replicate=N"),
        ("parallel.dp_shard=-1", "must be greater than or equal to 1 or must be 'auto'; set it to auto"),
        ("parallel.offload=cpu", "; set it to parameters, or to optimizer"),
        ("parallel.cp_kind=Ulysses", "; set it to all_to_all"),
        ("lora.kind=rslora", "must be 'lora' or 'dora'; set lora.rslora=true"),
        ("train.recompute=true", "; set it to full"),
        ("optim.name=adamw_8bit", "; set it to adamw, with precision.states=int8"),
        ("evaluate.every=no", "; set it to null, which is never"),
    ],
)  # fmt: skip
def test_a_value_of_another_project_is_answered_with_ours(override: str, message: str) -> None:
    assert message in fault(override)


KEYS_HERE = {path for path, _, _ in fields(Recipe)}


def test_every_name_of_another_project_leads_to_a_key() -> None:
    ends = {path.rpartition(".")[2] for path in KEYS_HERE}
    for name, (target, remark) in KEYS.items():
        key, equals, _ = target.partition("=")
        assert key in KEYS_HERE or (not key and remark), name
        assert {key for key in re.findall(r"[a-z]+\.[a-z_]+", remark) if key != "config.json"} <= KEYS_HERE, name
        assert name not in KEYS_HERE, f"{name} is a key"
        assert "." in name or name not in ends, f"{name} would hide a key of that name in another section"
        if equals:
            assert recipe_from_dict(BASE, [target])


def test_every_value_of_another_project_is_refused_and_leads_to_one_that_is_not() -> None:
    for (key, value), remedy in VALUES.items():
        assert key in KEYS_HERE
        assert set(re.findall(r"[a-z]+\.[a-z_]+", remedy)) <= KEYS_HERE, remedy
        assert remedy in fault(f"{key}={value}"), f"{key}={value} is taken"
        for meant in re.findall(r"(?:set it to|or to) ([a-z0-9_\[\]-]+)", remedy):
            wider = "precision.master=fp64" if meant == "fp64" else "precision.master=fp32"
            assert meant == "a" or recipe_from_dict(BASE, [wider, f"{key}={meant}"]), "`a number` is none"


NOT_KEYS = {"a2a", "accelerate", "ddp.yaml", "qwen2_5", "selective", "step_loss_mask", "zero2.yaml", "zero3.yaml"}
"""What stands among other projects' keys in the docs' tables: values, commands, files and fields of rows."""


def test_names_that_the_docs_translate_are_answered() -> None:
    docs, ours = Path(__file__).parents[2] / "docs", {path.rpartition(".")[2] for path in KEYS_HERE}
    for page in ("layouts.md", "coming-from-roll.md", "coming-from-slime.md", "coming-from-open-r1.md"):
        text = (docs / page).read_text(encoding="utf-8")
        tables = text.split("## From other launchers")[1].split("\n## ")[0] if page == "layouts.md" else text
        columns = [row.split("|")[1] for row in tables.splitlines() if row.startswith("|")]
        names = set(re.findall(r"`(?:--)?([a-z][a-zA-Z0-9_.-]*)(?:[: ][^`]*)?`", " ".join(columns))) - NOT_KEYS
        assert len(names) > 10
        ends = {plain(name.rpartition(".")[2]) for name in names}
        assert {name for name in ends - ours if remedy_for_key(name) is None} == set(), page


@pytest.mark.parametrize(
    ("keys", "degree", "sentence"),
    [
        ("sequence_parallel=true", "tp", "parallel.sequence_parallel=true has no effect with parallel.tp=1; remove it"),
        ("cp_kind=all_to_all", "cp", "parallel.cp_kind=all_to_all has no effect with parallel.cp=1; remove it or set"),
        ("pp_schedule=gpipe", "pp", "parallel.pp_schedule=gpipe has no effect with parallel.pp=1; remove it or set"),
        ("pp_chunks=2", "pp", "parallel.pp_chunks=2 has no effect with parallel.pp=1; remove it or set parallel.pp"),
        ("pp_first_layers=2", "pp", "parallel.pp_first_layers=2 has no effect with parallel.pp=1; remove it or set"),
    ],
)  # fmt: skip
def test_a_key_of_a_layout_that_does_nothing_is_told_and_stays(keys: str, degree: str, sentence: str) -> None:
    (idle,) = recipe_from_dict(BASE, [f"parallel.{keys}"]).idle_keys
    assert idle.startswith(sentence)
    recipe = recipe_from_dict(BASE, [f"parallel.{keys}", f"parallel.{degree}=2"])
    assert recipe.idle_keys == recipe_from_dict(parse_yaml(dump(recipe), "dump")).idle_keys == []


def test_keys_that_ask_for_nothing_are_not_idle() -> None:
    assert recipe_from_dict(BASE, ["parallel.sequence_parallel=false", "parallel.pp_schedule=1f1b"]).idle_keys == []
    assert recipe_from_dict(BASE, ["train.recompute_every=2"]).idle_keys == [
        "train.recompute_every=2 has no effect with train.recompute=none; remove it or set train.recompute"
    ]


def test_states_that_are_not_kept_cannot_be_narrow() -> None:
    assert "precision.states=int8 has no effect with optim.name=sgd" in fault("optim.name=sgd", "precision.states=int8")


def test_precision_must_nest() -> None:
    assert "precision.master=bf16 is coarser than precision.compute=fp32" in fault(
        "precision.master=bf16", "precision.compute=fp32"
    )


def test_all_faults_come_in_one_message() -> None:
    message = fault("optim.lrr=1", "batch.samples=0", "run.device=tpu")
    assert message.startswith("3 faults in the recipe:\n")
    assert message.count("\n") == 3


def test_missing_and_misplaced_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")
    file = tmp_path / "list.yaml"
    file.write_text("- a")
    with pytest.raises(RecipeError, match="must be a mapping with the keys model, lora, data"):
        read_recipe(file)
    file.write_text("model: {path: m}\nmodel: {path: n}")
    with pytest.raises(RecipeError, match="key 'model' is given twice"):
        read_recipe(file)
    file.write_text("model: [")
    with pytest.raises(RecipeError, match=r"list\.yaml: not valid YAML"):
        read_recipe(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("2E3", 2000.0), ("1.0e-5", 1e-5), ("5", 5), ("no", "no"), ("on", "on"), ("0", 0), ("-3", -3),
     ("2026-01-01", "2026-01-01"), ("010", "010"),
     ("true", True), ("null", None), ("~", None), ("1_000", 1000), (".5", 0.5), ("1.2.3", "1.2.3"), ("12:30", "12:30")],
)  # fmt: skip
def test_yaml_reads_as_recipes_are_written(text: str, value: Any) -> None:
    assert parse_yaml(text, "here") == value


def test_overrides_reach_lists_and_make_sections() -> None:
    recipe = recipe_from_dict(
        BASE, ["data.train.0.name=rows", "evaluate.early_stopping={patience: 2}", "data.validation=0.1"]
    )
    assert recipe.data.train[0].name == "rows"
    assert recipe.evaluate.early_stopping is not None
    assert BASE["data"] == {"train": [{"path": "a.jsonl"}]}, "the tree that came in is left alone"
    assert recipe_from_dict(BASE, ["data.train=b.jsonl"]).data.train[0].path == "b.jsonl"
    assert recipe_from_dict(BASE, ["batch.tokens=100"]).batch.size == ("tokens", 100)


@pytest.mark.parametrize("name", ["1e5", "12:30", "no", "null", "0x10", "a: b", "ß"])
def test_a_recipe_is_frozen_and_comes_back_from_its_dump(name: str) -> None:
    sources = f"data.validation=[{{path: 'v.jsonl@[:5]', slice: 12:30, name: {name!r}}}]"
    recipe = recipe_from_dict(BASE, ["optim.lr=3e-5", "data.train_on={last_n: 2}", sources])
    assert recipe_from_dict(parse_yaml(dump(recipe), "dump")) == recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.optim.lr = 1.0  # pyright: ignore


def test_every_key_is_documented_in_help_and_schema() -> None:
    text, schema = help_text(), json_schema()
    for path, field, _ in fields(Recipe):
        assert field.description, path
        assert path.rpartition(".")[2] in text
    assert schema["$defs"]["OptimConfig"]["properties"]["lr"]["description"] == "Peak learning rate."
    assert not schema["additionalProperties"]


def test_reading_a_recipe_imports_no_torch() -> None:
    code = "import sys, burnish.cli, burnish.recipe; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
