"""Any causal language model of `transformers`, as the trainer sees a model: packs in, hidden states and a head out.

Where the model lets its attention be exchanged, ours runs over the whole pack; where it does not, or mixes tokens in
other ways, each document is a row of its own. Dropout is off, whatever the config says.
Shape suffixes: T tokens of a pack, D hidden size, B rows, L tokens of a row, V vocabulary, H heads, G key and value
heads, E head dimension.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from burnish.model.attention import Attention, Kernel, attend_sdpa, choose_attention
from burnish.model.base import CausalLM
from burnish.model.hf_io import named_weights, written_as
from burnish.model.lm_head import Head, logits
from burnish.types import Documents, UserError

PACKED = "burnish"
"""The name of our attention in `transformers`' registry."""
SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Config keys of factors on the logits, and the power they are raised to: Cohere, Falcon-H1, Granite."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Config keys of caps on the logits: Gemma, RecurrentGemma, xLSTM."""
PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
"""Layers in which tokens meet in attention alone, and there within a document and a window."""
ROW_FILL = 0.8
"""Rows run together where the shortest is at least this part of the longest, which bounds the padding."""


class HFModel(CausalLM):
    """A model of `transformers`; parameters carry the names of its own state dict, without a prefix.

    The model's children are ours, so whoever replaces parameters here replaces them there; the model itself stays
    outside of the tree of modules, reachable as `inner`. `config` is its config with the standard names of sizes added
    (`hidden_size` beside GPT-2's `n_embd`).
    """

    inner: PreTrainedModel

    def __init__(self, inner: PreTrainedModel, attention: Attention) -> None:
        super().__init__()
        object.__setattr__(self, "inner", inner)
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.kernel = attention.kernel
        self.own_attention = _attention_of(inner)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
        text = inner.config.get_text_config()
        self.config = inner.config.to_dict() | {name: getattr(text, name) for name in sizes if hasattr(text, name)}
        self.attention = attention.name
        """The attention that runs, in words."""
        self.eval()

    def train(self, mode: bool = True) -> HFModel:
        """Stay in evaluation mode, in which no dropout runs; gradients do not depend on the mode."""
        return super().train(False)

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, documents: Documents, noise_TD: Tensor | None = None
    ) -> Tensor:
        """Hidden states [T, D] after the final norm."""
        if self.row_reason is None:
            return self._forward_packed(tokens_T, positions_T, documents, noise_TD, self.kernel)
        return self._forward_rows(tokens_T, documents, noise_TD)

    def head(self) -> Head:
        """The output layer with the weights of this moment."""
        return head_of(self.inner)

    def blocks(self) -> list[nn.Module]:
        """The decoder layers in order."""
        lists = [m for m in self.inner.get_decoder().modules() if isinstance(m, nn.ModuleList)]
        number = self.config.get("num_hidden_layers")
        return list(next((layers for layers in lists if len(layers) == number), []))

    def run_rows(self, reason: str) -> None:
        """From now on run one document a row, with the model's own attention."""
        self.row_reason = reason
        self.attention = f"{self.own_attention} of transformers, one document a row"

    def for_generation(self) -> PreTrainedModel:
        """The inner model with its own attention and cache; the next `forward` takes ours again."""
        self._use(self.own_attention)
        return self.inner

    def export(
        self,
        folder: Path,
        dtype: torch.dtype,
        weights: Iterator[tuple[str, Tensor]] | None = None,
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        """As of any model, but with all weights in memory: written by `save_pretrained`, which undoes renamings of
        loading."""
        self._use(self.own_attention)
        logging.disable_progress_bar()
        named = weights or named_weights(self).items()
        state = {name: tensor.detach().to(written_as(name, tensor.dtype, dtype)) for name, tensor in named}
        self.inner.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_bytes)
        path = Path(folder, "config.json")
        config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _forward_packed(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        documents: Documents,
        noise_TD: Tensor | None,
        kernel: Kernel,
    ) -> Tensor:
        self._use(PACKED)
        pack = Pack(documents, kernel)
        return self._hidden(tokens_T[None], noise_TD, position_ids=positions_T[None], burnish_pack=pack)[0]

    def _forward_rows(self, tokens_T: Tensor, documents: Documents, noise_TD: Tensor | None) -> Tensor:
        self._use(self.own_attention)
        tokens_NL = tokens_T.split(documents.lengths)
        noise_NLD = None if noise_TD is None else noise_TD.split(documents.lengths)
        hidden_NLD: dict[int, Tensor] = {}
        for group in groups_of_similar_length(documents.lengths):
            # Padding comes last, where no token of a causal model sees it, so it needs no mask.
            tokens_BL = pad_sequence([tokens_NL[n] for n in group], batch_first=True)
            noise_BLD = None if noise_NLD is None else pad_sequence([noise_NLD[n] for n in group], batch_first=True)
            hidden_BLD = self._hidden(tokens_BL, noise_BLD)
            hidden_NLD |= {n: hidden_LD[: documents.lengths[n]] for n, hidden_LD in zip(group, hidden_BLD, strict=True)}
        return torch.cat([hidden_NLD[n] for n in range(len(documents.lengths))])

    def _hidden(self, tokens_BL: Tensor, noise_BLD: Tensor | None, **arguments: Any) -> Tensor:
        inputs = {"input_ids": tokens_BL}
        if noise_BLD is not None:
            inputs = {"inputs_embeds": self.inner.get_input_embeddings()(tokens_BL) + noise_BLD}
        return self.inner.get_decoder()(**inputs, **arguments, use_cache=False)[0]

    def _use(self, implementation: str) -> None:
        if _attention_of(self.inner) != implementation:
            self.inner.set_attn_implementation(implementation)


def load_hf_model(
    name: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype | Literal["auto"],
    compute_dtype: torch.dtype,
    attention: Literal["auto", "sdpa", "varlen"] = "auto",
    revision: str = "main",
    trust_remote_code: bool = False,
    init_config: dict[str, Any] | None = None,
    seed: int = 0,
    storage: torch.device | str | None = None,
) -> HFModel:
    """The model of a folder or hub id, or with random weights drawn from `seed` where `init_config` is given.

    `dtype` is that of the parameters, auto the checkpoint's; `compute_dtype` that of the activations, by which, and by
    the `device` to run on, the attention kernel is chosen. Weights lie on `storage`, by default the same: on a CPU, in
    the checkpoint's type, they are the pages of its files, of which a host has one copy for all processes.
    Raises UserError where there is no such model, weights are missing, or the logits are not those of a `Head`.
    """
    if init_config is None:
        inner = read_inner(name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    else:
        assert dtype != "auto", "random weights have no checkpoint"
        inner = _initialise(init_config, trust_remote_code, dtype, seed)
    return wrap_hf_model(inner, device=device, compute_dtype=compute_dtype, attention=attention, storage=storage)


def wrap_hf_model(
    inner: PreTrainedModel,
    *,
    device: torch.device | str,
    compute_dtype: torch.dtype,
    attention: Literal["auto", "sdpa", "varlen"] = "auto",
    storage: torch.device | str | None = None,
) -> HFModel:
    """A loaded model of `transformers` as one of ours, to run on `device`, its weights moved to `storage`, by default
    the same. Raises UserError as `load_hf_model` does."""
    nn.Module.to(inner, storage or device)
    # varlen knows no cap of scores, so auto must not choose it for a model that has one.
    asked = "sdpa" if attention == "auto" and _caps_scores(inner) else attention
    model = HFModel(inner, choose_attention(asked, device, compute_dtype))
    verify_head(inner)
    obstacle = packing_obstacle(model)
    if obstacle is not None:
        model.run_rows(obstacle)
    return model


def read_inner(
    name: str | Path, *, dtype: torch.dtype | Literal["auto"], revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model of a folder or hub id, as `transformers` builds it; dtype auto is the checkpoint's.

    Raises UserError where its architecture is unknown or the checkpoint lacks weights.
    """
    raw, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    if raw.get("model_type") not in CONFIG_MAPPING and not (trust_remote_code and "auto_map" in raw):
        remedy = "set model.trust_remote_code=true if you trust its author" if "auto_map" in raw else "upgrade it"
        raise UserError(
            f"{name}: model_type={raw.get('model_type')!r} is unknown to the installed transformers; {remedy}"
        )
    logging.disable_progress_bar()  # it would run through the run's own lines
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, revision=revision, trust_remote_code=trust_remote_code, dtype=dtype, output_loading_info=True
    )
    inner, report = loaded
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise UserError(
            f"{name}: {len(absent)} weights of {type(inner).__name__} are missing from the checkpoint or have another "
            f"shape, such as {absent[0]}; they would be noise, so use a checkpoint that has them"
        )
    return _with_every_cap(inner)


def config_of(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """A config.json as the config object of its model type. Raises UserError where `transformers` has none."""
    model_type = raw.get("model_type", "")
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"model_type={model_type!r} is unknown to the installed transformers; upgrade it or correct it")
    return CONFIG_MAPPING[model_type].from_dict(dict(raw))


def _initialise(raw: Mapping[str, Any], trust_remote_code: bool, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = AutoModelForCausalLM.from_config(config_of(raw), dtype=dtype, trust_remote_code=trust_remote_code)
    return _with_every_cap(inner)


def describe_hf_model(raw: Mapping[str, Any], trust_remote_code: bool, dtype: torch.dtype) -> HFModel:
    """A model on meta, for its names, shapes and config; nothing of it can run."""
    with torch.device("meta"):
        inner = AutoModelForCausalLM.from_config(config_of(raw), dtype=dtype, trust_remote_code=trust_remote_code)
    return HFModel(inner, Attention("sdpa", attend_sdpa))


def _attention_of(inner: PreTrainedModel) -> str:
    """The attention it runs, which its config holds since transformers 4.36, with a public way to set it and none to
    read it."""
    return str(inner.config._attn_implementation)


def _caps_scores(inner: PreTrainedModel) -> bool:
    return getattr(inner.config.get_text_config(), "attn_logit_softcapping", None) is not None


def _with_every_cap(inner: PreTrainedModel) -> PreTrainedModel:
    """Older `transformers` let sdpa run where scores are capped, and leave out the cap."""
    if _caps_scores(inner) and _attention_of(inner) == "sdpa":
        inner.set_attn_implementation("eager")
    return inner


def head_of(inner: PreTrainedModel) -> Head:
    """The output layer as the config describes it; `verify_head` says whether that is the truth.

    Raises UserError where it is not linear.
    """
    layer = inner.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{type(inner).__name__}: unknown head, {type(layer).__name__} is not linear; {_UNKNOWN_HEAD}")
    text = inner.config.get_text_config()
    scale = 1.0
    for key, power in SCALES.items():
        scale *= (getattr(text, key, None) or 1.0) ** power
    softcap = next((cap for key in SOFTCAPS if (cap := getattr(text, key, None)) is not None), None)
    return Head(layer.weight, layer.bias, scale, softcap)


_UNKNOWN_HEAD = "such a model cannot be trained here"


LARGEST_LOGIT = 50.0
"""Before scale and cap, so that a cap shows."""


@torch.no_grad()
def verify_head(inner: PreTrainedModel) -> None:
    """Compare the logits of `head_of` with the model's own, on hidden states scaled up until an unknown cap must show.

    Raises UserError where they differ, because training would then optimise something else than the model computes.
    """
    head, seen = head_of(inner), []

    def enlarge(module: nn.Module, arguments: Any, output: Any) -> Any:
        hidden_1LD = output[0]
        plain_LV = logits(hidden_1LD[0], Head(head.weight_VD, head.bias_V))
        seen.append(hidden_1LD * (LARGEST_LOGIT / plain_LV.abs().max()).to(hidden_1LD.dtype))
        if isinstance(output, tuple):
            return (seen[0], *output[1:])
        output.last_hidden_state = seen[0]
        return output

    hook = inner.get_decoder().register_forward_hook(enlarge)
    theirs_LV = inner(input_ids=_random_tokens(inner, 8)[None], use_cache=False).logits[0]
    hook.remove()
    distance = _distance(logits(seen[0][0], head), theirs_LV) if seen else torch.inf
    if not distance < _tolerance(inner.dtype):
        raise UserError(
            f"{type(inner).__name__}: unknown head, its logits are not softcap(scale * (h W^T + b)) with the config's "
            f"scale={head.scale} and softcap={head.softcap} (relative difference {distance:.1e}); {_UNKNOWN_HEAD}"
        )


@torch.no_grad()
def packing_obstacle(model: HFModel) -> str | None:
    """Why documents cannot share a row, or None where a pack gives what they give one by one.

    This says that packing is supported and right; that it is tight is for `probe_isolation` to say.
    """
    text = model.inner.config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - PACKABLE_LAYERS
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    accepted = inspect.signature(model.inner.get_decoder().forward).parameters
    if "position_ids" not in accepted or not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return "its forward takes no position_ids, or no arguments for attention"
    # Private, but what set_attn_implementation asks before it only warns, in all of transformers 5.
    if not model.inner._can_set_attn_implementation():
        return "its attention cannot be exchanged"
    tokens_T = _random_tokens(model.inner, 12)
    positions_T = torch.cat((torch.arange(7), torch.arange(5))).to(tokens_T.device)
    documents = Documents(torch.tensor([0, 7, 12], dtype=torch.int32, device=tokens_T.device), (7, 5))
    windows = []

    def attend(q_THE, k_TGE, v_TGE, documents, scale, window=None, softcap=None) -> Tensor:
        windows.append(window)
        return attend_sdpa(q_THE, k_TGE, v_TGE, documents, scale, window, softcap)  # the one that runs in any dtype

    try:
        packed_TD = model._forward_packed(tokens_T, positions_T, documents, None, attend)
    except CannotPack as error:
        return str(error)
    if sum(window is not None for window in windows) < _num_windowed_layers(text):
        return "it does not tell its attention of the sliding window"
    distance = _distance(packed_TD, model._forward_rows(tokens_T, documents, None))
    return None if distance < _tolerance(model.inner.dtype) else f"packed, its outputs differ by {distance:.1e}"


def _num_windowed_layers(config: PreTrainedConfig) -> int:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return layer_types.count("sliding_attention")
    return config.num_hidden_layers if getattr(config, "sliding_window", None) else 0


def _random_tokens(inner: PreTrainedModel, number: int) -> Tensor:
    vocabulary = inner.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (number,), generator=torch.Generator().manual_seed(0)).to(inner.device)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2


def groups_of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """Documents, longest first, in groups whose shortest is at least `ROW_FILL` of the longest."""
    groups: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if groups and lengths[document] >= ROW_FILL * lengths[groups[-1][0]]:
            groups[-1].append(document)
        else:
            groups.append([document])
    return groups


class CannotPack(Exception):
    """A model asks its attention for something that ours does not compute."""


@dataclass(frozen=True, slots=True)
class Pack:
    """What attention must know of a pack, on its way through the model as the keyword `burnish_pack`."""

    documents: Documents
    kernel: Kernel


_WITHOUT_EFFECT = {
    "cache_position", "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values",
    "position_ids", "return_dict", "use_cache",
}  # fmt: skip
"""Arguments that models hand through to attention and that change nothing there."""


def _attend_packed(
    module: nn.Module,
    query_1HTE: Tensor,
    key_1GTE: Tensor,
    value_1GTE: Tensor,
    attention_mask: Tensor | None,
    *,
    burnish_pack: Pack | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that `transformers` calls; returns [1, T, H, E] and no attention weights."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT)
    if unknown:
        raise CannotPack(f"its attention takes {', '.join(unknown)}")
    if burnish_pack is None:
        raise CannotPack("it does not hand arguments through to its attention")
    if attention_mask is not None or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise CannotPack("its attention has a mask of its own or is not causal")
    scale = query_1HTE.shape[-1] ** -0.5 if scaling is None else scaling
    q_THE, k_TGE, v_TGE = (x[0].transpose(0, 1) for x in (query_1HTE, key_1GTE, value_1GTE))
    return burnish_pack.kernel(q_THE, k_TGE, v_TGE, burnish_pack.documents, scale, sliding_window, softcap)[None], None


AttentionInterface.register(PACKED, _attend_packed)
