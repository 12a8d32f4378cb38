"""What of a recipe decides ids and weights, opened without torch: rows, tokenizer, a model's configuration, limits.

It says the same of them as `components.py`, which loads the model. Torch and transformers are imported only for what
no local file says: hub ids, tokenizer classes that `tokenizer_files.py` does not know, a configuration's defaults.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from burnish.config import DataConfig, Recipe, RecipeError, SourceConfig
from burnish.data.chat import TextTokenizer, caught
from burnish.data.conversation import Format, recognise
from burnish.data.corpus import check_readable
from burnish.data.locate import locate
from burnish.data.parquet import open_parquet_rows
from burnish.data.prepare import Preparer, SourceRows, StreamedRow
from burnish.data.rows import Rows, open_rows
from burnish.data.streams import Stream, open_stream
from burnish.data.tokenizer_files import read_tokenizer
from burnish.data.turns import Selection
from burnish.files import read_object
from burnish.model.vocabulary import TokenizerFacts, stop_ids
from burnish.types import UserError

HUB_PATIENCE = 5
"""Seconds to wait for the hub's answer to a name."""
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
STREAM_ROWS = 1_000
"""Rows read of a stream where no limit is given: it may have no end worth waiting for."""
NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class ModelFacts:
    """What of a model's configuration decides ids and weights. `num_embeddings` is None where it is not known."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    num_embeddings: int | None


NATIVE = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures whose config.json is read as it stands; transformers completes others by its defaults."""
NESTED = ("text_config", "llm_config", "language_config", "text_encoder", "decoder", "thinker_config")


def read_model_facts(place: Path, implementation: str = "auto") -> ModelFacts | None:
    """The facts of the model at `place`, a folder or its config.json; None where there is no config.json."""
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        return None
    config = read_object(file, "correct it")
    generation_file = file.parent / "generation_config.json"
    generation = read_object(generation_file, "correct it") if generation_file.is_file() else None
    nested = next((config[key] for key in NESTED if isinstance(config.get(key), dict)), {})
    sizes = {k: v for k, v in nested.items() if k in ("vocab_size", "max_position_embeddings")}
    whole = {**config, **sizes}
    is_native = implementation != "transformers" and (whole.get("architectures") or [None])[0] in NATIVE
    says_stop = (generation or {}).get("eos_token_id") is not None or "eos_token_id" in whole
    if not is_native and not ({"vocab_size", "max_position_embeddings"} <= whole.keys() and says_stop):
        whole = _completed(file, whole)
    return ModelFacts(whole, generation, whole.get("vocab_size"))


def _completed(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the defaults of its class in transformers, where it has one."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(str(file.parent))
    except (ValueError, OSError, KeyError):
        return config
    text = found.get_text_config()
    sizes = {name: getattr(text, name, None) for name in ("vocab_size", "max_position_embeddings")}
    return {**found.to_dict(), **{name: value for name, value in sizes.items() if value is not None}}


@dataclass(frozen=True)
class OpenedTokenizer:
    """A tokenizer as training takes it, before template arguments and stop tokens."""

    backend: str
    special_tokens: Mapping[str, Any]
    chat_template: str | Mapping[str, str] | None
    added_tokens: Mapping[int, str]
    """The tokens that are added to the vocabulary, by id."""
    facts: TokenizerFacts


def open_tokenizer(place: str, trust_remote_code: bool = False) -> OpenedTokenizer:
    """The tokenizer of a folder or hub id. Raises UserError where there is none."""
    folder = Path(place).expanduser()
    files = read_tokenizer(folder) if folder.is_dir() else None
    if files is None:
        is_reachable = not folder.is_dir() and _hub_has(place)
        return _open_by_transformers(str(folder) if folder.is_dir() else place, trust_remote_code, is_reachable)
    ids = {kind: files.special_ids.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    facts = TokenizerFacts(files.largest_id, **ids, name=f"the tokenizer {place}")
    return OpenedTokenizer(files.backend, files.special_tokens, files.chat_template, files.added_tokens, facts)


def _hub_has(place: str) -> bool:
    """Whether the hub answers and has `place`; False where only the cache does.

    One question with a short patience: transformers would ask again and again, and say so each time.
    Raises UserError where neither has it.
    """
    folder = Path(place).expanduser()
    no_folder = f"no tokenizer {place}: there is no folder {folder.absolute()}{_near(folder)}"
    if folder.exists():
        raise UserError(f"no tokenizer {place}: that is a file; give the folder around its tokenizer.json")
    if not _HUB_ID.fullmatch(place):
        raise UserError(f"{no_folder}; give a tokenizer's or a model's folder, or a hub id (owner/name)")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

    try:
        get_hf_file_metadata(hf_hub_url(place, "tokenizer_config.json"), timeout=HUB_PATIENCE)
    except EntryNotFoundError:
        return True  # an older repository, with files of its own
    except Exception as error:  # whatever the library's HTTP client raises where there is no network
        if any(isinstance(try_to_load_from_cache(place, name), str) for name in ("tokenizer.json", "config.json")):
            return False
        if isinstance(error, OfflineModeIsEnabled):
            reason = "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub"
        elif isinstance(error, HfHubHTTPError) and error.response is not None:
            reason = f"the hub refuses it (status {error.response.status_code})"
        else:
            reason = f"it is not in the cache, and the hub cannot be reached ({str(error).splitlines()[0]})"
        raise UserError(f"{no_folder}, and as a hub id {reason}; correct the name") from None
    return True


def _near(folder: Path) -> str:
    """The folders beside it that are named nearly so, as the end of a sentence."""
    beside = folder.absolute().parent
    names = [entry.name for entry in beside.iterdir() if entry.is_dir()] if beside.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, 3, 0.5)
    return f" (near it is {', '.join(near)})" if near else ""


def _open_by_transformers(place: str, trust_remote_code: bool, is_reachable: bool) -> OpenedTokenizer:
    from transformers import AutoTokenizer  # seconds, and torch with it

    try:
        loaded = AutoTokenizer.from_pretrained(
            place, trust_remote_code=trust_remote_code, local_files_only=not is_reachable
        )
    except (OSError, ValueError) as error:
        folder = Path(place)
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"no tokenizer {place}: the folder holds no tokenizer.json; give a tokenizer's or a model's folder"
            ) from None
        raise UserError(
            f"no tokenizer could be loaded from {place}; give a folder with a tokenizer.json or a hub id "
            f"({str(error).splitlines()[0]})"
        ) from None
    text = TextTokenizer.from_transformers(loaded)
    facts = TokenizerFacts.of(loaded, place)
    added = {number: token.content for number, token in loaded.added_tokens_decoder.items()}
    return OpenedTokenizer(text.backend, text.special_tokens, text.chat_template, added, facts)


@dataclass(frozen=True)
class InspectedSource:
    """A source with its rows; `first` is the number of its first row in its file, which a slice may leave out."""

    name: str
    split: Literal["train", "validation"]
    config: SourceConfig
    rows: Rows | Stream
    format: Format
    first: int

    @property
    def num_rows(self) -> int | None:
        return len(self.rows) if isinstance(self.rows, Rows) else None

    def read(self, source: int, limit: int | None) -> Iterator[StreamedRow]:
        """The first `limit` rows, or all."""
        if isinstance(self.rows, Rows):
            for row in range(len(self.rows) if limit is None else min(limit, len(self.rows))):
                yield StreamedRow(source, row, self.rows.where(row), caught(self.rows.__getitem__, row))
            return
        limit = STREAM_ROWS if limit is None else limit
        for row, (where, found) in enumerate(islice(self.rows.reader.rows(None), limit)):
            yield StreamedRow(source, row, where, found)


def open_sources(data: DataConfig) -> tuple[InspectedSource, ...]:
    """What `data` names, training rows first. Rows that would be split off training rows stay among those.

    Raises UserError where there is nothing, and where a source is missing, empty or of no known shape.
    """
    held_out = data.validation if isinstance(data.validation, tuple) else ()
    opened: list[InspectedSource] = []
    by_split: dict[Literal["train", "validation"], tuple[SourceConfig, ...]]
    by_split = {"train": data.train, "validation": held_out}
    for split, configs in by_split.items():
        names: set[str] = set()
        for number, config in enumerate(configs):
            key = f"data.{split}.{number}"
            rows = open_stream(config, key) if config.streaming else _open_in_order(config, key)
            check_readable(rows, key)
            name = next(n for n in (rows.name, *(f"{rows.name}-{i}" for i in range(2, 99))) if n not in names)
            names.add(name)
            first = rows.start if isinstance(rows, Rows) else locate(config, key).bounds[0] or 0
            opened.append(InspectedSource(name, split, config, rows, recognise(rows.schema, config, key), first))
    if not opened:
        raise RecipeError("data.train is empty; name the rows to inspect")
    return tuple(opened)


def _open_in_order(config: SourceConfig, key: str) -> Rows:
    """`open_rows`, but for .parquet files, which are read here in order and without `datasets`."""
    place = locate(config, key)
    if config.split != "train" or config.config is not None or {f.suffix for f in place.files} != {".parquet"}:
        return open_rows(config, key)
    parts = [open_parquet_rows(file) for file in place.files]
    opened = tuple(part for part in parts if part is not None)
    if len(opened) < len(parts):
        return open_rows(config, key)
    num_rows = sum(map(len, opened))
    start, stop, _ = slice(*place.bounds).indices(num_rows)
    if start >= stop:
        rule = f"its slice keeps none of {num_rows} rows; widen the slice" if num_rows else "it holds no rows"
        raise UserError(f"{key}.path={config.path}: {rule}")
    return Rows(place.name, opened, start, stop)


def _sources(data: DataConfig) -> Iterator[tuple[str, SourceConfig]]:
    """Every source with its key."""
    held_out = data.validation if isinstance(data.validation, tuple) else ()
    for split, configs in (("train", data.train), ("validation", held_out)):
        yield from ((f"data.{split}.{number}", config) for number, config in enumerate(configs))


def read_template(file: str) -> str:
    """The Jinja template that data.chat_template names. Raises RecipeError where there is none in the file."""
    if not Path(file).is_file():
        raise RecipeError(f"data.chat_template={file}: no such file; give the path of a Jinja template")
    try:
        template = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"data.chat_template={file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    if not template.strip():
        raise RecipeError(f"data.chat_template={file} is empty; write a Jinja template, or leave the key out")
    return template


@dataclass(frozen=True)
class Parts:
    """The parts of `recipe`. Without `is_whole` it was made for rows alone: its model may be a tokenizer's folder, and
    only keys that were written limit a row's length.
    """

    recipe: Recipe
    is_whole: bool = True

    @property
    def files(self) -> Iterator[Path]:
        """The files that are read, but for a hub id's; none is opened. Raises UserError where rows are missing."""
        data, model = self.recipe.data, self.recipe.model
        for key, config in _sources(data):
            place = locate(config, key)
            yield from place.files
            yield from place.folder.rglob("*") if place.folder is not None else ()
        for named in (data.chat_template, self.tokenizer_place, model.path, model.init):
            place = Path(named).expanduser() if named is not None else None
            if place is not None:
                yield from place.iterdir() if place.is_dir() else (place,)
        yield self._saved

    @cached_property
    def sources(self) -> tuple[InspectedSource, ...]:
        return open_sources(self.recipe.data)

    @property
    def selection(self) -> Selection:
        data = self.recipe.data
        return Selection(data.train_on, data.train_reasoning, data.train_tool_calls, data.open_turns)

    @cached_property
    def model(self) -> ModelFacts | None:
        """The model's facts; None for rows whose tokenizer folder is no model's."""
        config = self.recipe.model
        if config.init is not None:
            return read_model_facts(Path(config.init).expanduser(), config.implementation)
        place = Path(str(config.path)).expanduser()
        if not place.is_dir() and self.is_whole:
            from burnish.model.hf_io import find_folder  # torch, which a hub id's download is not worth sparing

            place = find_folder(str(config.path), config.revision)
        found = read_model_facts(place, config.implementation) if place.is_dir() else None
        if found is None and self.is_whole:
            raise UserError(f"model.path={config.path}: there is no config.json; give a model's folder or hub id")
        return found

    @cached_property
    def tokenizer_place(self) -> str:
        config = self.recipe.model
        if config.tokenizer is not None:
            return config.tokenizer
        place = Path(str(config.init if config.init is not None else config.path)).expanduser()
        return str(place.parent if place.is_file() else place)

    @cached_property
    def opened_tokenizer(self) -> OpenedTokenizer:
        return open_tokenizer(self.tokenizer_place, self.recipe.model.trust_remote_code)

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Ids at which generation stops."""
        config, generation = (self.model.config, self.model.generation) if self.model else ({}, None)
        return stop_ids(self.opened_tokenizer.facts, config, generation)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        data, opened = self.recipe.data, self.opened_tokenizer
        return TextTokenizer(
            backend=opened.backend,
            special_tokens=opened.special_tokens,
            chat_template=opened.chat_template if self._template_file is None else self._template_file,
            template_kwargs=data.chat_template_kwargs,
            stop_tokens=frozenset(self.stops),
            renderer=data.renderer,
            date=self.date,
        )

    @cached_property
    def _template_file(self) -> str | None:
        file = self.recipe.data.chat_template
        return None if file is None else read_template(file)

    @cached_property
    def date(self) -> str:
        """The day that templates see, as training takes it: the recipe's, that of the first start, or today."""
        if self.recipe.data.date is not None:
            return self.recipe.data.date
        if self.is_whole and self._saved.is_file():
            return json.loads(self._saved.read_text(encoding="utf-8"))["date"]
        return date.today().isoformat()

    @property
    def _saved(self) -> Path:
        return Path(self.recipe.run.dir) / "data.json"

    @cached_property
    def limits(self) -> dict[str, int]:
        """What limits a row's length, by name, tokens."""
        data, batch = self.recipe.data, self.recipe.batch
        limits = {}
        if self.is_whole or "tokens_per_micro_batch" in batch.model_fields_set:
            limits["batch.tokens_per_micro_batch"] = batch.tokens_per_micro_batch
        if self.model is not None and self.model.config.get("max_position_embeddings"):
            limits["the model's max_position_embeddings"] = self.model.config["max_position_embeddings"]
        if data.max_length is not None:
            limits["data.max_length"] = data.max_length
        return limits

    @cached_property
    def preparer(self) -> Preparer:
        data = self.recipe.data
        num_embeddings = self.model.num_embeddings if self.model else None
        return Preparer(
            sources=tuple(SourceRows(s.name, None, s.format, s.config) for s in self.sources),
            tokenizer=self.tokenizer,
            limits=self.limits or {"what can be counted": NO_LIMIT},
            vocab_size=NO_LIMIT if num_embeddings is None else num_embeddings,
            selection=self.selection,
            turn_per_sample=data.turn_per_sample,
            over_long=data.over_long,
            truncate_side=data.truncate_side,
        )

    def token_name(self, token: int) -> str:
        return self.opened_tokenizer.added_tokens.get(token) or self.tokenizer.decode([token])

    @cached_property
    def facts(self) -> tuple[tuple[str, str], ...]:
        data = self.recipe.data
        what = [
            name for name, on in (("reasoning", data.train_reasoning), ("tool calls", data.train_tool_calls)) if not on
        ]
        facts = [
            ("tokenizer", self.tokenizer_place),
            ("template", data.renderer or data.chat_template or _template_name(self.opened_tokenizer.chat_template)),
            ("end of turn", ", ".join(self.token_name(stop) for stop in self.stops) or "none declared"),
            ("trained", str(data.train_on) + (f", without {' and '.join(what)}" if what else "")),
            ("longest row", ", ".join(f"{value:,} ({name})" for name, value in self.limits.items()) or "not limited"),
            ("longer rows", data.over_long + (f" {data.truncate_side}" if data.over_long == "truncate" else "")),
        ]
        if isinstance(data.validation, float):
            share = f"{data.validation:.2%}".replace(".00", "")
            facts.append(("held out", f"{share} of the training rows, which stand among those here"))
        if data.turn_per_sample:
            facts.append(("samples", "one a trained turn"))
        if data.chat_template_kwargs:
            facts.append(("template arguments", json.dumps(data.chat_template_kwargs, ensure_ascii=False)))
        if "strftime_now" in str(self.tokenizer.chat_template):
            facts.append(("date", self.date))
        facts.append(("sources", ", ".join(f"{s.name} ({s.format})" for s in self.sources)))
        return tuple(facts)


def _template_name(template: str | Mapping[str, str] | None) -> str:
    if template is None:
        return "none"
    return "the tokenizer's" if isinstance(template, str) else f"the tokenizer's ({', '.join(template)})"
