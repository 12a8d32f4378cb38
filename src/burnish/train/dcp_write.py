"""How tensors are written by torch.distributed.checkpoint (DCP): from copies that training cannot reach, and summed.

The files are DCP's; which folder they go to, and when it counts as a checkpoint, is checkpoint.py's.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from burnish.train.states import Coded, local_part
from burnish.train.together import Together


@dataclass(frozen=True, slots=True)
class Piece:
    """What this rank holds of one tensor: where it belongs in the whole, and its values."""

    layout: tuple[Any, ...]
    items: tuple[WriteItem, ...]
    values: Tensor


def pieces(tensors: Mapping[str, Tensor | Coded]) -> dict[str, Piece]:
    """The pieces of this rank, by name, with the tensors' own memory."""
    return {name: _piece(name, _values(tensor)) for name, tensor in tensors.items()}


class HostCopies:
    """Pieces in host memory, pinned for those of a CUDA device, whose buffers serve every further copy.

    They take as much memory as the pieces themselves, from the first copy on.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, Piece] = {}

    def take(self, tensors: Mapping[str, Tensor | Coded]) -> dict[str, Piece]:
        """Copies of the pieces as they are now. What an earlier call returned is overwritten."""
        kept, self._pieces = self._pieces, {}
        for name, tensor in tensors.items():
            values = _values(tensor)
            piece = kept.pop(name, None)
            if piece is None or piece.layout != _layout(values):
                piece = _piece(name, values, _host_buffer(local_part(values)))
            piece.values.copy_(local_part(values), non_blocking=True)
            self._pieces[name] = piece
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return self._pieces


def _values(tensor: Tensor | Coded) -> Tensor:
    return tensor.values() if isinstance(tensor, Coded) else tensor.detach()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    spread = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    return (tensor.shape, tensor.dtype, tensor.device, *spread)


def _piece(name: str, tensor: Tensor, values: Tensor | None = None) -> Piece:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({name: tensor})
    items = tuple(planner.create_local_plan().items)
    return Piece(_layout(tensor), items, local_part(tensor) if values is None else values)


def _host_buffer(values: Tensor) -> Tensor:
    return torch.empty_like(values, device="cpu", pin_memory=values.is_cuda, memory_format=torch.contiguous_format)


def write_pieces(ranks: Together, folder: Path, own_pieces: Mapping[str, Piece]) -> dict[str, dict[str, Any]]:
    """Write the pieces of all ranks, those that several hold once; returns size and checksum of every file.

    All ranks raise what goes wrong on one.
    """
    writer, planner = SummingWriter(folder), PiecePlanner(own_pieces)

    def plan(plans: list[SavePlan]) -> list[SavePlan]:
        return writer.prepare_global_plan(planner.create_global_plan(plans)[0])

    def finish(results: list[list[WriteResult]]) -> list[None]:
        writer.finish(planner.metadata, results)
        return [None] * ranks.count

    own_plan = ranks.divide(lambda: writer.prepare_local_plan(planner.create_local_plan()), plan)
    ranks.divide(lambda: writer.write_data(planner.finish_plan(own_plan), planner).wait(), finish)
    return {name: facts for files in ranks.each(lambda: writer.files) for name, facts in files.items()}


class PiecePlanner(DefaultSavePlanner):
    """Plans the writing of pieces that are there already."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False)
        self._pieces = pieces

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for piece in self._pieces.values() for item in piece.items])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._pieces[index.fqn].values


class SummingWriter(FileSystemWriter):
    """Writes and syncs one file a rank, and knows the size and checksum of what it meant to write, by file: `files`.

    Leaves out of `.metadata` where the checkpoint was written: a path has no business in a folder that moves.
    """

    def __init__(self, folder: Path) -> None:
        # One thread, because DCP loses the exceptions of any other: a full disk would pass for a success. No copying
        # ahead, which would be on a device that this thread never chose.
        super().__init__(folder, thread_count=1, per_thread_copy_ahead=0, sync_files=True)
        self.fs = self._summing = _SummingFiles()

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return self._summing.files

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # What is behind an exception does not travel to other ranks.
            raise _root_cause(error) from None


class _SummingFiles(FileSystem):
    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with _SummingFile(io.FileIO(path, mode.replace("b", ""))) as stream:
            yield stream
        self.files[Path(path).name] = {"bytes": stream.num_bytes, "crc32": f"{stream.checksum:08x}"}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class _SummingFile(io.BufferedWriter):
    checksum = 0
    num_bytes = 0

    def write(self, data: Any, /) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        self.num_bytes += memoryview(data).nbytes
        return super().write(data)

    def fileno(self) -> int:
        self.flush()  # DCP syncs by the number of the file, what is still in the buffer or not
        return super().fileno()


def _root_cause(error: BaseException) -> BaseException:
    """The OSError behind `error`, if any: torch's zip writer, closing after a failed write, raises its own."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__context__
    return behind or error
