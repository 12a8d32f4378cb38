"""What is shown of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from burnish.data.chat import TextTokenizer
from burnish.outcome import _rendered
from burnish.types import Sample


def test_a_character_of_several_tokens_is_shown_whole(chatml_tokenizer: Path) -> None:
    tokenizer = TextTokenizer.from_transformers(AutoTokenizer.from_pretrained(chatml_tokenizer), date="2026-01-01")
    text = "fox 🦊 日本 é"
    tokens = np.array(AutoTokenizer.from_pretrained(chatml_tokenizer)(text)["input_ids"], np.int32)
    weights = np.linspace(0, 1, len(tokens), dtype=np.float32)
    pieces = _rendered(tokenizer, Sample(tokens, weights, "a", 3)).pieces
    assert "".join(piece for piece, _ in pieces) == text
    assert len(pieces) < len(tokens)
    cut = _rendered(tokenizer, Sample(tokens[:-1], weights[:-1], "a", 3)).pieces
    assert cut[-1][0].endswith("\ufffd"), "a row cut within a character still shows all its tokens"
