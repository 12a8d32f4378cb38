"""Answers: the tokens our own forward finds likeliest, over the trained weights themselves, and a chat that grows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import native_model, tiny_config
from transformers import AutoTokenizer

import burnish.generate
from burnish.config import LoraConfig
from burnish.generate import as_hf_model, encode, generate, load_for_answers, run_chat, run_generate
from burnish.model.base import CausalLM
from burnish.model.hf_model import load_hf_model
from burnish.model.lm_head import logits
from burnish.model.lora import initialise_adapters, inject, trained, write_adapter
from burnish.types import Documents, UserError

PROMPTS = ["the quick brown fox", [{"role": "user", "content": "numbers"}], "answer questions about a lazy dog please"]


@pytest.fixture
def model() -> CausalLM:
    return native_model(tiny_config(initializer_range=0.2), torch.float32)


@pytest.fixture(scope="module")
def tokenizer(chatml_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(chatml_tokenizer)


@pytest.fixture
def folder(model: CausalLM, tokenizer: Any, tmp_path: Path) -> Path:
    model.export(tmp_path, torch.float32)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def our_logits(model: CausalLM, tokens: list[int]) -> torch.Tensor:
    number = len(tokens)
    documents = Documents(torch.tensor([0, number], dtype=torch.int32), (number,))
    with torch.no_grad():
        return logits(model(torch.tensor(tokens), torch.arange(number), documents), model.head())


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_native_model_answers_without_a_copy(family: str, is_tied: bool) -> None:
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    model = native_model(tiny_config(family, tie_word_embeddings=is_tied, **scaled), torch.float32)
    inner = as_hf_model(model)
    ours = dict(model.named_parameters())
    assert all(ours[name].data_ptr() == parameter.data_ptr() for name, parameter in inner.named_parameters())
    with torch.no_grad():
        next(iter(ours.values())).mul_(2.0)  # a step of training
    tokens = list(range(20))
    theirs_LV = inner(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(theirs_LV, our_logits(model, tokens), rtol=1e-4, atol=1e-5)


def hf_logits(inner: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return inner(input_ids=torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite"])
def test_stacked_experts_answer_without_a_copy(family: str) -> None:
    config = {key: value for key, value in tiny_config(family).items() if value is not None}
    model = native_model(config, torch.float32)
    inner = as_hf_model(model)
    memory = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in memory for parameter in inner.parameters())
    tokens = list(range(20))
    torch.testing.assert_close(hf_logits(inner, tokens), our_logits(model, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), LoraConfig(rank=4, kind="dora", modules_to_save=("norm",))])
def test_an_adapted_model_answers_with_its_adapters(lora: LoraConfig) -> None:
    model = native_model(tiny_config("qwen3"), torch.float32)
    plain = our_logits(model, list(range(20)))
    inject(model, lora, torch.float32)
    initialise_adapters(model, 0)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.mul_(1.1).add_(0.01)
    answers = hf_logits(as_hf_model(model), list(range(20)))
    torch.testing.assert_close(answers, our_logits(model, list(range(20))), rtol=1e-4, atol=1e-5)
    assert (answers - plain).abs().max() > 1e-3


def test_gathered_weights_answer_in_place_of_the_models_own() -> None:
    model, other = native_model(tiny_config(), torch.float32), native_model(tiny_config(), torch.float32, seed=1)
    inner = as_hf_model(other, {name: parameter.bfloat16() for name, parameter in model.named_parameters()})
    assert inner.dtype == torch.bfloat16
    assert torch.equal(hf_logits(inner, [1, 2]), hf_logits(as_hf_model(model.bfloat16()), [1, 2]))


def test_adapters_answer_on_their_base(tmp_path: Path, tokenizer: Any) -> None:
    model = native_model(tiny_config("qwen3"), torch.float32)
    for folder in ("base", "adapter"):
        (tmp_path / folder).mkdir()
    model.export(tmp_path / "base", torch.float32)
    inject(model, LoraConfig(rank=4), torch.float32)
    initialise_adapters(model, 0)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.02)
    write_adapter(tmp_path / "adapter", model, trained(model), torch.float32, str(tmp_path / "base"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    inner, _ = load_for_answers(str(tmp_path / "adapter"))
    inner = inner.cpu()
    torch.testing.assert_close(hf_logits(inner, [3, 4, 5]), our_logits(model, [3, 4, 5]), rtol=1e-4, atol=1e-5)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(tmp_path / "base"), ""))
    with pytest.raises(UserError, match="names no base_model_name_or_path"):
        load_for_answers(str(tmp_path / "adapter"))


def test_greedy_answers_are_the_likeliest_tokens_whatever_they_are_batched_with(
    model: CausalLM, tokenizer: Any
) -> None:
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = start = encode(tokenizer, prompt)
        for _ in range(6):
            tokens = [*tokens, int(our_logits(model, tokens)[-1].argmax())]
        assert answer == tokenizer.decode(tokens[len(start) :], skip_special_tokens=True)


def test_an_answer_ends_at_the_end_of_turn(model: CausalLM, tokenizer: Any) -> None:
    with torch.no_grad():
        model.head().weight_VD.zero_()  # tied: all logits are equal, so one of them is made the highest
        inner = as_hf_model(model)
        inner.set_output_embeddings(torch.nn.Linear(32, 512))
        inner.get_output_embeddings().weight.zero_()
        inner.get_output_embeddings().bias.zero_()[tokenizer.eos_token_id] = 1.0
    assert generate(inner, tokenizer, PROMPTS, max_new_tokens=50) == ["", "", ""]


def test_sampling_follows_the_seed_and_leaves_the_random_state(model: CausalLM, tokenizer: Any) -> None:
    state = torch.get_rng_state()
    one, other, third = (
        generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    )
    assert one == other != third
    assert torch.equal(state, torch.get_rng_state())


def test_what_a_checkpoint_suggests_for_sampling_is_not_taken_over(model: CausalLM, tokenizer: Any) -> None:
    inner = as_hf_model(model)
    plain = generate(inner, tokenizer, PROMPTS, max_new_tokens=12)
    inner.generation_config.repetition_penalty = 5.0
    inner.generation_config.do_sample = True
    assert generate(inner, tokenizer, PROMPTS, max_new_tokens=12) == plain


def test_a_model_of_transformers_answers_between_two_packs(tokenizer: Any) -> None:
    config = tiny_config("llama", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    model = load_hf_model("x", device="cpu", dtype=torch.float32, compute_dtype=torch.float32, init_config=config)
    before = our_logits(model, list(range(20)))
    assert generate(model, tokenizer, PROMPTS[:1], max_new_tokens=4) != [""]
    torch.testing.assert_close(our_logits(model, list(range(20))), before)


def test_prompts_become_what_the_template_says(tokenizer: Any) -> None:
    text = tokenizer.decode(encode(tokenizer, "answer numbers", system="questions"))
    assert text == (
        "<|im_start|>system\nquestions<|im_end|>\n<|im_start|>user\nanswer numbers<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_template_text_is_raw_and_messages_are_an_error(chatml_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatml_tokenizer)
    tokenizer.chat_template = None
    assert tokenizer.decode(encode(tokenizer, "answer numbers")) == "answer numbers"
    with pytest.raises(UserError, match="no chat template"):
        encode(tokenizer, PROMPTS[1])


def test_a_prompt_longer_than_the_context_is_an_error_and_a_long_answer_is_cut(tokenizer: Any) -> None:
    model = native_model(tiny_config(max_position_embeddings=16, initializer_range=0.2), torch.float32)
    with pytest.raises(UserError, match="context holds 16"):
        generate(model, tokenizer, ["the quick brown fox " * 9])
    assert generate(model, tokenizer, ["fox"], max_new_tokens=100) == generate(model, tokenizer, ["fox"])


def test_what_is_missing_is_named(model: CausalLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder here"):
        load_for_answers(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds no config\.json.*such as an export"):
        load_for_answers(str(tmp_path))
    for number, step in enumerate(("step-20", "step-100")):
        export = tmp_path / "hf" / step
        export.mkdir(parents=True)
        model.export(export, torch.float32)
        os.utime(export / "model.safetensors", (number, number))
    with pytest.raises(UserError, match=f"give {tmp_path}/hf/step-100"):
        load_for_answers(str(tmp_path))
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_for_answers(str(tmp_path / "hf" / "step-100"))


def test_generate_prints_the_answer(
    folder: Path, model: CausalLM, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_generate(str(folder), "the quick brown fox", max_new_tokens=6) == 0
    answer = generate(model, tokenizer, ["the quick brown fox"], max_new_tokens=6)[0]
    assert capsys.readouterr().out == f"{answer}\n"


class Chat:
    """A conversation with `folder`: what is typed, and the turns each answer was asked for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.asked = folder, []
        self._typed: Iterator[Any] = iter(())
        monkeypatch.setattr("builtins.input", self._input)
        monkeypatch.setattr(burnish.generate, "encode", self._encode)

    def run(self, *typed: Any) -> int:
        self._typed = iter(typed)
        return run_chat(str(self.folder), system="be quick", max_new_tokens=4)

    def _input(self, mark: str) -> str:
        line = next(self._typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def _encode(self, tokenizer: Any, prompt: Any, system: str | None = None) -> list[int]:
        self.asked.append([(turn["role"], turn["content"]) for turn in prompt])
        return encode(tokenizer, prompt, system)


@pytest.fixture
def chat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    return Chat(folder, monkeypatch)


def test_a_chat_grows_until_it_is_reset(chat: Chat) -> None:
    assert chat.run("the fox", "", "a dog", "/reset", "numbers", "/exit", "never read") == 0
    first, second, third = chat.asked
    assert first == [("system", "be quick"), ("user", "the fox")]
    assert [role for role, _ in second] == ["system", "user", "assistant", "user"]
    assert second[:2] == first
    assert second[2][1]
    assert third == [("system", "be quick"), ("user", "numbers")]


def test_ctrl_c_stops_an_answer_but_not_the_chat(chat: Chat, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(inner: Any, facts: Any, prompts: Any, *options: Any) -> None:
        printer = options[-1]
        printer.put(torch.tensor(prompts))
        printer.put(torch.tensor(tokenizer("the fox", add_special_tokens=False)["input_ids"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(burnish.generate, "_continue", interrupted)
    assert chat.run("a dog", KeyboardInterrupt(), "numbers") == 0
    assert chat.asked[1][1:] == [("user", "a dog"), ("assistant", "the fox"), ("user", "numbers")]


def test_a_conversation_that_outgrows_the_context_can_go_on(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.run("the quick brown fox " * 200, "numbers") == 0
    assert "type /reset" in capsys.readouterr().err
    assert chat.asked[1] == [("system", "be quick"), ("user", "numbers")]
