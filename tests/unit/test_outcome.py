"""What is shown of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from burnish.data.chat import TextTokenizer
from burnish.outcome import _rendered, dropped_warnings, result_facts
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
        "first_of_kind": {"chat": {"cut": "chat.jsonl:7", "over_long": "chat.jsonl:9: 80 tokens", "open_turn": "x:1"}},
        "held_out_rows": {"chat": {"kept": 5, "straddling": 3}},
        "held_out_first_of_kind": {"chat": {"straddling": "held.jsonl:2, messages[1]"}},
    }
    labels = ("samples", "dropped or cut", "noticed")
    assert [fact for fact in result_facts(summary, RunFolder(tmp_path)) if fact[0] in labels] == [
        ("samples", "chat: 132 of 60 rows"),
        ("dropped or cut", "chat: 4 cut, first: chat.jsonl:7"),
        ("dropped or cut", "chat: 2 over-long, first: chat.jsonl:9: 80 tokens"),
        ("noticed", "chat: 1,200 open-turn, first: x:1"),
        ("noticed", "chat (held out): 3 straddling, first: held.jsonl:2, messages[1]"),
    ]
    older = {key: value for key, value in summary.items() if "first_of_kind" not in key}
    assert ("dropped or cut", "chat: 4 cut") in result_facts(older, RunFolder(tmp_path))
    plain = result_facts({**summary, "rows": {"text": {"kept": 9}}, "held_out_rows": {}}, RunFolder(tmp_path))
    assert not set(labels) & dict(plain).keys()


def test_dropping_more_than_a_tenth_of_a_source_is_worth_a_warning() -> None:
    summary = {
        "rows": {
            "chat": {"rows": 500, "samples": 1254, "kept": 228, "over_long": 26, "bad": 1000, "open_turn": 3},
            "tenth": {"kept": 9, "bad": 1},
            "text": {"kept": 7},
        },
        "first_of_kind": {"chat": {"bad": "chat.jsonl:117, messages[1]: why", "over_long": "chat.jsonl:3: 80 tokens"}},
        "held_out_rows": {"silent": {"bad": 1}},
        "held_out_first_of_kind": {"silent": {"bad": "silent.jsonl:1: no assistant turn"}},
    }
    assert dropped_warnings(summary) == [
        "chat: dropped 1,026 of 1,254 samples; first: chat.jsonl:117, messages[1]: why",
        "silent (held out): dropped 1 of 1 samples; first: silent.jsonl:1: no assistant turn",
    ]
