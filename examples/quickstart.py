"""The tour: make rows, a tokenizer and a model of our own, fine-tune it by a recipe, and say where everything lies.

Run by `make quickstart`, from the root of the repository. Nothing is downloaded and no GPU is needed; what an earlier
run has left is used again. The world of the rows is a corner shop, whose assistant answers from memory, from its system
turn, or by calling a tool.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from burnish.cli import main as burnish

TEMPLATE = Path(__file__).with_name("quickstart.jinja")
RECIPE = Path("examples/quickstart.yaml")
DATA = Path("runs/quickstart-data")
RUN = Path("runs/quickstart")
NUM_TRAIN, NUM_HELD_OUT = 3000, 200
VOCAB_SIZE = 640

Row = dict[str, Any]
Turns = list[dict[str, Any]]

PLACES = {
    "apples": "in the basket by the door",
    "pears": "in the basket by the window",
    "plums": "in the box under the table",
    "eggs": "on the top shelf",
    "candles": "on the shelf behind me",
    "pencils": "in the drawer on the left",
    "stamps": "in the drawer on the right",
    "lemons": "on the low shelf",
}
OPENING = {
    "Monday": "eight",
    "Tuesday": "nine",
    "Wednesday": "seven",
    "Thursday": "ten",
    "Friday": "six",
    "Saturday": "eleven",
}
COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve")


def tool(name: str, description: str, **arguments: str) -> dict[str, Any]:
    """A function's schema as chat APIs write it; `arguments` maps each name to its JSON type."""
    properties = {argument: {"type": kind} for argument, kind in arguments.items()}
    function = {"name": name, "description": description, "parameters": {"type": "object", "properties": properties}}
    return {"type": "function", "function": function}


TOOLS = [
    tool("get_price", "The price of some goods in coins.", item="string", count="string"),
    tool("check_stock", "How many of an item are left.", item="string"),
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def call(name: str, arguments: dict[str, str], result: dict[str, int]) -> Turns:
    """The assistant's call of a tool, and what the tool answers."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(result)},
    ]


# Each topic is one exchange. It gets today's weekday where the conversation has a system turn and tools, else None.


def opening(rng: random.Random, today: str | None) -> Turns:
    day = rng.choice(list(OPENING))
    question = rng.choice(("When do you open on {}?", "What time do you open on {}?", "From when are you there on {}?"))
    return [user(question.format(day)), assistant(f"On {day} we open at {OPENING[day]}.")]


def place(rng: random.Random, today: str | None) -> Turns:
    item = rng.choice(list(PLACES))
    question = rng.choice(("Where are the {}?", "Where do I find {}?", "I am looking for {}."))
    return [user(question.format(item)), assistant(f"You find the {item} {PLACES[item]}.")]


def price(rng: random.Random, today: str | None) -> Turns:
    item, count = rng.choice(list(PLACES)), rng.choice(COUNTS)
    question = user(
        rng.choice(("How much are {} {}?", "What do {} {} cost?", "The price of {} {}, please.")).format(count, item)
    )
    if today is None:
        return [question, assistant("I have no price list here. Please ask at the till.")]
    coins = rng.randint(2, 99)
    answer = assistant(f"{count.capitalize()} {item} cost {coins} coins.")
    return [question, *call("get_price", {"item": item, "count": count}, {"coins": coins}), answer]


def stock(rng: random.Random, today: str | None) -> Turns:
    item = rng.choice(list(PLACES))
    question = user(rng.choice(("Do you have {}?", "Are there any {} left?", "I would like some {}.")).format(item))
    if today is None:
        return [question, assistant(f"I cannot see from here whether we have {item}. Please ask at the till.")]
    left = rng.choice((0, rng.randint(1, 99)))
    answer = assistant(f"Yes, we have {left} {item}." if left else f"I am sorry, the {item} are sold out.")
    return [question, *call("check_stock", {"item": item}, {"left": left}), answer]


def opening_today(rng: random.Random, today: str | None) -> Turns:
    question = rng.choice(("When do you open today?", "What time do you open today?"))
    if today is None:
        return [user(question), assistant("I do not know which day it is. Which day do you mean?")]
    return [user(question), assistant(f"Today is {today}, so we open at {OPENING[today]}.")]


def thanks(rng: random.Random, today: str | None) -> Turns:
    return [
        user(rng.choice(("Thank you!", "Thanks a lot!", "Many thanks."))),
        assistant("You are welcome. See you soon!"),
    ]


TOPICS: tuple[Callable[[random.Random, str | None], Turns], ...] = (opening, place, price, stock, opening_today, thanks)


def make_row(rng: random.Random) -> Row:
    """One conversation of one to three exchanges; three of four have a system turn and tools."""
    today = rng.choice([None, *(rng.choice(list(OPENING)) for _ in range(3))])
    system = [] if today is None else [{"role": "system", "content": f"You keep a corner shop. Today is {today}."}]
    topics = rng.sample(TOPICS, rng.randint(1, 3))
    turns = [turn for topic in topics for turn in topic(rng, today)]
    return {"messages": system + turns, "tools": None if today is None else TOOLS}


def make_rows(num: int, seed: int) -> list[Row]:
    """`num` rows, no two of them equal; the same for the same seed."""
    rng = random.Random(seed)
    rows: dict[str, Row] = {}
    while len(rows) < num:
        row = make_row(rng)
        rows.setdefault(json.dumps(row), row)
    return list(rows.values())


def train_tokenizer(rows: Sequence[Row], folder: Path) -> None:
    """Write a byte-level BPE tokenizer, trained on `rows` as its chat template renders them, with ChatML's tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # The marks of a call are not special, so that a decoded answer shows them.
    special, marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(marks),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    template = TEMPLATE.read_text(encoding="utf-8")
    chat = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template)
    texts = [chat.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False) for row in rows]
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=template, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)


def model_config(vocab_size: int) -> dict[str, Any]:
    """config.json of a Qwen3 with some 1.2 million parameters. Ids are those of `train_tokenizer`."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": 160,
        "intermediate_size": 480,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def prepare(folder: Path) -> bool:
    """Write train.jsonl, heldout.jsonl and model/ (tokenizer, config.json) to `folder`, unless they lie there already.

    Returns whether it wrote. A stamp, written last, tells whether what lies there was made by this file and template.
    """
    maker = hashlib.sha256(Path(__file__).read_bytes() + TEMPLATE.read_bytes()).hexdigest()
    stamp = folder / "made-by.sha256"
    if stamp.is_file() and stamp.read_text() == maker:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    rows = make_rows(NUM_TRAIN + NUM_HELD_OUT, seed=1)
    for name, part in (("train", rows[:NUM_TRAIN]), ("heldout", rows[NUM_TRAIN:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    train_tokenizer(rows[:NUM_TRAIN], folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(model_config(VOCAB_SIZE), indent=2) + "\n")
    stamp.write_text(maker)
    return True


def show_results(run: Path) -> None:
    """Print what changed between the first evaluation and the last, and where to look next."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line]
    answers = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    (first, before), (last, after) = losses[0], losses[-1]

    print(f"\nHeld-out loss: {before:.3f} before training, {after:.3f} after {last} steps.\n")
    for question in dict.fromkeys(answer["prompt"] for answer in answers):
        replies = {answer["step"]: answer["answer"] for answer in answers if answer["prompt"] == question}
        print(f"  {question}\n    before: {replies[first][:80]!r}\n    after:  {replies[last][:80]!r}")
    model = run / "hf" / f"step-{last}"
    print(f"""
What came of it:
  {model}  the model, for transformers, vLLM, SGLang, ...
  {run / "report.html"}  curves, data, samples with their trained tokens, answers: open it in a browser
  {run / "metrics.jsonl"}  a line a step

What to try next:
  .venv/bin/burnish chat {model}
  .venv/bin/burnish evaluate {model} {DATA / "heldout.jsonl"}
  .venv/bin/burnish sft {RECIPE} optim.lr=1e-3 run.dir=runs/slower
  a recipe of your own: README.md, "A first recipe"; every key: docs/recipes.md
""")


def main(overrides: Sequence[str]) -> int:
    """Prepare, train by the recipe with `a.b=c` overrides, show. Returns the exit status of training."""
    wrote = prepare(DATA)
    verb = "Wrote" if wrote else "Found"
    print(f"1. {verb} {NUM_TRAIN} rows, {NUM_HELD_OUT} held out, a tokenizer and the shape of a model: {DATA}")
    print(f"2. burnish sft {RECIPE}\n", flush=True)
    status = burnish(["sft", str(RECIPE), *overrides])
    if status == 0:
        show_results(RUN)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
