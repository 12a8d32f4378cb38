"""Random access to rows kept as Arrow tables: .parquet, folders saved by `datasets`, the hub, `datasets` in memory.

`datasets` maps its tables into memory from disk, so a pickled table is a path unless it was made in memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from burnish.data.json_files import FileFacts, file_hash
from burnish.data.schema import Fill, Schema, Signature, schema_of
from burnish.types import UserError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_BATCH = 1_000


@dataclass(frozen=True, eq=False, slots=True)
class Table:
    """Rows of an Arrow table; `label` names it in messages. A column that is null in a row is absent from it."""

    dataset: datasets.Dataset
    label: str
    schema: Schema
    facts: FileFacts

    def __len__(self) -> int:
        return self.facts.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return without_nulls(self.dataset[row])

    def where(self, row: int) -> str:
        return f"{self.label} row {row}"


def open_parquet(path: Path) -> Table:
    """A .parquet file, as a table that `datasets` keeps in its cache. The hash is that of the file's bytes."""
    dataset = load("parquet", data_files=str(path), split="train")
    schema, _ = _scan(dataset)
    _refuse_media(dataset, schema, path.name)
    return Table(dataset, path.name, schema, FileFacts(str(path), path.stat().st_size, len(dataset), file_hash(path)))


def open_saved(folder: Path, split: str) -> Table:
    """A folder written by `save_to_disk`; `split` picks one of several. Raises UserError where it has none."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.DatasetDict):
        return open_table(saved, folder.name, str(folder))
    if split not in saved:
        raise UserError(f"{folder} has the splits {', '.join(map(str, saved))}, and split={split} is none of them")
    return open_table(saved[split], f"{folder.name}[{split}]", str(folder))


def open_hub(name: str, config: str | None, split: str) -> Table:
    """A data set of the hub. Raises UserError where it cannot be had."""
    dataset = load(name, name=config, split=split)
    return open_table(dataset, f"{name}[{split}]", name)


def open_table(dataset: datasets.Dataset, label: str, path: str) -> Table:
    """A table whose hash is that of its rows, wherever and in whatever pieces they are stored."""
    schema, digest = _scan(dataset)
    _refuse_media(dataset, schema, label)
    return Table(dataset, label, schema, FileFacts(path, dataset.data.nbytes, len(dataset), digest))


def load(path: str, **arguments: Any) -> Any:
    """`datasets.load_dataset`. Raises UserError where the data set, its configuration or its split is not to be had."""
    import datasets

    datasets.disable_progress_bars()  # they would run through the run's own lines
    try:
        return datasets.load_dataset(path, **arguments)
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"{path} is no file or folder here and cannot be had from the hub: {error}; give the path of a file, or "
            "download the data set where there is a network and name its folder"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: {error} (the source's `split` and `config` choose)") from error


def without_nulls(value: Any) -> Any:
    """`value` without its null keys: Arrow gives every struct the keys of all of them, null where a row had none."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _scan(dataset: datasets.Dataset) -> tuple[Schema, str]:
    """The schema of a table, and a hash of its rows that does not depend on how they are cut into files."""
    import pyarrow as pa

    digest = hashlib.blake2b(digest_size=16)
    signatures: Counter[Signature] = Counter()
    for batch in dataset.with_format("arrow").iter(batch_size=_BATCH):
        table = cast("pa.Table", batch)
        # A copy, because a slice's buffers may be written with more than the slice in them.
        plain = table.take(np.arange(table.num_rows)).combine_chunks().replace_schema_metadata()
        with pa.BufferOutputStream() as buffer:
            with pa.ipc.new_stream(buffer, plain.schema) as writer:
                writer.write_table(plain)
            digest.update(buffer.getvalue())
        signatures.update(dict(_signatures(plain)))
    return schema_of(signatures), digest.hexdigest()


def _refuse_media(dataset: datasets.Dataset, schema: Schema, label: str) -> None:
    """Raise UserError for images, audio and video, before `datasets` would decode them."""
    filled = frozenset().union(*schema.shapes)
    media = [name for name, feature in dataset.features.items() if name in filled and _holds_media(feature)]
    if media:
        raise UserError(
            f"{label}: column {media[0]} holds images, audio or video; multimodal rows are not supported yet"
        )


def _holds_media(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_media, feature.values()))
    inner = getattr(feature, "feature", None)
    return _holds_media(inner) if inner is not None else type(feature).__name__ in ("Image", "Audio", "Video")


def _signatures(table: pa.Table) -> Iterator[tuple[Signature, int]]:
    fills = np.stack([_fills(column) for column in table.columns], axis=1)
    kinds, counts = np.unique(fills, axis=0, return_counts=True)
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        yield tuple(zip(table.column_names, map(Fill, kind), strict=True)), count


def _fills(column: pa.ChunkedArray) -> np.ndarray:
    """How each row fills a column, uint8 [rows]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    filled = np.where(column.is_null().to_numpy(), Fill.NULL, Fill.FILLED).astype(np.uint8)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        lengths = pc.call_function("binary_length", [column])
    elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.call_function("list_value_length", [column])
    else:
        return filled
    filled[lengths.fill_null(1).to_numpy() == 0] = Fill.EMPTY
    return filled
