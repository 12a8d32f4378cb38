"""Answers of a model in training, of an export, of any Hugging Face folder; on the command line one or a conversation.

Decoding is that of `transformers`. Nothing here changes weights or the random state of training.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, TextStreamer
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.initialization import no_init_weights
from transformers.utils import logging

from burnish.model.base import CausalLM, saved_buffers
from burnish.model.hf_io import find_folder
from burnish.model.hf_model import HFModel, config_of, read_inner
from burnish.model.lora import put_adapters_like, settings_of
from burnish.model.vocabulary import TokenizerFacts
from burnish.types import UserError

Turn = dict[str, Any]
"""A message as chat templates read it: role, content, perhaps tool calls."""
Prompt = str | Sequence[Turn]
"""Text, or the messages of a conversation that the model is to continue."""
BATCH_SIZE = 8
"""Prompts answered together."""


def as_hf_model(model: CausalLM, weights: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The model as one of `transformers`, over the same memory: what training writes, it reads.

    `weights` are all that the model saves by its own names, where ranks hold parts of it (`parallel.weights`'
    `gather_full`); by default its own. Adapters stay adapters. An HFModel whose own weights are taken gives its inner
    model, good for answers until its next forward.
    """
    if weights is None and isinstance(model, HFModel):
        return model.for_generation()
    weights = weights or dict(model.named_parameters()) | saved_buffers(model)
    weights = {name: _as_held(model, name, tensor.detach()) for name, tensor in weights.items()}
    example = next(iter(weights.values()))
    # A copy, for the next forward of an HFModel takes another attention, which its config holds.
    config = deepcopy(model.for_generation().config) if isinstance(model, HFModel) else config_of(model.config)
    # Undocumented, here since transformers 5.0; on the meta device the buffers would be left without values, too.
    with no_init_weights():
        inner = AutoModelForCausalLM.from_config(config, dtype=example.dtype)
    put_adapters_like(model, inner)
    missing, unexpected = inner.load_state_dict(weights, strict=False, assign=True)
    inner.tie_weights()
    assert not unexpected, unexpected
    assert set(missing) <= set(inner.all_tied_weights_keys), missing
    nn.Module.to(inner, example.device)  # the buffers; parameters are there
    return inner.requires_grad_(False).eval()


def _as_held(model: CausalLM, name: str, tensor: Tensor) -> Tensor:
    """Stacked experts in the shape of `transformers`' modules, which have gate and up in one dimension."""
    stack = model.stacks.get(name)
    return tensor if stack is None or len(stack.pieces) == 1 else tensor.flatten(1, 2)


def generate(
    model: CausalLM | PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    system: str | None = None,
    seed: int = 0,
) -> list[str]:
    """An answer to each prompt, without special tokens; text is a user turn where the tokenizer has a chat template.

    Temperature 0 takes the likeliest token; above, tokens are drawn from `seed`, and the caller's random state stays.
    Raises UserError where a prompt leaves no room in the model's context.
    """
    inner = as_hf_model(model) if isinstance(model, CausalLM) else model
    encoded = [encode(tokenizer, prompt, system) for prompt in prompts]
    answers = continue_all(inner, TokenizerFacts.of(tokenizer), encoded, max_new_tokens, temperature, seed)
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def continue_all(
    inner: PreTrainedModel,
    tokenizer: TokenizerFacts,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """`generate` from ids to ids, with what fills up the rows of a batch behind an answer's end."""
    answers: list[list[int]] = []
    devices = [inner.device] if inner.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), BATCH_SIZE):
            few = prompts[start : start + BATCH_SIZE]
            answers += _continue(inner, tokenizer, few, max_new_tokens, temperature).tolist()
    return answers


def encode(tokenizer: Tokenizer, prompt: Prompt, system: str | None = None) -> list[int]:
    """Token ids of a prompt up to where the answer begins.

    Raises UserError where messages meet a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        if not tokenizer.chat_template:
            return tokenizer(prompt if system is None else f"{system}\n{prompt}")["input_ids"]
        prompt = [{"role": "user", "content": prompt}]
    if not tokenizer.chat_template:
        raise UserError(f"tokenizer {tokenizer.name_or_path} has no chat template for messages; give plain text")
    turns = list(prompt) if system is None else [{"role": "system", "content": system}, *prompt]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def _continue(
    inner: PreTrainedModel,
    tokenizer: TokenizerFacts,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    streamer: TextStreamer | None = None,
) -> Tensor:
    """New tokens [B, L] of prompts padded on the left."""
    longest = max(map(len, prompts))
    config = _generation_config(inner, tokenizer, min(max_new_tokens, _room(inner, longest)), temperature)
    rows = [[config.pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens_BL = torch.tensor(rows, device=inner.device)
    mask_BL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=inner.device)
    call: Any = inner.generate
    return call(inputs=tokens_BL, attention_mask=mask_BL, generation_config=config, streamer=streamer)[:, longest:]


def _room(inner: PreTrainedModel, num_tokens: int) -> int:
    limit = getattr(inner.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if num_tokens >= limit:
        raise UserError(f"the prompt has {num_tokens} tokens, and the model's context holds {limit}; shorten it")
    return limit - num_tokens


def _generation_config(
    inner: PreTrainedModel, tokenizer: TokenizerFacts, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Plain sampling: what a checkpoint's generation_config.json suggests besides its stop tokens is not taken over."""
    stop_ids = _stop_ids(inner, tokenizer)
    pad_id = tokenizer.pad if tokenizer.pad is not None else next(iter(stop_ids), 0)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )
    neutral = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    return GenerationConfig(
        **neutral | sampling, max_new_tokens=max_new_tokens, eos_token_id=stop_ids or None, pad_token_id=pad_id
    )


def _stop_ids(inner: PreTrainedModel, tokenizer: TokenizerFacts) -> list[int]:
    of_model = inner.generation_config.eos_token_id if inner.generation_config else None
    ids = [tokenizer.eos, *(of_model if isinstance(of_model, list) else [of_model])]
    return list(dict.fromkeys(i for i in ids if i is not None))


def load_for_answers(name: str) -> tuple[PreTrainedModel, Tokenizer]:
    """Model, on a GPU where there is one, and tokenizer of a folder or hub id; adapters are added to their base.

    Raises UserError where either is missing.
    """
    folder = find_folder(name)
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        newest = max(folder.glob("**/*.safetensors"), key=lambda path: path.stat().st_mtime, default=None)
        remedy = f"give {newest.parent}" if newest else "give a Hugging Face folder, such as an export of a run"
        raise UserError(f"{name} holds no config.json, so it is no model; {remedy}")
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / file).is_file() for file in names):
        raise UserError(f"{name} holds no tokenizer; copy that of its base model (tokenizer.json and its config) there")
    logging.disable_progress_bar()
    inner = _read_adapted(folder) if is_adapter else read_inner(folder, dtype="auto")
    nn.Module.to(inner, "cuda" if torch.cuda.is_available() else "cpu")
    return inner.eval(), AutoTokenizer.from_pretrained(folder)


def _read_adapted(folder: Path) -> PreTrainedModel:
    """The model that a folder of adapters belongs to, with the adapters added in."""
    from peft import PeftModel

    base, _ = settings_of(folder)
    adapted: Any = PeftModel.from_pretrained(read_inner(find_folder(base), dtype="auto"), str(folder))
    return adapted.merge_and_unload()


class _Printer(TextStreamer):
    """Prints an answer as it comes, and keeps it, so that one cut short has its place in the conversation."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(text, end="\n" if stream_end else "", flush=True)


def run_generate(
    name: str, prompt: str, *, max_new_tokens: int, system: str | None = None, temperature: float = 0.0
) -> int:
    """`burnish generate`: print the answer as it comes. Returns the exit status."""
    inner, tokenizer = load_for_answers(name)
    tokens = encode(tokenizer, prompt, system)
    _continue(inner, TokenizerFacts.of(tokenizer), [tokens], max_new_tokens, temperature, _Printer(tokenizer))
    return 0


def run_chat(name: str, *, max_new_tokens: int, system: str | None = None, temperature: float = 0.0) -> int:
    """`burnish chat`: answer line after line of a growing conversation. Returns the exit status."""
    inner, tokenizer = load_for_answers(name)
    print("/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.")
    opening: list[Turn] = [] if system is None else [{"role": "system", "content": system}]
    turns = opening
    for line in _lines():
        if line == "/reset":
            turns = opening
            print("The conversation starts anew.")
            continue
        asked = [*turns, {"role": "user", "content": line}]
        try:
            answer = _answer(inner, tokenizer, asked, max_new_tokens, temperature)
        except UserError as error:
            print(f"{error}, or type /reset", file=sys.stderr)
            continue
        turns = [*asked, {"role": "assistant", "content": answer}]
    return 0


def _lines() -> Iterable[str]:
    """What the user types, line by line, until /exit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() editing and a history; Windows has none
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if line == "/exit":
            return
        if line:
            yield line


def _answer(
    inner: PreTrainedModel, tokenizer: Tokenizer, turns: Sequence[Turn], max_new_tokens: int, temperature: float
) -> str:
    """Print an answer and return it; Ctrl-C cuts it short. Without a chat template, the turns are one running text."""
    text = "\n".join(turn["content"] for turn in turns)
    tokens = encode(tokenizer, turns if tokenizer.chat_template else text)
    printer = _Printer(tokenizer)
    try:
        _continue(inner, TokenizerFacts.of(tokenizer), [tokens], max_new_tokens, temperature, printer)
    except KeyboardInterrupt:
        printer.end()
        print("(stopped)")
    return printer.text
