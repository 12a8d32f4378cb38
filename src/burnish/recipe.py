"""Recipes read and written: YAML with `a.b=c` overrides in, one message for all faults, help and JSON schema out.

All of it comes from the fields of `config.py`. Imports no torch.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ValidationError

from burnish.config import Recipe, RecipeError, Section
from burnish.names import KEYS, plain, remedy_for_key, remedy_for_value


class _Loader(yaml.SafeLoader):
    """YAML as recipes are written: 1e-5 is a number, `no` and dates are text, a key given twice is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# Plain decimals alone: to YAML 1.1 a slice such as 12:30 is a number to base 60.
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?((\d[\d_]*\.[\d_]*|\.\d+)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML by the rules of `_Loader`. Raises RecipeError with `origin` and the place of the fault."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


def apply_override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `tree` with one `a.b=value` set; list items are numbers: `data.train.0.path=x`. The value is YAML.

    Raises RecipeError where the text is no override or the path leads through a value.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override {override!r} is not of the form a.b=value, such as optim.lr=2e-5")
    value = parse_yaml(text, f"override {override!r}")

    def set_at(node: Any, keys: Sequence[str], done: str) -> Any:
        if not keys:
            return value
        key, rest = keys[0], keys[1:]
        here = f"{done}.{key}".lstrip(".")
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise RecipeError(
                    f"override {override!r}: {done} has {len(node)} items; {key!r} must be 0 to {len(node) - 1}"
                )
            return [set_at(item, rest, here) if i == int(key) else item for i, item in enumerate(node)]
        if node is None:
            node = {}
        if isinstance(node, str) and rest == () and key != "path":
            node = {"path": node}
        if not isinstance(node, dict):
            raise RecipeError(f"override {override!r}: {done}={node!r} has no keys below it")
        return {**node, key: set_at(node.get(key), rest, here)}

    return set_at(tree, tuple(path.split(".")), "")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with `a.b=c` overrides applied.

    Raises RecipeError: one message that names key, value, rule and remedy of every fault.
    """
    file = Path(path)
    if not file.is_file():
        raise RecipeError(
            f"recipe {file} does not exist; give the path of a YAML file, such as examples/quickstart.yaml"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe {file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    tree = parse_yaml(text, str(file))
    if tree is not None and not isinstance(tree, dict):
        raise RecipeError(
            f"recipe {file} is a {type(tree).__name__}; it must be a mapping with the keys "
            + ", ".join(Recipe.model_fields)
        )
    return recipe_from_dict(tree or {}, overrides)


def recipe_from_dict(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a plain mapping, as `read_recipe` reads it. Raises RecipeError."""
    for override in overrides:
        tree = apply_override(tree, override)
    return validate(Recipe, tree)


SectionType = typing.TypeVar("SectionType", bound=Section)


def validate(section: type[SectionType], tree: Any) -> SectionType:
    """`tree` as `section`; strict, but a list serves where a tuple is meant. Raises RecipeError."""
    try:
        return section.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        faults = _faults(section, error)
        lines = (
            faults
            if len(faults) == 1
            else [f"{len(faults)} faults in the recipe:", *(f"  {fault}" for fault in faults)]
        )
        raise RecipeError("\n".join(lines)) from None
    except TypeError as error:
        raise RecipeError(f"recipe: {error}; use plain YAML values") from None


def _faults(section: type[Section], error: ValidationError) -> list[str]:
    # A union reports the complaints of each of its members; those of the deepest place are the ones to show.
    by_place: dict[tuple[str, ...], list[Any]] = {}
    for fault in error.errors(include_url=False):
        by_place.setdefault(tuple(_place(section, fault)), []).append(fault)
    deepest = [p for p in by_place if not any(len(other) > len(p) and other[: len(p)] == p for other in by_place)]
    return [_at(section, list(place), by_place[place]) for place in deepest]


def _at(section: type[Section], keys: list[str], faults: list[Any]) -> str:
    """What is wrong at one place, and what to do about it."""
    said = _joined(list(dict.fromkeys(_fault(section, keys, fault) for fault in faults)))
    value = faults[0]["input"]
    known = remedy_for_value(_schema_path(keys), value)
    if known is not None:
        return f"{said}; {known}"
    choices = {
        choice
        for fault in faults
        if fault["type"] == "literal_error"
        for choice in re.findall(r"'([^']*)'", fault["ctx"]["expected"])
    }
    near = difflib.get_close_matches(value.lower(), sorted(choices), 1, 0.5) if isinstance(value, str) else []
    return f"{said}; did you mean {near[0]}?" if near else said


def _joined(complaints: list[str]) -> str:
    """What several members of a union say of one value, the key and value said once."""
    first, *others = complaints
    return " or ".join(
        [first, *(other.partition(": must ")[2] and f"must {other.partition(': must ')[2]}" for other in others)]
    )


def _place(section: type[Section], fault: Any) -> list[str]:
    """The path as the user wrote it: pydantic adds the names of union members to it."""
    loc: tuple[int | str, ...] = fault["loc"]
    keys: list[str] = []
    node: Any = section
    for part in loc:
        if isinstance(part, int):
            keys.append(str(part))
            continue
        members = _sections(node)
        owner = next((m for m in members if part in m.model_fields), None)
        if owner is not None:
            node = owner.model_fields[part].annotation
            keys.append(part)
        elif part == loc[-1] and (
            fault["type"] == "extra_forbidden"
            or not (
                re.search(r"[\[\]()]|^(int|float|str|bool|constrained|tuple|literal|function)", part)
                or any(part == m.__name__ for m in members)
            )
        ):
            keys.append(part)
    return keys


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for arg in typing.get_args(annotation) for s in _sections(arg)]


def _fault(section: type[Section], keys: list[str], fault: Any) -> str:
    name = ".".join(keys) or "recipe"
    value = json.dumps(fault["input"], ensure_ascii=False, default=str)
    shown = value if len(value) <= 80 else value[:77] + "..."
    if fault["type"] == "extra_forbidden":
        return f"{name}={shown}: no such key; {_meant(section, keys)}"
    if fault["type"] == "missing":
        return f"{name}: missing; {_doc(section, keys)}"
    if fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
        return (
            message if re.match(r"[a-z_]+\.[a-z_]+|exactly one|every source", message) else f"{name}={shown}: {message}"
        )
    message = (fault["msg"][0].lower() + fault["msg"][1:]).replace("input should be", "must be")
    message = re.sub("must be (a valid array|an object|a valid dictionary)", lambda m: _IN_YAML[m[1]], message)
    return f"{name}={shown}: {message}"


def _meant(section: type[Section], keys: list[str]) -> str:
    """Which key an unknown one stands for: one that others call so, is written almost so, or is of another section."""
    above, name = _schema_path(keys[:-1]), keys[-1]
    remedy = remedy_for_key(name, above)
    if remedy is not None:
        return remedy
    known = sorted(path for path, _, _ in fields(section) if not path.startswith("data.validation."))
    elsewhere = [k for k in known if k.rpartition(".")[2] == plain(name)]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    siblings = sorted(path.rpartition(".")[2] for path, _, _ in fields(section) if path.rpartition(".")[0] == above)
    near = difflib.get_close_matches(plain(name), siblings, 1, 0.6)
    if near:
        return f"did you mean {'.'.join([*keys[:-1], near[0]])}?"
    foreign = difflib.get_close_matches(plain(name), KEYS, 1, 0.9)
    return remedy_for_key(foreign[0]) or "" if foreign else f"the keys here are {', '.join(siblings)}"


def remedy_for_option(option: str) -> str | None:
    """What to write where a key, ours or another project's, was given as `--learning_rate`; None for no such key."""
    name = plain(option)
    paths = [path for path, _, _ in fields(Recipe) if not path.startswith("data.validation.")]
    keys = [path for path in paths if path == name] or [path for path in paths if path.rpartition(".")[2] == name]
    remedy = f"set {' or '.join(keys)}" if keys else remedy_for_key(name.rpartition(".")[2], name.rpartition(".")[0])
    return None if remedy is None else f"keys of the recipe are given as a.b=c: {remedy}"


_IN_YAML = {
    "a valid array": "must be a list, such as [a, b]",
    "an object": "must be a mapping of keys, such as {key: value}",
    "a valid dictionary": "must be a mapping of keys, such as {key: value}",
}
"""pydantic's words for JSON in those of YAML."""


def _schema_path(keys: Sequence[str]) -> str:
    return ".".join(k for k in keys if not k.isdigit())


def _doc(section: type[Section], keys: Sequence[str]) -> str:
    wanted = _schema_path(keys)
    return next((field.description or "" for path, field, _ in fields(section) if path == wanted), "")


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted path, pydantic field, type as text) of every key below `section`, depth first, sections included."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field, type_text(field.annotation)
        for nested in _sections(field.annotation):
            yield from fields(nested, f"{path}.")


def type_text(annotation: Any) -> str:
    """A field's type as a user would say it: `int | null`, `error | drop`, `[section, ...]`."""
    if annotation is None or annotation is type(None):
        return "null"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_text(args[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_text(a) for a in args))
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin is tuple:
        return f"[{type_text(args[0])}, ...]" if args[-1] is Ellipsis else f"[{', '.join(type_text(a) for a in args)}]"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "{" + ", ".join(annotation.model_fields) + "}" if len(annotation.model_fields) == 1 else "section"
    if origin is dict:
        return "mapping"
    return {"str": "text", "bool": "true | false"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def help_text() -> str:
    """Every key with its type, default and meaning, for `burnish sft --help`."""
    lines: list[str] = []
    for path, field, kind in fields(Recipe):
        depth = path.count(".")
        name = path.rpartition(".")[2]
        if depth == 0:
            lines += ["", f"{name}:  {field.description}"]
        elif path.startswith("data.validation."):
            continue
        else:
            default = "" if field.is_required() else f" = {json.dumps(field.default, default=list)}"
            lines += [f"{'  ' * depth}{name}: {kind}{default}", f"{'  ' * depth}    {field.description}"]
    return "\n".join(lines).lstrip("\n")


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "burnish recipe",
    }


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `read_recipe` reads back to an equal one."""
    return yaml.dump(json.loads(recipe.model_dump_json()), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
