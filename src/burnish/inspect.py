"""`burnish inspect`: what would be trained of rows, shown on a terminal, as a page or as JSON lines.

Arguments in, output and exit status out; `inspector.py` reads and counts, `observe.inspect_terminal` and
`observe.inspect_page` draw.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, cast

import numpy as np

from burnish.config import Recipe, RecipeError, SourceConfig
from burnish.files import write_whole
from burnish.inspector import Inspector
from burnish.observe.inspection import InspectedRow, Inspection, plural
from burnish.parts import Parts
from burnish.recipe import read_recipe, recipe_from_dict
from burnish.types import UserError

DEFAULT_LIMITS: Mapping[str, int | None] = {"terminal": 5, "html": 200, "json": None}


@dataclass(frozen=True)
class Request:
    """The arguments of `burnish inspect`. `target` is a recipe (.yaml) or rows, as a source's `path` takes them."""

    target: str
    overrides: Sequence[str] = ()
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: str | None = None
    limit: int | None = None
    format: Literal["terminal", "html", "json"] = "terminal"
    out: str | None = None
    tokens: bool = False

    @property
    def is_recipe(self) -> bool:
        return self.target.endswith((".yaml", ".yml"))


def inspect(request: Request) -> int:
    """Show what the request asks for; the exit status: 0 where every row rendered, 3 where some give no sample.

    Raises UserError for arguments, files or rows as a whole that cannot be used.
    """
    try:
        return _inspect(request)
    except UserError as error:
        if request.is_recipe:
            raise
        # The recipe that is made of the arguments names the rows' keys otherwise than the user does.
        raise type(error)(re.sub(r"data\.train\.0(\.path=|\.|: )", "", str(error))) from None


def _inspect(request: Request) -> int:
    if request.format == "html" and request.out is None and sys.stdout.isatty():
        raise UserError("--format html writes a page; name a file for it with --out, or redirect the output")
    if request.tokens and request.format != "terminal":
        raise UserError(f"--tokens is for --format terminal; {request.format} holds the boundaries anyway, so leave it")
    recipe = requested_recipe(request)
    limit = DEFAULT_LIMITS[request.format] if request.limit is None else request.limit
    parts = Parts(recipe, request.is_recipe)
    if request.out is not None:
        _refuse_inputs(Path(request.out), [Path(request.target), *parts.files])
    inspector = Inspector(parts, request.target)
    if request.format == "html":
        return _show_page(inspector, limit, request.out)
    with ExitStack() as stack:
        file = stack.enter_context(_opened(request.out)) if request.out is not None else _standard_output()
        show = _show_lines if request.format == "json" else _show_terminal
        return show(inspector, limit, file, request.tokens)


def _refuse_inputs(out: Path, read: Sequence[Path]) -> None:
    """Raises UserError where `out` is one of the files that are read, under whatever name."""
    if out.is_file() and any(file.is_file() and file.samefile(out) for file in read):
        raise UserError(f"--out={out} is a file that is read; name another")


class _Output:
    """A text file of which faults of writing are UserErrors, but for a reader that went away."""

    def __init__(self, file: TextIO, name: str) -> None:
        self._file = file
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with self._named():
            return self._file.write(text)

    def flush(self) -> None:
        with self._named():
            self._file.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            if self._file is sys.stdout:
                sys.stdout = None  # what it holds back cannot be written at exit either
            raise _cannot_write(self._name, error) from None


def _cannot_write(name: str, error: OSError) -> UserError:
    return UserError(f"{name} cannot be written: {error.strerror}; name another file with --out")


def _standard_output() -> TextIO:
    return cast(TextIO, _Output(sys.stdout, "standard output"))


def _writable(path: str) -> TextIO:
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise _cannot_write(f"--out={path}", error) from None


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    file = _writable(path)
    output = _Output(file, f"--out={path}")
    try:
        yield cast(TextIO, output)
        output.flush()
    finally:
        with suppress(OSError):  # what could not be written has been said
            file.close()


def requested_recipe(request: Request) -> Recipe:
    """The recipe of a request; of rows alone one with those as its one training source. Raises RecipeError."""
    options: dict[str, Any] = {}
    if request.tokenizer is not None:
        options["model.tokenizer"] = request.tokenizer
    if request.chat_template is not None:
        options["data.chat_template"] = request.chat_template
    if request.chat_template_kwargs is not None:
        options["data.chat_template_kwargs"] = _kwargs(request.chat_template_kwargs)
    written = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    _check_overrides(request)
    if request.is_recipe:
        return read_recipe(request.target, [*request.overrides, *written])
    if request.tokenizer is None:
        raise RecipeError(
            f"--tokenizer is missing: {request.target} is taken for rows, which need one; give --tokenizer DIR, "
            "or a recipe (.yaml)"
        )
    keys = [o if "." in o.partition("=")[0] else f"data.train.0.{o}" for o in request.overrides]
    # The model is never opened, and a stream's rows are counted here.
    tree = {"model": {"path": request.tokenizer}, "data": {"train": [{"path": request.target}]}, "train": {"steps": 1}}
    return recipe_from_dict(tree, [*keys, *written])


def _check_overrides(request: Request) -> None:
    for override in request.overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise RecipeError(
                f"{override}: one target is inspected, here {request.target}; name several files by a glob "
                "('rows/*.jsonl') or as data.train of a recipe, and keys as key=value"
            )
        if request.is_recipe and key in SourceConfig.model_fields:
            raise RecipeError(f"{override}: that is a source's key; did you mean data.train.0.{override}?")


def _kwargs(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RecipeError(f'--chat-template-kwargs={text}: not JSON ({error}); write {{"key": value}}') from None
    if not isinstance(value, dict):
        raise RecipeError(f'--chat-template-kwargs={text}: must be a JSON object, such as {{"enable_thinking": false}}')
    return value


def _show_terminal(inspector: Inspector, limit: int | None, file: TextIO, tokens: bool) -> int:
    from burnish.observe.inspect_terminal import Terminal

    terminal = Terminal(file, tokens)
    terminal.opening(inspector.title, inspector.parts.facts)
    for row in inspector.rows(limit):
        terminal.row(row)
        file.flush()
    found = inspector.inspection(())
    terminal.summary(found, inspector.num_rows)
    return _status(found)


def _show_lines(inspector: Inspector, limit: int | None, file: TextIO, tokens: bool) -> int:
    """One JSON object a row; what is found over all of them goes to standard error."""
    from burnish.observe.inspect_terminal import harmless

    for row in inspector.rows(limit):
        file.write(json.dumps(as_json(row)) + "\n")
        file.flush()
    found = inspector.inspection(())
    for warning in found.warnings:
        count = f"{plural(warning.count, found.unit)} " if warning.count else ""
        print(harmless(f"warning: {count}{warning.text}"), file=sys.stderr)
    return _status(found)


def as_json(row: InspectedRow) -> dict[str, Any]:
    """A row as one object of `--format json`."""
    place: dict[str, Any] = {"index": row.index, "source": row.source}
    if row.message is not None:
        place["message"] = row.message
    if row.error is not None:
        # An error often says itself which message it is.
        is_named = row.message is None or row.error.startswith("messages[")
        where = row.where if is_named else f"{row.where}, messages[{row.message}]"
        return {**place, "error": f"{where}: {row.error}"}
    numbers = {weight: float(str(weight)) for weight in np.unique(row.loss_weights)}
    return {
        **place,
        "input_ids": row.tokens.tolist(),
        "loss_weights": [numbers[weight] for weight in row.loss_weights],
        "text": row.text,
        "spans": [list(span) for span in row.spans],
        "warnings": [{"kind": kind, "text": text} for kind, text in row.warnings],
    }


def _show_page(inspector: Inspector, limit: int | None, out: str | None) -> int:
    from burnish.observe.inspect_page import render

    shown: list[InspectedRow] = []
    with _Progress() as progress:
        for number, quota in enumerate(inspector.quotas(limit)):
            for count, row in enumerate(inspector.source_rows(number)):
                if quota is None or count < quota or (row.source, row.index) in inspector.linked:
                    shown.append(row)
                progress.advance()
    found = inspector.inspection(shown)
    page = render(found)
    if out is not None:
        _write_page(out, page)
    stdout = _standard_output()
    stdout.write(page if out is None else f"{out}\n")
    stdout.flush()
    return _status(found)


def _write_page(out: str, page: str) -> None:
    """Whole or not at all where `out` is to be a regular file; what else it names is written to, not replaced."""
    place = Path(out).resolve()
    if place.exists() and not place.is_file():
        with _opened(out) as file:
            file.write(page)
        return
    try:
        write_whole(place, page)
    except OSError as error:
        raise _cannot_write(f"--out={out}", error) from None


class _Progress:
    """How many rows are read, on standard error where that is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._status = self._console.status("reading rows") if self._console.is_terminal else None
        self._rows = 0

    def __enter__(self) -> _Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def advance(self) -> None:
        self._rows += 1
        if self._status is not None and self._rows % 100 == 0:
            self._status.update(f"{self._rows:,} rows read")


def _status(found: Inspection) -> int:
    return 3 if any(source.errors or source.dropped for source in found.sources) else 0
