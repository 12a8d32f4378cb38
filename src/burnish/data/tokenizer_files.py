"""A tokenizer folder read without transformers, and equal to what transformers' AutoTokenizer makes of it.

Only for classes that transformers builds from tokenizer.json in a way known here; `read_tokenizer` says None of others.
Reads local files alone, and no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from burnish.files import read_object
from burnish.types import UserError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that every tokenizer may have; a configuration's other `*_token` keys name a model's own."""
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizer")
"""Classes (without their suffix Fast) that take tokenizer.json as it is."""
OWN_CLASS_TYPES = (
    "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "siglip2", "hyperclovax_vision_v2",
)  # fmt: skip
"""Values of model_type for which transformers takes a class of its own, whatever the tokenizer's configuration says."""
MISTRAL_TYPES = ("mistral", "mixtral", "pixtral", "voxtral")
"""Beginnings of model types whose tokenizer may be mistral-common's."""
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says of its tokenizer, as `TextTokenizer` takes it."""

    backend: str
    """JSON of the `tokenizers` library."""
    special_tokens: Mapping[str, str]
    """bos_token, eos_token, ..., and a model's own, such as image_token."""
    chat_template: str | Mapping[str, str] | None
    largest_id: int
    special_ids: Mapping[str, int]
    """The ids of `special_tokens`."""
    added_tokens: Mapping[int, str]
    """The tokens that are added to the vocabulary, by id."""


def read_tokenizer(folder: Path) -> TokenizerFiles | None:
    """The tokenizer in `folder`; None where only transformers knows how its class is built.

    Raises UserError where a file is broken.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    settings, document = _read(folder / "tokenizer_config.json"), _read(folder / "tokenizer.json")
    how = _class(folder, settings, document)
    if how is None:
        return None
    special, added = _special_tokens(folder, settings, document)
    if how == "Qwen2Tokenizer":
        end = "<|endoftext|>"
        special.named = {"unk_token": end, "eos_token": end, "pad_token": end, **special.named}
        document = {**document, **_qwen2_parts(document, settings)}
    tokenizer = _loaded(folder, document)
    padding = document.get("padding")
    if padding is not None:
        special.named.setdefault("pad_token", padding["pad_token"])
    named = {name: token for name, token in special.named.items() if token is not None}
    _add_missing(tokenizer, added, list(named.values()), special.extra)
    if how == "Qwen2Tokenizer":
        tokenizer.add_tokens([AddedToken(str(token), special=True) for token in [*named.values(), *special.extra]])
    if tokenizer.post_processor is None:
        tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="$A:0", pair="$A:0 $B:1", special_tokens=[]
        )
    ids = {name: tokenizer.token_to_id(str(token)) for name, token in named.items()}
    return TokenizerFiles(
        backend=tokenizer.to_str(),
        special_tokens={name: str(token) for name, token in named.items()},
        chat_template=_chat_template(folder, settings),
        largest_id=max(tokenizer.get_vocab().values()),
        special_ids={name: number for name, number in ids.items() if number is not None},
        added_tokens={number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()},
    )


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises UserError where it is anything else."""
    return read_object(file, "download or copy it again") if file.is_file() else {}


def _class(folder: Path, settings: Mapping[str, Any], document: Mapping[str, Any]) -> str | None:
    """The class that AutoTokenizer takes, where it is one of those known here."""
    declared = settings.get("tokenizer_class")
    unusual = [key for key in ("auto_map", "fast_tokenizer_files", "init_inputs") if settings.get(key)]
    if not isinstance(declared, str) or unusual or (folder / "tekken.json").exists():
        return None
    model_type = _read(folder / "config.json").get("model_type") or ""
    if model_type in OWN_CLASS_TYPES or model_type.startswith(MISTRAL_TYPES):
        return None
    name = declared.removesuffix("Fast")
    if model_type == "qwen2" or name == "Qwen2Tokenizer":
        return "Qwen2Tokenizer" if document.get("model", {}).get("type") == "BPE" else None
    if name == "LlamaTokenizer" and _is_byte_level(document):
        return "TokenizersBackend"
    return "TokenizersBackend" if name in PLAIN_CLASSES else None


def _is_byte_level(document: Mapping[str, Any]) -> bool:
    return any(_holds_byte_level(document.get(part)) for part in ("pre_tokenizer", "decoder"))


def _holds_byte_level(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    inner = [*part.get("pretokenizers", ()), *part.get("decoders", ())]
    return part.get("type") == "ByteLevel" or any(map(_holds_byte_level, inner))


def _qwen2_parts(document: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What Qwen2Tokenizer puts in place of tokenizer.json's own; vocabulary, merges and post-processor stay."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": bool(settings.get("add_prefix_space")),
        "trim_offsets": True,
        "use_regex": False,
    }
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}
    model = document["model"]
    return {
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "vocab": model["vocab"],
            "merges": model["merges"],
        },
    }


@dataclass
class _Special:
    """Special tokens as the configuration has them: with a name, and without."""

    named: dict[str, str | AddedToken | None]
    extra: list[str | AddedToken]


def _special_tokens(
    folder: Path, settings: Mapping[str, Any], document: Mapping[str, Any]
) -> tuple[_Special, dict[int, AddedToken]]:
    """The special tokens, and the added tokens by id that the configuration or tokenizer.json lists."""
    stated = dict(settings)
    if "additional_special_tokens" in stated and not stated.get("extra_special_tokens"):
        stated["extra_special_tokens"] = stated.pop("additional_special_tokens")
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in stated:
        added = {int(number): AddedToken(**token) for number, token in stated["added_tokens_decoder"].items()}
    else:
        stated |= _special_tokens_map(folder, stated)
        added = {token["id"]: _added_token(token) for token in document.get("added_tokens", ())}
    own = stated.get("extra_special_tokens")
    by_content = {str(token): token for token in added.values()}
    named: dict[str, str | AddedToken | None] = {}
    for key in (key for key in NAMED if key in stated):
        token = _token(stated[key])
        named[key] = by_content.get(str(token), token)
    models_own = {key: _token(value) for key, value in stated.items() if key.endswith("_token") and key not in NAMED}
    models_own |= {key: _token(value) for key, value in own.items()} if isinstance(own, Mapping) else {}
    named |= {key: token for key, token in models_own.items() if token is not None}
    extra = [_token(token) for token in own] if isinstance(own, list) else []
    return _Special(named, [token for token in extra if token is not None]), added


def _special_tokens_map(folder: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json of older folders, whose tokens are special whatever it says of them."""
    found: dict[str, Any] = {}
    for key, value in _read(folder / "special_tokens_map.json").items():
        if key == "extra_special_tokens" and isinstance(value, list):
            before = list(stated.get("extra_special_tokens") or ())
            value = before + [token for token in value if token not in before]
        elif isinstance(value, dict) and key != "extra_special_tokens":
            value = {**value, "special": True, "__type": "AddedToken"}
        found[key] = value
    return found


def _token(value: Any) -> str | AddedToken | None:
    """A token that is written as text or as an AddedToken; None for anything else."""
    if isinstance(value, str | AddedToken):
        return value
    if isinstance(value, Mapping) and "content" in value:
        return AddedToken(**{key: item for key, item in value.items() if key != "__type"})
    return None


def _added_token(token: Mapping[str, Any]) -> AddedToken:
    return AddedToken(**{key: value for key, value in token.items() if key != "id"})


def _loaded(folder: Path, document: Mapping[str, Any]) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise UserError(f"{folder / 'tokenizer.json'} is no tokenizer ({error}); download or copy it again") from None


def _add_missing(
    tokenizer: Tokenizer,
    added: Mapping[int, AddedToken],
    named: Sequence[str | AddedToken],
    extra: Sequence[str | AddedToken],
) -> None:
    """Add the tokens that tokenizer.json lacks or has otherwise, in the order that gives each its id."""
    there = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing: list[AddedToken] = [token for _, token in sorted(added.items()) if repr(token) not in there]
    known |= {str(token) for token in missing}
    for token in (*named, *extra):
        if str(token) not in known:
            known.add(str(token))
            missing.append(token if isinstance(token, AddedToken) else AddedToken(token, special=True))
    names = {str(token) for token in named}
    for token in missing:
        token.special = token.special or str(token) in names
    tokenizer.add_tokens(missing)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | Mapping[str, str] | None:
    """Templates in files win over those in the configuration."""
    found = dict(_template_files(folder))
    if found:
        return found["default"] if set(found) == {"default"} else found
    template = settings.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return template


def _template_files(folder: Path) -> Iterator[tuple[str, str]]:
    if (folder / "chat_template.jinja").is_file():
        yield "default", _text(folder / "chat_template.jinja")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        yield file.name.removesuffix(".jinja"), _text(file)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
