"""The documentation is held to the code: commands parse, recipes are valid, links lead to files, none is forgotten."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from burnish.cli import parse
from burnish.recipe import apply_override, parse_yaml, read_recipe, recipe_from_dict

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


def commands() -> Iterator[tuple[str, str]]:
    """(page, command line) of every command of burnish in a block of bash."""
    for page, block in blocks("bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].rpartition("/")[2] == "burnish":
                yield page, line


RECIPES = [(page, text) for page, text in blocks("yaml") if not text.startswith(FRAGMENT)]
COMMANDS = list(commands())


def test_documentation_has_recipes_and_commands() -> None:
    # Else the tests below would pass on nothing.
    assert len(RECIPES) >= 7
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line.strip() for _, line in COMMANDS])
def test_command_is_one_the_command_line_takes(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index(">")] if ">" in words else words
    if "--help" in words:
        with pytest.raises(SystemExit) as left:
            parse(words)
        assert left.value.code == 0
        return
    parsed = parse(words)
    if parsed.command == "sft":
        tree = {"model": {"path": "m"}, "data": {"train": ["rows.jsonl"]}}
        recipe_from_dict(tree, parsed.overrides)


@pytest.mark.parametrize(("page", "text"), RECIPES, ids=[f"{page}-{n}" for n, (page, _) in enumerate(RECIPES)])
def test_recipe_in_a_page_is_valid(page: str, text: str) -> None:
    recipe_from_dict(parse_yaml(text, page))


def test_fragment_is_part_of_a_recipe() -> None:
    fragments = [(page, text) for page, text in blocks("yaml") if text.startswith(FRAGMENT)]
    assert fragments
    for page, text in fragments:
        recipe_from_dict({"model": {"path": "m"}, "data": {"train": ["rows.jsonl"]}} | parse_yaml(text, page))


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


def test_architecture_lists_every_file_once() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)
    package = ROOT / "src" / "burnish"
    files = {str(f.relative_to(package)) for f in package.rglob("*.py")}
    empty = {name for name in files if name.endswith("/__init__.py")}
    assert sorted(listed) == sorted(files - empty)


def test_files_named_in_pages_exist() -> None:
    package = ROOT / "src" / "burnish"
    for page in PAGES:
        names = re.findall(r"`((?:data|model|train|observe|tests|bench)/[\w/]+\.py)`", page.read_text(encoding="utf-8"))
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


def _known_keys() -> Iterator[str]:
    from burnish.config import Recipe
    from burnish.recipe import fields

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
