"""Rows to samples, in this process and in workers, and what becomes of the workers."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.config import SourceConfig
from burnish.data.chat import Encoded, Row, TextTokenizer
from burnish.data.conversation import Format
from burnish.data.prepare import (
    Prepared,
    PreparedRow,
    PreparePool,
    Preparer,
    Rejected,
    SourceRows,
    StreamedRow,
    count_rows,
    counted,
    counts_text,
)
from burnish.data.turn_places import Notice
from burnish.data.turns import ASSISTANT_TURNS, Selection
from burnish.types import RowError, Sample, Status, UserError

HEAVY = {"torch", "transformers", "datasets"}


def talk(answer: str, question: str = "what?", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


@dataclass(frozen=True)
class ListRows:
    """Rows in memory; a row that is text raises what the text says."""

    rows: tuple[dict[str, Any] | str, ...]
    fingerprint: str = "rows"

    def __getitem__(self, row: int) -> dict[str, Any]:
        found = self.rows[row]
        if found == "modules":
            return talk("x", metadata={"heavy": sorted(HEAVY & set(sys.modules))})
        if isinstance(found, str):
            raise RowError("broken JSON") if found == "bad" else ZeroDivisionError(found)
        return found

    def where(self, row: int) -> str:
        return f"rows.jsonl:{row + 1}"


@pytest.fixture(scope="module")
def preparer(chatml_tokenizer: Path) -> Preparer:
    from transformers import AutoTokenizer  # not at the top: workers import this module

    rows = [
        talk("fine", metadata={"n": 1}, level=7),
        talk("x" * 200),
        "bad",
        {"messages": [{"role": "user", "content": "a"}]},
    ]
    rows += [talk(f"number {n}") for n in range(40)]
    config = SourceConfig(path="rows.jsonl", label_key="level")
    source = SourceRows("rows", ListRows(tuple(rows)), Format.MESSAGES, config)
    limits = {"data.max_length": 64, "the model's maximum": 512}
    tokenizer = TextTokenizer.from_transformers(AutoTokenizer.from_pretrained(chatml_tokenizer))
    return Preparer((source,), tokenizer, limits, vocab_size=512)


class Noticing(TextTokenizer):
    """A tokenizer that finds something to say of rows that speak of a number."""

    def encode_batch(self, rows: Sequence[Row], selection: Selection = ASSISTANT_TURNS) -> list[Encoded | RowError]:
        said = (Notice("number", "one"), Notice("number", "another"), Notice("even", "it is even"))
        return [
            replace(encoded, notices=said) if isinstance(encoded, Encoded) and "number" in encoded.text else encoded
            for encoded in super().encode_batch(rows, selection)
        ]


def with_rows(preparer: Preparer, *rows: dict[str, Any] | str) -> Preparer:
    return replace(preparer, sources=(replace(preparer.sources[0], rows=ListRows(rows)),))


def as_values(rows: list[PreparedRow]) -> list[list[Any]]:
    def value(p: Prepared) -> Any:
        if isinstance(p, Rejected):
            return p
        arrays = p.tokens.tolist(), p.loss_weights.tolist()
        return (*arrays, p.source, p.index, p.status, p.metadata, p.label, p.turn, p.notices)

    return [[value(one) for one in row] for row in rows]


def test_a_row_becomes_a_sample_or_a_reason_with_its_place(preparer: Preparer) -> None:
    (good,), (long,), (broken,), (silent,) = preparer.prepare([(0, row) for row in range(4)])
    assert isinstance(good, Sample)
    assert (good.source, good.index, good.metadata, good.label) == ("rows", 0, {"n": 1}, 7)
    assert good.status is Status.COMPLETE
    assert preparer.tokenizer.decode(good.tokens[good.loss_weights > 0]) == "fine<|im_end|>"
    assert isinstance(long, Rejected)
    assert long.kind == "over_long"
    assert "rows.jsonl:2: " in long.message
    assert "more than data.max_length=64" in long.message
    assert broken == Rejected("bad", "rows", 2, "rows.jsonl:3: broken JSON")
    assert isinstance(silent, Rejected)
    assert silent.kind == "bad"
    assert "rows.jsonl:4: the conversation has no assistant turn" in silent.message


def test_over_long_names_the_least_limit_or_cuts(preparer: Preparer) -> None:
    limits = {"data.max_length": 200, "the model's maximum": 30, "batch.tokens_per_micro_batch": 40}
    ((long,),) = replace(preparer, limits=limits).prepare([(0, 1)])
    assert isinstance(long, Rejected)
    assert "more than the model's maximum=30" in long.message
    ((cut,),) = replace(preparer, limits=limits, over_long="truncate").prepare([(0, 1)])
    assert isinstance(cut, Sample)
    assert len(cut.tokens) == 30
    assert cut.status is Status.TRUNCATED
    ((nothing,),) = replace(preparer, limits={"m": 5}, over_long="truncate").prepare([(0, 1)])
    assert isinstance(nothing, Rejected)
    assert nothing.kind == "bad"
    assert "no trained token" in nothing.message


def test_ids_outside_the_embedding_are_bad(preparer: Preparer) -> None:
    ((outside,),) = replace(preparer, vocab_size=50).prepare([(0, 0)])
    assert isinstance(outside, Rejected)
    assert "outside the model's embedding of 50 rows" in outside.message


def test_rows_of_a_stream_come_along(preparer: Preparer) -> None:
    stream = replace(preparer, sources=(replace(preparer.sources[0], rows=None),))
    items = [StreamedRow(0, 9, "s:9", talk("fine")), StreamedRow(0, 10, "s:10", RowError("torn"))]
    (sample,), (torn,) = stream.prepare(items)
    assert isinstance(sample, Sample)
    assert sample.id == "rows:9"
    assert torn == Rejected("bad", "rows", 10, "s:10: torn")


def test_a_fingerprint_follows_rows_options_and_tokenizer(preparer: Preparer) -> None:
    variants = [
        preparer,
        replace(preparer, selection=Selection(train_on="last")),
        replace(preparer, selection=Selection(reasoning=False)),
        replace(preparer, turn_per_sample=True),
        replace(preparer, over_long="drop"),
        replace(preparer, limits={"m": 3}),
        replace(preparer, tokenizer=replace(preparer.tokenizer, chat_template="x")),
        replace(preparer, sources=(replace(preparer.sources[0], rows=ListRows((), "other")),)),
    ]
    assert len({variant.fingerprint(0) for variant in variants}) == len(variants)
    assert replace(preparer).fingerprint(0) == preparer.fingerprint(0)


def turns(*messages: tuple[str, float | None]) -> dict[str, Any]:
    """A chat of these answers, each with its weight."""
    asked = ({"role": "user", "content": f"question {number}"} for number in range(len(messages)))
    answers = ({"role": "assistant", "content": text, "weight": weight} for text, weight in messages)
    return {"messages": [message for pair in zip(asked, answers, strict=True) for message in pair]}


def test_each_trained_turn_is_a_sample_with_its_own_weight_and_policies(preparer: Preparer) -> None:
    chat = turns(("one", None), ("two", 0), ("three", 0.5), ("x" * 200, 1), ("five", None))
    chat |= {"metadata": {"n": 1}, "level": 7}
    by_turn = replace(with_rows(preparer, chat), limits={"m": 100}, turn_per_sample=True)
    (row,) = by_turn.prepare([(0, 0)])
    one, three, long, five = row
    assert isinstance(one, Sample)
    assert isinstance(three, Sample)
    assert [one.id, three.id] == ["rows:0:1", "rows:0:5"]
    assert [(s.index, s.turn, s.metadata, s.label) for s in (one, three)] == [(0, 1, {"n": 1}, 7), (0, 5, {"n": 1}, 7)]
    trained = [(preparer.tokenizer.decode(s.tokens[s.loss_weights > 0]), s.loss_weights.max()) for s in (one, three)]
    assert trained == [("one<|im_end|>", 1.0), ("three<|im_end|>", 0.5)]
    assert "three" not in preparer.tokenizer.decode(one.tokens), "a turn does not see what comes later"
    assert isinstance(long, Rejected)
    assert (long.kind, long.index) == ("over_long", 0)
    assert long.message.startswith("rows.jsonl:1, messages[7]: ")
    assert isinstance(five, Rejected), "its history is too long"
    cut = replace(by_turn, over_long="truncate", truncate_side="left").prepare([(0, 0)])[0]
    assert [one.status for one in cut if isinstance(one, Sample)] == [*["complete"] * 2, *["truncated"] * 2]


def test_rows_without_turns_are_one_sample_or_one_reason(preparer: Preparer) -> None:
    rows = [turns(("one", 0.0)), talk("fine"), {"messages": [{"role": "user", "content": "a"}]}, "bad"]
    silent, one, no_turn, broken = replace(with_rows(preparer, *rows), turn_per_sample=True).prepare(
        [(0, row) for row in range(4)]
    )
    assert [len(row) for row in (silent, one, no_turn, broken)] == [1, 1, 1, 1]
    assert isinstance(one[0], Sample)
    reasons = [row[0].message for row in (silent, no_turn, broken) if isinstance(row[0], Rejected)]
    assert [reason.partition(": ")[0] for reason in reasons] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4"]
    source = replace(preparer.sources[0], rows=ListRows(({"text": "the fox"},)), format=Format.TEXT)
    ((text,),) = replace(preparer, sources=(source,), turn_per_sample=True).prepare([(0, 0)])
    assert isinstance(text, Sample)
    assert text.id == "rows:0"


def test_kinds_of_notices_come_with_the_sample_each_once(preparer: Preparer) -> None:
    noticing = Noticing(**preparer.tokenizer.__getstate__())
    (plain,), (said,) = replace(preparer, tokenizer=noticing).prepare([(0, 0), (0, 4)])
    assert isinstance(plain, Sample)
    assert isinstance(said, Sample)
    assert (plain.notices, said.notices) == ((), ("number", "even"))


def test_counts_tell_rows_from_samples_where_they_differ() -> None:
    kept = Sample(np.empty(0, np.int32), np.empty(0, np.float32), "rows", notices=("open_turn",))
    row: list[Prepared] = [kept, Rejected("over_long", "rows", 0, "too long"), replace(kept, status=Status.TRUNCATED)]
    counts = Counter(what for offset, one in enumerate(row) for what in counted(one, offset))
    assert counts == {"kept": 2, "cut": 1, "over_long": 1, "further": 2, "open_turn": 2}
    assert count_rows(counts) == {"rows": 1, "samples": 3, "kept": 2, "open_turn": 2, "over_long": 1, "cut": 1}
    assert count_rows(Counter(counted(kept, 0))) == {"kept": 1, "open_turn": 1}
    assert counts_text({"kept": 1200, "over_long": 3}) == "1,200 kept, 3 over-long"


# --- processes ---


@pytest.fixture(scope="module")
def pool(preparer: Preparer) -> Iterator[PreparePool]:
    with PreparePool(preparer, 2) as pool:
        yield pool


def test_workers_give_what_this_process_gives_in_order(preparer: Preparer, pool: PreparePool) -> None:
    chunks = [[(0, row) for row in range(start, min(start + 3, 44))] for start in range(0, 44, 3)]
    here = list(PreparePool(preparer, 0).map([*chunks, []]))
    there = list(pool.map([*chunks, []]))
    assert [as_values(results) for results in there] == [as_values(results) for results in here]
    ((sample,), *_), *_ = there
    assert isinstance(sample, Sample)
    assert (sample.tokens.dtype, sample.loss_weights.dtype) == (np.int32, np.float32)


def test_workers_give_several_samples_of_a_row_and_their_notices(preparer: Preparer) -> None:
    rows = [turns(("one", None), ("x" * 200, 1)), "bad", turns(("number", 1), ("number", 0.5))]
    noticing = replace(with_rows(preparer, *rows), tokenizer=Noticing(**preparer.tokenizer.__getstate__()))
    by_turn = replace(noticing, turn_per_sample=True)
    items = [(0, 0), (0, 1), (0, 2)]
    with PreparePool(by_turn, 1) as pool:
        (there,) = pool.map([items])
    assert as_values(there) == as_values(by_turn.prepare(items))
    assert [len(row) for row in there] == [2, 1, 2]
    assert all(isinstance(one, Sample) and one.notices == ("number", "even") for one in there[2])


def test_few_chunks_are_under_way(pool: PreparePool) -> None:
    taken = itertools.count()
    results = pool.map([(0, 5)] for _ in taken)  # endless
    for _ in range(3):
        next(results)
    results.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert next(taken) <= 3 + 2 * len(pool.pids)


def test_workers_import_nothing_heavy_and_no_ctrl_c_reaches_them(preparer: Preparer) -> None:
    with PreparePool(with_rows(preparer, "modules"), 1) as pool:
        (((sample,),),) = pool.map([[(0, 0)]])
        assert os.getpgid(pool.pids[0]) != os.getpgrp()
    assert isinstance(sample, Sample)
    assert sample.metadata == {"heavy": []}


def test_what_goes_wrong_in_a_worker_reaches_the_caller(preparer: Preparer) -> None:
    no_template = replace(
        with_rows(preparer, "boom", talk("x")), tokenizer=replace(preparer.tokenizer, chat_template=None)
    )
    with PreparePool(no_template, 1) as pool:
        with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError: boom"):
            list(pool.map([[(0, 0)]]))
        with pytest.raises(UserError, match="no chat template"):
            list(pool.map([[(0, 1)]]))
        os.kill(pool.pids[0], signal.SIGKILL)
        with pytest.raises(UserError, match=r"ended with status -9.*data\.workers"):
            list(pool.map([[(0, 1)]]))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_running, pids))


def test_closing_leaves_no_process(preparer: Preparer) -> None:
    pool = PreparePool(preparer, 2)
    pids = pool.pids
    assert all(map(is_running, pids))
    pool.close()
    pool.close()
    assert not any(map(is_running, pids))


# No `if __name__ == "__main__"`: workers must not run the user's script again.
SCRIPT = """
import pathlib, pickle, sys, time
from burnish.config import SourceConfig
from burnish.data.conversation import Format
from burnish.data.prepare import PreparePool, Preparer, SourceRows, StreamedRow
print("started", flush=True)
source = SourceRows("s", None, Format.TEXT, SourceConfig(path="s"))
tokenizer = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
pool = PreparePool(Preparer((source,), tokenizer, {"m": 100}, 512), 2)
print(len(list(pool.map([[StreamedRow(0, 0, "s:0", {"text": "the fox"})]] * 4))), *pool.pids, flush=True)
if sys.argv[2] == "raise":
    raise SystemExit(7)
time.sleep(60)
"""


@pytest.mark.parametrize("end", ["kill", "raise"])
def test_no_worker_outlives_its_parent(preparer: Preparer, tmp_path: Path, end: str) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "tokenizer").write_bytes(pickle.dumps(preparer.tokenizer))
    command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path / "tokenizer"), end]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    num_chunks, *pids = map(int, parent.stdout.readline().split())
    assert (num_chunks, len(pids)) == (4, 2)
    if end == "kill":
        parent.kill()
    status = parent.wait()
    assert status == (-signal.SIGKILL if end == "kill" else 7)
    assert wait_until_gone(pids)
