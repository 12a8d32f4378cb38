"""How far each parallel layout is from one process: a step of every case of tests/parity/test_layouts.py, as a table.

    python bench/layouts.py [--quick] [--max-ranks N] [--only WORD ...] [--without WORD ...]

Both sides take two SGD (or AdamW) steps from the same weights on the same samples; the last is compared. Ranks are
processes of this machine over gloo. A figure is the largest relative difference: of the loss, of the held-out loss, of
the global gradient norm before clipping, and over all tensors of |a - b| / |b| of gradients and of weights after the
step. `--quick` takes every sixth case of at most 2 ranks. Behind the table stands the largest of each kind of model.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "parity")]  # forked ranks import the cases by the same name

import torch  # noqa: E402
from test_layouts import CASES, Case, differences, limits  # noqa: E402  # pyright: ignore[reportMissingImports]
from tiny import EXPERTS, tiny_config  # noqa: E402  # pyright: ignore[reportMissingImports]

DATA = ("dp_replicate", "dp_shard")
HEADER = "loss | held-out loss | norm | gradients | weights |"


def layout(case: Case) -> str:
    """The keys of `parallel:` and what else of the case is not the default."""
    parts = [f"{key} {value}" for key, value in case.parallel.items()]
    plain = {**tiny_config(case.model_config["model_type"]), "tie_word_embeddings": True}
    changed = {key: value for key, value in case.model_config.items() if value != plain.get(key)}
    untied = changed.pop("tie_word_embeddings", None) is False and case.model_config["model_type"] not in EXPERTS
    parts += [f"{key} {value}" for key, value in changed.items() if not isinstance(value, list)]
    chosen = {
        "untied head": untied,
        "loss per sample": case.normalization == "sample",
        f"recompute {case.recompute}": case.recompute != "none",
        f"of {case.blocks.get('every')} blocks one": "every" in case.blocks,
        "activations on the host": "is_offloaded" in case.blocks,
        "compiled": "is_compiled" in case.blocks,
        f"`frozen {' '.join(case.freeze)}`": case.freeze,
        case.rows: case.rows != "uneven",
        "ranks without a sample": case.num_samples < math.prod(map(case.parallel.get, DATA, (1, 1))),
        f"{case.num_steps} steps": case.num_steps != 2,
    }
    if case.lora is not None:
        parts += [{"lora": "LoRA", "dora": "DoRA"}[case.lora.get("kind", "lora")]]
        parts += ["rsLoRA"] if case.lora.get("rslora") else []
    parts += [key.replace("_", " ") for key in (*case.trainer, *case.loss)]
    return ", ".join(parts + [words for words, is_chosen in chosen.items() if is_chosen])


def model(case: Case) -> str:
    return str(case.model_config.get("model_type"))


def figures(values: Iterable[float]) -> str:
    return " | ".join(f"{value:.1e}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every sixth case of at most 2 ranks")
    parser.add_argument("--max-ranks", type=int, default=8)
    parser.add_argument("--only", nargs="+", default=[], help="cases whose names hold one of these words")
    parser.add_argument("--without", nargs="+", default=[], help="cases whose names hold none of these words")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    most = 2 if arguments.quick else arguments.max_ranks
    cases = [case for case in CASES if case.world <= most]
    if arguments.only:
        cases = [case for case in cases if any(word in case.name for word in arguments.only)]
    cases = [case for case in cases if not any(word in case.name for word in arguments.without)]
    if arguments.quick:
        cases = cases[::6]
    begun = time.perf_counter()
    print(f"| layout | model | ranks | compute | {HEADER}")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    over, kinds = [], defaultdict(list)
    for case in cases:
        found, allowed = differences(case), limits(case)
        over += [f"{case}: {name} {value:.1e}" for name, value in found.items() if not value <= allowed[name]]
        compute = f"{case.compute} AdamW" if case.optimizer == "adamw" else case.compute
        if case.master == "bf16":
            compute += ", bf16 masters"
        kinds[model(case), case.compute].append(list(found.values()))
        print(f"| {layout(case)} | {model(case)} | {case.world} | {compute} | {figures(found.values())} |", flush=True)
    print(f"\n| model | compute | layouts | {HEADER}\n|---|---|---|---|---|---|---|---|")
    for (family, compute), rows in kinds.items():
        largest = figures(max(column) for column in zip(*rows, strict=True))
        print(f"| {family} | {compute} | {len(rows)} | {largest} |")
    print(f"\n{len(cases)} layouts in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    if over:
        sys.exit("over the limits that tests hold: " + "; ".join(over))


if __name__ == "__main__":
    main()
