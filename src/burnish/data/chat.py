"""Rows to token ids and loss weights, with the ids of `apply_chat_template` and weights that follow from the template.

Characters map to tokens by offsets: a token is trained where any of its characters is, unless another message wrote one
of them or one stands before the turn. Which characters are trained is `turns.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer

from burnish.data.places import ChatPlaces, Places, Span, TextPlaces, spans_of
from burnish.data.renderer import FunctionTemplate, load_renderer, renderer_digest
from burnish.data.template import ChatTemplate, Rendering, Template, common_prefix
from burnish.data.turn_places import Chat, Notice, Stops
from burnish.data.turns import (
    ASSISTANT_TURNS,
    Selection,
    Turn,
    closed_last,
    message_weights,
    single_turn,
    trained_turns,
    weighted_turns,
)
from burnish.types import Conversation, Message, Origin, RawText, RowError, TokenRow, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TruncateSide = Literal["right", "left", "turns"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TurnRow:
    """Assistant turn `number` of a chat (its message's index), under exactly the prompt that inference gives it."""

    chat: Conversation
    number: int


Row = Conversation | TurnRow | RawText | TokenRow


@dataclass(frozen=True)
class Encoded:
    """A tokenised row of L tokens.

    `tokens` is int32 [L]; `loss_weights` is float32 [L], the weight with which token i is predicted, so index 0 is 0.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    text: str = ""
    """The rendering; empty for a row that came tokenised."""
    notices: tuple[Notice, ...] = ()
    turns: tuple[Turn, ...] = ()
    """The turns of which something is trained; characters of `text`."""
    _places: Places | None = None
    _kept: np.ndarray | None = None
    """The tokens of the whole row that a cut left, int [L]; None for all of them."""

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every token once, in order."""
        if self._places is None:
            return spans_of([("assistant:content" if w else "template", None) for w in self.loss_weights])
        origins = self._places.origins(self.turns)
        return spans_of(origins if self._kept is None else [origins[i] for i in self._kept])

    @cached_property
    def offsets(self) -> np.ndarray:
        """Characters [start, end) of each token in `text`, int32 [L, 2]."""
        if self._places is None:
            return np.zeros((len(self.tokens), 2), np.int32)
        offsets = self._places.offsets
        return offsets if self._kept is None else offsets[self._kept]

    @cached_property
    def turn_ends(self) -> tuple[int, ...]:
        """Token counts at which a message ends: the row may be cut there without cutting a turn."""
        assert self._kept is None, "a row is cut once"
        return () if self._places is None else self._places.turn_ends()

    @cached_property
    def prefix(self) -> int:
        """Tokens at the start that hold the system turn and the tools."""
        assert self._kept is None, "a row is cut once"
        return 0 if self._places is None else self._places.prefix()


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
    renderer: str | None = None
    """`data.renderer`: what writes chats in place of the chat template."""
    date: str = "2025-01-01"
    """The day that `strftime_now` gives templates, YYYY-MM-DD."""

    @classmethod
    def from_transformers(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        stop_tokens: Iterable[int | str] = (),
        renderer: str | None = None,
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
            renderer=renderer,
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
        if self.renderer is not None:
            state["renderer_code"] = renderer_digest(self.renderer)
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def eos_id(self) -> int | None:
        eos = self.special_tokens.get("eos_token")
        return None if eos is None else self._tokenizer.token_to_id(eos)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of `tokens`, special tokens included."""
        return self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False)

    def encode(self, row: Row, selection: Selection = ASSISTANT_TURNS) -> Encoded:
        """Token ids and loss weights of one row. Raises RowError where it cannot be trained on."""
        encoded = self.encode_batch([row], selection)[0]
        if isinstance(encoded, RowError):
            raise encoded
        return encoded

    def encode_batch(self, rows: Sequence[Row], selection: Selection = ASSISTANT_TURNS) -> list[Encoded | RowError]:
        """`encode` of each row, errors as values. Raises UserError where the tokenizer lacks what such rows need."""
        drafts = [caught(self._draft, row, selection) for row in rows]
        encodings = iter(self._encode_texts([draft for draft in drafts if isinstance(draft, _Draft)]))
        return [caught(self._weigh, d, next(encodings)) if isinstance(d, _Draft) else d for d in drafts]

    def prompt_differences(self, row: Conversation | TurnRow, encoded: Encoded) -> list[tuple[int, str]]:
        """Trained turns whose prompt is not what inference would give for the same history: (message, how)."""
        if isinstance(row, TurnRow):
            return []
        chat = self._chat(row)
        asked = {
            turn: caught(chat.prompt, turn.message)
            for turn in encoded.turns
            if row.messages[turn.message].role == "assistant"
        }
        texts = [prompt for prompt in asked.values() if not isinstance(prompt, RowError)]
        encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        found = []
        for turn, prompt in asked.items():
            before = encoded.text[: turn.text_start]
            if isinstance(prompt, RowError):
                found.append((turn.message, f"inference cannot ask for it: {prompt}"))
                continue
            ids = next(encodings).ids
            if prompt != before:
                at = common_prefix(prompt, before)
                found.append(
                    (turn.message, f"trained under {_excerpt(before, at)}, inference asks under {_excerpt(prompt, at)}")
                )
            elif encoded.tokens[: len(ids)].tolist() != ids:
                found.append((turn.message, f"the prompt's end {prompt[-20:]!r} has other tokens without the turn"))
        return found

    def _draft(self, row: Row, selection: Selection) -> _Draft | Encoded:
        if isinstance(row, TokenRow):
            return _trained(_from_tokens(row))
        if isinstance(row, RawText):
            return _Draft(_encodable(row.prompt + row.completion), completion=len(row.prompt))
        chat = self._chat(row.chat if isinstance(row, TurnRow) else row)
        stops = self._stops(chat.template)
        if isinstance(row, TurnRow):
            weight = message_weights(row.chat.messages, selection.train_on)[row.number]
            rendering, turn = single_turn(chat, row.number, weight, selection, stops)
            return self._chat_draft(chat.until(row.number + 1), rendering, [turn], selection, stops, turn.text_start)
        rendering = chat.trace()
        if selection.train_on == "all":
            turns = weighted_turns(rendering, row.messages)
            return _Draft(_encodable(rendering.text), None, row.messages, rendering, stops, turns, default=1.0)
        turns = trained_turns(chat, rendering, selection, stops)
        return self._chat_draft(chat, rendering, turns, selection, stops)

    def _chat_draft(
        self,
        chat: Chat,
        rendering: Rendering,
        turns: list[Turn],
        selection: Selection,
        stops: Stops,
        prompt: int | None = None,
    ) -> _Draft:
        if selection.open_turns == "close":
            rendering, turns = closed_last(chat, rendering, turns, stops, self.special_tokens.get("eos_token"))
        messages = chat.conversation.messages
        return _Draft(_encodable(rendering.text), None, messages, rendering, stops, turns, prompt=prompt)

    def _encode_texts(self, drafts: Sequence[_Draft]) -> list[Encoding]:
        """The tokens of each text. Those of a prompt are what they are without the turn behind it, as in inference."""
        encodings = self._tokenizer.encode_batch([draft.text for draft in drafts], add_special_tokens=False)
        asked = {i: draft.prompt for i, draft in enumerate(drafts) if draft.prompt is not None}
        prompts = [drafts[i].text[:end] for i, end in asked.items()]
        for i, prompt in zip(asked, self._tokenizer.encode_batch(prompts, add_special_tokens=False), strict=True):
            if encodings[i].ids[: len(prompt)] != prompt.ids:
                turn = self._tokenizer.encode(drafts[i].text[asked[i] :], add_special_tokens=False)
                encodings[i] = Encoding.merge([prompt, turn], growing_offsets=True)
        return encodings

    def _weigh(self, draft: _Draft, encoding: Encoding) -> Encoded:
        return _trained(
            self._weigh_text(draft, encoding) if draft.completion is not None else self._weigh_chat(draft, encoding)
        )

    def _weigh_chat(self, draft: _Draft, encoding: Encoding) -> Encoded:
        assert draft.rendering is not None
        assert draft.stops is not None
        tokens = np.array(encoding.ids, np.int32)
        places = ChatPlaces(encoding, draft.rendering, draft.messages, len(tokens), self._in_order, draft.stops)
        loss_weights = np.full(len(tokens), draft.default, np.float32)
        notices: list[Notice] = []
        straddling = 0
        for turn in draft.turns:
            for start, end in turn.trained:
                first, last = places.first_token(start), places.first_token(end)
                before, behind = places.characters(first), places.characters(last)
                if before[0] < start:
                    straddling += 1
                    first += int(before[0] < turn.start or draft.holds_others(before[0], start, turn.message))
                if behind[0] < end:
                    straddling += 1
                    last += int(not draft.holds_others(end, behind[1], turn.message))
                loss_weights[first:last] = turn.weight
            notices += turn.notices
        if straddling:
            tokens_hold = "1 token holds" if straddling == 1 else f"{straddling} tokens hold"
            notices.append(Notice("straddling", f"{tokens_hold} both trained and other characters, and count as whole"))
        return Encoded(tokens, loss_weights, draft.text, tuple(notices), tuple(draft.turns), places)

    def _weigh_text(self, draft: _Draft, encoding: Encoding) -> Encoded:
        assert draft.completion is not None
        ids, before, after = encoding.ids, *self._frame
        if before and ids[: len(before)] == before:
            before = []
        closing = [] if (ids + after)[-1:] == [self._eos] else [self._eos]
        places = TextPlaces(encoding, draft.completion, len(before), len(after) + len(closing), len(draft.text))
        whole = np.array([*before, *ids, *after, *closing], np.int32)
        loss_weights = np.zeros(len(whole), np.float32)
        loss_weights[places.seam if draft.completion else 0 :] = 1
        return Encoded(whole, loss_weights, draft.text, _places=places)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.backend)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # All it does without special tokens is to trim white space off the offsets.
        tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        return tokenizer

    @cached_property
    def _in_order(self) -> bool:
        """Whether every character has its token and tokens stand in the order of their characters, by what it is made
        of: then a single look-up is as good as all offsets."""
        parts = json.loads(self.backend)
        steps = parts["pre_tokenizer"] or {}
        steps = steps.get("pretokenizers", [steps])
        keeps_all = all(step.get("behavior") != "Removed" for step in steps)
        return parts["normalizer"] is None and keeps_all and steps[-1].get("type") == "ByteLevel"

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
    def _compiled(self) -> dict[str, Template]:
        return {}

    @cached_property
    def _known_stops(self) -> dict[Template, Stops]:
        return {}

    def _chat(self, conversation: Conversation) -> Chat:
        kwargs = {**self.template_kwargs, **conversation.template_kwargs}
        reserved = kwargs.keys() & {"messages", "tools", "add_generation_prompt"}
        if reserved:
            raise RowError(f"chat_template_kwargs sets {min(reserved)}, which is not an argument; remove it")
        return Chat(self._template(conversation), conversation, kwargs)

    def _template(self, chat: Conversation) -> Template:
        """What writes `chat`; of several templates the one transformers takes."""
        if self.renderer is not None:
            if self.renderer not in self._compiled:
                self._compiled[self.renderer] = FunctionTemplate(load_renderer(self.renderer), self.renderer)
            return self._compiled[self.renderer]
        source = self.chat_template
        if isinstance(source, Mapping):
            source = source.get("tool_use" if chat.tools is not None and "tool_use" in source else "default")
        if source is None:
            raise UserError(
                "the tokenizer has no chat template, and chat rows need one; set data.chat_template to a Jinja file"
            )
        if source not in self._compiled:
            self._compiled[source] = ChatTemplate(source, self.special_tokens, date.fromisoformat(self.date))
        return self._compiled[source]

    def _stops(self, template: Template) -> Stops:
        """eos and the declared stop tokens; and the special tokens that the template writes, but for bos and pad."""
        if template not in self._known_stops:
            added = self._tokenizer.get_added_tokens_decoder()
            known = {stop if isinstance(stop, int) else self._tokenizer.token_to_id(stop) for stop in self.stop_tokens}
            # One that must stand alone (`single_word`) is no token behind a turn's text.
            ids = {n for n, token in added.items() if n in self._tokenizer.encode(f"a{token.content}a").ids}
            declared = {added[number].content for number in ids & {self.eos_id, *known}}
            no_stops = {self.special_tokens.get("bos_token"), self.special_tokens.get("pad_token")} - declared
            written = {
                added[number].content
                for number in ids
                if added[number].special
                and added[number].content not in no_stops
                and template.may_write(added[number].content)
            }
            marks = (*sorted((token.content for token in added.values()), key=len, reverse=True), "\n")
            landmarks = re.compile("|".join(map(re.escape, marks)))
            self._known_stops[template] = Stops(frozenset(declared), frozenset(written), landmarks)
        return self._known_stops[template]


class _Draft(NamedTuple):
    """A row as text, before it is tokenised."""

    text: str
    completion: int | None = None
    """Raw text: where the completion starts. The fields below are those of a chat."""
    messages: tuple[Message, ...] = ()
    rendering: Rendering | None = None
    stops: Stops | None = None
    turns: Sequence[Turn] = ()
    default: float = 0.0
    """The weight of what is in no turn."""
    prompt: int | None = None
    """Where the prompt ends that inference tokenises by itself."""

    def holds_others(self, start: int, end: int, message: int) -> bool:
        """Whether another message than `message`, or a tool's schema, wrote any of characters [start, end)."""
        assert self.rendering is not None
        return any(
            run.start < end and run.end > start and (run.origin is None or _is_others(run.origin, message))
            for run in self.rendering.runs
        )


def _is_others(origin: Origin, message: int) -> bool:
    return origin.part != "template" and origin.message != message


def turn_rows(row: Row, selection: Selection) -> list[Row]:
    """A chat as one row for each of its trained assistant turns; another row as it is.

    A chat of which nothing is trained stays whole, so that `encode` says why.
    """
    if not isinstance(row, Conversation):
        return [row]
    weights = caught(message_weights, row.messages, selection.train_on)
    if isinstance(weights, RowError):
        return [row]
    return [
        TurnRow(row, number)
        for number, (message, weight) in enumerate(zip(row.messages, weights, strict=True))
        if message.role == "assistant" and weight
    ] or [row]


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
    return _trained(
        replace(encoded, tokens=encoded.tokens[kept], loss_weights=encoded.loss_weights[kept], _kept=kept),
        f" in the {len(kept)} tokens left after the cut",
    )


def _trained(encoded: Encoded, where: str = "") -> Encoded:
    """`encoded`, whose weights are its own array, with none on the first token, which nothing predicts.

    Raises RowError where none is left.
    """
    encoded.loss_weights[:1] = 0
    if not encoded.loss_weights.any():
        raise RowError(f"no trained token{where}")
    return encoded


def _from_tokens(row: TokenRow) -> Encoded:
    tokens, loss_weights = np.asarray(row.tokens), np.array(row.loss_weights, np.float32)
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


def _excerpt(text: str, at: int) -> str:
    """What stands around character `at`, where one text differs from another."""
    start, end = max(0, at - 20), at + 20
    return repr(("..." if start else "") + text[start:end] + ("..." if end < len(text) else ""))


def caught(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result | RowError:
    """The result, or the RowError as a value: one bad row must not spoil the batch it is tokenised in."""
    try:
        return function(*args, **kwargs)
    except RowError as error:
        return error
