"""Hugging Face model folders: find one, read its config and weights, write them.

Weights are read through a memory map and converted one tensor at a time, straight into the model's parameters, and
written in shards as they come. The tokenizer, generation_config.json and the model card are not this module's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from burnish.files import read_object, sync
from burnish.model.base import CausalLM, saved_buffers
from burnish.types import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOADED: tuple[str, ...] = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
SECOND_COPIES = ("original/*", "onnx/*", "consolidated*")
"""What is fetched of a hub repository, and what is not: the same weights in other formats."""

Box = tuple[slice, ...]
"""A part of a tensor: start and stop along each of its dimensions."""
EXACT = ("e_score_correction_bias",)
"""Last names of tensors that are written as they are, whatever the others are rounded to: as `transformers` does."""


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
    if not file.is_file() and (path / "adapter_config.json").is_file():
        raise UserError(f"{path} holds adapters and no model; set model.path to their base, and lora.path={path}")
    if not file.is_file():
        raise UserError(f"{file} does not exist; give the config.json of a model, or the folder that holds it")
    return read_object(file, "correct it")


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a model holds of a checkpoint, by Hugging Face's names: those of adapters are no part of it."""
    tensors = dict(model.named_parameters()) | saved_buffers(model)
    return {name.replace(".base_layer.", "."): t for name, t in tensors.items() if ".lora_" not in name}


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
    weights = named_weights(model)
    expected = expected or {name: tensor.shape for name, tensor in weights.items()}
    weights = {name: tensor for name, tensor in weights.items() if name in expected}  # the rest are copies of tied ones
    stored, copies = _locate_weights(folder, model, expected)
    parts = {name: part_of(tensor) for name, tensor in weights.items()}
    pieces = [piece for name, part in parts.items() for piece in _pieces_of(model, name, expected[name], *part)]
    _copy_pieces(pieces, stored)
    for name, target in copies.items():
        if target in parts:
            _check_copy(folder, stored, name, target, parts[target][1])


def check_weights(folder: Path, model: CausalLM) -> None:
    """Raises UserError as `read_weights` does, but for tied weights that differ; of the files it reads the headers.

    `model` may be on meta.
    """
    _locate_weights(folder, model, {name: tensor.shape for name, tensor in named_weights(model).items()})


def each_weight(folder: Path, model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """The weights of a folder one after the other, by the names, in the types and order of `model`, which is on meta.

    Raises UserError as `read_weights` does, before the first.
    """
    weights = named_weights(model)
    stored, _ = _locate_weights(folder, model, {name: tensor.shape for name, tensor in weights.items()})
    for name, weight in weights.items():
        tensor = torch.empty(weight.shape, dtype=weight.dtype)
        _copy_pieces(list(_pieces_of(model, name, weight.shape, *whole(tensor))), stored)
        yield name, tensor


def _locate_weights(
    folder: Path, model: CausalLM, expected: Mapping[str, torch.Size]
) -> tuple[dict[str, Path], dict[str, str]]:
    """The files of a folder's tensors, which are those of `expected`, and which names are copies of tied ones.

    The model then knows whether its experts are stored whole.
    """
    stored = {name: file for name, file in locate_tensors(folder).items() if not _is_ignored(name, model)}
    copies = {name: target for name, target in model.aliases.items() if name in stored}
    model.is_stored_whole = any(name in stored for name in model.stacks)
    shapes = {
        source: shape for name, full in expected.items() for source, shape in _sources_of(model, name, full).items()
    }
    check_tensors(folder, shapes, stored, copies, remedy="set model.implementation to transformers")
    return stored, copies


def _is_ignored(name: str, model: CausalLM) -> bool:
    return name.endswith("rotary_emb.inv_freq") or name.startswith(model.unread)


class Piece(NamedTuple):
    """A box of a stored tensor, and the memory it goes to."""

    source: str
    box: Box
    target: Tensor


def _pieces_of(model: CausalLM, name: str, shape: torch.Size, local: Tensor, box: Box) -> Iterator[Piece]:
    """What to read for the `box` of a tensor of `shape` that `local` holds."""
    stack = model.stacks.get(name)
    if stack is None or (model.is_stored_whole and len(stack.pieces) == 1):
        yield Piece(name, box, local)
        return
    experts, kinds, *rest = box if len(stack.pieces) > 1 else (box[0], slice(0, 1), *box[1:])
    local = local if len(stack.pieces) > 1 else local.unsqueeze(1)
    for kind in range(kinds.start, kinds.stop):
        by_expert = local[:, kind - kinds.start]
        if model.is_stored_whole:
            merged = slice(kind * shape[2] + rest[0].start, kind * shape[2] + rest[0].stop)
            yield Piece(name, (experts, merged, *rest[1:]), by_expert)
            continue
        for expert in range(experts.start, experts.stop):
            yield Piece(stack.pieces[kind].format(expert), tuple(rest), by_expert[expert - experts.start])


def _sources_of(model: CausalLM, name: str, shape: torch.Size) -> dict[str, torch.Size]:
    """The stored tensors a parameter of `shape` is made of."""
    stack = model.stacks.get(name)
    if stack is None:
        return {name: shape}
    inner = 1 + (len(stack.pieces) > 1)
    if model.is_stored_whole:
        return {name: torch.Size((shape[0], prod(shape[1 : inner + 1]), *shape[inner + 1 :]))}
    return {piece.format(expert): shape[inner:] for expert in range(shape[0]) for piece in stack.pieces}


def as_stored(model: CausalLM, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors by their names in the model as a checkpoint holds them: experts apart, or as the one read had them.

    What comes apart shares its memory.
    """
    for name, tensor in tensors:
        stack = model.stacks.get(name)
        if stack is None:
            yield name, tensor
        elif model.is_stored_whole:
            yield name, tensor.flatten(1, 2) if len(stack.pieces) > 1 else tensor
        else:
            for expert, one in enumerate(tensor):
                for piece, part in zip(stack.pieces, one if len(stack.pieces) > 1 else one[None], strict=True):
                    yield piece.format(expert), part


def locate_tensors(folder: Path, single: str = SINGLE) -> dict[str, Path]:
    """The file of every tensor of the folder, by tensor name. Raises UserError where there are no safetensors."""
    if (folder / single).is_file():
        with _opened(folder / single) as file:
            return dict.fromkeys(file.keys(), folder / single)
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
    raise UserError(f"{folder} has neither {single} nor {INDEX}; give a folder with weights, or set model.init instead")


def has_weights(folder: Path) -> bool:
    """Whether the folder is here and has all files of its weights."""
    try:
        locate_tensors(folder)
    except UserError:
        return False
    return True


def fingerprint_weights(folder: Path) -> str:
    """Tells the weights of one folder from those of another: of every file the size, its beginning and its middle."""
    digest = hashlib.sha256()
    for file in sorted(set(locate_tensors(folder).values())):
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(str(size).encode() + stream.read(2**20))
            stream.seek(size // 2)
            digest.update(stream.read(2**20))
    return digest.hexdigest()[:32]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(f"{file} is no whole safetensors file ({error}); download or copy it again") from None


def _read_pieces(pieces: Sequence[Piece], stored: Mapping[str, Path]) -> Iterator[tuple[Piece, Tensor]]:
    """Every piece in turn, file by file; the memory of a whole tensor is the file's own map."""
    by_file: dict[Path, list[Piece]] = {}
    for piece in pieces:
        by_file.setdefault(stored[piece.source], []).append(piece)
    for path, its_pieces in by_file.items():
        with _opened(path) as file:
            for piece in its_pieces:
                tensor = file.get_slice(piece.source)
                if [side.stop - side.start for side in piece.box] == tensor.get_shape():
                    yield piece, file.get_tensor(piece.source)
                elif all(side.stop > side.start for side in piece.box):
                    yield piece, tensor[piece.box]


@torch.no_grad()
def _copy_pieces(pieces: Sequence[Piece], stored: Mapping[str, Path]) -> None:
    for piece, tensor in _read_pieces(pieces, stored):
        piece.target.copy_(tensor)


def read_tensors(
    stored: Mapping[str, Path], targets: Mapping[str, Tensor], part_of: Callable[[Tensor], tuple[Tensor, Box]] = whole
) -> None:
    """Copy stored tensors into `targets`, which have their names; `part_of` is that of `read_weights`."""
    parts = {name: part_of(target) for name, target in targets.items()}
    _copy_pieces([Piece(name, box, local) for name, (local, box) in parts.items()], stored)


def check_tensors(
    folder: Path,
    expected: Mapping[str, torch.Size],
    stored: Mapping[str, Path],
    copies: Mapping[str, str] | None = None,
    config: str = "config.json",
    remedy: str = "take another folder",
) -> None:
    """Raise a UserError that lists every tensor of the folder that is missing, unexpected or of another shape.

    `copies` are the names of tensors stored a second time, and of which. `config` is the file that describes them.
    """
    copies = copies or {}
    found = stored.keys() - copies.keys()
    faults = [
        f"{label} {_listed(sorted(names))}"
        for label, names in (("missing:", expected.keys() - found), ("unexpected:", found - expected.keys()))
        if names
    ]
    if faults:
        raise UserError(
            f"{folder} does not hold the weights that its {config} describes; {'; '.join(faults)}. "
            f"Correct {config}, or {remedy}"
        )
    wanted = {name: list(expected[copies.get(name, name)]) for name in stored}
    for path in dict.fromkeys(stored.values()):
        with _opened(path) as file:
            for name in (name for name, its_path in stored.items() if its_path == path):
                shape = list(file.get_slice(name).get_shape())
                if shape != wanted[name]:
                    faults.append(f"{name} is {shape}, not {wanted[name]}")
    if faults:
        raise UserError(f"{folder} does not fit its {config}: {_listed(faults)}; correct {config}")


def _check_copy(folder: Path, stored: Mapping[str, Path], name: str, target: str, box: Box) -> None:
    """A tied weight may be stored twice, but not with two values: one of them would be lost."""
    both = [Piece(source, box, torch.empty(0)) for source in (name, target)]
    tensors = [tensor for _, tensor in _read_pieces(both, stored)]
    if tensors and not torch.equal(*tensors):
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
    replaced only if it is empty or holds a config.json or adapter_config.json; anything else raises UserError.
    """
    is_model = any((folder / f"{kind}config.json").is_file() for kind in ("", "adapter_"))
    if folder.exists() and any(folder.iterdir()) and not is_model:
        raise UserError(f"{folder} exists and is no model folder; it would be replaced, so name another or empty it")
    partial, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames below
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    mode = partial.stat().st_mode & 0o666  # what the umask leaves; safetensors lets the owner alone read its files
    try:
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            if entry.is_file():
                entry.chmod(mode)
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

    `tensors` has Hugging Face's names, tied ones once, as `as_stored` gives them. They are taken one by one, and a
    shard is written as soon as the next would make it larger than the limit, so that memory holds one shard.
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
        save_tensors(shard, folder / f".{len(shards)}.safetensors")
        shard.clear()

    for name, tensor in items:
        exported_tensor = _exported(name, tensor, dtype)
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


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file. Raises UserError where the disk does not take it."""
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        free = shutil.disk_usage(file.parent).free / 2**20
        size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
        raise UserError(
            f"{file} could not be written ({error}): it takes {size:,.0f} MiB, and {free:,.0f} MiB are free; make room"
        ) from None


def written_as(name: str, held: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The type in which a tensor of type `held` is written where the others are written as `dtype`."""
    return dtype if held.is_floating_point and not name.endswith(EXACT) else held


def _exported(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    exported = tensor.detach().to("cpu", written_as(name, tensor.dtype, dtype)).contiguous()
    # safetensors refuses tensors that share memory, which the experts of a stack do.
    return exported if exported.untyped_storage().nbytes() == exported.nbytes else exported.clone()


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
