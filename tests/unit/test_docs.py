"""The documentation is held to the code: commands parse, recipes are valid, links lead to files, none is forgotten."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.cli import parse
from burnish.config import Recipe, RecipeError
from burnish.recipe import apply_override, fields, json_schema, parse_yaml, read_recipe, recipe_from_dict

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FRAGMENT = "# fragment\n"
"""First line of a YAML block that is only part of a recipe."""
REGISTRIES = re.compile(r"pypi\.org|pythonhosted|index-url|download\.pytorch\.org|conda\.anaconda|npmjs", re.IGNORECASE)
MACHINE_PATHS = re.compile(r"(?<![\w.~-])/(?:home|root|work|Users|tmp|mnt)/\w+")


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(page, text) of every fenced block of a language."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield page.name, block


LAUNCHERS = ("burnish", "torchrun", "srun")


def commands() -> Iterator[tuple[str, str]]:
    """(page, command line) of every command of burnish in a block of bash, started by itself or by a launcher."""
    for page, block in blocks("bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].rpartition("/")[2] in LAUNCHERS:
                yield page, line


def arguments(line: str) -> list[str]:
    """What burnish gets of a command line."""
    words = shlex.split(line, comments=True)
    names = [word.rpartition("/")[2] for word in words]
    words = words[names.index("burnish") + 1 :]
    return words[: words.index(">")] if ">" in words else words


RECIPES = [(page, text) for page, text in blocks("yaml") if not text.startswith(FRAGMENT)]
COMMANDS = list(commands())


def test_documentation_has_recipes_and_commands() -> None:
    # Else the tests below would pass on nothing.
    assert len(RECIPES) >= 7
    assert len(COMMANDS) >= 9
    assert {line.split()[0] for _, line in COMMANDS} >= set(LAUNCHERS)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line.strip() for _, line in COMMANDS])
def test_command_is_one_the_command_line_takes(page: str, line: str) -> None:
    words = arguments(line)
    if "--help" in words:
        with pytest.raises(SystemExit) as left:
            parse(words)
        assert left.value.code == 0
        return
    parsed = parse(words)
    if parsed.command in ("sft", "plan"):
        tree = {"model": {"path": "m"}, "data": {"train": ["rows.jsonl"]}}
        recipe_from_dict(tree, parsed.overrides)


@pytest.mark.parametrize(("page", "text"), RECIPES, ids=[f"{page}-{n}" for n, (page, _) in enumerate(RECIPES)])
def test_recipe_in_a_page_is_valid(page: str, text: str) -> None:
    recipe_from_dict(parse_yaml(text, page))


WRITTEN = [
    *((f"{page}-{n}", parse_yaml(text, page)) for n, (page, text) in enumerate(RECIPES)),
    *((file.name, parse_yaml(file.read_text(encoding="utf-8"), file.name)) for file in ROOT.glob("examples/*.yaml")),
]
SCHEMA = json_schema()


def minimal(data: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {"model": {"path": "m"}, "data": {"train": "rows.jsonl"} | data, **sections}


@pytest.mark.parametrize("tree", [tree for _, tree in WRITTEN], ids=[name for name, _ in WRITTEN])
def test_schema_takes_the_recipes_of_pages_and_examples(tree: dict[str, Any]) -> None:
    assert fits(tree, SCHEMA)
    assert not fits({**tree, "seed": 1}, SCHEMA)
    for section in tree:
        assert not fits({**tree, section: {**tree[section], "unknown": 1}}, SCHEMA), section


@pytest.mark.parametrize(
    "tree",
    [
        minimal({}),
        minimal({"train": ["rows.jsonl", {"path": "more.jsonl", "weight": 0.5}]}),
        minimal({"train": {"path": "rows.jsonl"}}),
        minimal({"validation": 0.01}),
        minimal({"validation": "held.jsonl"}),
        minimal({"validation": ["held.jsonl"]}),
        minimal({"train_on": {"last_n": 2}}),
        minimal({}, evaluate={"every": 0.1}, checkpoint={"every": "epoch"}),
        minimal({}, evaluate={"every": None}, train={"compile": True}),
    ],
    ids=str,
)
def test_schema_takes_what_a_recipe_takes(tree: dict[str, Any]) -> None:
    recipe_from_dict(tree)
    assert fits(tree, SCHEMA)


@pytest.mark.parametrize(
    "tree",
    [
        minimal({"train": 3}),
        minimal({"train": [3]}),
        minimal({"train": [{"path": "rows.jsonl", "wieght": 0.5}]}),
        minimal({"validation": 2.0}),
        minimal({"validation": 0}),
        minimal({}, evaluate={"every": 1.5}),
        minimal({}, evaluate={"every": 0}),
        minimal({}, checkpoint={"every": "epochs"}),
        minimal({}, optimizer={}),
    ],
    ids=str,
)
def test_schema_refuses_what_a_recipe_refuses(tree: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        recipe_from_dict(tree)
    assert not fits(tree, SCHEMA)


JSON_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool}
ASSERTIONS = {
    "type": lambda value, name: value is None if name == "null" else is_json_type(value, name),
    "const": lambda value, constant: value == constant,
    "enum": lambda value, constants: value in constants,
    "pattern": lambda value, pattern: re.search(pattern, value) is not None,
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
    "minItems": lambda value, number: len(value) >= number,
    "maxItems": lambda value, number: len(value) <= number,
    "required": lambda value, names: value.keys() >= set(names),
}
NESTING = {"$defs", "properties", "additionalProperties", "items", "prefixItems"}
ANNOTATIONS = {"$schema", "title", "description", "default"}


def is_json_type(value: Any, name: str) -> bool:
    return isinstance(value, JSON_TYPES[name]) and isinstance(value, bool) == (name == "boolean")


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a JSON schema takes `value`, by the keywords that ours uses; a KeyError for any other."""
    if "$ref" in schema:
        return fits(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")])
    if "anyOf" in schema:
        return any(fits(value, member) for member in schema["anyOf"])
    keywords = sorted(schema.keys() - NESTING - ANNOTATIONS, key=lambda keyword: keyword != "type")
    if not all(ASSERTIONS[keyword](value, schema[keyword]) for keyword in keywords):
        return False
    if isinstance(value, list):
        members = schema.get("prefixItems") or [schema["items"]] * len(value)
        return all(fits(item, member) for item, member in zip(value, members, strict=True))
    if isinstance(value, dict):
        known, other = schema.get("properties", {}), schema["additionalProperties"]
        members = {key: known.get(key, other) for key in value}
        return all(
            member is True or (member is not False and fits(value[key], member)) for key, member in members.items()
        )
    return True


def test_fragment_is_part_of_a_recipe() -> None:
    fragments = [(page, text) for page, text in blocks("yaml") if text.startswith(FRAGMENT)]
    assert fragments
    for page, text in fragments:
        tree = {"model": {"path": "m"}, "data": {"train": ["rows.jsonl"]}} | parse_yaml(text, page)
        recipe_from_dict(tree)
        assert fits(tree, SCHEMA)


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: file.name)
def test_example_is_valid(file: Path) -> None:
    recipe = read_recipe(file)
    assert recipe.run.dir.startswith("runs/")


def test_python_in_readme_uses_a_valid_recipe() -> None:
    (block,) = [text for page, text in blocks("python") if page == "README.md"]
    assignment = ast.parse(block).body[1]
    assert isinstance(assignment, ast.Assign)
    tree = ast.literal_eval(assignment.value)
    assert recipe_from_dict(tree).run.dir == "runs/mine"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [
        link
        for link in links
        if not link.startswith(("http://", "https://", "#")) and not (page.parent / link.partition("#")[0]).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_a_page_lead_to_a_heading(page: Path) -> None:
    for target, _, anchor in re.findall(r"\]\(([\w./-]*)(#)([\w-]+)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    for table in re.findall(r"(?:^\|.*\n?)+", page.read_text(encoding="utf-8"), re.MULTILINE):
        rows = [re.sub(r"\\\||`[^`]*`", "", row) for row in table.splitlines()]
        assert {row.count("|") for row in rows} == {rows[0].count("|")}, table
        assert all(row.rstrip().endswith("|") for row in rows), table
        assert re.fullmatch(r"(\|-+)+\|", rows[1]), table


def test_architecture_lists_every_file_once() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)
    package = ROOT / "src" / "burnish"
    files = {str(f.relative_to(package)) for f in package.rglob("*.py")}
    empty = {name for name in files if name.endswith("/__init__.py")}
    assert sorted(listed) == sorted(files - empty)


def test_architecture_lists_packages_in_the_order_of_imports() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)[/.][\w/.]+` \|", text, re.MULTILINE)
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    layers = [re.findall(r"burnish\.(\w+)", layer) for layer in contract["layers"]]
    depth = {name: number for number, names in enumerate(layers) for name in names}
    depths = [depth[name] for name in listed if name != "__init__"]
    assert depths == sorted(depths)


def test_loop_in_architecture_is_the_code() -> None:
    (loop,) = [text for page, text in blocks("python") if page == "architecture.md"]
    assert loop in (ROOT / "src" / "burnish" / "loop.py").read_text(encoding="utf-8")


def test_files_named_in_pages_exist() -> None:
    package = ROOT / "src" / "burnish"
    for page in PAGES:
        names = re.findall(
            r"`((?:data|model|train|parallel|cluster|observe|tests|bench)/[\w/]+\.py)`",
            page.read_text(encoding="utf-8"),
        )
        assert not [name for name in names if not (package / name).exists() and not (ROOT / name).exists()], page.name


def test_key_reference_is_that_of_the_recipe() -> None:
    spec = importlib.util.spec_from_file_location("key_reference", ROOT / "docs" / "key_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert page == module.with_reference(page), "docs/recipes.md is behind the recipe's fields: run `make docs`"


def test_keys_named_in_pages_exist() -> None:
    known = set(_known_keys())
    sections = {key.partition(".")[0] for key in known}
    pattern = re.compile(rf"`((?:{'|'.join(sorted(sections))})\.[a-z_.]+)[:`]")
    for page in PAGES:
        named = set(pattern.findall(page.read_text(encoding="utf-8")))
        files = {name for name in named if name.endswith((".py", ".yaml", ".json", ".jsonl"))}
        assert not sorted(named - files - known), page.name


def test_keys_that_stand_for_those_of_other_launchers_exist() -> None:
    page = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## From other launchers\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (?P<theirs>.*) \| (?P<ours>[^|]*) \|$", section, re.MULTILINE)
    assert len(rows) >= 25
    kinds = {path: kind for path, _, kind in fields(Recipe)}
    known = {name for path in kinds for name in (path, path.rpartition(".")[2])}
    values = {value for kind in kinds.values() for value in re.findall(r"\w+", kind)}
    for _, ours in rows:
        for text in re.findall(r"`([^`]+)`", ours):
            for part in text.split(", "):
                key, _, value = part.partition(":")
                assert key in known | values | {"parallel"}, ours
                assert value.strip() in values | {"", "N"} or value.strip().isdigit(), ours


def _known_keys() -> Iterator[str]:
    for path, _, _ in fields(Recipe):
        yield path


def test_nothing_names_a_package_registry_or_a_place_on_a_machine() -> None:
    suffixes = {".md", ".py", ".yaml", ".toml", ".txt", ".json", ".jinja", ""}
    folders = [ROOT / "docs", ROOT / "examples", ROOT / ".ci", ROOT / "bench", ROOT / "src"]
    files = [f for folder in folders for f in folder.rglob("*") if f.is_file() and f.suffix in suffixes]
    for file in [*files, *PAGES, ROOT / "Makefile", ROOT / "constraints.txt", ROOT / "pyproject.toml"]:
        text = file.read_text(encoding="utf-8")
        assert not REGISTRIES.search(text), file
        assert not MACHINE_PATHS.search(text), file


def test_override_in_recipes_page_sets_what_it_says() -> None:
    tree = {"data": {"train": [{"path": "a"}]}}
    assert apply_override(tree, "data.train.0.path=other.jsonl")["data"]["train"] == [{"path": "other.jsonl"}]
    assert apply_override(tree, "data.train=[a.jsonl,b.jsonl]")["data"]["train"] == ["a.jsonl", "b.jsonl"]
