"""Memory that `burnish plan` foretells against what torch's MemTracker sees of real steps on the CPU.

    python bench/plan.py [PART_OF_A_NAME]

The cases are those of tests/parity/test_plan_memory.py, which holds them to 10 %.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"


def main(wanted: str) -> None:
    sys.path[:0] = [str(TESTS), str(TESTS / "parity")]
    import test_plan_memory as cases  # pyright: ignore[reportMissingImports]

    print(f"{'case':<28} {'forward and backward, MB':>30} {'optimizer step, MB':>30}")
    print(f"{'':<28} {'plan':>10}{'seen':>10}{'ratio':>10} {'plan':>10}{'seen':>10}{'ratio':>10}")
    for case in (*cases.CASES, *cases.RANKS):
        if wanted not in case.name:
            continue
        seen = cases.measure(case) if case.world == 1 else cases.run_ranks(case.world, cases.measure, case)[0]
        cells = [
            f"{a / 1e6:>10.1f}{b / 1e6:>10.1f}{a / b:>10.3f}" for a, b in zip(cases.foretell(case), seen, strict=True)
        ]
        print(f"{case.name:<28} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
