"""The loss curve of transformers' own Trainer on the same rows in the same order: padded there, packed here, fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import native_model, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from burnish.config import OptimConfig
from burnish.data.pack import Layout, pack
from burnish.parallel.execution import Execution
from burnish.train.loss import CrossEntropy
from burnish.train.trainer import LocalTrainer
from burnish.types import Sample

STEPS, ROWS = 50, 8


def make_samples() -> list[Sample]:
    random = np.random.default_rng(0)
    samples = []
    for index in range(STEPS * ROWS):
        length = int(random.integers(5, 48))
        start, stride = random.integers(0, 500, 2)
        tokens = ((start + stride % 7 * np.arange(length)) % 512).astype(np.int32)  # sequences that can be learned
        weights = np.ones(length, np.float32)
        weights[: length // 3 + 1] = 0
        samples.append(Sample(tokens, weights, "rows", index))
    return samples


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    width = max(len(s.tokens) for s in samples)
    ids, labels = torch.zeros(len(samples), width, dtype=torch.long), torch.full((len(samples), width), -100)
    mask = torch.zeros(len(samples), width, dtype=torch.long)
    for row, sample in enumerate(samples):
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = torch.where(torch.from_numpy(sample.loss_weights) > 0, tokens, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class InOrder(Trainer):
    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.train_dataset, ROWS, shuffle=False, collate_fn=collate)  # pyright: ignore


@pytest.mark.filterwarnings("ignore")
def test_fifty_steps_of_transformers_trainer(tmp_path: Path) -> None:
    config, samples = tiny_config("qwen3"), make_samples()
    ours = native_model(config, torch.float32, seed=3)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")
    missing = theirs.load_state_dict(dict(ours.named_parameters()), strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    assert not missing.unexpected_keys

    recorder = Losses()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = InOrder(model=theirs, args=arguments, train_dataset=samples, callbacks=[recorder])  # pyright: ignore
    trainer.train()

    optim = OptimConfig(lr=2e-3, schedule="constant", warmup_ratio=0.0, weight_decay=0.1)
    local = LocalTrainer(Execution(ours, torch.float32, torch.device("cpu")), CrossEntropy(), optim, total_steps=STEPS)
    losses = []
    for step in range(STEPS):
        inputs = pack(samples[step * ROWS : (step + 1) * ROWS], Layout(100))
        losses.append(local.step(inputs)["loss"].mean)

    assert losses[0] == pytest.approx(recorder.losses[0], rel=1e-5)
    assert losses == pytest.approx(recorder.losses, rel=1e-3)
    assert losses[-1] < losses[0] - 0.5, "something was learned, so later steps compare trained weights"
