"""Rows one by one as they would be trained, with what is worth a warning in each and in all of them together.

It reads what `parts.py` opened, by the same `Preparer` as training; what it found is `observe.inspection`'s plain data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice, pairwise, repeat

import numpy as np

from burnish.data.chat import Encoded, Row, TurnRow, caught
from burnish.data.pack import first_fit
from burnish.data.prepare import StreamedRow
from burnish.model.vocabulary import TokenizerFacts, check_vocabulary
from burnish.observe.inspection import DataWarning, InspectedRow, Inspection, PackingFill, SourceStatistics
from burnish.parts import NO_LIMIT, InspectedSource, Parts
from burnish.types import Conversation, Message, RawText, RowError, TokenRow

LINKED_ROWS = 10
"""Rows that a gathered warning names, and the page shows although they lie beyond the limit."""
LARGEST_CHUNK = 64
LOW_SHARE, HIGH_SHARE = 0.01, 0.95

MEANINGS = {
    "error": "give no sample",
    "dropped": "are dropped, as data.over_long or data.bad_rows chooses",
    "outside_embedding": "have token ids that are none of the tokenizer's",
    "no_end_of_turn": "train a turn without its end-of-turn token, so that the model may not learn to stop",
    "pad_equals_eos": "train the end of a turn by the token that also pads; burnish masks by length and "
    "trains it, other tools may mask it by id",
    "double_bos": "begin with two BOS tokens",
    "never_trained": "hold added tokens that no row trains",
    "empty_turn": "have an empty turn",
    "duplicate": "give the same tokens and weights as an earlier one",
    "prompt_mismatch": "train a turn under another prompt than inference would give; data.turn_per_sample=true trains "
    "each turn under exactly that, where the template writes the turn as going on from it",
    "dropped_reasoning": "have reasoning that the template does not write",
    "dropped_tool_calls": "have tool calls that the template does not write",
    "low_share": "train less than 1 % of the tokens",
    "high_share": "train more than 95 % of the tokens",
    "open_turn": "have a turn that no end-of-turn token ends; data.open_turns=close ends a last one",
    "straddling": "have tokens that hold both trained and other characters",
    "undeclared_stop": "end a turn with a token that no configuration declares a stop, so that generation may run on",
    "stop_amid_turn": "have a stop amid a turn, where generation ends before the turn does",
    "no_header": "have a turn that begins otherwise than inference asks for one; all of it is trained",
    "generation_block": "differ between the template's generation blocks and what the model would generate",
}
"""What a kind of warning says of several rows, a verb first."""
_SINGULAR = {"have": "has", "are": "is"}


@dataclass
class _Tally:
    """Statistics of one source, as its rows come."""

    source: InspectedSource
    rows: int = 0
    errors: int = 0
    dropped: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    duplicates: int = 0
    roles: dict[str, tuple[int, int]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    def add(self, row: InspectedRow) -> None:
        if row.error is not None:
            self.errors += not row.dropped
            self.dropped += row.dropped
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
            dropped=self.dropped,
        )


class Inspector:
    """Rows as they would be trained, and what is found in all of them together."""

    def __init__(self, parts: Parts, title: str) -> None:
        self.parts = parts
        self._preparer = parts.preparer  # opens all of it: what cannot be used is refused before any row is read
        self.title = title
        self._tallies = [_Tally(source) for source in self.parts.sources]
        self._seen: dict[int, tuple[str, int]] = {}
        self._gathered: dict[str, tuple[int, list[tuple[str, int]]]] = {}
        self._present: dict[int, tuple[int, list[tuple[str, int]]]] = defaultdict(lambda: (0, []))
        self._trained_added: set[int] = set()

    @property
    def num_rows(self) -> int | None:
        """Rows that there are, None where a stream is among the sources."""
        numbers = [source.num_rows for source in self.parts.sources]
        return None if None in numbers else sum(number for number in numbers if number is not None)

    def rows(self, limit: int | None) -> Iterator[InspectedRow]:
        """At most `limit` rows, from the beginning of every source alike; each is ready as soon as it is asked for."""
        for number, quota in enumerate(self.quotas(limit)):
            yield from self.source_rows(number, quota)

    def source_rows(self, number: int, limit: int | None = None) -> Iterator[InspectedRow]:
        """The first `limit` rows of one source, or all."""
        found = self.parts.sources[number].read(number, limit)
        sizes = chain((1, 2, 4, 8, 16, 32), repeat(LARGEST_CHUNK))
        while chunk := list(islice(found, next(sizes))):
            yield from self._inspected(self.parts.sources[number], self._tallies[number], chunk)

    def quotas(self, limit: int | None) -> list[int | None]:
        """How many rows of each source `limit` comes to; None is all."""
        if limit is None:
            return [None] * len(self.parts.sources)
        sizes = [NO_LIMIT if source.num_rows is None else source.num_rows for source in self.parts.sources]
        left, quotas = min(limit, sum(sizes)), [0] * len(sizes)
        while left:
            unread = [number for number, size in enumerate(sizes) if quotas[number] < size]
            for number in unread:
                more = min(max(1, left // len(unread)), sizes[number] - quotas[number], left)
                quotas[number] += more
                left -= more
        return list(quotas)

    def inspection(self, rows: Iterable[InspectedRow]) -> Inspection:
        """What was found in the rows read until now, `rows` of them in detail."""
        statistics = tuple(tally.statistics() for tally in self._tallies)
        lengths = [length for tally in self._tallies if tally.source.split == "train" for length in tally.lengths]
        return Inspection(
            title=self.title,
            facts=self.parts.facts,
            rows=tuple(rows),
            sources=statistics,
            warnings=tuple(self._data_warnings()),
            packing=_packing([n for n in lengths if n <= self._budget], self._budget),
            unit="sample" if self.parts.recipe.data.turn_per_sample else "row",
        )

    @property
    def _budget(self) -> int:
        return self.parts.recipe.batch.tokens_per_micro_batch

    @property
    def linked(self) -> frozenset[tuple[str, int]]:
        """The rows, as (source, index), that a gathered warning names until now."""
        return frozenset(row for _, rows in self._gathered.values() for row in rows)

    def _inspected(
        self, source: InspectedSource, tally: _Tally, chunk: Sequence[StreamedRow]
    ) -> Iterator[InspectedRow]:
        parts = [caught(self._preparer.parts, found) for found in chunk]
        fresh = [part for row in parts if not isinstance(row, RowError) for part in row]
        encoded = iter(self.parts.tokenizer.encode_batch(fresh, self.parts.selection))
        for found, of_row in zip(chunk, parts, strict=True):
            index = source.first + found.index
            tally.rows += 1
            if isinstance(of_row, RowError):
                made = [self._failed(source.name, index, found.where, of_row)]
            else:
                made = [self._row(source.name, index, found.where, part, next(encoded)) for part in of_row]
            for row in made:
                tally.add(row)
                self._gather(row)
                yield row

    def _row(self, source: str, index: int, where: str, part: Row, encoded: Encoded | RowError) -> InspectedRow:
        message = part.number if isinstance(part, TurnRow) else None
        if isinstance(encoded, RowError):
            return self._failed(source, index, where, encoded, message)
        whole = caught(self._preparer.fit, encoded)
        if isinstance(whole, RowError):
            return self._failed(source, index, where, whole, message, self._is_over_long(encoded))
        spans = tuple(_spans(whole))
        roles: dict[str, tuple[int, int]] = {}
        for start, end, origin, weight in spans:
            role = origin.partition(":")[0]
            tokens, trained = roles.get(role, (0, 0))
            roles[role] = tokens + end - start, trained + (end - start if weight else 0)
        is_cut_amid = whole is not encoded and self.parts.recipe.data.truncate_side == "left"
        pieces = self._pieces(whole, encoded.prefix if is_cut_amid else None)
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
            message=message,
        )

    def _failed(
        self,
        source: str,
        index: int,
        where: str,
        error: RowError,
        message: int | None = None,
        is_over_long: bool = False,
    ) -> InspectedRow:
        data = self.parts.recipe.data
        key, chosen = ("over_long", data.over_long) if is_over_long else ("bad_rows", data.bad_rows)
        text = f"{error} (data.{key}=drop)" if chosen == "drop" else str(error)
        nothing = np.empty(0, np.int32), np.empty(0, np.float32)
        return InspectedRow(
            index, source, where, text, *nothing, "", (), (), (), 0, {}, message, dropped=chosen == "drop"
        )

    def _is_over_long(self, encoded: Encoded) -> bool:
        """Whether that is why it does not fit: where rows are cut, and of ids without an embedding, it is not."""
        return self._preparer.over_long != "truncate" and int(encoded.tokens.max()) < self._preparer.vocab_size

    def _pieces(self, encoded: Encoded, seam: int | None) -> tuple[str, ...]:
        """What to show of each token; what a normaliser left out of all tokens goes with the one behind it.

        `seam` is the number of tokens before a cut amid the row.
        """
        text, pieces, done = encoded.text, [], 0
        if not text:
            return decoded_pieces(encoded.tokens.tolist(), self.parts.tokenizer.decode)
        placed = zip(encoded.tokens.tolist(), encoded.offsets.tolist(), strict=True)
        for number, (token, (start, end)) in enumerate(placed):
            if number == seam:
                done = start
            if start == end:
                pieces.append(self.parts.tokenizer.decode([token]))
            else:
                pieces.append(text[done:end])
                done = max(done, end)
        return tuple(pieces)

    # --- warnings ---

    def _warnings(
        self, source: str, index: int, part: Row, encoded: Encoded, whole: Encoded
    ) -> Iterator[tuple[str, str]]:
        tokens, weights = whole.tokens, whole.loss_weights
        facts = self.parts.opened_tokenizer.facts
        trained = tokens[weights > 0]
        open_messages = {text.partition(":")[0] for kind, text in whole.notices if kind == "open_turn"}
        if isinstance(part, TokenRow):
            if self.parts.stops and not np.isin(trained, self.parts.stops).any():
                yield "no_end_of_turn", "no end-of-turn token is trained"
        else:
            for message in _turns_without_end(whole):
                name = f"messages[{message}]" if message is not None else "the text"
                if name not in open_messages:
                    yield "no_end_of_turn", f"{name} is trained without an end-of-turn token"
        if facts.pad is not None and facts.pad in {facts.eos, *self.parts.stops} and facts.pad in trained:
            name = self.parts.token_name(facts.pad)
            yield "pad_equals_eos", f"the end of a turn is trained by {name}, which also pads"
        if facts.bos is not None and len(tokens) > 1 and tokens[0] == tokens[1] == facts.bos:
            yield "double_bos", f"it begins with two BOS tokens, {self.parts.token_name(facts.bos)}"
        largest = int(tokens.max())
        if self.parts.model is None and largest > facts.largest_id:
            yield "outside_embedding", f"token id {largest} is none of the tokenizer's, which go to {facts.largest_id}"
        for number, role in _empty_turns(part):
            yield "empty_turn", f"messages[{number}] ({role}) is empty"
        first = self._seen.setdefault(hash((tokens.tobytes(), weights.tobytes())), (source, index))
        if first != (source, index):
            yield "duplicate", f"it gives the same tokens and weights as {first[0]} {first[1]}"
        if isinstance(part, Conversation):
            for message, difference in self.parts.tokenizer.prompt_differences(part, encoded):
                yield "prompt_mismatch", f"messages[{message}]: {difference}"
        share = len(trained) / len(tokens)
        is_all_meant = self.parts.selection.train_on == "all" or (isinstance(part, RawText) and not part.prompt)
        if share < LOW_SHARE:
            yield "low_share", f"{len(trained)} of {len(tokens)} tokens are trained, less than 1 %"
        elif share > HIGH_SHARE and not is_all_meant:
            yield "high_share", f"{len(trained)} of {len(tokens)} tokens are trained, more than 95 %"
        yield from whole.notices

    def _gather(self, row: InspectedRow) -> None:
        kinds = {kind for kind, _ in row.warnings}
        if row.error is not None:
            kinds = {"dropped" if row.dropped else "error"}
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
    def _is_added(self) -> np.ndarray:
        found = np.zeros(self.parts.opened_tokenizer.facts.largest_id + 1, bool)
        found[list(self.parts.opened_tokenizer.added_tokens)] = True
        return found

    def _data_warnings(self) -> Iterator[DataWarning]:
        """Errors first, then what is the tokenizer's, then what rows have in common."""
        gathered = dict(self._gathered)
        for kind in ("error", "dropped"):
            if kind in gathered:
                yield _data_warning(kind, *gathered.pop(kind))
        yield from self._vocabulary_warnings()
        never = {number: found for number, found in self._present.items() if number not in self._trained_added}
        if never:
            names = ", ".join(self.parts.token_name(number) for number in sorted(never))
            rows = list(dict.fromkeys(row for _, rows in never.values() for row in rows))[:LINKED_ROWS]
            count = max(count for count, _ in never.values())
            text = f"{_meaning('never_trained', count)}: {names}"
            yield DataWarning("never_trained", text, count, tuple(rows))
        for kind in [*(kind for kind in MEANINGS if kind in gathered), *sorted(gathered.keys() - MEANINGS.keys())]:
            yield _data_warning(kind, *gathered[kind])

    def _vocabulary_warnings(self) -> Iterator[DataWarning]:
        if self.parts.model is None or self.parts.model.num_embeddings is None:
            return
        facts, rows = self.parts.opened_tokenizer.facts, self.parts.model.num_embeddings
        outside = [token for token in sorted(self.parts.opened_tokenizer.added_tokens) if token >= rows]
        if outside:
            names = ", ".join(self.parts.token_name(token) for token in outside[:LINKED_ROWS])
            more = ", ..." if len(outside) > LINKED_ROWS else ""
            text = f"added tokens lie outside the model's embedding of {rows} rows: {names}{more}"
            yield DataWarning("outside_embedding", text, 0, ())
        # That pad is eos is said of the rows where it matters.
        pad = None if facts.pad == facts.eos else facts.pad
        known = TokenizerFacts(facts.largest_id, facts.bos, facts.eos, pad, facts.name)
        findings = check_vocabulary(known, self.parts.model.config, self.parts.model.generation, rows)
        for text in (*findings.errors, *findings.warnings):
            yield DataWarning("vocabulary", text, 0, ())


def _data_warning(kind: str, count: int, rows: Sequence[tuple[str, int]]) -> DataWarning:
    return DataWarning(kind, _meaning(kind, count), count, tuple(rows))


def _meaning(kind: str, count: int) -> str:
    meaning = MEANINGS.get(kind, f"have the notice {kind}")
    verb, _, rest = meaning.partition(" ")
    return f"{_SINGULAR.get(verb, f'{verb}s')} {rest}" if count == 1 else meaning


def _spans(encoded: Encoded) -> Iterator[tuple[int, int, str, float]]:
    """The spans, each of one weight."""
    weights = encoded.loss_weights
    changes = (np.flatnonzero(np.diff(weights)) + 1).tolist()
    for span in encoded.spans:
        cuts = [span.start, *(c for c in changes if span.start < c < span.end), span.end]
        for start, end in pairwise(cuts):
            yield start, end, span.origin, float(str(weights[start]))


def _turns_without_end(encoded: Encoded) -> list[int | None]:
    """Messages of which an assistant's text is trained with no trained end-of-turn token behind it.

    That token may stand in no message, or in the next one's header, so that it is known by its place alone.
    """
    found: list[int | None] = []
    for start, end, origin, message in encoded.spans:
        if not encoded.loss_weights[start:end].any():
            continue
        if origin == "template:end" and found:
            found.pop()
        elif origin.startswith("assistant:") and message not in found[-1:]:
            found.append(message)
    return found


def _empty_turns(part: Row) -> list[tuple[int, str]]:
    """(message, role) of what a user or an assistant left empty."""
    if isinstance(part, TurnRow):
        messages = part.chat.messages[: part.number + 1]
    else:
        messages = part.messages if isinstance(part, Conversation) else ()
    return [(n, m.role) for n, m in enumerate(messages) if m.role in ("user", "assistant") and _is_empty(m)]


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
