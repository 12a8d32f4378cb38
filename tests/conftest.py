"""Fixtures that tests share: the folder of real data, and a tiny tokenizer made here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny import CHATML

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and tokenizers that stands beside the checkout."""
    folder = Path(os.environ.get("BURNISH_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: this test reads real data from it (set BURNISH_SHARED to its place)")
    return folder


@pytest.fixture(scope="session")
def chatml_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a 512-token byte-level BPE tokenizer with ChatML tokens and `CHATML`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["the quick brown fox jumps over a lazy dog", "the system user asks", "the assistant answer is numbers"]
    tokenizer.train_from_iterator(texts * 8, trainer)
    folder = tmp_path_factory.mktemp("chatml-tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        "model_max_length": 1000000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
