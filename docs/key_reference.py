"""Writes the key reference into recipes.md, from the fields of the recipe: `make docs`. A test holds it up to date."""

from __future__ import annotations

import json
from pathlib import Path

from burnish.config import Recipe
from burnish.recipe import fields

PAGE = Path(__file__).with_name("recipes.md")
START, END = "<!-- keys: written by `make docs` -->", "<!-- end of keys -->"


def key_reference() -> str:
    """A heading for every section of a recipe, and a table of its keys."""
    lines: list[str] = []
    for path, field, kind in fields(Recipe):
        if path.startswith("data.validation."):
            continue  # the keys of a source, as in data.train
        if "." not in path:
            lines += [
                "",
                f"### {path}",
                "",
                field.description,
                "",
                "| key | type | default | meaning |",
                "|---|---|---|---|",
            ]
            continue
        default = "required" if field.is_required() else f"`{json.dumps(field.default, default=list)}`"
        text = kind.replace("|", "\\|")
        lines.append(f"| `{path}` | {text} | {default} | {field.description.replace('|', chr(92) + '|')} |")
    return "\n".join(lines).strip()


def with_reference(page: str) -> str:
    """The page with the reference between its marks."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n\n{key_reference()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_reference(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
