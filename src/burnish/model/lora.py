"""LoRA, rsLoRA and DoRA: the layers and files are peft's; which layers, first values and merging are decided here.

Adapters stand inside of the model's own modules and the rest of the model is frozen. Knows no layout: whoever has one
passes in how values are written and parts are read.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from burnish.config import LoraConfig
from burnish.files import read_object
from burnish.model.base import CausalLM
from burnish.model.hf_io import Box, check_tensors, find_folder, locate_tensors, read_tensors, save_tensors, whole
from burnish.types import UserError

if TYPE_CHECKING:
    import peft

NAME = "default"
"""What peft calls the adapter."""
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROUTERS = ("gate",)
"""Linear layers that choose experts: all-linear leaves them alone."""


def inject(model: CausalLM, lora: LoraConfig, dtype: torch.dtype) -> None:
    """Put adapters of type `dtype` into the model and freeze all else but `lora.modules_to_save`, which become `dtype`.

    The base keeps its type: it is never updated, so it needs no master beside what it computes in. Parameters may be on
    meta; the adapters have no values until `initialise_adapters` or `read_adapter`. Raises UserError for a target that
    is not there or cannot have an adapter.
    """
    import peft  # takes seconds, like transformers, which it imports

    targets = _targets(model, lora)
    saved = _saved_modules(model, lora)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # pyright: ignore[reportArgumentType]
        use_rslora=lora.rslora,
        use_dora=lora.kind == "dora",
        target_modules=targets,
        init_lora_weights=True if lora.init == "kaiming" else "gaussian",
    )
    peft.inject_adapter_in_model(config, model, NAME)
    for layer in adapted_layers(model).values():
        if lora.kind == "dora":
            layer.lora_variant[NAME] = Dora()  # of a variant only its forward runs in training
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name.rpartition(".")[0] in saved:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    # Only now, because peft would keep two copies of them. By whole names, because it takes any ending for a match.
    config.modules_to_save = sorted(saved) or None


def peft_config(model: nn.Module) -> peft.LoraConfig | None:
    """The configuration of the adapters in the model; None where there are none."""
    return getattr(model, "peft_config", {}).get(NAME)


def put_adapters_like(model: nn.Module, other: nn.Module) -> None:
    """Put adapters without values where `model` has them into `other`, whose layers have the same names."""
    config = peft_config(model)
    if config is not None:
        import peft

        peft.inject_adapter_in_model(replace(config, modules_to_save=None), other, NAME)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers with an adapter, peft's `lora.Linear`, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters and the modules trained whole, by their names in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def without_base(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what the model saves that which its frozen base does not hold; all of it where there are no adapters."""
    if peft_config(model) is None:
        return state
    return {
        name: tensor
        for name, tensor in state.items()
        if tensor.requires_grad or ".lora_" in name or not isinstance(tensor, nn.Parameter)
    }


def _targets(model: CausalLM, lora: LoraConfig) -> list[str]:
    """The ends of the names of the layers that get an adapter."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    heads = {name for name in linear if model.get_submodule(name).weight is model.head().weight_VD}
    if lora.targets == "all-linear":
        inside = {id(module) for block in model.blocks() for module in block.modules()}
        names = [name for name in linear - heads if not inside or id(model.get_submodule(name)) in inside]
        ends = {name.rpartition(".")[2] for name in names} - set(ROUTERS)
        if not ends:
            raise UserError(
                f"lora.targets=all-linear finds no linear layer in {type(model).__name__}; name the layers instead"
            )
        return sorted(ends)
    for target in lora.targets:
        found = {name for name, _ in model.named_modules() if _ends(name, target)}
        if found & heads:
            raise UserError(
                f"lora.targets={target} is the output layer, which runs without its module and so without an adapter; "
                "train it whole with lora.modules_to_save, or leave it out"
            )
        if not found:
            raise UserError(f"lora.targets={target} ends no module's name; {_near(target, linear - heads)}")
        if found - linear:
            other = min(found - linear)
            kind = type(model.get_submodule(other)).__name__
            raise UserError(
                f"lora.targets={target} is {other}, a module of type {kind}; adapters go around linear layers: "
                f"{_near(target, linear - heads)}"
            )
    return sorted(lora.targets)


def _saved_modules(model: CausalLM, lora: LoraConfig) -> set[str]:
    """The names of the modules to train whole."""
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    saved: set[str] = set()
    for target in lora.modules_to_save:
        found = {owner for owner in owners if _ends(owner, target)}
        if not found:
            tied = next(
                (model.aliases[alias] for alias in model.aliases if _ends(alias.rpartition(".")[0], target)), ""
            )
            hint = f"it is tied to {tied.rpartition('.')[0]}, so name that" if tied else _near(target, owners)
            raise UserError(f"lora.modules_to_save={target} ends no name of a module with weights; {hint}")
        saved |= found
    return saved


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _near(target: str, names: set[str]) -> str:
    """All there is to take, nearest first."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    return f"take some of {', '.join(difflib.get_close_matches(target, ends, len(ends), 0.0))}"


@dataclass(frozen=True)
class Dora:
    """DoRA's forward (arXiv 2402.09353, equation 5, with the length of W + BA held constant for the gradient).

    Unlike peft's it takes lengths in float32 at least, and makes no identity matrix. The fields are for layouts.
    """

    local: Callable[[Tensor], Tensor] = lambda parameter: parameter
    """What is here of a parameter."""
    total: Callable[[Tensor], Tensor] = lambda squares_O: squares_O
    """Squared lengths of rows, of those of the columns that are here."""

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The layer's output with the adapter's part; `result` is that without."""
        base, scaling = module.get_base_layer(), module.scaling[active_adapter]
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        with torch.no_grad():
            weight_OI, a_RI, b_OR = (self.local(layer.weight) for layer in (base, a, b))
            length_O = self.total(square_rows(weight_OI + scaling * (b_OR @ a_RI))).sqrt()
        magnitude_O = self.local(module.lora_magnitude_vector[active_adapter].weight)
        scale_O = (magnitude_O / length_O).to(result.dtype)
        bias_O = 0.0 if base.bias is None else self.local(base.bias)
        return scale_O * (result - bias_O + scaling * b(a(x))) + bias_O


def square_rows(weight_OI: Tensor) -> Tensor:
    """The squared Euclidean length of every row, in float32 (float64 where the weight is)."""
    return weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32)).square().sum(1)


@torch.no_grad()
def initialise_adapters(model: CausalLM, seed: int, part_of: Callable[[Tensor], tuple[Tensor, Box]] = whole) -> None:
    """Write first values, as peft draws them: A as `lora.init` says, B zero, DoRA's lengths those of the base's rows.

    Call it once the base has its weights. A is drawn on the CPU in float32 from a generator of its own, seeded by
    (seed, name), so that no layout changes it; `part_of` is as in `zoo.initialise`.
    """
    config = peft_config(model)
    assert config is not None, "inject adapters first"
    for name, layer in adapted_layers(model).items():
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        digest = hashlib.sha256(f"{seed}/{name}.lora_A".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if config.init_lora_weights == "gaussian":
            drawn = torch.normal(0.0, 1 / config.r, tuple(a.shape), generator=generator)
        else:
            drawn = (torch.rand(tuple(a.shape), generator=generator) * 2 - 1) / math.sqrt(a.shape[1])
        local, box = part_of(a)
        local.copy_(drawn[box])
        b.zero_()
        if config.use_dora:
            layer.lora_magnitude_vector[NAME].weight.copy_(square_rows(layer.get_base_layer().weight).sqrt())


def read_adapter(
    path: str,
    model: CausalLM,
    lora: LoraConfig,
    expected: Mapping[str, torch.Size] | None = None,
    part_of: Callable[[Tensor], tuple[Tensor, Box]] = whole,
) -> None:
    """Copy an adapter in peft's format, a folder or hub id, into the adapters of the model.

    `part_of` is as in `zoo.initialise`. Otherwise as `check_adapter`.
    """
    stored = check_adapter(path, model, lora, expected)
    read_tensors(stored, {stored_name(name): parameter for name, parameter in trained(model).items()}, part_of)


def check_adapter(
    path: str, model: CausalLM, lora: LoraConfig, expected: Mapping[str, torch.Size] | None = None
) -> dict[str, Path]:
    """The file of every tensor of an adapter in peft's format, a folder or hub id, that goes on in the model's.

    `expected` are names and shapes of what the whole model trains, where this is a part of it. Raises UserError where
    the adapter is another than `lora` describes.
    """
    folder = find_folder(path)
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"lora.path={path} has no {CONFIG}; give the folder of an adapter in peft's format")
    _check_config(path, read_object(file, "correct it"), lora)
    expected = expected or {name: parameter.shape for name, parameter in trained(model).items()}
    stored = locate_tensors(folder, FILE)
    ties = {stored_name(alias): stored_name(target) for alias, target in model.aliases.items() if target in expected}
    check_tensors(
        folder,
        {stored_name(name): shape for name, shape in expected.items()},
        stored,
        {alias: target for alias, target in ties.items() if alias in stored},
        config=file.name,
        remedy="set lora.targets and lora.modules_to_save to what it adapts",
    )
    return stored


def settings_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """The base that an adapter in peft's format belongs to, and the keys of a recipe's `lora` that go on from it.

    Raises UserError where it names no base.
    """
    found = read_object(folder / CONFIG, "correct it")
    if not found.get("base_model_name_or_path"):
        raise UserError(f"{folder} names no base_model_name_or_path in {CONFIG}; add it")
    targets = found.get("target_modules") or ()
    return found["base_model_name_or_path"], {
        "path": str(folder),
        "rank": found.get("r"),
        "alpha": found.get("lora_alpha"),
        "rslora": found.get("use_rslora", False),
        "kind": "dora" if found.get("use_dora") else "lora",
        "targets": [targets] if isinstance(targets, str) else list(targets),
        "modules_to_save": list(found.get("modules_to_save") or ()),
    }


def _check_config(path: str, found: Mapping[str, Any], lora: LoraConfig) -> None:
    if found.get("peft_type") != "LORA":
        raise UserError(f"lora.path={path} holds an adapter of type {found.get('peft_type')}; only LORA can go on here")
    wanted = {
        "rank": (lora.rank, found.get("r")),
        "alpha": (lora.alpha, found.get("lora_alpha")),
        "rslora": (lora.rslora, found.get("use_rslora", False)),
        "kind": (lora.kind, "dora" if found.get("use_dora") else "lora"),
    }
    for key, (ours, theirs) in wanted.items():
        if ours != theirs:
            raise UserError(f"lora.{key}={ours}, and the adapter in {path} has {theirs}; set lora.{key} to {theirs}")
    special = next(
        (key for key in ("rank_pattern", "alpha_pattern", "lora_bias", "target_parameters") if found.get(key)), None
    )
    if special is not None:
        raise UserError(f"lora.path={path} has {special} in its {CONFIG}, which is not trained here")


def stored_name(name: str) -> str:
    """The name that peft's files have for a parameter."""
    return "base_model.model." + name.replace(
        f".lora_magnitude_vector.{NAME}.weight", ".lora_magnitude_vector"
    ).replace(f".{NAME}.weight", ".weight")


def write_adapter(
    folder: Path, model: CausalLM, tensors: Mapping[str, Tensor], dtype: torch.dtype, base_model: str | None
) -> None:
    """Write adapter_config.json and the adapters, as `dtype`, into an existing folder that peft reads.

    `tensors` are those of `trained`, whole. `base_model` is the folder or hub id that the adapter belongs to.
    """
    config = peft_config(model)
    assert config is not None, "inject adapters first"
    # peft keeps a tied weight tied only if told so, and wants it in the file by both of its names.
    ties = {alias: target for alias, target in model.aliases.items() if target in tensors}
    exported = replace(config, base_model_name_or_path=base_model, inference_mode=True, ensure_weight_tying=bool(ties))
    exported.target_modules = sorted(
        config.target_modules or ()
    )  # peft's set would be written in another order each time
    exported.save_pretrained(str(folder))
    state = {stored_name(name): t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
    state |= {stored_name(alias): state[stored_name(target)].clone() for alias, target in ties.items()}
    save_tensors(state, folder / FILE)


def merge(
    weights: Iterator[tuple[str, Tensor]], model: nn.Module, adapters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the base, by a checkpoint's names, with their adapters added in, one after the other.

    `adapters` are those of `trained`, whole and on the device of the weights. Sums are taken in float32 at least.
    """
    config = peft_config(model)
    assert config is not None, "inject adapters first"
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    for name, weight in weights:
        layer = name.removesuffix(".weight")
        if name == layer or f"{layer}.lora_A.{NAME}.weight" not in adapters:
            yield name, weight
            continue
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (adapters[f"{layer}.{part}.{NAME}.weight"].to(wide) for part in ("lora_A", "lora_B"))
        merged = weight.to(wide) + scaling * (b @ a)
        if config.use_dora:
            magnitude = adapters[f"{layer}.lora_magnitude_vector.{NAME}.weight"].to(wide)
            merged *= (magnitude / square_rows(merged).sqrt())[:, None]
        yield name, merged
