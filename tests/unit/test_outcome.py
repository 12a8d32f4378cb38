"""What is shown of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from burnish.data.chat import TextTokenizer
from burnish.outcome import _rendered, result_facts
from burnish.run import RunFolder
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


def test_what_was_dropped_noticed_or_split_is_told_by_source_and_nothing_else(tmp_path: Path) -> None:
    told = {"samples": 132, "rows": 60, "kept": 130, "cut": 4, "over_long": 2, "open_turn": 1200}
    summary = {
        **dict.fromkeys(("total_tokens", "total_trained_tokens", "runtime_seconds", "step", "total_steps"), 1),
        **dict.fromkeys(("final_train_loss", "final_eval_loss", "export")),
        "rows": {"chat": told, "text": {"kept": 9}},
        "held_out_rows": {"chat": {"kept": 5, "straddling": 3}},
    }
    facts = dict(result_facts(summary, RunFolder(tmp_path)))
    assert facts["samples"] == "chat: 132 of 60 rows"
    assert facts["dropped or cut"] == "chat: 4 cut; chat: 2 over-long"
    assert facts["noticed"] == "chat: 1,200 open-turn; chat (held out): 3 straddling"
    plain = result_facts({**summary, "rows": {"text": {"kept": 9}}, "held_out_rows": {}}, RunFolder(tmp_path))
    assert not {"samples", "dropped or cut", "noticed"} & dict(plain).keys()
