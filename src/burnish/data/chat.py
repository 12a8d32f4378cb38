"""Rows to token ids and loss weights, with the ids of `apply_chat_template` and weights that follow from the template.

A trained turn is what the model would generate there: from behind the generation prompt through the end-of-turn token.
Where that cannot be known the row is a RowError that says why. Characters map to tokens by offsets: a token that
holds the end of a header and the start of the turn's text is trained, one that reaches into another message is not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer

from burnish.config import LastTurns, Roles, TrainOn
from burnish.data.template import ChatTemplate, Place, Rendering, common_prefix, message_dict
from burnish.types import Conversation, Message, RawText, RowError, TokenRow, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Conversation | RawText | TokenRow
TruncateSide = Literal["right", "left", "turns"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class MessageSpan:
    """Tokens [start, end) that the template wrote for message `message`, header and what follows its end included."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Encoded:
    """A tokenised row of L tokens.

    `tokens` is int32 [L]; `loss_weights` is float32 [L], the weight with which token i is predicted, so index 0 is 0.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    turn_ends: tuple[int, ...] = ()
    """Token counts at which a message ends: the row may be cut there without cutting a turn."""
    prefix: int = 0
    """Tokens at the start that hold the system turn and the tools."""
    text: str = ""
    """The rendering; empty for a row that came tokenised."""
    spans: tuple[MessageSpan, ...] = ()


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and chat template without transformers: light to import, to pickle and to send to processes."""

    backend: str
    """JSON of the `tokenizers` library."""
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    """What templates see of them: bos_token, eos_token, ..."""
    chat_template: str | Mapping[str, str] | None = None
    """Jinja text, or several by name (default, tool_use)."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for the template; a row's own win."""
    stop_tokens: frozenset[int | str] = frozenset()
    """Tokens besides eos that end a turn, such as those of generation_config."""
    date: str = "2025-01-01"
    """The day that `strftime_now` gives templates, YYYY-MM-DD."""

    @classmethod
    def from_transformers(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        stop_tokens: Iterable[int | str] = (),
        date: str | None = None,
    ) -> TextTokenizer:
        """What a loaded transformers tokenizer does. Raises UserError where it has no `tokenizers` backend."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path} is a {type(tokenizer).__name__} without a `tokenizers` backend, "
                "which burnish needs to know where each token stands; convert it to a folder with a tokenizer.json "
                "(transformers.convert_slow_tokenizer) and set model.tokenizer to that"
            )
        options: dict[str, Any] = {} if date is None else {"date": date}
        return cls(
            backend=backend.to_str(),
            special_tokens=dict(tokenizer.special_tokens_map),
            chat_template=tokenizer.chat_template,
            template_kwargs=dict(template_kwargs or {}),
            stop_tokens=frozenset(stop_tokens),
            **options,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # what is cached is built again where it is needed

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that ids and weights depend on; of the date only where a template asks for it."""
        state = self.__getstate__() | {"stop_tokens": sorted(map(str, self.stop_tokens))}
        if "strftime_now" not in str(self.chat_template):
            del state["date"]
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def eos_id(self) -> int | None:
        eos = self.special_tokens.get("eos_token")
        return None if eos is None else self._tokenizer.token_to_id(eos)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of `tokens`, special tokens included."""
        return self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False)

    def encode(self, row: Row, train_on: TrainOn = "assistant") -> Encoded:
        """Token ids and loss weights of one row. Raises RowError where it cannot be trained on."""
        encoded = self.encode_batch([row], train_on)[0]
        if isinstance(encoded, RowError):
            raise encoded
        return encoded

    def encode_batch(self, rows: Sequence[Row], train_on: TrainOn = "assistant") -> list[Encoded | RowError]:
        """`encode` of each row, errors as values. Raises UserError where the tokenizer lacks what such rows need."""
        drafts = [caught(self._draft, row, train_on) for row in rows]
        texts = [draft.text for draft in drafts if isinstance(draft, _Draft)]
        encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        return [caught(self._weigh, d, next(encodings)) if isinstance(d, _Draft) else d for d in drafts]

    def _draft(self, row: Row, train_on: TrainOn) -> _Draft | Encoded:
        if isinstance(row, TokenRow):
            return _trained(_from_tokens(row))
        if isinstance(row, RawText):
            return _Draft(_encodable(row.prompt + row.completion), completion=len(row.prompt))
        return self._draft_chat(row, train_on)

    def _draft_chat(self, chat: Conversation, train_on: TrainOn) -> _Draft:
        weights = message_weights(chat.messages, train_on)
        template, stops = self._template(chat)
        kwargs = {**self.template_kwargs, **chat.template_kwargs}
        messages = [message_dict(message) for message in chat.messages]
        rendering = caught(template.trace, chat, kwargs)
        if isinstance(rendering, RowError):
            if train_on != "all" or any(message.weight is not None for message in chat.messages):
                raise rendering
            rendering = Rendering(template.render(messages, chat.tools, kwargs), (), ())
        stretches: list[_Stretch] = []
        for number, message in enumerate(chat.messages):
            if train_on == "all":
                if message.weight is not None:
                    place = _only_place(number, message, rendering)
                    stretches.append(_Stretch(number, place.start, place.start, place.end, message.weight))
            elif weights[number] == 0:
                continue
            elif message.role == "assistant":
                place = _turn_place(number, message, rendering)
                prompt = template.generation_prompt(messages, number, chat.tools, kwargs, rendering.text[: place.start])
                header = self._header(number, rendering.text[place.start : place.end], prompt)
                stretches.append(_Stretch(number, place.start, place.start + header, place.end, weights[number], stops))
            elif message.content.strip():
                place = _text_place(number, message, rendering)
                stretches.append(_Stretch(number, place.start, place.start, place.end, weights[number]))
        return _Draft(
            _encodable(rendering.text),
            places=tuple(place for place in rendering.places if place.message < len(messages)),
            prefix=_prefix(chat.messages, rendering),
            default=1.0 if train_on == "all" else 0.0,
            stretches=tuple(stretches),
        )

    def _header(self, number: int, turn: str, prompt: str) -> int:
        """Characters at the start of a turn that the generation prompt would write: their common prefix.

        Where that ends within the prompt, it counts up to the last token of its own or line end: what follows may be
        the assistant's words that begin as the prompt goes on (`<th` of <think> and <that>).
        """
        header = common_prefix(turn, prompt)
        if header < len(prompt):
            ends = [match.end() for match in self._landmark.finditer(turn, 0, header)]
            header = ends[-1] if ends else 0
        if prompt and not header:
            raise RowError(
                f"messages[{number}] (assistant): cannot be sure what to train: the chat template begins the turn with "
                f"{turn[:20]!r}, and asks for one with {prompt[:20]!r}"
            )
        return header

    def _weigh(self, draft: _Draft, encoding: Encoding) -> Encoded:
        return _trained(
            self._weigh_text(draft, encoding) if draft.completion is not None else self._weigh_chat(draft, encoding)
        )

    def _weigh_chat(self, draft: _Draft, encoding: Encoding) -> Encoded:
        tokens = _Tokens.of(encoding)
        loss_weights = np.full(len(tokens.ids), draft.default, np.float32)
        for stretch in draft.stretches:
            first, end = tokens.covering(stretch.text_start, stretch.end)
            if stretch.stops is not None:
                end = self._behind_stop(stretch, draft.text, tokens)
            reaches_back = tokens.starts[first] < stretch.start
            loss_weights[first + int(reaches_back) : end] = stretch.weight
        spans = tuple(MessageSpan(p.message, *tokens.between(p.start, p.end)) for p in draft.places)
        return Encoded(
            tokens.ids,
            loss_weights,
            turn_ends=tuple(sorted({span.end for span in spans})),
            prefix=tokens.between(0, draft.prefix)[1],
            text=draft.text,
            spans=spans,
        )

    def _behind_stop(self, stretch: _Stretch, text: str, tokens: _Tokens) -> int:
        """The token count through the turn's end-of-turn token: its last, but for white space."""
        closing = stretch.text_start + len(text[stretch.text_start : stretch.end].rstrip())
        last = tokens.covering(closing - 1, closing)[1] - 1
        assert stretch.stops is not None
        if closing == stretch.text_start or int(tokens.ids[last]) not in stretch.stops:
            written = text[max(stretch.text_start, closing - 20) : closing]
            names = ", ".join(repr(self._tokenizer.id_to_token(stop)) for stop in sorted(stretch.stops)) or "none"
            raise RowError(
                f"messages[{stretch.message}] (assistant): cannot be sure what to train: the chat template ends "
                f"the turn with {written!r} and no end-of-turn token (known: {names})"
            )
        return last + 1

    def _weigh_text(self, draft: _Draft, encoding: Encoding) -> Encoded:
        assert draft.completion is not None
        ids, before, after = encoding.ids, *self._frame
        if before and ids[: len(before)] == before:
            before = []
        closing = [] if (ids + after)[-1:] == [self._eos] else [self._eos]
        tokens = _Tokens.of(encoding)
        seam = tokens.covering(draft.completion, max(len(draft.text), draft.completion + 1))[0] + len(before)
        whole = np.array([*before, *ids, *after, *closing], np.int32)
        loss_weights = np.zeros(len(whole), np.float32)
        loss_weights[seam if draft.completion else 0 :] = 1
        return Encoded(whole, loss_weights, (seam, len(whole)), text=draft.text)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.backend)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # All it does without special tokens is to trim white space off the offsets.
        tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        return tokenizer

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer itself puts before and behind a text, such as BOS."""
        framed = Tokenizer.from_str(self.backend).encode("a")
        inner = [i for i, special in enumerate(framed.special_tokens_mask) if not special]
        return framed.ids[: inner[0]], framed.ids[inner[-1] + 1 :]

    @property
    def _eos(self) -> int:
        if self.eos_id is None:
            raise UserError(
                "the tokenizer has no eos_token to end raw text with; set eos_token in its tokenizer_config.json"
            )
        return self.eos_id

    @cached_property
    def _landmark(self) -> re.Pattern[str]:
        added = (token.content for token in self._tokenizer.get_added_tokens_decoder().values())
        return re.compile("|".join(re.escape(text) for text in (*sorted(added, key=len, reverse=True), "\n")))

    @cached_property
    def _compiled(self) -> dict[str, tuple[ChatTemplate, frozenset[int]]]:
        return {}

    def _template(self, chat: Conversation) -> tuple[ChatTemplate, frozenset[int]]:
        """The template for `chat` and the ids that end its turns; of several templates the one transformers takes."""
        source = self.chat_template
        if isinstance(source, Mapping):
            source = source.get("tool_use" if chat.tools is not None and "tool_use" in source else "default")
        if source is None:
            raise UserError(
                "the tokenizer has no chat template, and chat rows need one; set data.chat_template to a Jinja file"
            )
        if source not in self._compiled:
            template = ChatTemplate(source, self.special_tokens, date.fromisoformat(self.date))
            self._compiled[source] = template, self._stops(source)
        return self._compiled[source]

    def _stops(self, template: str) -> frozenset[int]:
        """eos, the declared stop tokens, and the special tokens in the template's text (but for bos and pad)."""
        declared = {stop if isinstance(stop, int) else self._tokenizer.token_to_id(stop) for stop in self.stop_tokens}
        no_stops = {self.special_tokens.get("bos_token"), self.special_tokens.get("pad_token")}
        written = {
            number
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content in template and token.content not in no_stops
        }
        return frozenset(number for number in {self.eos_id} | declared | written if number is not None)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Characters [text_start, end) to train behind the header [start, text_start); one of `stops` must end a turn."""

    message: int
    start: int
    text_start: int
    end: int
    weight: float
    stops: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row as text, before it is tokenised."""

    text: str
    completion: int | None = None
    """Raw text: where the completion starts. The fields below are those of a chat."""
    places: tuple[Place, ...] = ()
    prefix: int = 0
    default: float = 0.0
    stretches: tuple[_Stretch, ...] = ()


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Ids and the characters [starts, ends) of each; the bytes of one character share its place."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, encoding: Encoding) -> _Tokens:
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(encoding)).reshape(-1, 2)
        starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
        if (np.diff(starts) < 0).any() or (np.diff(ends) < 0).any():
            raise RowError("cannot be sure what to train: the tokenizer's offsets are not in order")
        return cls(np.array(encoding.ids, np.int32), starts, ends)

    def covering(self, start: int, end: int) -> tuple[int, int]:
        """Tokens [first, last) that hold any of characters [start, end)."""
        return int(np.searchsorted(self.ends, start, "right")), int(np.searchsorted(self.starts, end, "left"))

    def between(self, start: int, end: int) -> tuple[int, int]:
        """Tokens [first, last) that begin within characters [start, end)."""
        return int(np.searchsorted(self.starts, start, "left")), int(np.searchsorted(self.starts, end, "left"))


def message_weights(messages: Sequence[Message], train_on: TrainOn) -> tuple[float, ...]:
    """The weight with which each message is trained.

    `train_on` names the roles and, of the silent messages of those roles, the trained ones; a message's own weight
    decides for itself, but never makes another role trained. Raises RowError where no message has such a role.
    """
    if train_on == "all":
        return tuple(1.0 if message.weight is None else message.weight for message in messages)
    roles = train_on.roles if isinstance(train_on, Roles) else ("assistant",)
    candidates = [number for number, message in enumerate(messages) if message.role in roles]
    if not candidates:
        raise RowError("no assistant turn" if roles == ("assistant",) else f"no message of role {' or '.join(roles)}")
    num_last = train_on.last_n if isinstance(train_on, LastTurns) else 1 if train_on == "last" else len(candidates)
    trained = candidates[-num_last:]
    own = {number: messages[number].weight for number in candidates}
    return tuple(
        0.0 if number not in own else float(number in trained) if own[number] is None else float(own[number] or 0)
        for number in range(len(messages))
    )


def truncate(encoded: Encoded, max_length: int, side: TruncateSide) -> Encoded:
    """`encoded` cut to at most `max_length` tokens; as it is where it fits.

    right cuts the end; left cuts behind the system turn and tools; turns cuts the end between two messages. Raises
    RowError where nothing trained is left, or where the cut finds no place.
    """
    length = len(encoded.tokens)
    if length <= max_length:
        return encoded
    kept = np.arange(max_length)
    if side == "left":
        if encoded.prefix >= max_length:
            raise RowError(
                f"system turn and tools alone are {encoded.prefix} tokens, and {max_length} are left after the cut"
            )
        kept = np.concatenate([kept[: encoded.prefix], np.arange(length - max_length + encoded.prefix, length)])
    elif side == "turns":
        kept = kept[: max((end for end in encoded.turn_ends if end <= max_length), default=0)]
    spans = ((s.message, *np.searchsorted(kept, (s.start, s.end)).tolist()) for s in encoded.spans)
    return _trained(
        replace(
            encoded,
            tokens=encoded.tokens[kept],
            loss_weights=encoded.loss_weights[kept],
            turn_ends=tuple(sorted(set(np.searchsorted(kept, encoded.turn_ends).tolist()) - {0})),
            spans=tuple(MessageSpan(*span) for span in spans if span[1] < span[2]),
        ),
        f" in the {len(kept)} tokens left after the cut",
    )


def _trained(encoded: Encoded, where: str = "") -> Encoded:
    """`encoded` with no weight on its first token, which nothing predicts. Raises RowError where none is left."""
    loss_weights = encoded.loss_weights.copy()
    loss_weights[:1] = 0
    if not loss_weights.any():
        raise RowError(f"no trained token{where}")
    return replace(encoded, loss_weights=loss_weights)


def _from_tokens(row: TokenRow) -> Encoded:
    tokens, loss_weights = np.asarray(row.tokens), np.asarray(row.loss_weights, np.float32)
    if tokens.shape != loss_weights.shape or tokens.ndim != 1:
        raise RowError(f"{tokens.size} token ids and {loss_weights.size} weights; give one weight for each id")
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < 2**31:
        raise RowError(f"token ids run from {tokens.min()} to {tokens.max()}; they must be 0 to 2147483647")
    return Encoded(tokens.astype(np.int32), loss_weights)


def _encodable(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"the text holds {text[error.start]!a}, half of a surrogate pair, which is no character"
            ) from None
    return text


def _prefix(messages: Sequence[Message], rendering: Rendering) -> int:
    """Where the first message that is no system turn begins."""
    starts = (
        place.start
        for place in rendering.places
        if place.message < len(messages) and messages[place.message].role not in ("system", "developer")
    )
    return next(starts, 0)


def _only_place(number: int, message: Message, rendering: Rendering) -> Place:
    """The one pass that wrote message `number`; a pass within another pass for it is part of that."""
    places = [place for place in rendering.places if place.message == number]
    outer = [
        place
        for place in places
        if not any(place != o and o.start <= place.start and place.end <= o.end for o in places)
    ]
    if len(outer) != 1:
        found = "in no loop over the messages" if not outer else f"in {len(outer)} places"
        raise RowError(
            f"messages[{number}] ({message.role}): cannot be sure what to train: the chat template writes it {found}"
        )
    return outer[0]


def _turn_place(number: int, message: Message, rendering: Rendering) -> Place:
    """`_only_place`, provided that no other message's text and no tool stands in it."""
    own = _only_place(number, message, rendering)
    for other in (*rendering.places, *rendering.texts):
        if other.message != number and other.start < own.end and max(other.end, other.start + 1) > own.start:
            raise RowError(
                f"messages[{number}] ({message.role}): cannot be sure what to train: the chat template writes "
                f"messages[{other.message}] or a tool into the same turn"
            )
    return own


def _text_place(number: int, message: Message, rendering: Rendering) -> Place:
    """Where the content of a message that is no assistant's stands."""
    found = [place for place in rendering.texts if place.message == number]
    if len(found) != 1 or message.content.strip() not in rendering.text[found[0].start : found[0].end]:
        raise RowError(
            f"messages[{number}] ({message.role}): cannot be sure what to train: the chat template does not write "
            "its content once and as it is"
        )
    return found[0]


def caught(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result | RowError:
    """The result, or the RowError as a value: one bad row must not spoil the batch it is tokenised in."""
    try:
        return function(*args, **kwargs)
    except RowError as error:
        return error
