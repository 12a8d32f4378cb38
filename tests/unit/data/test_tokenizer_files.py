"""Tokenizer folders read without transformers are what transformers makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from burnish.data.chat import TextTokenizer
from burnish.data.tokenizer_files import TokenizerFiles, read_tokenizer
from burnish.types import UserError

TEXT = "<s>the quick\nbrown <|im_start|>fox's<|im_end|> 12 345\u00e9\u0301 <new> <old>  \U0001f600 <image>"


def check_equal(folder: Path) -> TokenizerFiles:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(str(folder))
    found = read_tokenizer(folder)
    assert found is not None
    theirs = TextTokenizer.from_transformers(expected)
    ours = TextTokenizer(found.backend, found.special_tokens, found.chat_template)
    assert ours.decode([1, 2, 3]) == theirs.decode([1, 2, 3])
    assert json.loads(ours.backend) == json.loads(theirs.backend)
    assert dict(ours.special_tokens) == dict(theirs.special_tokens)
    assert ours.chat_template == theirs.chat_template
    assert ours.fingerprint == theirs.fingerprint
    assert found.largest_id == max(expected.get_vocab().values())
    for kind in ("bos", "eos", "pad"):
        assert found.special_ids.get(f"{kind}_token") == getattr(expected, f"{kind}_token_id")
    for frame in (True, False):
        from tokenizers import Tokenizer

        encoded = Tokenizer.from_str(ours.backend).encode(TEXT, add_special_tokens=frame)
        assert encoded.ids == expected(TEXT, add_special_tokens=frame)["input_ids"]
    return found


def edited(
    source: Path,
    target: Path,
    settings: dict[str, Any] | None = None,
    document: dict[str, Any] | None = None,
    files: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """A copy of a tokenizer folder with keys of its two files changed, and files written beside them."""
    shutil.copytree(source, target)
    for name, changes in (("tokenizer_config.json", settings), ("tokenizer.json", document)):
        content = {**json.loads((target / name).read_text()), **(changes or {})}
        if name == "tokenizer_config.json":
            content = {key: value for key, value in content.items() if key not in without}
        (target / name).write_text(json.dumps(content))
    for name, content in (files or {}).items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return target


@pytest.mark.parametrize("name", ["gpt2-chatml", "minimind"])
def test_shared_tokenizers(shared: Path, name: str) -> None:
    check_equal(shared / "tokenizers" / name)


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
        **flags,
    }


DECODER = {"0": token("<|endoftext|>"), "1": token("<|im_start|>"), "2": token("<|im_end|>")}
PAD = {"__type": "AddedToken", **token("<pad>", lstrip=True)}
QWEN2 = {"tokenizer_class": "Qwen2Tokenizer"}
TRICKY: dict[str, dict[str, Any]] = {
    "as it is": {},
    "bos and eos flags, which tokenizer.json overrules": {
        "settings": {"add_bos_token": True, "add_eos_token": True, "bos_token": "<|im_start|>"}
    },
    "tokens that only the configuration has": {
        "settings": {
            "added_tokens_decoder": {**DECODER, "700": token("<new>"), "701": token("<old>", special=False)},
        }
    },
    "flags that differ": {"settings": {"added_tokens_decoder": {**DECODER, "2": token("<|im_end|>", rstrip=True)}}},
    "named tokens that tokenizer.json lacks": {"settings": {"bos_token": "<s>", "pad_token": PAD}},
    "tokens of a model's own": {"settings": {"image_token": "<image>", "extra_special_tokens": {"video_token": "<v>"}}},
    "extra tokens": {"settings": {"extra_special_tokens": ["<new>", "<old>", "<|im_end|>"]}},
    "additional tokens": {"settings": {"additional_special_tokens": ["<new>"]}},
    "null tokens": {"settings": {"bos_token": None, "unk_token": None}},
    "tokens as mappings": {"settings": {"eos_token": {"__type": "AddedToken", **token("<|im_end|>")}}},
    "no eos": {"without": ("eos_token",)},
    "a list of templates": {
        "settings": {
            "chat_template": [
                {"name": "default", "template": "a{{ messages }}"},
                {"name": "tool_use", "template": "b{{ tools }}"},
            ]
        }
    },
    "a template file beside the configuration's": {"files": {"chat_template.jinja": "from the file {{ messages }}"}},
    "additional template files": {
        "files": {"chat_template.jinja": "one", "additional_chat_templates/tool_use.jinja": "two"}
    },
    "only additional template files": {"files": {"additional_chat_templates/tool_use.jinja": "two"}},
    "no template": {"without": ("chat_template",)},
    "special_tokens_map.json": {
        "files": {"special_tokens_map.json": {"bos_token": token("<s>"), "unk_token": "<unk>", "eos_token": "<old>"}}
    },
    "special_tokens_map.json beside a decoder": {
        "settings": {"added_tokens_decoder": DECODER},
        "files": {"special_tokens_map.json": {"eos_token": "<old>"}},
    },
    "padding and truncation": {
        "document": {
            "padding": {
                "strategy": "BatchLongest",
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<|endoftext|>",
            },
            "truncation": {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0},
        },
        "without": ("pad_token",),
    },
    "the old generic class": {"settings": {"tokenizer_class": "PreTrainedTokenizerFast"}},
    "Llama's class over byte-level tokens": {"settings": {"tokenizer_class": "LlamaTokenizerFast"}},
    "Llama's class in a Llama folder": {
        "settings": {"tokenizer_class": "LlamaTokenizer"},
        "files": {"config.json": {"model_type": "llama"}},
    },
    "Qwen2's class": {"settings": QWEN2},
    "Qwen2's class without eos": {"settings": QWEN2, "without": ("eos_token", "pad_token")},
    "Qwen2's class with tokens of its own": {
        "settings": {
            **QWEN2,
            "added_tokens_decoder": {**DECODER, "600": token("<new>")},
            "extra_special_tokens": ["<old>"],
        }
    },
    "Qwen2's class in a Qwen3 folder": {"settings": QWEN2, "files": {"config.json": {"model_type": "qwen3"}}},
    "a Qwen2 folder with the generic class": {"files": {"config.json": {"model_type": "qwen2"}}},
    "a Llama folder with the generic class": {"files": {"config.json": {"model_type": "llama"}}},
}


@pytest.mark.parametrize("case", TRICKY)
def test_tricky_folders(tmp_path: Path, chatml_tokenizer: Path, case: str) -> None:
    check_equal(edited(chatml_tokenizer, tmp_path / "tokenizer", **TRICKY[case]))


def test_what_only_transformers_knows_is_left_to_it(tmp_path: Path, chatml_tokenizer: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"settings": {"tokenizer_class": "GemmaTokenizer"}},
        {"settings": {"auto_map": {"AutoTokenizer": ["code.Slow", "code.Fast"]}}},
        {"files": {"config.json": {"model_type": "qwen3_5"}}},
        {"files": {"config.json": {"model_type": "mistral3"}}},
        {"without": ("tokenizer_class",)},
    ]
    for number, case in enumerate(cases):
        assert read_tokenizer(edited(chatml_tokenizer, tmp_path / str(number), **case)) is None
    (tmp_path / "empty").mkdir()
    assert read_tokenizer(tmp_path / "empty") is None


def test_types_with_a_class_of_their_own_are_those_of_transformers() -> None:
    from transformers.models.auto import tokenization_auto as auto

    from burnish.data.tokenizer_files import OWN_CLASS_TYPES

    forced = {
        model_type
        for model_type in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        if auto.TOKENIZER_MAPPING_NAMES.get(model_type) not in (None, "TokenizersBackend")
    }
    assert forced <= {*OWN_CLASS_TYPES, "qwen2"}


def test_a_broken_file_is_named(tmp_path: Path, chatml_tokenizer: Path) -> None:
    folder = edited(chatml_tokenizer, tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not JSON"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer"):
        read_tokenizer(folder)
