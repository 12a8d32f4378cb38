"""Reads the `.metadata` of torch.distributed.checkpoint (DCP), which is a pickle, without running what is in it.

Every name a pickle may refer to stands for an inert record made for that one reading, so that not even an attribute of
a class of torch can be changed; what comes out is checked value by value and only then becomes DCP's `Metadata`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Set
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

Value = TypeVar("Value")

CLASSES = "torch.distributed.checkpoint.metadata"
FILES = "torch.distributed.checkpoint.filesystem"


class InertReader(FileSystemReader):
    """Reads tensors from `folder` by metadata that `parse` has already made."""

    def __init__(self, folder: Any, metadata: Metadata):
        super().__init__(folder)
        self._parsed = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._parsed


def parse(pickled: bytes, files: Set[str]) -> Metadata:
    """The metadata of a checkpoint that holds tensors alone, in `files`.

    Raises ValueError for a pickle that DCP would not have written for such a checkpoint: one that names anything else
    than DCP's records, is cut off, or points outside `files`.
    """
    unpickler = _InertUnpickler(io.BytesIO(pickled))
    try:
        record = unpickler.load()
    except Exception as error:  # a forged pickle can raise anything that its reading can
        raise ValueError(f"{type(error).__name__}: {error}") from error
    _expect(record, unpickler.stand_ins[CLASSES, "Metadata"])
    tensors: dict[str, STORAGE_TYPES] = {
        _expect(name, str): _tensor(entry) for name, entry in _field(record, "state_dict_metadata", dict).items()
    }
    storage = {_index(key): _place(place, files) for key, place in _field(record, "storage_data", dict).items()}
    return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta())


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.stand_ins = _stand_ins()

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in self.stand_ins:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no checkpoint of tensors does")
        return self.stand_ins[module_name, global_name]


def _stand_ins() -> dict[tuple[str, str], Any]:
    """What the globals of DCP's pickles are taken to mean, made anew so that a pickle can change nothing that lasts."""
    records = ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta")
    memory_format = type("_MEM_FORMAT_ENCODING", (), {"__init__": lambda self, value: None})

    def member(enum: Any, name: Any) -> None:
        # Python 3.11.2 pickles an enum's member as getattr(class, name); the formats' is the only one that occurs.
        if enum is not memory_format:
            raise pickle.UnpicklingError("it takes an attribute of something that is no memory format")

    return {
        **{(CLASSES, name): type(name, (), {}) for name in records},
        (CLASSES, "TensorProperties"): type("TensorProperties", (), {"__setstate__": _keep_state}),
        (FILES, "_StorageInfo"): type("_StorageInfo", (), {}),
        (CLASSES, "_MEM_FORMAT_ENCODING"): memory_format,
        ("builtins", "getattr"): member,
        ("torch.serialization", "_get_layout"): lambda name: name,
        ("torch", "Size"): tuple,
        **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
    }


def _keep_state(self: Any, state: Any) -> None:
    self.state = state


def _expect(value: Any, kind: type[Value]) -> Value:
    if not isinstance(value, kind):
        raise ValueError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _field(record: Any, name: str, kind: type[Value]) -> Value:
    return _expect(vars(record).get(name) if hasattr(record, "__dict__") else None, kind)


def _size(record: Any, name: str) -> torch.Size:
    return torch.Size(_expect(length, int) for length in _field(record, name, tuple))


def _tensor(record: Any) -> TensorStorageMetadata:
    properties = _field(_field(record, "properties", object), "state", tuple)
    chunks = [
        ChunkStorageMetadata(_size(chunk, "offsets"), _size(chunk, "sizes")) for chunk in _field(record, "chunks", list)
    ]
    dtype = _expect(next(iter(properties), None), torch.dtype)
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _size(record, "size"), chunks)


def _index(record: Any) -> MetadataIndex:
    return MetadataIndex(_field(record, "fqn", str), _size(record, "offset"), _field(record, "index", int))


def _place(record: Any, files: Set[str]) -> _StorageInfo:
    name = _field(record, "relative_path", str)
    if name not in files:
        raise ValueError(f"it points to {name!r}, which is no file of the checkpoint")
    # Private, but what DCP's own reader looks a tensor up by since torch 2.0; there is no public name for it.
    return _StorageInfo(name, _field(record, "offset", int), _field(record, "length", int))
