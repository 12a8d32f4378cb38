"""How far each parallel layout is from one process: a step of every case of tests/parity/test_layouts.py, as a table.

    python bench/layouts.py [--quick] [--max-ranks N] [--only WORD ...]

Both sides take two SGD (or AdamW) steps from the same weights on the same samples; the second is compared. Ranks are
processes of this machine over gloo. A figure is the largest relative difference: of the loss, of the held-out loss, of
the global gradient norm before clipping, and over all tensors of |a - b| / |b| of gradients and of weights after the
step. `--quick` takes every sixth case of at most 2 ranks.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "parity")]  # forked ranks import the cases by the same name

import torch  # noqa: E402
from test_layouts import CASES, Case, differences, limits  # noqa: E402  # pyright: ignore[reportMissingImports]


def layout(case: Case) -> str:
    """The keys of `parallel:` and what else of the case is not the default."""
    parts = [f"{key} {value}" for key, value in case.parallel.items()]
    parts += [f"{key} {value}" for key, value in case.config.items() if key == "num_hidden_layers"]
    if case.config.get("tie_word_embeddings") is False:
        parts.append("untied head")
    if case.normalization != "token":
        parts.append("loss per sample")
    if case.recompute != "none":
        parts.append(f"recompute {case.recompute}")
    if case.lora is not None:
        parts.append({"lora": "LoRA", "dora": "DoRA"}[case.lora.get("kind", "lora")])
    if case.freeze:
        parts.append("frozen parameters")
    if case.num_samples < case.world:
        parts.append("ranks without a sample")
    parts += [key.replace("_", " ") for key in case.trainer]
    return ", ".join(parts)


def model(case: Case) -> str:
    return str(case.model_config.get("model_type"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every sixth case of at most 2 ranks")
    parser.add_argument("--max-ranks", type=int, default=8)
    parser.add_argument("--only", nargs="+", default=[], help="cases whose names hold one of these words")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    most = 2 if arguments.quick else arguments.max_ranks
    cases = [case for case in CASES if case.world <= most]
    if arguments.only:
        cases = [case for case in cases if any(word in case.name for word in arguments.only)]
    if arguments.quick:
        cases = cases[::6]
    begun = time.perf_counter()
    print("| layout | model | ranks | compute | loss | held-out loss | norm | gradients | weights |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    over = []
    for case in cases:
        found, allowed = differences(case), limits(case)
        over += [f"{case}: {name} {value:.1e}" for name, value in found.items() if value > allowed[name]]
        compute = f"{case.compute} AdamW" if case.optimizer == "adamw" else case.compute
        if case.master == "bf16":
            compute += ", bf16 masters"
        figures = " | ".join(f"{value:.1e}" for value in found.values())
        print(f"| {layout(case)} | {model(case)} | {case.world} | {compute} | {figures} |", flush=True)
    print(f"\n{len(cases)} layouts in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    if over:
        sys.exit("over the limits that tests hold: " + "; ".join(over))


if __name__ == "__main__":
    main()
