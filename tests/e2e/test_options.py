"""What single keys of the recipe change about a run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest
from tiny import tiny_config
from workshop import Workshop, weights

from burnish.loop import fit
from burnish.recipe import recipe_from_dict
from burnish.sft import SFT, Result
from burnish.types import UserError

Train = Callable[..., Result]


@pytest.fixture
def train(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train 6 steps in this process with some keys changed."""
    monkeypatch.chdir(workshop.folder)

    def run(*overrides: str) -> Result:
        tree = {
            "model": {"init": "model/config.json", "tokenizer": "tokenizer"},
            "data": {"train": ["train.jsonl@[:48]"], "validation": ["held.jsonl"], "workers": 0},
            "batch": {"samples": 8, "tokens_per_micro_batch": 128},
            "optim": {"lr": 5e-3},
            "precision": {"compute": "fp32"},
            "evaluate": {"every": None},
            "run": {"dir": "runs/a", "trackers": []},
        }
        return SFT(recipe_from_dict(tree, overrides)).train()

    return run


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.recompute=full",),
        ("train.recompute=selective", "precision.compute=bf16"),
        ("precision.states=bf16",),
        ("precision.states=int8",),
        ("precision.compute=bf16", "precision.master=bf16", "optim.lr=1e-2"),
        ("precision.compute=fp64", "precision.master=fp64", "precision.states=fp64", "precision.reduce=fp64"),
        ("train.neftune_alpha=5.0",),
        ("train.label_smoothing=0.1", "train.z_loss=1e-4"),
        ("train.loss=sample",),
        ("model.implementation=transformers",),
        ("batch.packing=off",),
        ("optim.schedule=wsd", "optim.warmup_steps=1"),
        ("run.deterministic=true",),
        ("data.prepare=first",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_it_learns_with(train: Train, overrides: tuple[str, ...]) -> None:
    found = train(*overrides).summary
    assert found["step"] == 6
    assert found["final_eval_loss"] < found["first_eval_loss"] - 0.5


@pytest.mark.parametrize(
    "override", ["train.neftune_alpha=5.0", "train.label_smoothing=0.2", "train.z_loss=1e-2", "train.loss=sample",
                 "optim.weight_decay=0.9", "optim.clip_norm=0.1", "optim.schedule=constant", "run.seed=1",
                 "data.train_on=all", "data.shuffle=false"],
)  # fmt: skip
def test_a_key_changes_what_is_learned(train: Train, override: str) -> None:
    plain = train("run.dir=runs/plain").summary
    changed = train("run.dir=runs/changed", override).summary
    assert changed["final_eval_loss"] != plain["final_eval_loss"]


@pytest.mark.parametrize(
    "override",
    [
        "train.recompute=full",
        "batch.tokens_per_micro_batch=512",
        "evaluate.tokens_per_micro_batch=512",
        "data.workers=1",
        "run.log_every=4",
        "train.memory_check=false",
        "checkpoint.seconds=1e-6",
    ],
)
def test_a_key_changes_nothing_but_rounding(train: Train, override: str) -> None:
    plain = train("run.dir=runs/plain").summary
    changed = train("run.dir=runs/changed", override).summary
    assert changed["final_eval_loss"] == pytest.approx(plain["final_eval_loss"], rel=1e-5)
    assert changed["total_tokens"] == plain["total_tokens"]


def test_frozen_parameters_stay(train: Train, workshop: Workshop) -> None:
    import torch

    train("run.dir=runs/none", "optim.lr=1e-30", "checkpoint.export_dtype=fp32")
    train("run.dir=runs/frozen", "model.freeze=[model.layers.*.mlp.*]", "checkpoint.export_dtype=fp32")
    start, frozen = weights(workshop.folder / "runs" / "none"), weights(workshop.folder / "runs" / "frozen")
    same = {name for name in start if torch.allclose(start[name], frozen[name], atol=1e-12)}
    assert same == {name for name in start if ".mlp." in name}
    with pytest.raises(UserError, match=r"model\.freeze=model\.layer\.\* fits no parameter; near names: model"):
        train("run.dir=runs/typo", "model.freeze=[model.layer.*]")


def test_the_best_is_kept_and_exported_and_training_stops_early(train: Train, workshop: Workshop) -> None:
    result = train(
        "evaluate.every=1", "optim.lr=0.5", "optim.schedule=constant", "checkpoint.keep=1", "checkpoint.keep_best=true",
        "evaluate.early_stopping={patience: 2}", "train.epochs=4",
    )  # fmt: skip
    found = result.summary
    assert found["stopped_early"]
    assert found["step"] == found["best_step"] + 2 < found["total_steps"]
    assert result.export is not None
    assert result.export.name == f"step-{found['best_step']}"
    kept = sorted(path.name for path in (workshop.folder / "runs/a/checkpoints").glob("iter_*"))
    assert kept == [f"iter_{found['best_step']:07d}", f"iter_{found['step']:07d}"]


def test_a_nonfinite_step_can_be_skipped(train: Train, workshop: Workshop) -> None:
    wild = ("optim.lr=1e30", "optim.clip_norm=null", "checkpoint.export_dtype=fp32")
    found = train(*wild, "train.on_nonfinite=skip").summary
    assert found["step"] == 6
    lines = [json.loads(line) for line in (workshop.folder / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert any(line.get("nonfinite_steps") for line in lines)
    assert json.loads((workshop.folder / "runs/a/nonfinite.json").read_text())
    assert all(bool(w.isfinite().all()) for w in weights(workshop.folder / "runs/a").values()), "none took a bad step"


def test_nothing_is_saved_between_a_nonfinite_step_and_the_stop(train: Train, workshop: Workshop) -> None:
    with pytest.raises(UserError, match="is not finite"):
        train("optim.lr=1e30", "optim.clip_norm=null", "run.log_every=100", "checkpoint.every=1")
    bad = json.loads((workshop.folder / "runs/a/nonfinite.json").read_text())[0]["step"]
    latest = (workshop.folder / "runs/a/checkpoints/latest_checkpointed_iteration.txt").read_text()
    assert int(latest) == bad - 1


def test_exports_at_every_save(train: Train, workshop: Workshop) -> None:
    train("checkpoint.every=3", "checkpoint.export=save")
    assert sorted(path.name for path in (workshop.folder / "runs/a/hf").iterdir()) == ["step-3", "step-6"]


def test_packing_that_leaks_is_refused_or_left(train: Train, workshop: Workshop) -> None:
    """A Mamba has no attention to keep documents apart with."""
    config = {
        "model_type": "mamba", "architectures": ["MambaForCausalLM"], "vocab_size": 512, "hidden_size": 32,
        "num_hidden_layers": 2, "state_size": 8, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 0,
    }  # fmt: skip
    (workshop.folder / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"batch\.packing=require.*set it to auto"):
        train("batch.packing=require")
    found = train("optim.lr=2e-2").summary
    assert found["final_eval_loss"] < found["first_eval_loss"] - 0.3


def test_a_native_model_that_leaks_is_refused(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.model import attention

    def leaking(q: Any, k: Any, v: Any, documents: Any, *arguments: Any, **options: Any) -> Any:
        one = type(documents)(documents.cu_seqlens[[0, -1]], (sum(documents.lengths),))
        return attention.attend_sdpa(q, k, v, one, *arguments, **options)

    choice = attention.Attention("leaking", leaking)
    monkeypatch.setattr("burnish.model.zoo.choose_attention", lambda *arguments: choice)
    with pytest.raises(UserError, match=r"hidden states change by .*; this model has no other way to run"):
        train()


def test_a_run_taken_further_is_not_finished_by_its_old_summary(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train().summary["total_steps"] == 6
    further = ("train.epochs=2", "checkpoint.allow_changes=true", "checkpoint.every=1")

    def fit_one_step(trainer: Any, source: Any, run: Any) -> None:
        log = run.log

        def log_and_stop(*arguments: Any) -> None:
            log(*arguments)
            run.interrupted = signal.SIGTERM

        run.log = log_and_stop
        fit(trainer, source, run)

    with monkeypatch.context() as stopping:
        stopping.setattr("burnish.sft.fit", fit_one_step)
        assert train(*further).interrupted == 143
    assert train(*further).summary["step"] == 12


def test_a_renamed_file_is_the_same_data(train: Train, workshop: Workshop) -> None:
    train("train.epochs=1")
    (workshop.folder / "train.jsonl").rename(workshop.folder / "renamed.jsonl")
    found = train("data.train=renamed.jsonl@[:48]")
    assert found.summary["step"] == 6, "finished, and recognised as such"
    train("data.train=renamed.jsonl@[:48]", "train.steps=8", "checkpoint.allow_changes=true")


def test_a_run_begun_elsewhere_goes_on_in_its_own_folder(train: Train, workshop: Workshop) -> None:
    train("run.dir=runs/a")
    further = ("run.dir=runs/b", "checkpoint.resume=runs/a", "train.epochs=2", "checkpoint.allow_changes=true")
    assert train(*further).summary["step"] == 12
    lines = [json.loads(line) for line in (workshop.folder / "runs/b/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(7, 13))
    before = (workshop.folder / "runs/b/metrics.jsonl").read_bytes()
    assert train(*further).summary["step"] == 12
    assert (workshop.folder / "runs/b/metrics.jsonl").read_bytes() == before, (
        "it is finished, and not begun again from a"
    )


def test_the_best_of_another_folder_is_looked_for_anew(train: Train) -> None:
    train("run.dir=runs/a", "optim.lr=3.0", "optim.schedule=constant")
    found = train(
        "run.dir=runs/b", "checkpoint.resume=runs/a", "train.epochs=2", "checkpoint.allow_changes=true",
        "optim.lr=3.0", "optim.schedule=constant", "evaluate.every=3", "checkpoint.keep_best=true",
    )  # fmt: skip
    assert found.summary["best_step"] > 6
    assert found.export is not None


def test_a_dropped_row_at_the_end_is_counted(train: Train, workshop: Workshop) -> None:
    with (workshop.folder / "train.jsonl").open("a") as file:
        file.write("broken\n")
    found = train("data.train=[train.jsonl]", "data.shuffle=false", "data.bad_rows=drop")
    assert found.summary["rows"] == {"train": {"kept": 96, "bad": 1}}


def test_a_file_of_broken_rows_names_the_first(train: Train, workshop: Workshop) -> None:
    (workshop.folder / "train.jsonl").write_text("{'a': 1}\n" * 3)
    with pytest.raises(UserError, match=r"none of its rows can be read; the first: train\.jsonl:1: broken JSON"):
        train("data.train=[train.jsonl]")


@pytest.mark.parametrize("changes", [{"vocab_size": 300}, {"max_position_embeddings": 20}])
def test_a_model_that_does_not_fit_is_refused(train: Train, workshop: Workshop, changes: dict[str, Any]) -> None:
    (workshop.folder / "model" / "config.json").write_text(json.dumps(tiny_config("llama", **changes)))
    with pytest.raises(UserError, match=r"has ids up to 319|more than the model's max_position_embeddings=20"):
        train()


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(train: Train) -> None:
    plain = train("run.dir=runs/plain").summary
    compiled = train("run.dir=runs/compiled", "train.compile=true").summary
    assert compiled["final_eval_loss"] == pytest.approx(plain["final_eval_loss"], rel=1e-4)


def test_keys_that_do_nothing_are_warned_of(train: Train) -> None:
    log = train("parallel.cp_kind=all_to_all", "parallel.sequence_parallel=true").run_folder / "logs" / "rank-0.log"
    text = log.read_text()
    assert text.count("parallel.cp_kind=all_to_all has no effect with parallel.cp=1; remove it or set parallel.cp") == 1
    assert text.count("parallel.sequence_parallel=true has no effect with parallel.tp=1") == 1
