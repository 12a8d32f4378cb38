"""Hugging Face model folders: find one, read its config and weights, write them.

Weights are read through a memory map and converted one tensor at a time, straight into the model's parameters, and
written in shards as they come. The tokenizer, generation_config.json and the model card are not this module's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from burnish.files import read_object, sync
from burnish.model.base import CausalLM
from burnish.types import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOADED: tuple[str, ...] = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
SECOND_COPIES = ("original/*", "onnx/*", "consolidated*")
"""What is fetched of a hub repository, and what is not: the same weights in other formats."""

Box = tuple[slice, ...]
"""A part of a tensor: start and stop along each of its dimensions."""


def find_folder(path: str, revision: str = "main", with_code: bool = False) -> Path:
    """The folder `path` names: one on this machine, or a hub repository, downloaded once to Hugging Face's cache.

    `with_code` also downloads a repository's Python files. Raises UserError where there is neither.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise UserError(f"{path} is a file; a model is the folder around its config.json, so give {local.parent}")
    patterns = [*DOWNLOADED, "*.py"] if with_code else list(DOWNLOADED)
    try:
        return Path(
            snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=[*SECOND_COPIES])
        )
    except HFValidationError:
        raise UserError(f"{path} is no folder here, and no hub id (owner/name) either; correct the path") from None
    except GatedRepoError:
        raise UserError(
            f"{path} is gated; accept its terms on huggingface.co and log in with `hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{path} is no folder here, and as a hub id (revision {revision}) it is not in the cache and the hub "
            f"cannot be reached; correct the path, unset HF_HUB_OFFLINE, or run `hf download {path}` where there is a "
            "network"
        ) from None
    except HfHubHTTPError as error:
        raise UserError(f"{path} is no folder here, and the hub says of it (revision {revision}): {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The config.json at `path`: the file or the folder around it. Raises UserError where it is no JSON object."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist; give the config.json of a model, or the folder that holds it")
    return read_object(file, "correct it")


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint holds, by its names for them: those of adapters are no part of it."""
    return {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if ".lora_" not in name}


def whole(parameter: Tensor) -> tuple[Tensor, Box]:
    """A parameter of which all is here."""
    return parameter, tuple(slice(0, size) for size in parameter.shape)


def read_weights(
    folder: Path,
    model: CausalLM,
    expected: Mapping[str, torch.Size] | None = None,
    part_of: Callable[[Tensor], tuple[Tensor, Box]] = whole,
) -> None:
    """Copy the weights of a folder into the model's parameters, whatever their type and device.

    `part_of` says of a parameter what memory of it is here and which part of the tensor that holds; nothing else is
    read. `expected` are names and shapes of the whole model, where this is a part of it. Raises one UserError that
    lists every missing, unexpected and misshapen tensor; nothing is copied then.
    """
    parameters = named_weights(model)
    expected = expected or {name: parameter.shape for name, parameter in parameters.items()}
    stored = {name: file for name, file in locate_tensors(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    copies = {name: target for name, target in model.aliases.items() if name in stored}
    _check_names(folder, expected.keys(), stored.keys() - copies.keys())
    _check_shapes(folder, expected, stored, copies)
    parts = {name: part_of(parameter) for name, parameter in parameters.items()}
    boxes = {name: box for name, (_, box) in parts.items()}
    with torch.no_grad():
        for name, tensor in _read_tensors({name: stored[name] for name in parameters}, boxes):
            parts[name][0].copy_(tensor)
    for name, target in copies.items():
        if target in parameters:
            _check_copy(folder, stored, name, target, boxes[target])


def locate_tensors(folder: Path) -> dict[str, Path]:
    """The file of every tensor of the folder, by tensor name. Raises UserError where there are no safetensors."""
    if (folder / SINGLE).is_file():
        with _opened(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        lost = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if lost:
            raise UserError(f"{folder} lacks {_listed(lost)}, which {INDEX} names; download or copy the folder again")
        return {name: folder / file for name, file in weight_map.items()}
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} holds its weights as .bin files, which can run code when they are read; convert them with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}; give a folder with weights, or set model.init instead")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(f"{file} is no whole safetensors file ({error}); download or copy it again") from None


def _read_tensors(stored: Mapping[str, Path], boxes: Mapping[str, Box]) -> Iterator[tuple[str, Tensor]]:
    """The box of every tensor in turn, file by file; the memory of a whole one is the file's own map."""
    for path in dict.fromkeys(stored.values()):
        with _opened(path) as file:
            for name in (name for name, its_path in stored.items() if its_path == path):
                tensor, box = file.get_slice(name), boxes[name]
                if [side.stop - side.start for side in box] == tensor.get_shape():
                    yield name, file.get_tensor(name)
                elif all(side.stop > side.start for side in box):
                    yield name, tensor[box]


def _check_names(folder: Path, wanted: Any, found: Any) -> None:
    faults = [
        f"{label} {_listed(sorted(names))}"
        for label, names in (("missing:", wanted - found), ("unexpected:", found - wanted))
        if names
    ]
    if faults:
        raise UserError(
            f"{folder} does not hold the weights that its config.json describes; {'; '.join(faults)}. "
            "Correct config.json, or set model.implementation to transformers"
        )


def _check_shapes(
    folder: Path, expected: Mapping[str, torch.Size], stored: Mapping[str, Path], copies: Mapping[str, str]
) -> None:
    wanted = {name: list(expected[copies.get(name, name)]) for name in stored}
    faults = []
    for path in dict.fromkeys(stored.values()):
        with _opened(path) as file:
            for name in (name for name, its_path in stored.items() if its_path == path):
                shape = list(file.get_slice(name).get_shape())
                if shape != wanted[name]:
                    faults.append(f"{name} is {shape}, not {wanted[name]}")
    if faults:
        raise UserError(f"{folder} does not fit its config.json: {_listed(faults)}; correct config.json")


def _check_copy(folder: Path, stored: Mapping[str, Path], name: str, target: str, box: Box) -> None:
    """A tied weight may be stored twice, but not with two values: one of them would be lost."""
    tensors = dict(_read_tensors({name: stored[name], target: stored[target]}, {name: box, target: box}))
    if tensors and not torch.equal(tensors[name], tensors[target]):
        raise UserError(
            f"{folder}: config.json ties {name} to {target}, but the two are stored with different values; "
            "set tie_word_embeddings to false in config.json to keep both"
        )


def _listed(names: Sequence[str], limit: int = 8) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` when the block ends without an exception.

    A reader sees the old folder, none for the moment of the change, or the whole new one. An existing folder is
    replaced only if it is empty or holds a config.json; anything else raises UserError.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise UserError(f"{folder} exists and is no model folder; it would be replaced, so name another or empty it")
    partial, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames below
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            sync(entry)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json and the weights into an existing folder, floating tensors as `dtype`.

    `tensors` has Hugging Face's names, tied ones once, as `named_parameters` gives them. They are taken one by one, and
    a shard is written as soon as the next would make it larger than the limit, so that memory holds one shard.
    """
    name_of_dtype = str(dtype).removeprefix("torch.")
    exported = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": name_of_dtype}
    _write_json(folder / "config.json", exported)
    items = iter(tensors.items()) if isinstance(tensors, Mapping) else tensors
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    filled = total_size = 0

    def write_shard() -> None:
        shards.append(list(shard))
        save_file(shard, folder / f".{len(shards)}.safetensors", metadata={"format": "pt"})
        shard.clear()

    for name, tensor in items:
        exported_tensor = _exported(tensor, dtype)
        if shard and filled + exported_tensor.nbytes > max_shard_bytes:
            write_shard()
            filled = 0
        shard[name] = exported_tensor
        filled += exported_tensor.nbytes
        total_size += exported_tensor.nbytes
    write_shard()
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        (folder / f".{number}.safetensors").rename(folder / file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _exported(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
