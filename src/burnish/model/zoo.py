"""Which module an architecture is, and a model's way from its name in the recipe to weights on a device.

The only registry of the project: Hugging Face architecture -> our module. Any other runs through `transformers`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from burnish.config import ModelConfig
from burnish.model.attention import Kernel, attend_sdpa, choose_attention
from burnish.model.base import CausalLM, UnsupportedModel, saved_buffers
from burnish.model.dense import LLAMA, QWEN2, QWEN3, DenseLM
from burnish.model.hf_io import (
    Box,
    find_folder,
    has_weights,
    locate_tensors,
    named_weights,
    read_config,
    read_weights,
    whole,
)
from burnish.model.mla import DEEPSEEK_V3, GLM4_MOE_LITE, LatentMoE
from burnish.model.moe import Qwen3MoE, set_compute
from burnish.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES: Mapping[str, Callable[[dict[str, Any], Kernel], CausalLM]] = {
    "LlamaForCausalLM": partial(DenseLM, family=LLAMA),
    "Qwen2ForCausalLM": partial(DenseLM, family=QWEN2),
    "Qwen3ForCausalLM": partial(DenseLM, family=QWEN3),
    "Qwen3MoeForCausalLM": Qwen3MoE,
    "Glm4MoeLiteForCausalLM": partial(LatentMoE, family=GLM4_MOE_LITE),
    "DeepseekV3ForCausalLM": partial(LatentMoE, family=DEEPSEEK_V3),
}
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its weights, and what to print about it."""

    model: CausalLM
    implementation: Literal["native", "transformers"]
    reason: str
    """Why this implementation was taken."""
    attention: str
    """The attention kernel."""
    folder: Path
    """Where config.json was read: the place to look for a tokenizer."""

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def facts(self) -> dict[str, str]:
        return {
            "architecture": architecture_of(self.model.config),
            "implementation": f"{self.implementation} ({self.reason})",
        }


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a recipe's model comes from, and whose modules compute it."""

    folder: Path
    """Where config.json was read."""
    config: dict[str, Any]
    implementation: Literal["native", "transformers"]
    reason: str


def locate(model: ModelConfig, found: Path | None = None) -> Origin:
    """The model of a recipe, before any weight is read. Raises UserError where there is none or none that runs it.

    `found` is the folder that another process of the run found it in: where it is here, with all weights, nothing is
    asked of the hub.
    """
    if model.init:
        source = Path(model.init)
    elif found is not None and has_weights(found):
        source = found
    else:
        source = find_folder(str(model.path), model.revision, model.trust_remote_code)
    config = complete(read_config(source))
    return Origin(
        source if source.is_dir() else source.parent, config, *choose_implementation(model.implementation, config)
    )


def load_model(
    model: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    seed: int,
) -> Loaded:
    """The model of a recipe: weights of `model.path`, or random ones of the shape of `model.init` drawn from `seed`.

    `dtype` is that of the parameters, `compute_dtype` that of the activations, by which the attention kernel is chosen.
    Raises UserError where there is no such model, or the implementation or kernel asked for cannot run it.
    """
    origin = locate(model)
    if origin.implementation == "transformers":
        types: dict[str, Any] = {"dtype": dtype, "compute_dtype": compute_dtype}
        return load_by_transformers(model, origin, device=device, **types, seed=seed)
    attention = choose_attention(model.attention, device, compute_dtype)
    native = build(origin.config, attention.kernel, dtype=dtype, device=device, compute=compute_dtype)
    if model.init:
        initialise(native, seed)
    else:
        read_weights(origin.folder, native)
    return Loaded(native, origin.implementation, origin.reason, attention.name, origin.folder)


def describe_model(model: ModelConfig, dtype: torch.dtype) -> Loaded:
    """The model of a recipe on meta: names, shapes and config, for whoever computes nothing. Raises as `load_model`."""
    origin = locate(model)
    if origin.implementation == "transformers":
        from burnish.model.hf_model import describe_hf_model

        described: CausalLM = describe_hf_model(origin.config, model.trust_remote_code, dtype)
    else:
        described = build(origin.config, attend_sdpa, dtype=dtype, device="meta")
    return Loaded(described, origin.implementation, origin.reason, "", origin.folder)


def adopt_model(
    inner: PreTrainedModel,
    model: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> Loaded:
    """A loaded model of `transformers` as one to train: in our own modules over its weights where there are such.

    Weights that are of type `dtype` on `device` are shared, so that training shows in `inner`; others are copied.
    Raises UserError as `load_model` does.
    """
    config = complete(inner.config.to_dict())
    folder = Path(inner.name_or_path or ".")
    implementation, reason = choose_implementation(model.implementation, config)
    exact = {name: buffer.detach().to(device, copy=True) for name, buffer in saved_buffers(inner).items()}
    torch.nn.Module.to(inner, device=device, dtype=dtype)
    if implementation == "transformers":
        from burnish.model.hf_model import wrap_hf_model

        inner.load_state_dict(exact, strict=False, assign=True)
        wrapped = wrap_hf_model(inner, device=device, compute_dtype=compute_dtype, attention=model.attention)
        return Loaded(wrapped, implementation, reason, wrapped.attention, folder)
    attention = choose_attention(model.attention, device, compute_dtype)
    native = build(config, attention.kernel, dtype=dtype, device="meta", compute=compute_dtype)
    weights = dict(inner.named_parameters())
    shared = {name: weights[name].detach().view(p.shape) for name, p in native.named_parameters()}
    corrections = {name: exact[name] for name in saved_buffers(native)}
    native.load_state_dict(shared | corrections, strict=False, assign=True)
    inner.load_state_dict(corrections, strict=False, assign=True)
    return Loaded(native, implementation, reason, attention.name, folder)


def load_by_transformers(
    model: ModelConfig,
    origin: Origin,
    *,
    device: torch.device | str,
    dtype: torch.dtype | Literal["auto"],
    compute_dtype: torch.dtype,
    seed: int,
    storage: torch.device | str | None = None,
) -> Loaded:
    """The model of a recipe in modules of `transformers`, to run on `device`, its weights on `storage` (by default the
    same). `dtype` auto is the checkpoint's. Raises as `load_model`."""
    from burnish.model.hf_model import load_hf_model  # transformers takes seconds to import

    if not model.init:
        locate_tensors(origin.folder)  # transformers would go on to .bin files, or fail without a remedy
    loaded = load_hf_model(
        origin.folder,
        device=device,
        dtype=dtype,
        compute_dtype=compute_dtype,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
        init_config=origin.config if model.init else None,
        seed=seed,
        storage=storage,
    )
    return Loaded(loaded, origin.implementation, origin.reason, loaded.attention, origin.folder)


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """The config with `architectures` and `model_type`, where one of them is ours and tells the other.

    Raises UserError where it has neither.
    """
    names, model_type = config.get("architectures"), config.get("model_type")
    if names:
        return config if model_type or names[0] not in MODEL_TYPES else {**config, "model_type": MODEL_TYPES[names[0]]}
    if model_type is None:
        raise UserError('config.json names no architecture; add architectures, such as ["Qwen3ForCausalLM"]')
    ours = [name for name in MODEL_TYPES if MODEL_TYPES[name] == model_type]
    return {**config, "architectures": ours} if ours else config


def architecture_of(config: Mapping[str, Any]) -> str:
    return (config.get("architectures") or [config["model_type"]])[0]


def choose_implementation(
    asked: Literal["auto", "native", "transformers"], config: dict[str, Any]
) -> tuple[Literal["native", "transformers"], str]:
    """Whose modules run a config, and why.

    Raises UserError where native ones are asked for and there are none.
    """
    if asked == "transformers":
        return "transformers", "as model.implementation says"
    obstacle = _native_obstacle(config)
    if obstacle is None:
        return "native", "as model.implementation says" if asked == "native" else "the architecture is one of ours"
    if asked == "auto":
        return "transformers", obstacle
    raise UserError(f"model.implementation=native: {obstacle}; set it to auto or transformers")


def _native_obstacle(config: dict[str, Any]) -> str | None:
    try:
        build(config, attend_sdpa, dtype=torch.float32, device="meta")
    except UnsupportedModel as error:
        return str(error)
    return None


def build(
    config: dict[str, Any],
    kernel: Kernel,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    compute: torch.dtype | None = None,
) -> CausalLM:
    """Our module for a config.json, its parameters uninitialised and of type `dtype`.

    `compute` is the type of the activations, by which experts choose their kernel; None is `dtype`. Raises
    UnsupportedModel for an architecture or feature that is not ours.
    """
    architecture = architecture_of(config)
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(f"{architecture} is none of the native {', '.join(ARCHITECTURES)}")
    with torch.device("meta"):
        model = ARCHITECTURES[architecture](config, kernel)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # buffers keep their own type
    set_compute(model, compute or dtype, device)
    return model.to_empty(device=device)


def shallow(config: dict[str, Any], num_layers: int = 2) -> dict[str, Any]:
    """The config of a model like it with so many of its first layers, or all where it has fewer."""
    num_layers = min(num_layers, config["num_hidden_layers"])
    cut = {key: config[key][:num_layers] for key in ("layer_types", "mlp_layer_types") if config.get(key)}
    return {**config, "num_hidden_layers": num_layers, **cut}


@torch.no_grad()
def initialise(model: CausalLM, seed: int, part_of: Callable[[Tensor], tuple[Tensor, Box]] = whole) -> None:
    """Write random weights as `transformers` does: matrices from N(0, initializer_range^2), norms 1, biases 0.

    Every matrix is drawn on the CPU in float32 from a generator of its own, seeded by (seed, name), so that neither
    layout nor device nor data type changes it; of stacked experts each for itself, and only those that are here.
    `part_of` says which memory this rank has of a parameter, and which part of the whole that is.
    """
    deviation = model.config.get("initializer_range") or 0.02
    for name, weight in named_weights(model).items():
        if name.endswith(".bias") or not isinstance(weight, nn.Parameter):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0)
        else:
            local, box = part_of(weight)
            shape = tuple(weight.shape)
            if name in model.stacks:
                for expert, row in zip(range(*box[0].indices(shape[0])), local, strict=True):
                    row.copy_(_normal(shape[1:], deviation, seed, f"{name}.{expert}")[box[1:]])
            else:
                local.copy_(_normal(shape, deviation, seed, name)[box])


def _normal(shape: Sequence[int], deviation: float, seed: int, name: str) -> Tensor:
    return torch.normal(0.0, deviation, tuple(shape), generator=_generator(seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
