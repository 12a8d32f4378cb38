"""`burnish inspect`: what would be trained of rows, by the way that training takes them, shown and counted.

It opens tokenizer, configurations and rows from local files without torch and transformers, which it imports only for
what no file says; it loads no weights. The views are `observe.inspect_terminal` and `observe.inspect_page`.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from burnish.config import DataConfig, Recipe, RecipeError, SourceConfig
from burnish.data.chat import Encoded, Row, Selection, TextTokenizer, caught
from burnish.data.conversation import Format, recognise
from burnish.data.corpus import _check_readable as check_readable
from burnish.data.locate import locate
from burnish.data.pack import first_fit
from burnish.data.parquet import open_parquet_rows
from burnish.data.prepare import Preparer, SourceRows, StreamedRow
from burnish.data.rows import Rows, open_rows
from burnish.data.streams import Stream, open_stream
from burnish.data.tokenizer_files import read_tokenizer
from burnish.files import write_whole
from burnish.model.vocabulary import TokenizerFacts, check_vocabulary, stop_ids
from burnish.observe.inspection import DataWarning, InspectedRow, Inspection, PackingFill, SourceStatistics
from burnish.recipe import read_recipe, recipe_from_dict
from burnish.types import Conversation, Message, RawText, RowError, TokenRow, UserError

STREAM_ROWS = 1_000
"""Rows read of a stream where no limit is given: it may have no end worth waiting for."""
DEFAULT_LIMITS: Mapping[str, int | None] = {"terminal": 5, "html": 200, "json": None}
LINKED_ROWS = 10
"""Rows that a gathered warning names, and the page shows although they lie beyond the limit."""
LARGEST_CHUNK = 64
NO_LIMIT = 2**31 - 1
LOW_SHARE, HIGH_SHARE = 0.01, 0.95

MEANINGS = {
    "error": "rows give no sample",
    "outside_embedding": "added tokens lie outside the model's embedding",
    "vocabulary": "tokenizer and model disagree",
    "no_end_of_turn": "rows train a turn without its end-of-turn token, so that the model may not learn to stop",
    "pad_equals_eos": "rows train the end of a turn by the token that also pads; burnish masks by length and trains it, "
    "other tools may mask it by id",
    "double_bos": "rows begin with two BOS tokens",
    "never_trained": "added tokens are in the data and never trained",
    "empty_turn": "rows have an empty turn",
    "duplicate": "rows give the same tokens and weights as an earlier one",
    "prompt_mismatch": "rows train a turn under another prompt than inference would give; "
    "data.turn_per_sample=true trains each turn under exactly that",
    "low_share": "rows train less than 1 % of their tokens",
    "high_share": "rows train more than 95 % of their tokens",
    "open_turn": "rows have a turn that no end-of-turn token ends; data.open_turns=close ends a last one",
    "straddling": "rows have tokens that hold both trained and other characters",
    "generation_block": "rows differ between the template's generation blocks and what the model would generate",
}


@dataclass(frozen=True)
class Request:
    """The arguments of `burnish inspect`. `target` is a recipe (.yaml) or rows, as a source's `path` takes them."""

    target: str
    overrides: Sequence[str] = ()
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: str | None = None
    limit: int | None = None
    format: Literal["terminal", "html", "json"] = "terminal"
    out: str | None = None
    tokens: bool = False

    @property
    def is_recipe(self) -> bool:
        return self.target.endswith((".yaml", ".yml"))


def inspect(request: Request) -> int:
    """Show what the request asks for; the exit status: 0 where every row rendered, 3 where some are errors.

    Raises UserError for arguments, files or rows as a whole that cannot be used.
    """
    if request.format == "html" and request.out is None and sys.stdout.isatty():
        raise UserError("--format html writes a page; name a file for it with --out, or redirect the output")
    recipe = requested_recipe(request)
    limit = DEFAULT_LIMITS[request.format] if request.limit is None else request.limit
    inspector = Inspector(recipe, request.target, limits_by_default=request.is_recipe)
    if request.format == "html":
        return _show_page(inspector, limit, request.out)
    with ExitStack() as stack:
        file = sys.stdout
        if request.out is not None:
            file = stack.enter_context(_writable(request.out))
        show = _show_lines if request.format == "json" else _show_terminal
        return show(inspector, limit, file, request.tokens)


def _writable(path: str) -> TextIO:
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={path} cannot be written: {error.strerror}; name another file") from None


def requested_recipe(request: Request) -> Recipe:
    """The recipe of a request; of rows alone one with those as its one training source. Raises RecipeError."""
    options: dict[str, Any] = {}
    if request.tokenizer is not None:
        options["model.tokenizer"] = request.tokenizer
    if request.chat_template is not None:
        options["data.chat_template"] = request.chat_template
    if request.chat_template_kwargs is not None:
        options["data.chat_template_kwargs"] = _kwargs(request.chat_template_kwargs)
    written = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    if request.is_recipe:
        return read_recipe(request.target, [*request.overrides, *written])
    if request.tokenizer is None:
        raise RecipeError(
            f"--tokenizer is missing: {request.target} is taken for rows, which need one; give --tokenizer DIR, "
            "or a recipe (.yaml)"
        )
    keys = [o if "." in o.partition("=")[0] else f"data.train.0.{o}" for o in request.overrides]
    # The model is never opened, and a stream's rows are counted here.
    tree = {"model": {"path": request.tokenizer}, "data": {"train": [{"path": request.target}]}, "train": {"steps": 1}}
    return recipe_from_dict(tree, [*keys, *written])


def _kwargs(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"--chat-template-kwargs={text}: not JSON ({error}); write {{\"key\": value}}") from None
    if not isinstance(value, dict):
        raise RecipeError(f'--chat-template-kwargs={text}: must be a JSON object, such as {{"enable_thinking": false}}')
    return value


# --- what a recipe's rows are prepared with ---


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
    config = _read_json(file)
    generation_file = file.parent / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else None
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); correct it") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is a JSON {type(value).__name__}; it must be an object")
    return value


@dataclass(frozen=True)
class OpenedTokenizer:
    """A tokenizer as training takes it, before template arguments and stop tokens."""

    backend: str
    special_tokens: Mapping[str, Any]
    chat_template: str | Mapping[str, str] | None
    facts: TokenizerFacts


def open_tokenizer(place: str, trust_remote_code: bool = False) -> OpenedTokenizer:
    """The tokenizer of a folder or hub id. Raises UserError where there is none."""
    folder = Path(place).expanduser()
    files = read_tokenizer(folder) if folder.is_dir() else None
    if files is None:
        return _open_by_transformers(place, trust_remote_code)
    ids = {kind: files.special_ids.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    facts = TokenizerFacts(files.largest_id, **ids, name=f"the tokenizer {place}")
    return OpenedTokenizer(files.backend, files.special_tokens, files.chat_template, facts)


def _open_by_transformers(place: str, trust_remote_code: bool) -> OpenedTokenizer:
    from transformers import AutoTokenizer  # seconds, and torch with it

    try:
        loaded = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer could be loaded from {place}; give a folder with a tokenizer.json or a hub id "
            f"({str(error).splitlines()[0]})"
        ) from None
    text = TextTokenizer.from_transformers(loaded)
    facts = TokenizerFacts(
        max(loaded.get_vocab().values()),
        loaded.bos_token_id,
        loaded.eos_token_id,
        loaded.pad_token_id,
        f"the tokenizer {place}",
    )
    return OpenedTokenizer(text.backend, text.special_tokens, text.chat_template, facts)


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
    for split, configs in (("train", data.train), ("validation", held_out)):
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
    start, stop, _ = slice(*place.bounds).indices(sum(map(len, opened)))
    if len(opened) < len(parts) or start >= stop:
        return open_rows(config, key)
    return Rows(place.name, opened, start, stop)


# --- rows ---


@dataclass
class _Tally:
    """Statistics of one source, as its rows come."""

    source: InspectedSource
    rows: int = 0
    errors: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    duplicates: int = 0
    roles: dict[str, tuple[int, int]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    def add(self, row: InspectedRow) -> None:
        if row.error is not None:
            self.errors += 1
            return
        self.lengths.append(len(row.tokens))
        self.tokens += len(row.tokens)
        self.trained += int(np.count_nonzero(row.loss_weights))
        self.truncated += int(row.truncated > 0)
        self.tokens_cut += row.truncated
        self.duplicates += int(any(kind == "duplicate" for kind, _ in row.warnings))
        for role, (tokens, trained) in row.roles.items():
            before = self.roles.get(role, (0, 0))
            self.roles[role] = before[0] + tokens, before[1] + trained

    def statistics(self) -> SourceStatistics:
        return SourceStatistics(
            name=self.source.name,
            split=self.source.split,
            rows=self.rows,
            errors=self.errors,
            tokens=self.tokens,
            trained_tokens=self.trained,
            roles=dict(self.roles),
            truncated=self.truncated,
            tokens_cut=self.tokens_cut,
            duplicates=self.duplicates,
            lengths=np.array(self.lengths, np.int32),
        )


class Inspector:
    """Rows as they would be trained, and what is found in all of them together.

    `limits_by_default` is false for rows without a recipe, which only keys that are written limit.
    """

    def __init__(self, recipe: Recipe, title: str, limits_by_default: bool = True) -> None:
        self.recipe = recipe
        self.title = title
        self._limits_by_default = limits_by_default
        data = recipe.data
        self.selection = Selection(
            train_on=data.train_on,
            reasoning=data.train_reasoning,
            tool_calls=data.train_tool_calls,
            open_turns=data.open_turns,
        )
        self.sources = open_sources(data)
        self._tallies = [_Tally(source) for source in self.sources]
        self._seen: dict[int, tuple[str, int]] = {}
        self._gathered: dict[str, tuple[int, list[tuple[str, int]]]] = {}
        self._present: dict[int, tuple[int, list[tuple[str, int]]]] = defaultdict(lambda: (0, []))
        self._trained_added: set[int] = set()

    @cached_property
    def model(self) -> ModelFacts | None:
        """The model's facts; None for rows whose tokenizer folder is no model's."""
        config = self.recipe.model
        if config.init is not None:
            return read_model_facts(Path(config.init).expanduser(), config.implementation)
        place = Path(str(config.path)).expanduser()
        if not place.is_dir() and self._limits_by_default:
            from burnish.model.hf_io import find_folder  # torch, which a hub id's download is not worth sparing

            place = find_folder(str(config.path), config.revision)
        found = read_model_facts(place, config.implementation) if place.is_dir() else None
        if found is None and self._limits_by_default:
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
            chat_template=self._template_file or opened.chat_template,
            template_kwargs=data.chat_template_kwargs,
            stop_tokens=frozenset(self.stops),
            renderer=data.renderer,
            date=self.date,
        )

    @property
    def _template_file(self) -> str | None:
        file = self.recipe.data.chat_template
        if file is None:
            return None
        if not Path(file).is_file():
            raise RecipeError(f"data.chat_template={file}: no such file; give the path of a Jinja template")
        return Path(file).read_text(encoding="utf-8")

    @cached_property
    def date(self) -> str:
        """The day that templates see, as training takes it: the recipe's, that of the first start, or today."""
        saved = Path(self.recipe.run.dir) / "data.json"
        if self.recipe.data.date is not None:
            return self.recipe.data.date
        if self._limits_by_default and saved.is_file():
            return json.loads(saved.read_text(encoding="utf-8"))["date"]
        return date.today().isoformat()

    @cached_property
    def limits(self) -> dict[str, int]:
        """What limits a row's length, by name, tokens."""
        data, batch = self.recipe.data, self.recipe.batch
        limits = {}
        if self._limits_by_default or "tokens_per_micro_batch" in batch.model_fields_set:
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

    @cached_property
    def facts(self) -> tuple[tuple[str, str], ...]:
        data = self.recipe.data
        what = [name for name, on in (("reasoning", data.train_reasoning), ("tool calls", data.train_tool_calls)) if not on]
        facts = [
            ("tokenizer", self.tokenizer_place),
            ("template", data.renderer or data.chat_template or _template_name(self.opened_tokenizer.chat_template)),
            ("end of turn", ", ".join(self._name(stop) for stop in self.stops) or "none declared"),
            ("trained", str(data.train_on) + (f", without {' and '.join(what)}" if what else "")),
            ("longest row", ", ".join(f"{value:,} ({name})" for name, value in self.limits.items()) or "not limited"),
            ("longer rows", data.over_long + (f" {data.truncate_side}" if data.over_long == "truncate" else "")),
        ]
        if data.turn_per_sample:
            facts.append(("samples", "one a trained turn"))
        if data.chat_template_kwargs:
            facts.append(("template arguments", json.dumps(data.chat_template_kwargs, ensure_ascii=False)))
        if "strftime_now" in str(self.tokenizer.chat_template):
            facts.append(("date", self.date))
        facts.append(("sources", ", ".join(f"{s.name} ({s.format})" for s in self.sources)))
        return tuple(facts)

    @property
    def num_rows(self) -> int | None:
        """Rows that there are, None where a stream is among the sources."""
        numbers = [source.num_rows for source in self.sources]
        return None if None in numbers else sum(number for number in numbers if number is not None)

    def rows(self, limit: int | None) -> Iterator[InspectedRow]:
        """At most `limit` rows, from the beginning of every source alike; each is ready as soon as it is asked for."""
        for number, quota in enumerate(self.quotas(limit)):
            yield from self.source_rows(number, quota)

    def source_rows(self, number: int, limit: int | None = None) -> Iterator[InspectedRow]:
        """The first `limit` rows of one source, or all."""
        found = self.sources[number].read(number, limit)
        sizes = chain((1, 2, 4, 8, 16, 32), repeat(LARGEST_CHUNK))
        while chunk := list(islice(found, next(sizes))):
            yield from self._inspected(self.sources[number], self._tallies[number], chunk)

    def quotas(self, limit: int | None) -> list[int | None]:
        """How many rows of each source `limit` comes to; None is all."""
        if limit is None:
            return [None] * len(self.sources)
        left, quotas = limit, [0] * len(self.sources)
        sizes = [NO_LIMIT if source.num_rows is None else source.num_rows for source in self.sources]
        for place, number in enumerate(sorted(range(len(sizes)), key=lambda n: sizes[n])):
            # The shortest first, so that what it leaves goes to the others; the odd row to the recipe's first.
            share = left // (len(sizes) - place)
            quotas[number] = min(sizes[number], share)
            left -= quotas[number]
        for number in range(len(sizes)):
            more = min(left, sizes[number] - quotas[number], 1)
            quotas[number] += more
            left -= more
        return list(quotas)

    def inspection(self, rows: Iterable[InspectedRow]) -> Inspection:
        """What was found in the rows read until now, `rows` of them in detail."""
        statistics = tuple(tally.statistics() for tally in self._tallies)
        lengths = [length for tally in self._tallies if tally.source.split == "train" for length in tally.lengths]
        return Inspection(
            title=self.title,
            facts=self.facts,
            rows=tuple(rows),
            sources=statistics,
            warnings=tuple(self._data_warnings()),
            packing=_packing([n for n in lengths if n <= self._budget], self._budget),
        )

    @property
    def _budget(self) -> int:
        return self.recipe.batch.tokens_per_micro_batch

    @property
    def linked(self) -> frozenset[tuple[str, int]]:
        """The rows, as (source, index), that a gathered warning names until now."""
        return frozenset(row for _, rows in self._gathered.values() for row in rows)

    def _inspected(self, source: InspectedSource, tally: _Tally, chunk: Sequence[StreamedRow]) -> Iterator[InspectedRow]:
        preparer = self.preparer
        parts = [caught(preparer._parts, found) for found in chunk]
        fresh = [part for row in parts if not isinstance(row, RowError) for part in row]
        encoded = iter(self.tokenizer.encode_batch(fresh, self.selection))
        for found, of_row in zip(chunk, parts, strict=True):
            index = source.first + found.index
            tally.rows += 1
            if isinstance(of_row, RowError):
                made = [_failed(source.name, index, found.where, of_row)]
            else:
                made = [self._row(source.name, index, found.where, part, next(encoded)) for part in of_row]
            for row in made:
                tally.add(row)
                self._gather(row)
                yield row

    def _row(self, source: str, index: int, where: str, part: Row, encoded: Encoded | RowError) -> InspectedRow:
        whole = encoded if isinstance(encoded, RowError) else caught(self.preparer._fit, encoded)
        if isinstance(whole, RowError) or isinstance(encoded, RowError):
            assert isinstance(whole, RowError)
            return _failed(source, index, where, whole)
        spans = tuple(_spans(whole))
        roles: dict[str, tuple[int, int]] = {}
        for start, end, origin, weight in spans:
            role = origin.partition(":")[0]
            tokens, trained = roles.get(role, (0, 0))
            roles[role] = tokens + end - start, trained + (end - start if weight else 0)
        pieces = self._pieces(whole, encoded.prefix if whole is not encoded else None)
        return InspectedRow(
            index=index,
            source=source,
            where=where,
            error=None,
            tokens=whole.tokens,
            loss_weights=whole.loss_weights,
            text=whole.text if not isinstance(part, TokenRow) else "".join(pieces),
            pieces=pieces,
            spans=spans,
            warnings=tuple(self._warnings(source, index, part, encoded, whole)),
            truncated=len(encoded.tokens) - len(whole.tokens),
            roles=roles,
        )

    def _pieces(self, encoded: Encoded, seam: int | None) -> tuple[str, ...]:
        """What to show of each token; what a normaliser left out of all tokens goes with the one behind it.

        `seam` is the number of tokens before a cut amid the row.
        """
        text, pieces, done = encoded.text, [], 0
        if not text:
            return decoded_pieces(encoded.tokens.tolist(), self.tokenizer.decode)
        for number, (token, (start, end)) in enumerate(
            zip(encoded.tokens.tolist(), encoded.offsets.tolist(), strict=True)
        ):
            if number == seam:
                done = start
            if start == end:
                pieces.append(self.tokenizer.decode([token]))
            else:
                pieces.append(text[done:end])
                done = max(done, end)
        return tuple(pieces)

    # --- warnings ---

    def _warnings(
        self, source: str, index: int, part: Row, encoded: Encoded, whole: Encoded
    ) -> Iterator[tuple[str, str]]:
        tokens, weights = whole.tokens, whole.loss_weights
        facts = self.opened_tokenizer.facts
        trained = tokens[weights > 0]
        open_messages = {text.partition(":")[0] for kind, text in whole.notices if kind == "open_turn"}
        if isinstance(part, TokenRow):
            if self.stops and not np.isin(trained, self.stops).any():
                yield "no_end_of_turn", "no end-of-turn token is trained"
        else:
            for message in _turns_without_end(whole):
                name = f"messages[{message}]" if message is not None else "the text"
                if name not in open_messages:
                    yield "no_end_of_turn", f"{name} is trained without an end-of-turn token"
        if facts.pad is not None and facts.pad in {facts.eos, *self.stops} and facts.pad in trained:
            yield "pad_equals_eos", f"the end of a turn is trained by {self._name(facts.pad)}, which also pads"
        if facts.bos is not None and len(tokens) > 1 and tokens[0] == tokens[1] == facts.bos:
            yield "double_bos", f"it begins with two BOS tokens, {self._name(facts.bos)}"
        for number in _empty_turns(part):
            yield "empty_turn", f"messages[{number[0]}] ({number[1]}) is empty"
        first = self._seen.setdefault(hash((tokens.tobytes(), weights.tobytes())), (source, index))
        if first != (source, index):
            yield "duplicate", f"it gives the same tokens and weights as {first[0]} {first[1]}"
        if isinstance(part, Conversation):
            for message, difference in self.tokenizer.prompt_differences(part, encoded):
                yield "prompt_mismatch", f"messages[{message}]: {difference}"
        share = len(trained) / max(len(tokens) - 1, 1)
        if share < LOW_SHARE:
            yield "low_share", f"{len(trained)} of {len(tokens)} tokens are trained, less than 1 %"
        elif share > HIGH_SHARE and not (isinstance(part, RawText) and not part.prompt):
            yield "high_share", f"{len(trained)} of {len(tokens)} tokens are trained, more than 95 %"
        yield from whole.notices

    def _gather(self, row: InspectedRow) -> None:
        kinds = {kind for kind, _ in row.warnings} if row.error is None else {"error"}
        for kind in kinds:
            count, rows = self._gathered.setdefault(kind, (0, []))
            if len(rows) < LINKED_ROWS and (row.source, row.index) not in rows:
                rows.append((row.source, row.index))
            self._gathered[kind] = count + 1, rows
        self._note_added(row)

    def _note_added(self, row: InspectedRow) -> None:
        """Count added tokens in what somebody wrote; the template's own marks are the prompt's business."""
        is_added = self._is_added
        tokens = row.tokens[row.tokens < len(is_added)]
        if not is_added[tokens].any():
            return
        present: set[int] = set()
        for start, end, origin, weight in row.spans:
            numbers = row.tokens[start:end]
            numbers = numbers[numbers < len(is_added)]
            numbers = numbers[is_added[numbers]]
            if weight:
                self._trained_added.update(numbers.tolist())
            elif origin != "template":
                present.update(numbers.tolist())
        for number in present:
            count, rows = self._present[number]
            if len(rows) < LINKED_ROWS:
                rows.append((row.source, row.index))
            self._present[number] = count + 1, rows

    @cached_property
    def _added(self) -> dict[int, str]:
        """Added tokens by id."""
        return {token["id"]: token["content"] for token in json.loads(self.opened_tokenizer.backend)["added_tokens"]}

    @cached_property
    def _is_added(self) -> np.ndarray:
        found = np.zeros(self.opened_tokenizer.facts.largest_id + 1, bool)
        found[list(self._added)] = True
        return found

    def _name(self, token: int) -> str:
        return self._added.get(token) or self.tokenizer.decode([token])

    def _data_warnings(self) -> Iterator[DataWarning]:
        """Errors first, then what is the tokenizer's, then what rows have in common."""
        gathered = dict(self._gathered)
        if "error" in gathered:
            yield _data_warning("error", *gathered.pop("error"))
        yield from self._vocabulary_warnings()
        never = {number: found for number, found in self._present.items() if number not in self._trained_added}
        if never:
            names = ", ".join(self._name(number) for number in sorted(never))
            rows = list(dict.fromkeys(row for _, rows in never.values() for row in rows))[:LINKED_ROWS]
            text = f"{MEANINGS['never_trained']}: {names}"
            yield DataWarning("never_trained", text, max(count for count, _ in never.values()), tuple(rows))
        for kind in sorted(gathered, key=lambda kind: list(MEANINGS).index(kind) if kind in MEANINGS else len(MEANINGS)):
            yield _data_warning(kind, *gathered[kind])

    def _vocabulary_warnings(self) -> Iterator[DataWarning]:
        if self.model is None or self.model.num_embeddings is None:
            return
        facts, rows = self.opened_tokenizer.facts, self.model.num_embeddings
        outside = [token for token in sorted(self._added) if token >= rows]
        if outside:
            names = ", ".join(self._name(token) for token in outside[:LINKED_ROWS])
            more = ", ..." if len(outside) > LINKED_ROWS else ""
            text = f"{MEANINGS['outside_embedding']} of {rows} rows: {names}{more}"
            yield DataWarning("outside_embedding", text, 0, ())
        # That pad is eos is said of the rows where it matters.
        pad = None if facts.pad == facts.eos else facts.pad
        known = TokenizerFacts(facts.largest_id, facts.bos, facts.eos, pad, facts.name)
        findings = check_vocabulary(known, self.model.config, self.model.generation, rows)
        for text in (*findings.errors, *findings.warnings):
            yield DataWarning("vocabulary", text, 0, ())


def _data_warning(kind: str, count: int, rows: Sequence[tuple[str, int]]) -> DataWarning:
    return DataWarning(kind, MEANINGS.get(kind, f"rows with the notice {kind}"), count, tuple(rows))


def _failed(source: str, index: int, where: str, error: RowError) -> InspectedRow:
    nothing = np.empty(0, np.int32), np.empty(0, np.float32)
    return InspectedRow(index, source, where, str(error), *nothing, "", (), (), (), 0, {})


def _spans(encoded: Encoded) -> Iterator[tuple[int, int, str, float]]:
    """The spans, each of one weight."""
    weights = encoded.loss_weights
    changes = (np.flatnonzero(np.diff(weights)) + 1).tolist()
    for span in encoded.spans:
        cuts = [span.start, *(c for c in changes if span.start < c < span.end), span.end]
        for start, end in zip(cuts, cuts[1:], strict=False):
            yield start, end, span.origin, float(str(weights[start]))


def _turns_without_end(encoded: Encoded) -> list[int | None]:
    """Messages of which an assistant's text is trained and no end-of-turn token."""
    trained, ended = dict[int | None, None](), set[int | None]()
    for start, end, origin, message in encoded.spans:
        if encoded.loss_weights[start:end].any():
            if origin == "template:end":
                ended.add(message)
            elif origin.startswith("assistant:"):
                trained[message] = None
    return [message for message in trained if message not in ended]


def _empty_turns(part: Row) -> list[tuple[int, str]]:
    if not isinstance(part, Conversation):
        return []
    return [(n, m.role) for n, m in enumerate(part.messages) if m.role in ("user", "assistant") and _is_empty(m)]


def _is_empty(message: Message) -> bool:
    return not (message.content.strip() or (message.reasoning or "").strip() or message.tool_calls)


def decoded_pieces(tokens: Sequence[int], decode: Callable[[list[int]], str]) -> tuple[str, ...]:
    """What to show of each token by its id alone; of a character in several tokens the first shows it."""
    pieces: list[str] = []
    begun: list[int] = []
    for token in tokens:
        begun.append(token)
        text = decode(begun)
        if "\ufffd" in text and len(begun) < 4:  # a character has at most four bytes
            continue
        pieces += [text, *[""] * (len(begun) - 1)]
        begun = []
    return (*pieces, *([decode(begun), *[""] * (len(begun) - 1)] if begun else []))


def _packing(lengths: Sequence[int], budget: int) -> PackingFill | None:
    if not lengths:
        return None
    packs = len(first_fit(lengths, budget))
    return PackingFill(budget, packs, sum(lengths) / (packs * budget))


def _template_name(template: str | Mapping[str, str] | None) -> str:
    if template is None:
        return "none"
    return "the tokenizer's" if isinstance(template, str) else f"the tokenizer's ({', '.join(template)})"


# --- views ---


def _show_terminal(inspector: Inspector, limit: int | None, file: TextIO, tokens: bool) -> int:
    from burnish.observe.inspect_terminal import Terminal

    terminal = Terminal(file, tokens)
    terminal.opening(inspector.title, inspector.facts)
    for row in inspector.rows(limit):
        terminal.row(row)
        file.flush()
    found = inspector.inspection(())
    terminal.summary(found, inspector.num_rows)
    return _status(found)


def _show_lines(inspector: Inspector, limit: int | None, file: TextIO, tokens: bool) -> int:
    """One JSON object a row; what is found over all of them goes to standard error."""
    from burnish.observe.inspect_terminal import harmless

    for row in inspector.rows(limit):
        file.write(json.dumps(as_json(row)) + "\n")
        file.flush()
    found = inspector.inspection(())
    for warning in found.warnings:
        count = f"{warning.count} " if warning.count else ""
        print(harmless(f"warning: {count}{warning.text}"), file=sys.stderr)
    return _status(found)


def as_json(row: InspectedRow) -> dict[str, Any]:
    """A row as one object of `--format json`."""
    if row.error is not None:
        return {"index": row.index, "source": row.source, "error": f"{row.where}: {row.error}"}
    numbers = {weight: float(str(weight)) for weight in np.unique(row.loss_weights)}
    return {
        "index": row.index,
        "source": row.source,
        "input_ids": row.tokens.tolist(),
        "loss_weights": [numbers[weight] for weight in row.loss_weights],
        "text": row.text,
        "spans": [list(span) for span in row.spans],
        "warnings": [{"kind": kind, "text": text} for kind, text in row.warnings],
    }


def _show_page(inspector: Inspector, limit: int | None, out: str | None) -> int:
    from burnish.observe.inspect_page import render

    shown: list[InspectedRow] = []
    with _Progress() as progress:
        for number, quota in enumerate(inspector.quotas(limit)):
            for count, row in enumerate(inspector.source_rows(number)):
                if quota is None or count < quota or (row.source, row.index) in inspector.linked:
                    shown.append(row)
                progress.advance()
    found = inspector.inspection(shown)
    page = render(found)
    if out is None:
        sys.stdout.write(page)
    else:
        try:
            write_whole(Path(out), page)
        except OSError as error:
            raise UserError(f"--out={out} cannot be written: {error.strerror}; name another file") from None
        print(out)
    return _status(found)


class _Progress:
    """How many rows are read, on standard error where that is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._status = self._console.status("reading rows") if self._console.is_terminal else None
        self._rows = 0

    def __enter__(self) -> _Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def advance(self) -> None:
        self._rows += 1
        if self._status is not None and self._rows % 100 == 0:
            self._status.update(f"{self._rows:,} rows read")


def _status(found: Inspection) -> int:
    return 3 if any(source.errors for source in found.sources) else 0
