"""Where the rows of a source lie: its path becomes files, a saved `datasets` folder or a hub name. Reads no row."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from burnish.config import SourceConfig
from burnish.types import UserError

KINDS = (".jsonl", ".json", ".parquet")
_SAVED = ("state.json", "dataset_dict.json")
_SUFFIX = re.compile(r"(.*)@(\[.*\])", re.DOTALL)
_BOUNDS = re.compile(r"\[?(-?\d*):(-?\d*)\]?")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
_FILE_SUFFIXES = (*KINDS, *_COMPRESSED, ".csv", ".tsv", ".txt", ".arrow")


@dataclass(frozen=True, slots=True)
class Place:
    """Exactly one of `files`, `folder` (saved by `datasets`) and `hub` is set. `bounds` is the slice; None is open."""

    name: str
    bounds: tuple[int | None, int | None]
    files: tuple[Path, ...] = ()
    folder: Path | None = None
    hub: str | None = None


def locate(source: SourceConfig, key: str) -> Place:
    """Find a source on disk, relative to the working directory, or take its path for a hub name.

    `key` is the recipe's name for the source, such as `data.train.0`. Raises UserError where nothing is found.
    """
    path, bounds = _path_and_bounds(source, key)
    place = Path(path).expanduser()
    name = source.name
    if place.is_dir():
        if any((place / mark).is_file() for mark in _SAVED):
            return Place(name or place.resolve().name, bounds, folder=place.absolute())
        return Place(name or place.resolve().name, bounds, files=_in_folder(place, f"{key}.path={path}"))
    if place.exists():
        return Place(name or place.stem, bounds, files=(_supported(place, f"{key}.path={path}"),))
    if glob.has_magic(path):
        return Place(name or _stem(place), bounds, files=_matching(place, f"{key}.path={path}"))
    if _HUB_NAME.fullmatch(path) and not path.endswith(_FILE_SUFFIXES):
        return Place(name or path, bounds, hub=path)
    raise UserError(
        f"{key}.path={path}: there is no file or folder {place.absolute()}{_near(place)}; paths are relative to the "
        "working directory, and a data set of the hub is named org/name"
    )


def _path_and_bounds(source: SourceConfig, key: str) -> tuple[str, tuple[int | None, int | None]]:
    match = _SUFFIX.fullmatch(source.path)
    if match is None:
        return source.path, _bounds(source.slice, f"{key}.slice=") if source.slice is not None else (None, None)
    if source.slice is not None:
        raise UserError(f"{key}: path={source.path} and slice={source.slice} both name a slice; keep one of them")
    return match[1], _bounds(match[2], f"{key}.path={match[1]}@")


def _bounds(text: str, key: str) -> tuple[int | None, int | None]:
    match = _BOUNDS.fullmatch(text)
    if match is None or match[0] == "":
        raise UserError(
            f"{key}{text}: a slice is a:b with whole numbers, either of them left out, such as :1000 or -100:"
        )
    start, stop = (int(bound) if bound else None for bound in match.groups())
    return start, stop


def _in_folder(folder: Path, setting: str) -> tuple[Path, ...]:
    files = _readable(folder.iterdir())
    if not files:
        deeper = next((file.parent for file in sorted(folder.rglob("*")) if file.suffix in KINDS), None)
        hint = f"; {deeper} holds some: name that folder" if deeper else ""
        raise UserError(f"{setting}: the folder {folder.absolute()} holds no {', '.join(KINDS)} file{hint}")
    return files


def _matching(pattern: Path, setting: str) -> tuple[Path, ...]:
    files = _readable(map(Path, glob.glob(str(pattern), recursive=True)))
    if not files:
        raise UserError(f"{setting}: no {', '.join(KINDS)} file matches {pattern.absolute()}")
    return files


def _readable(entries: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(sorted(entry.absolute() for entry in entries if entry.suffix in KINDS and entry.is_file()))


def _supported(file: Path, setting: str) -> Path:
    if file.suffix in KINDS:
        return file.absolute()
    remedy = "decompress it first" if file.suffix in _COMPRESSED else "convert it to .jsonl"
    raise UserError(
        f"{setting}: a {file.suffix or 'file without a suffix'} cannot be read, only {', '.join(KINDS)}; {remedy}"
    )


def _near(place: Path) -> str:
    """What stands where the path was looked for, as the end of a sentence."""
    folder = next(parent for parent in place.absolute().parents if parent.is_dir())
    if folder != place.absolute().parent:
        return f", nor the folder {place.absolute().parent} ({folder} is there)"
    near = difflib.get_close_matches(place.name, [entry.name for entry in folder.iterdir()], 3, 0.5)
    return f"; near it is {', '.join(near)}" if near else ""


def _stem(pattern: Path) -> str:
    """A name for the files of a glob: its last part without wildcards."""
    return next((Path(part).stem for part in reversed(pattern.parts) if not glob.has_magic(part)), "rows")
