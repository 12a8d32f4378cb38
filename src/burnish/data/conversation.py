"""From raw rows to conversations: which shape the rows of a source have, and what each row says in that shape.

Renders nothing and knows no tokenizer; `messages.py` reads the messages themselves.
"""

from __future__ import annotations

import difflib
import enum
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from burnish.config import SourceConfig
from burnish.data.json_files import json_kind
from burnish.data.messages import to_messages, to_tools
from burnish.data.schema import Schema
from burnish.types import Conversation, Message, RawText, RowError, TokenRow, UserError

Row = Mapping[str, Any]

SHAREGPT_COLUMN = "conversations"
IGNORED_LABEL = -100
"""The label of a token that is not trained, in rows that come tokenised (PyTorch's ignore_index)."""
_MASKS = ("loss_mask", "assistant_masks", "completion_mask")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_USUAL_PAIRS = (("question", "answer"), ("query", "response"), ("problem", "solution"), ("input", "output"))
_DEFAULTS = {name: field.default for name, field in SourceConfig.model_fields.items()}
_KEYS = tuple(name for name in _DEFAULTS if name.endswith("_key"))


class Format(enum.StrEnum):
    """The shapes of rows, under the names that `format` has in the recipe."""

    MESSAGES = "messages"
    PROMPT = "prompt"
    INSTRUCTION = "instruction"
    SHAREGPT = "sharegpt"
    TEXT = "text"
    TOKENS = "tokens"


def recognise(schema: Schema, source: SourceConfig, key: str = "data.train") -> Format:
    """The one shape that the columns of a source's rows fit, or the one that `source.format` forces.

    `messages` wins over a `prompt`, and prompt with completion over `messages`. Rows that fit no shape do not count:
    each is a RowError of its own later. `key` is the recipe's name for the source, for messages.
    Raises UserError where no shape fits or several do, where a key of the source names a column that no row has, and,
    unless the format is forced, where a column would be left unread that changes what a row says.
    """
    _check_keys(schema, source, key)
    if source.format != "auto":
        chosen = Format(source.format)
        missing = [column for column in _needs(source)[chosen] if column not in schema.columns]
        if missing:
            raise UserError(
                f"{key}.format={chosen}: no row has the column {missing[0]}; {_seen(schema)}{_remedy(schema)}"
            )
        return chosen
    found: Counter[Format] = Counter()
    for shape, num_rows in schema.shapes.items():
        found.update(dict.fromkeys(_fitting(shape, source), num_rows))
    if not found:
        shapes = "; ".join(f"{name} needs {' and '.join(columns)}" for name, columns in _needs(source).items())
        raise UserError(
            f"{key}.path={source.path}: the rows fit no known shape; {_seen(schema)}; {shapes}{_remedy(schema)}"
        )
    if len(found) > 1:
        counts = ", ".join(f"{name} ({count} rows)" for name, count in found.most_common())
        raise UserError(
            f"{key}.path={source.path}: the rows fit more than one shape: {counts}; {_seen(schema)}; "
            f"set {key}.format to one"
        )
    (chosen,) = found
    _check_unread(schema, source, key, chosen)
    return chosen


def to_conversation(row: Row, format: Format, source: SourceConfig) -> Conversation | RawText | TokenRow:
    """What a row says. A null column is an absent one. Raises RowError with the reason where nothing can be trained."""
    for column in _MEDIA:
        if row.get(column):
            raise RowError(f"column {column} is not empty; multimodal rows are not supported yet")
    return _READERS[format](row, source)


def row_facts(row: Row, source: SourceConfig) -> tuple[Any, dict[str, Any]]:
    """A row's label (None without `label_key`) and metadata; what is no mapping stands under its column's name."""
    label = None if source.label_key is None else row.get(source.label_key)
    metadata = row.get(source.metadata_key)
    if metadata is None:
        return label, {}
    return label, dict(metadata) if isinstance(metadata, Mapping) else {source.metadata_key: metadata}


def _named(source: SourceConfig, key: str) -> bool:
    """Whether the recipe names a column itself, so that it has to be there."""
    return getattr(source, key) not in (None, _DEFAULTS[key])


def _prompt_column(source: SourceConfig) -> str:
    return source.prompt_key if _named(source, "prompt_key") else "prompt"


def _sharegpt_column(source: SourceConfig) -> str:
    return source.messages_key if _named(source, "messages_key") else SHAREGPT_COLUMN


def _needs(source: SourceConfig) -> dict[Format, tuple[str, ...]]:
    """The columns that make each shape, under the source's names for them."""
    return {
        Format.MESSAGES: (source.messages_key,),
        Format.PROMPT: (_prompt_column(source), "completion"),
        Format.INSTRUCTION: (source.prompt_key, source.response_key),
        Format.SHAREGPT: (_sharegpt_column(source),),
        Format.TEXT: ("text",),
        Format.TOKENS: ("input_ids",),
    }


def _fitting(shape: frozenset[str], source: SourceConfig) -> list[Format]:
    """The shapes that a row with these columns filled fits, but for those that another of them wins over."""
    fitting = [format for format, columns in _needs(source).items() if shape.issuperset(columns)]
    beaten: set[Format] = set()
    if Format.PROMPT in fitting:
        # A response_key of "completion" asks for a chat turn by name; else a completion makes it prompt/completion.
        beaten.add(Format.PROMPT if source.response_key == "completion" else Format.MESSAGES)
    if _sharegpt_column(source) == source.messages_key:
        beaten.add(Format.SHAREGPT)  # messages are read alike in both shapes
    return [format for format in fitting if format not in beaten]


def _check_keys(schema: Schema, source: SourceConfig, key: str) -> None:
    for name in _KEYS:
        column = getattr(source, name)
        if _named(source, name) and column not in schema.columns:
            near = difflib.get_close_matches(column, schema.columns, 1, 0.5)
            hint = f"did you mean {name}={near[0]}? " if near else ""
            raise UserError(f"{key}.{name}={column}: no row has this column; {hint}{_seen(schema)}")


def _check_unread(schema: Schema, source: SourceConfig, key: str, format: Format) -> None:
    read = {getattr(source, name) for name in _KEYS}
    filled = frozenset().union(*schema.shapes) - read
    suspects = {"system": "system_key"} if format in (Format.MESSAGES, Format.SHAREGPT, Format.INSTRUCTION) else {}
    if format is Format.INSTRUCTION:
        suspects |= {"input": "query_key"}
        if "history" in filled:
            raise UserError(
                f"{key}.path={source.path}: column history holds earlier turns, which instruction rows do not "
                f"read; write the rows as messages, or set {key}.format={format} to leave them out"
            )
    for column, name in suspects.items():
        if column in filled and getattr(source, name) is None:
            raise UserError(
                f"{key}.path={source.path}: nothing reads the column {column}, which is not empty; "
                f"set {key}.{name}={column} to use it, or {key}.format={format} to leave it out"
            )


def _seen(schema: Schema) -> str:
    columns = ", ".join(f"{name} ({count} rows)" for name, count in schema.columns.items())
    return f"the columns are {columns}" if columns else "no row could be read as an object with columns"


def _remedy(schema: Schema) -> str:
    for prompt, response in _USUAL_PAIRS:
        if prompt in schema.columns and response in schema.columns:
            return f". Set prompt_key={prompt} and response_key={response}"
    return ". Set format, or the keys that name the columns (prompt_key, response_key, messages_key, ...)"


def _from_messages(row: Row, source: SourceConfig) -> Conversation:
    return _from_turns(row, source, source.messages_key)


def _from_sharegpt(row: Row, source: SourceConfig) -> Conversation:
    return _from_turns(row, source, _sharegpt_column(source))


def _from_turns(row: Row, source: SourceConfig, column: str) -> Conversation:
    return _chat(row, source, _with_system(row, source, to_messages(_column(row, column), column)))


def _from_instruction(row: Row, source: SourceConfig) -> Conversation:
    """One exchange; a query follows the instruction after a newline (ROLL's `get_encode_function`)."""
    prompt = _text(row, source.prompt_key)
    query = None if source.query_key is None else _optional_text(row, source.query_key)
    user = Message("user", f"{prompt}\n{query}" if query else prompt)
    answer = Message("assistant", _text(row, source.response_key))
    return _chat(row, source, _with_system(row, source, (user, answer)))


def _from_prompt(row: Row, source: SourceConfig) -> Conversation | RawText:
    """Two strings are raw text. Of two lists of messages only the completion's are trained.

    Messages of the prompt have weight 0 unless the row gives them another.
    """
    column = _prompt_column(source)
    prompt, completion = _column(row, column), _column(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if source.system_key is not None and row.get(source.system_key):
            raise RowError(
                f"{column} and completion are raw text, which has no system turn; column {source.system_key} has one"
            )
        return RawText(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError(
            f"{column} is {json_kind(prompt)} and completion {json_kind(completion)}; both must be text or both lists"
        )
    context, answer = to_messages(prompt, column), to_messages(completion, "completion")
    _check_assistant(answer, "column completion")
    context = _with_system(row, source, context)
    untrained = (replace(message, weight=0.0) if message.weight is None else message for message in context)
    return _chat(row, source, (*untrained, *answer))


def _from_text(row: Row, source: SourceConfig) -> RawText:
    text = _text(row, "text")
    if not text:
        raise RowError("column text is empty")
    return RawText("", text)


def _with_system(row: Row, source: SourceConfig, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    system = None if source.system_key is None else _optional_text(row, source.system_key)
    if not system:
        return messages
    if messages[0].role == "system":
        raise RowError(f"column {source.system_key} and the first message both are a system turn; keep one")
    return Message("system", system), *messages


def _chat(row: Row, source: SourceConfig, messages: tuple[Message, ...]) -> Conversation:
    _check_assistant(messages, "the conversation")
    arguments = row.get("chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise RowError(f"column chat_template_kwargs is {json_kind(arguments)}, not an object")
    return Conversation(messages, to_tools(row.get(source.tools_key), source.tools_key), dict(arguments or {}))


def _check_assistant(messages: Sequence[Message], what: str) -> None:
    if all(message.role != "assistant" for message in messages):
        raise RowError(f"{what} has no assistant turn, so there is nothing to train")


def _from_tokens(row: Row, source: SourceConfig) -> TokenRow:
    """Ids, trained where labels, masks and `loss_weights` all say so; everywhere where there are none of them.

    `labels` stand as Hugging Face has them: label i is token i, or -100. Tokens whose `attention_mask` is 0 are padding
    and left out.
    """
    tokens = _numbers(row, "input_ids", np.integer)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**31:
        raise RowError(f"column input_ids holds {tokens.min()} to {tokens.max()}; an id is 0 or more and below 2^31")
    weights = np.ones(len(tokens), np.float32)
    for column in ("labels", *_MASKS, "loss_weights"):
        if row.get(column) is not None:
            weights *= _weights(row, column, tokens)
    if row.get("attention_mask") is not None:
        attended = _mask(row, "attention_mask", len(tokens))
        tokens, weights = tokens[attended], weights[attended]
    weights[:1] = 0  # nothing predicts the first token
    if not weights.any():
        raise RowError("no token is trained")
    return TokenRow(tokens.astype(np.int32), weights)


def _weights(row: Row, column: str, tokens: np.ndarray) -> np.ndarray:
    """What one column says of each token's weight."""
    if column in _MASKS:
        return _mask(row, column, len(tokens))
    values = _same_length(_numbers(row, column, np.integer if column == "labels" else np.number), column, len(tokens))
    if column == "labels":
        trained = values != IGNORED_LABEL
        shifted = np.flatnonzero(trained & (values != tokens))
        if shifted.size:
            at = shifted[0]
            raise RowError(
                f"labels[{at}]={values[at]} is neither {IGNORED_LABEL} nor input_ids[{at}]={tokens[at]}; "
                "labels must not be shifted"
            )
        return trained
    if not np.isfinite(values).all() or (values < 0).any():
        raise RowError(
            f"column {column} holds {values.min()} to {values.max()}; a weight is a finite number, 0 or more"
        )
    return values.astype(np.float32)


def _mask(row: Row, column: str, length: int) -> np.ndarray:
    values = _same_length(_numbers(row, column, np.integer, np.bool_), column, length)
    if not np.isin(values, (0, 1)).all():
        raise RowError(
            f"column {column} holds {values.min()} to {values.max()}; a mask holds 0 and 1 (weights go to loss_weights)"
        )
    return values.astype(bool)


def _same_length(values: np.ndarray, column: str, length: int) -> np.ndarray:
    if len(values) != length:
        raise RowError(f"column {column} has {len(values)} values for {length} input_ids")
    return values


def _numbers(row: Row, column: str, *kinds: type[np.generic]) -> np.ndarray:
    value = _column(row, column)
    try:
        numbers = np.asarray(value)
    except ValueError:
        numbers = np.empty((0, 0))
    if numbers.ndim != 1 or not (numbers.size == 0 or any(np.issubdtype(numbers.dtype, kind) for kind in kinds)):
        names = {np.integer: "whole numbers", np.number: "numbers"}
        raise RowError(f"column {column} must be a flat list of {names[kinds[0]]}, and it is {_shown(value)}")
    return numbers


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _column(row: Row, column: str) -> Any:
    if row.get(column) is None:
        state = "null" if column in row else "missing"
        raise RowError(f"column {column} is {state}; the row has {', '.join(row) or 'no columns'}")
    return row[column]


def _text(row: Row, column: str) -> str:
    value = _column(row, column)
    if not isinstance(value, str):
        raise RowError(f"column {column} is {json_kind(value)}, not text")
    return value


def _optional_text(row: Row, column: str) -> str | None:
    return None if row.get(column) is None else _text(row, column)


_READERS: dict[Format, Callable[[Row, SourceConfig], Conversation | RawText | TokenRow]] = {
    Format.MESSAGES: _from_messages,
    Format.PROMPT: _from_prompt,
    Format.INSTRUCTION: _from_instruction,
    Format.SHAREGPT: _from_sharegpt,
    Format.TEXT: _from_text,
    Format.TOKENS: _from_tokens,
}
