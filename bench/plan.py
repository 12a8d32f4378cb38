"""Memory that `burnish plan` foretells against what torch's MemTracker sees of real steps on the CPU.

    python bench/plan.py [PART_OF_A_NAME ...]

The cases are those of tests/parity/test_plan_memory.py, which holds them to 10 %. Of ranks with the same part of the
pipeline the fullest is shown.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"


def main(wanted: list[str]) -> None:
    sys.path[:0] = [str(TESTS), str(TESTS / "parity")]
    import test_plan_memory as cases  # pyright: ignore[reportMissingImports]

    print(f"{'case':<34} {'forward and backward, MB':>30} {'optimizer step, MB':>30}")
    print(f"{'':<34} {'plan':>10}{'seen':>10}{'ratio':>10} {'plan':>10}{'seen':>10}{'ratio':>10}")
    for case in (*cases.CASES, *cases.RANKS):
        if not any(part in case.name for part in wanted or [""]):
            continue
        every = [cases.measure(case)] if case.world == 1 else cases.run_ranks(case.world, cases.measure, case)
        for stage, foretold in enumerate(cases.foretell(case)):
            peers = [seen for rank, seen in enumerate(every) if case.degrees.place(rank)["pp"] == stage]
            seen = [max(peaks) for peaks in zip(*peers, strict=True)]
            name = case.name if case.degrees.pp == 1 else f"{case.name}, pipeline rank {stage}"
            cells = [f"{a / 1e6:>10.1f}{b / 1e6:>10.1f}{a / b:>10.3f}" for a, b in zip(foretold, seen, strict=True)]
            print(f"{name:<34} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
