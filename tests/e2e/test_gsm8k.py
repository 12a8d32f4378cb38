"""examples/gsm8k.yaml on real rows, a few steps of it: it learns, and kill -9 changes no bit."""

from __future__ import annotations

import json
from pathlib import Path

from workshop import Workshop, wait_for_step

ROOT = Path(__file__).resolve().parents[2]


def test_real_rows_are_learned_and_a_killed_run_ends_in_the_same_bits(workshop: Workshop, shared: Path) -> None:
    data = shared / "data"
    command = [
        "sft",
        str(ROOT / "examples" / "gsm8k.yaml"),
        f"model.init={ROOT / 'examples' / 'gsm8k-model.json'}",
        f"model.tokenizer={shared / 'tokenizers' / 'minimind'}",
        f"data.train.0.path={data / 'gsm8k_train.jsonl'}",
        f"data.validation.0.path={data / 'gsm8k_test.jsonl'}",
        "data.validation.0.slice=0:24",
        "batch={samples: 6, tokens_per_micro_batch: 1024}",
        "optim.warmup_steps=2",
        "train.steps=9",
        "evaluate.every=3",
        "evaluate.prompts=[]",
        "checkpoint.every=2",
        "data.workers=1",
    ]
    workshop.burnish(*command, "run.dir=runs/whole")
    for step in (1, 4, 7):
        process = workshop.start(*command, "run.dir=runs/killed")
        wait_for_step(workshop.folder / "runs" / "killed", step, process)
        process.kill()
    workshop.burnish(*command, "run.dir=runs/killed")
    whole, killed = (workshop.folder / "runs" / name / "hf/step-9/model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    lines = [json.loads(line) for line in (workshop.folder / "runs/killed/metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert len(held_out) == 4
    assert held_out == sorted(held_out, reverse=True), "it falls at each evaluation"
    assert held_out[-1] < held_out[0] - 1
