"""What a run leaves behind: the facts at its start, summary.json, report.html, the exported model and its card. It
computes and trains nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from burnish.components import Components
from burnish.config import Recipe
from burnish.data.chat import TextTokenizer
from burnish.data.feed import Feed, Preparation
from burnish.data.pack import Layout
from burnish.data.prepare import DROPPED, count_rows
from burnish.data.rows import Rows
from burnish.export import Card, SavedWeights, write_export
from burnish.files import write_whole
from burnish.length import RunLength
from burnish.model.vocabulary import stop_ids
from burnish.observe.environment import environment, versions
from burnish.observe.flops import formula_text
from burnish.observe.metrics import read
from burnish.observe.report import (
    Generation,
    LengthDistribution,
    RenderedSample,
    Report,
    SourceSummary,
    write_report,
)
from burnish.observe.units import count_text, duration_text
from burnish.rank import Rank, RankGroup
from burnish.recipe import dump
from burnish.run import Progress, Run, RunFolder
from burnish.train.optim import DTYPES
from burnish.types import Sample

PICTURED_ROWS = 2_000
"""Rows of a source from whose lengths the report draws its distribution."""
LONGEST_CHARACTER = 4
"""Tokens of one character at most: bytes of UTF-8."""
KINDS = {"packed": "packed", "rows": "one document a row", "single": "one document a micro-batch"}
ORDINARY = ("rows", "samples", "kept")
"""What is counted of every source. What is neither of these nor of `CHANGED` is a kind of notice."""
CHANGED = ("cut", *DROPPED)
WORTH_A_WARNING = 0.1
"""Share of a source's samples beyond which that they were dropped is a warning."""
SHOWN_SAMPLES = 3
"""Rendered samples of each source in the report."""


def start_facts(parts: Components, length: RunLength, layout: Layout, ranks: Rank | RankGroup) -> list[tuple[str, str]]:
    """Labels and values of what is about to run."""
    recipe, loaded = parts.recipe, parts.loaded
    frozen = sum(p.numel() for p in loaded.model.parameters() if not p.requires_grad)
    parameters = count_text(loaded.num_parameters) + (f", {count_text(frozen)} of them frozen" if frozen else "")
    precision = [f"{name} {value}" for name, value in recipe.precision]
    unit, size = recipe.batch.size
    budget = layout.tokens_per_micro_batch
    rows = ", ".join(
        f"{s.name} ({s.format}{f', {s.num_rows:,} rows' if s.num_rows is not None else ', streamed'})"
        for s in parts.corpus.train
    )
    facts = [
        ("model", f"{loaded.facts['architecture']}, {parameters} parameters, {loaded.facts['implementation']}"),
        ("attention", f"{ranks.attention()}, {KINDS[layout.kind]}"),
        ("data", rows),
        ("held out", ", ".join(f"{s.name} ({s.num_rows:,} rows)" for s in parts.corpus.validation) or "none"),
        ("length", f"{length.total_steps:,} steps of {size:,} {unit}, micro-batches of {budget:,} tokens"),
        ("precision", ", ".join(precision)),
        ("layout", _layout_text(ranks, str(parts.device))),
    ]
    device_name = ranks.device_name()
    utilisation = parts.utilisation(ranks.world_size, device_name)
    if utilisation is not None:
        facts.append(("MFU", formula_text(utilisation.shape, device_name, utilisation.peak)))
    return facts


def _layout_text(ranks: Rank | RankGroup, device: str) -> str:
    if ranks.world_size == 1:
        return f"one process on {device}"
    axes = [f"{name} {size}" for name, size in asdict(ranks.degrees).items() if size > 1]
    return f"{ranks.world_size} ranks on {device.partition(':')[0]}: {', '.join(axes)}"


def write_facts(
    parts: Components, folder: RunFolder, prepared: Sequence[Preparation] | None, held_out: Sequence[Preparation]
) -> None:
    """recipe.yaml, environment.json, data.json and model/: what the run is made of.

    data.json has the counts of the sources that were prepared: `held_out`, and the training ones where `prepared` is
    given.
    """
    write_whole(folder.path / "recipe.yaml", dump(parts.recipe))
    folder.write_json("environment.json", environment(str(parts.device)))
    data = parts.corpus.facts()
    for part, found in (("train", prepared or ()), ("validation", held_out)):
        for source, preparation in zip(data[part], found, strict=bool(found)):
            source |= {"counts": count_rows(preparation.counts), "first_of_kind": preparation.first_of_kind}
    folder.write_json("data.json", {"date": parts.date, **data})
    model = folder.path / "model"
    model.mkdir(exist_ok=True)
    folder.write_json("model/config.json", parts.loaded.model.config)
    if parts.generation_config is not None:
        folder.write_json("model/generation_config.json", parts.generation_config)
    parts.tokenizer.save_pretrained(str(model))


def trained_rows(folder: RunFolder) -> dict[str, int | None]:
    """The rows of each source that a run trains on, None for a stream; nothing where no run has begun."""
    file = folder.path / "data.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"train": []}
    return {source["name"]: source["rows"] for source in facts["train"]}


def summarise(
    run: Run, cursor: Mapping[str, Any], held_out: Mapping[str, Preparation], export: Path | None
) -> dict[str, Any]:
    """summary.json. Times, totals and counts of rows are of the whole run, over all starts and epochs.

    `cursor` is the state of the training source (`RowSource`), `held_out` by source.
    """
    counts, progress = cursor["counts"], run.progress
    first = {
        name: {kind: reason for kind, reason in kinds.items() if kind in counts.get(name, {})}
        for name, kinds in cursor["first_of_kind"].items()
    }
    run.count_time()
    lines = read(run.folder.metrics)
    steps = [line for line in lines if "loss" in line]
    return {
        "finished": True,
        "stopped_early": progress.stopped_early,
        "step": progress.step,
        "total_steps": run.total_steps,
        "runtime_seconds": progress.seconds,
        "samples_per_second": progress.totals.samples / progress.seconds,
        "tokens_per_second": progress.totals.tokens / progress.seconds,
        "total_samples": progress.totals.samples,
        "total_tokens": progress.totals.tokens,
        "total_trained_tokens": progress.totals.trained_tokens,
        "final_train_loss": steps[-1]["loss"] if steps else None,
        "first_eval_loss": next((line["eval/loss"] for line in lines if "eval/loss" in line), None),
        "final_eval_loss": progress.last_evaluation.get("eval/loss"),
        "best_eval_loss": progress.best_loss,
        "best_step": progress.best_step,
        "rows": {name: count_rows(of_source) for name, of_source in counts.items()},
        "first_of_kind": {name: kinds for name, kinds in first.items() if kinds},
        "held_out_rows": {name: count_rows(found.counts) for name, found in held_out.items()},
        "held_out_first_of_kind": {
            name: found.first_of_kind for name, found in held_out.items() if found.first_of_kind
        },
        "export": None if export is None else str(export),
    }


def result_facts(summary: Mapping[str, Any], folder: RunFolder) -> list[tuple[str, str]]:
    """Labels and values of what came of a run, and where it lies."""
    tokens, trained = count_text(summary["total_tokens"]), count_text(summary["total_trained_tokens"])
    seconds = duration_text(summary["runtime_seconds"])
    facts = [
        ("steps", f"{summary['step']:,} of {summary['total_steps']:,} in {seconds}"),
        ("tokens", f"{tokens}, {trained} trained"),
    ]
    if summary["final_train_loss"] is not None:
        facts.append(("train loss", f"{summary['final_train_loss']:.4f}"))
    if summary["final_eval_loss"] is not None:
        first, last = summary["first_eval_loss"], summary["final_eval_loss"]
        facts.append(("held-out loss", f"{last:.4f}" if first in (None, last) else f"{first:.4f} -> {last:.4f}"))
    facts += _count_facts(summary)
    if summary["export"] is not None:
        facts.append(("export", summary["export"]))
    facts += [("report", str(folder.report)), ("metrics", str(folder.metrics))]
    if summary["export"] is not None:
        facts.append(("next", f"burnish chat {summary['export']}"))
    return facts


def dropped_warnings(summary: Mapping[str, Any]) -> list[str]:
    """A line for each source of which more than a tenth of the samples was dropped, with the first of most of them."""
    lines = []
    for name, counts, first in _counts_by_source(summary):
        dropped = {kind: counts[kind] for kind in DROPPED if kind in counts}
        number, total = sum(dropped.values()), sum(dropped.values()) + counts.get("kept", 0)
        if number > WORTH_A_WARNING * total:
            kind = max(dropped, key=dropped.__getitem__)
            lines.append(f"{name}: dropped {number:,} of {total:,} samples{_first_text(first, kind, '; ')}")
    return lines


def _counts_by_source(summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, int], Mapping[str, str]]]:
    """(name, counts, first of each kind) of every source; summaries of older versions have no first ones."""
    for prefix, suffix in (("", ""), ("held_out_", " (held out)")):
        first = summary.get(f"{prefix}first_of_kind", {})
        for name, counts in summary[f"{prefix}rows"].items():
            yield f"{name}{suffix}", counts, first.get(name, {})


def _first_text(first: Mapping[str, str], kind: str, before: str = ", ") -> str:
    return f"{before}first: {first[kind]}" if kind in first else ""


def _count_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What became of rows, by source: nothing of those that were all kept as they are."""
    samples, dropped, noticed = [], [], []
    for name, counts, first in _counts_by_source(summary):
        if "samples" in counts:
            samples.append(("samples", f"{name}: {counts['samples']:,} of {counts['rows']:,} rows"))
        for kind, number in counts.items():
            text = f"{name}: {number:,} {kind.replace('_', '-')}{_first_text(first, kind)}"
            if kind in CHANGED:
                dropped.append(("dropped or cut", text))
            elif kind not in ORDINARY:
                noticed.append(("noticed", text))
    return [*samples, *dropped, *noticed]


def write_run_report(
    parts: Components,
    folder: RunFolder,
    feed: Feed,
    held_out: Sequence[Preparation],
    facts: Sequence[tuple[str, str]],
    summary: Mapping[str, Any],
) -> None:
    """report.html, from `start_facts`, what the run left in its folder, and the first rows of its sources.

    data.json gets the counts of the whole run, which `write_facts` could not know yet.
    """
    _write_counts(folder, summary)
    answers = folder.answers.read_text(encoding="utf-8").splitlines() if folder.answers.exists() else []
    metrics = read(folder.metrics)
    pictured = [_first_rows(feed, index) for index in range(len(parts.corpus.train))]
    trained = [
        _source_summary(
            source.name,
            "train",
            summary["rows"].get(source.name, {}),
            summary["first_of_kind"].get(source.name, {}),
            sum(line.get(f"tokens/{source.name}", 0) for line in metrics),
            sum(line.get(f"trained_tokens/{source.name}", 0) for line in metrics),
            LengthDistribution.of([len(sample.tokens) for sample in samples]),
        )
        for source, samples in zip(parts.corpus.train, pictured, strict=True)
    ]
    evaluated = [
        _source_summary(
            source.name,
            "validation",
            summary["held_out_rows"][source.name],
            found.first_of_kind,
            int(found.lengths.tokens.sum()),
            found.num_trained,
            LengthDistribution.of(found.lengths.tokens.tolist()),
        )
        for source, found in zip(parts.corpus.validation, held_out, strict=True)
    ]
    report = Report(
        title=parts.recipe.run.name or folder.path.name,
        facts=[*facts, *((f"{name} version", text) for name, text in versions().items())],
        summary=result_facts(summary, folder),
        metrics=metrics,
        sources=[*trained, *evaluated],
        samples=[_rendered(parts.text_tokenizer, one) for samples in pictured for one in samples[:SHOWN_SAMPLES]],
        generations=[Generation(**json.loads(line)) for line in answers],
        recipe=dump(parts.recipe),
    )
    write_report(folder.report, report)


def _write_counts(folder: RunFolder, summary: Mapping[str, Any]) -> None:
    facts = json.loads((folder.path / "data.json").read_text(encoding="utf-8"))
    for part, prefix in (("train", ""), ("validation", "held_out_")):
        for source in facts[part]:
            source["counts"] = summary[f"{prefix}rows"].get(source["name"], {})
            source["first_of_kind"] = summary[f"{prefix}first_of_kind"].get(source["name"], {})
    folder.write_json("data.json", facts)


def _first_rows(feed: Feed, index: int) -> list[Sample]:
    """The samples of a source's first rows: enough for a picture of it. None of a stream, which has no first rows."""
    if not isinstance(feed.corpus.train[index].rows, Rows):
        return []
    rows = islice(feed.rows(index), PICTURED_ROWS)
    return [prepared for row in rows for prepared in row if isinstance(prepared, Sample)]


def _rendered(tokenizer: TextTokenizer, sample: Sample) -> RenderedSample:
    """Token by token; tokens that hold parts of one character, such as those of an emoji, are shown together."""
    pieces: list[tuple[str, float]] = []
    begun: list[int] = []
    for token, weight in zip(sample.tokens.tolist(), sample.loss_weights.tolist(), strict=True):
        begun.append(token)
        text = tokenizer.decode(begun)
        if "\ufffd" in text and len(begun) < LONGEST_CHARACTER:
            continue
        pieces.append((text, weight))
        begun = []
    if begun:
        pieces.append((tokenizer.decode(begun), float(sample.loss_weights[-1])))
    return RenderedSample(sample.source, sample.index, pieces)


def _source_summary(
    name: str,
    split: str,
    counts: Mapping[str, int],
    first: Mapping[str, str],
    tokens: int,
    num_trained: int,
    lengths: LengthDistribution | None,
) -> SourceSummary:
    dropped = {kind.replace("_", "-") + _first_text(first, kind): n for kind, n in counts.items() if kind in DROPPED}
    kept = counts.get("kept", 0)
    rows = counts.get("rows", kept + sum(dropped.values()))
    return SourceSummary(name, split, rows, kept, dropped, counts.get("cut", 0), tokens, num_trained, lengths)


def export_model(
    rank: Rank | RankGroup | SavedWeights,
    parts: Components,
    recipe: Recipe,
    run: RunFolder,
    progress: Progress,
    target: Path,
) -> Path:
    """Write the weights that `rank` holds now, which are those of `progress`, as a Hugging Face folder; returns it."""
    model, last = parts.loaded.model, progress.last_evaluation
    card = Card(
        name=recipe.run.name or run.path.name,
        base_model=recipe.model.path,
        step=progress.step,
        samples=progress.totals.samples,
        tokens=progress.totals.tokens,
        trained_tokens=progress.totals.trained_tokens,
        held_out_loss=last.get("eval/loss") if last.get("step") == progress.step else None,
        sources=trained_rows(run),
        recipe=dump(recipe),
        versions=versions(),
    )
    return write_export(
        target,
        lambda folder: rank.export(folder, DTYPES[recipe.checkpoint.export_dtype]),
        parts.tokenizer,
        parts.generation_config,
        stop_ids(parts.tokenizer_facts, model.config, parts.generation_config),
        card,
    )
