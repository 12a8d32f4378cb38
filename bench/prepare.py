"""Rows prepared a second (read, normalised, rendered, tokenised, weighed) against what others need for the same rows.

    python bench/prepare.py [--rows 20000] [--repeat 5] [--quick] [--data glaive gsm8k] [--tokenizers gpt2-chatml ...]
    python bench/prepare.py --profile         where one worker's time goes
    python bench/prepare.py --first-batch     from a process's start to its first batch, on 350,000 rows

The rows are cut into `--repeat` slices, and every way takes each slice in turn, so that a slow spell of a shared
machine meets all of them; what is printed are medians of the slices and of their ratios. Nothing is written but rows
in a temporary folder, and no model runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "true"  # the Rust tokenizer alone; our workers take a core each
os.environ["RAYON_NUM_THREADS"] = "2"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from tokenizers import Tokenizer

from burnish.config import DataConfig, SourceConfig
from burnish.data.chat import TextTokenizer
from burnish.data.conversation import to_conversation
from burnish.data.corpus import Corpus, open_corpus
from burnish.data.feed import Feed
from burnish.data.prepare import PreparePool, Preparer, SourceRows, _answer, _Packed
from burnish.data.rows import Rows
from burnish.data.source import CHUNK, BatchSize
from burnish.data.tokenizer_files import read_tokenizer
from burnish.types import Conversation, Message, Sample

WORKERS = 2
LIMITS = {"data.max_length": 1 << 20}
SHARED = Path(os.environ.get("BURNISH_SHARED", Path(__file__).resolve().parents[2] / "shared"))
KEYS: dict[str, dict[str, Any]] = {
    "glaive": {},
    "gsm8k": {"prompt_key": "question", "response_key": "answer"},
}
TOKENIZERS = ("gpt2-chatml", "minimind")

Chat = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]
"""Messages and tools as transformers takes them."""


# --- rows ---


def write_rows(folder: Path, data: str, num_rows: int, kind: str = "jsonl") -> Path:
    """A file of `num_rows` rows: those of the shared data set, over and over."""
    if data == "glaive":
        rows = json.loads((SHARED / "data" / "glaive_toolcall_en.json").read_text(encoding="utf-8"))
    else:
        lines = (SHARED / "data" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = folder / f"{data}.{kind}"
    head, seam, tail = ("[\n", ",\n", "\n]\n") if kind == "json" else ("", "\n", "\n")
    with path.open("w", encoding="utf-8") as file:
        file.write(head)
        for number in range(num_rows):
            file.write((seam if number else "") + texts[number % len(texts)])
        file.write(tail)
    return path


def num_rows_of(data: str, num_rows: int) -> int:
    """GSM8K is taken as it is, and shorter only where fewer rows are asked for."""
    return min(num_rows, 7_473) if data == "gsm8k" else num_rows


def open_rows(path: Path, data: str) -> Corpus:
    return open_corpus(DataConfig(train=(SourceConfig(path=str(path), **KEYS[data]),)), seed=0)


def preparer_of(corpus: Corpus, tokenizer: str) -> Preparer:
    """The preparer that a recipe with this source and tokenizer would have."""
    (source,) = corpus.train
    assert isinstance(source.rows, Rows)
    files = read_tokenizer(SHARED / "tokenizers" / tokenizer)
    assert files is not None, f"{tokenizer} is of a class that only transformers reads"
    return Preparer(
        (SourceRows(source.name, source.rows, source.format, source.config),),
        TextTokenizer(files.backend, files.special_tokens, files.chat_template),
        LIMITS,
        vocab_size=1 << 20,
    )


def load_transformers(folder: Path) -> Any:
    """The folder's tokenizer as transformers loads it."""
    from transformers import AutoTokenizer  # here, because it brings torch, which no worker and no first batch needs

    return AutoTokenizer.from_pretrained(folder)


def chats_of(preparer: Preparer, numbers: Sequence[int]) -> list[Chat]:
    """The rows as transformers takes them."""
    (source,) = preparer.sources
    assert source.rows is not None
    chats = [to_conversation(source.rows[number], source.format, source.config) for number in numbers]
    return [
        ([_shaped(message) for message in chat.messages], list(chat.tools) if chat.tools else None)
        for chat in chats
        if isinstance(chat, Conversation)
    ]


def _shaped(message: Message) -> dict[str, Any]:
    shaped: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        shaped["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return shaped


def chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


# --- the ways ---


def burnish(pool: PreparePool, numbers: Sequence[int]) -> None:
    for _ in pool.map([(0, number) for number in chunk] for chunk in chunks(numbers)):
        pass


def rust_alone(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    for batch in chunks(texts):
        tokenizer.encode_batch(list(batch), add_special_tokens=False)


class PerMessage:
    """slime's way for Qwen3 (`--loss-mask-type qwen3`), from its description: each message rendered and tokenised alone
    beside a user message whose ids are cut off again, tool results that follow each other together.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_transformers(folder)
        self._beside = {"role": "user", "content": "x"}
        self._cut = len(self._ids([self._beside]))
        self._header = len(self._ids([self._beside], add_generation_prompt=True)) - self._cut

    def __call__(self, chat: Chat) -> tuple[list[int], list[int]]:
        messages, tools = chat
        tokens: list[int] = []
        mask: list[int] = []
        for group in self._groups(messages):
            if not tokens:
                ids = self._ids([*group, self._beside], tools=tools)[: -self._cut]
            else:
                ids = self._ids([self._beside, *group])[self._cut :]
            header = self._header if group[0]["role"] == "assistant" else len(ids)
            tokens += ids
            mask += [0] * header + [1] * (len(ids) - header)
        return tokens, mask

    def _groups(self, messages: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        for is_tool, group in groupby(messages, lambda message: message["role"] == "tool"):
            if is_tool:
                yield list(group)
            else:
                yield from ([message] for message in group)

    def _ids(self, messages: list[dict[str, Any]], **arguments: Any) -> list[int]:
        return self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)


class PerMessageProcesses:
    """The same in `WORKERS` processes, whose ids and masks come back as arrays."""

    def __init__(self, folder: Path) -> None:
        self._pool = multiprocessing.get_context("spawn").Pool(WORKERS, _start, (folder,))

    def __call__(self, chats: Sequence[Chat]) -> None:
        for _ in self._pool.imap(_per_message, chunks(chats)):
            pass

    def close(self) -> None:
        self._pool.terminate()
        self._pool.join()


_way: PerMessage | None = None
"""What a process of `PerMessageProcesses` works with."""


def _start(folder: Path) -> None:
    global _way
    _way = PerMessage(folder)


def _per_message(chats: Sequence[Chat]) -> list[tuple[np.ndarray, np.ndarray]]:
    assert _way is not None
    return [(np.array(ids, np.int32), np.array(mask, np.float32)) for ids, mask in map(_way, chats)]


def trl_way(folder: Path) -> Callable[[Sequence[Chat]], None] | None:
    """TRL's preparation with `assistant_only_loss`, one process: one call of a template with blocks a row.

    TRL takes neither tokenizer's own template, so it is TRL's for Qwen3. None where trl is not installed.
    """
    try:
        from trl.chat_template_utils import (  # pyright: ignore[reportMissingImports]
            qwen3_training_chat_template as template,
        )
    except ImportError:
        return None
    tokenizer = load_transformers(folder)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "chat_template": template}

    def prepare(chats: Sequence[Chat]) -> None:
        for messages, tools in chats:
            tokenizer.apply_chat_template(messages, tools=tools, **options)

    return prepare


# --- throughput ---


@dataclass
class Ways:
    """What each way took for each slice, rows a second."""

    rates: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, num_rows: int, run: Callable[[], Any]) -> None:
        start = time.perf_counter()
        run()
        self.rates.setdefault(name, []).append(num_rows / (time.perf_counter() - start))

    def rate(self, name: str) -> str:
        return f"{statistics.median(self.rates[name]):,.0f}" if name in self.rates else "-"

    def ratio(self, first: str, second: str) -> str:
        if second not in self.rates:
            return "-"
        pairs = zip(self.rates[first], self.rates[second], strict=True)
        return f"{statistics.median(one / other for one, other in pairs):.2f}"


def measure(path: Path, data: str, tokenizer: str, repeat: int) -> tuple[Ways, float]:
    """Every way's rate by slice, and the mean tokens of a row."""
    preparer = preparer_of(open_rows(path, data), tokenizer)
    (source,) = preparer.sources
    assert isinstance(source.rows, Rows)
    numbers = np.random.default_rng(0).permutation(len(source.rows)).tolist()
    folder = SHARED / "tokenizers" / tokenizer
    render = partial(load_transformers(folder).apply_chat_template, tokenize=False)
    rust = Tokenizer.from_str(preparer.tokenizer.backend)
    one, two, trl = PerMessage(folder), PerMessageProcesses(folder), trl_way(folder)
    ways = Ways()
    num_tokens = 0
    with PreparePool(preparer, WORKERS) as pool:
        num_tokens = _warm_up(pool, rust, preparer, render, numbers[: 4 * CHUNK])
        two(chats_of(preparer, numbers[: 4 * CHUNK]))
        for slice_ in np.array_split(numbers, repeat):
            rows = slice_.tolist()
            chats = chats_of(preparer, rows)
            texts = [render(messages, tools=tools) for messages, tools in chats]
            ways.time("burnish", len(rows), partial(burnish, pool, rows))
            ways.time("rust", len(rows), partial(rust_alone, rust, texts))
            ways.time("one", len(rows), lambda chats=chats: [one(chat) for chat in chats])
            ways.time("two", len(rows), partial(two, chats))
            ways.time("render", len(rows), lambda chats=chats: [render(m, tools=t) for m, t in chats])
            if trl is not None:
                ways.time("trl", len(rows), partial(trl, chats))
    two.close()
    return ways, num_tokens / (4 * CHUNK)


def _warm_up(pool: PreparePool, rust: Tokenizer, preparer: Preparer, render: Any, numbers: list[int]) -> int:
    """Start both workers, and hold their ids against the plain way's. Returns the tokens of these rows."""
    prepared = [row for chunk in pool.map([(0, n) for n in chunk] for chunk in chunks(numbers)) for row in chunk]
    num_tokens = 0
    for row, (messages, tools) in zip(prepared, chats_of(preparer, numbers), strict=True):
        (sample,) = row if isinstance(row, list) else (row,)
        ids = rust.encode(render(messages, tools=tools), add_special_tokens=False).ids
        assert isinstance(sample, Sample), sample
        assert sample.tokens.tolist() == ids, f"row {sample.index} has other ids than its template's text"
        num_tokens += len(ids)
    return num_tokens


def throughput(options: argparse.Namespace) -> None:
    print(
        "| data | tokenizer | tokens a row | burnish, rows/s | Rust alone | burnish / Rust alone | per message "
        "| burnish / per message | per message, 2 processes | burnish / that | TRL | burnish / TRL | rendering alone |"
    )
    print("|---" * 13 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for data in options.data:
            path = write_rows(Path(folder), data, num_rows_of(data, options.rows))
            for tokenizer in options.tokenizers:
                ways, num_tokens = measure(path, data, tokenizer, options.repeat)
                cells = [data, tokenizer, f"{num_tokens:.0f}", ways.rate("burnish")]
                for other in ("rust", "one", "two", "trl"):
                    cells += [ways.rate(other), ways.ratio("burnish", other)]
                print("|", " | ".join([*cells, ways.rate("render")]), "|", flush=True)


# --- profile ---


class Watched:
    """A Rust tokenizer that writes down when its batches ran."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.runs: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch(self, *arguments: Any, **more: Any) -> Any:
        start = time.process_time()
        encodings = self._tokenizer.encode_batch(*arguments, **more)
        self.runs.append((start, time.process_time()))
        return encodings


STAGES = ("read", "normalise", "render and trace", "Rust", "ids and weights", "samples", "transfer", "receive (parent)")


def profile_chunk(preparer: Preparer, watched: Watched, numbers: Sequence[int]) -> dict[str, float]:
    """CPU seconds of each stage of one chunk, as a worker goes through it."""
    (source,) = preparer.sources
    assert source.rows is not None
    clock = time.process_time  # nothing here waits, and what else runs on the machine does not count
    started = clock()
    rows = [(source.rows.where(number), source.rows[number])[1] for number in numbers]
    read = clock()
    chats: list[Any] = [to_conversation(row, source.format, source.config) for row in rows]
    normalised = clock()
    watched.runs.clear()
    preparer.tokenizer.encode_batch(chats)
    encoded = clock()
    rust = sum(end - start for start, end in watched.runs)
    before = watched.runs[0][0] - normalised
    results = preparer.prepare([(0, number) for number in numbers])
    prepared = clock()
    sent = pickle.dumps(_answer(lambda _: results, []))
    transferred = clock()
    reply = pickle.loads(sent)
    assert isinstance(reply, _Packed), reply
    reply.unpack()
    received = clock()
    seconds = (
        read - started,
        normalised - read,
        before,
        rust,
        encoded - normalised - before - rust,
        (prepared - encoded) - (encoded - started),
        transferred - prepared,
        received - transferred,
    )
    return dict(zip(STAGES, seconds, strict=True))


def profile(options: argparse.Namespace) -> None:
    """The median chunk's microseconds of CPU a row by stage, in one process with one thread of Rust."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print("| data | tokenizer |", " | ".join(STAGES), "| sum in the worker |")
    print("|---" * (len(STAGES) + 3) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for data in options.data:
            path = write_rows(Path(folder), data, num_rows_of(data, options.rows))
            for name in options.tokenizers:
                preparer = preparer_of(open_rows(path, data), name)
                tokenizer = replace(preparer.tokenizer)
                watched = Watched(tokenizer._tokenizer)
                tokenizer.__dict__["_tokenizer"] = watched
                preparer = replace(preparer, tokenizer=tokenizer)
                numbers = np.random.default_rng(0).permutation(num_rows_of(data, options.rows)).tolist()
                found = [profile_chunk(preparer, watched, chunk) for chunk in chunks(numbers)][1:]
                medians = [statistics.median(chunk[stage] for chunk in found) / CHUNK * 1e6 for stage in STAGES]
                cells = [f"{value:.0f}" for value in (*medians, sum(medians[:-1]))]
                print(f"| {data} | {name} |", " | ".join(cells), "|", flush=True)


# --- the first batch ---


def first_batch(path: str, data: str, tokenizer: str) -> dict[str, float]:
    """Seconds until the corpus was open and from there to the first batch, and the CPU time until it was open."""
    started = time.perf_counter()
    corpus = open_rows(Path(path), data)
    opened = time.perf_counter()
    opening = time.process_time()
    with Feed(corpus, preparer_of(corpus, tokenizer), WORKERS, frozenset({"bad", "over_long"})) as feed:
        batch = feed.training(corpus.order(seed=0, shuffle=True), BatchSize("samples", 128)).next()
        ready = time.perf_counter()
    assert len(batch) == 128
    return {"open": opened - started, "batch": ready - opened, "cpu": opening}


def first_batches(options: argparse.Namespace) -> None:
    """A table of medians; the whole is what the parent sees, from the start of Python to the first batch."""
    print(
        "| data | file | size, MB | whole, s | Python and imports | open and index | workers and 128 samples "
        "| CPU until open |"
    )
    print("|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for data in options.data:
            for kind in ("jsonl", "json"):
                path = write_rows(Path(folder), data, options.first_batch, kind)
                runs = [_in_a_process(str(path), data, options.tokenizers[0]) for _ in range(options.repeat)]
                medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                cells = [f"{medians[name]:.2f}" for name in ("whole", "imports", "open", "batch", "cpu")]
                size = path.stat().st_size / 1e6
                print(f"| {data} | .{kind} | {size:,.0f} |", " | ".join(cells), "|", flush=True)
                path.unlink()


def _in_a_process(*point: str) -> dict[str, float]:
    start = time.perf_counter()
    command = [sys.executable, __file__, "--point", json.dumps(point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        whole = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"the measurement ended with status {process.returncode}")
    seconds = json.loads(line)
    return {**seconds, "whole": whole, "imports": whole - seconds["open"] - seconds["batch"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of Glaive; GSM8K has 7,473 at most")
    parser.add_argument("--repeat", type=int, default=5, help="slices of the rows, or processes for --first-batch")
    parser.add_argument("--quick", action="store_true", help="2,000 rows in 3 slices")
    parser.add_argument("--data", nargs="+", choices=tuple(KEYS), default=tuple(KEYS))
    parser.add_argument("--tokenizers", nargs="+", choices=TOKENIZERS, default=TOKENIZERS)
    parser.add_argument("--profile", action="store_true", help="print where one worker's time goes instead")
    parser.add_argument(
        "--first-batch", type=int, nargs="?", const=350_000, metavar="ROWS", help="time to the first batch instead"
    )
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(first_batch(*json.loads(options.point))), flush=True)
        return
    if options.quick:
        options.rows, options.repeat = 2_000, 3
    if options.profile:
        profile(options)
    elif options.first_batch:
        first_batches(options)
    else:
        throughput(options)


if __name__ == "__main__":
    main()
