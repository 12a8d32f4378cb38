"""`burnish plan`: what a recipe needs and how long it takes, without any device.

A request in, tables or JSON and an exit status out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from burnish.files import write_whole
from burnish.observe.plan_terminal import draw
from burnish.plan.layouts import Planner
from burnish.plan.report import Report
from burnish.plan.request import Request
from burnish.recipe import read_recipe
from burnish.types import UserError


def plan(request: Request) -> int:
    """Show what the request asks for; the exit status is 0, or 3 where it does not fit in the memory stated.

    Raises UserError where the recipe, the model, the rows or the layout cannot be used, before anything is shown.
    """
    recipe = read_recipe(request.recipe, request.overrides)
    report = Report(Planner(request, recipe))
    found = report.fit() if request.fit else report.plan()
    for sentence in recipe.idle_keys:
        print(f"warning: {sentence}", file=sys.stderr)
    if request.json == "-":
        print(json.dumps(found.tree, indent=2))
        return found.status
    if request.json is not None:
        try:
            write_whole(Path(request.json).resolve(), json.dumps(found.tree, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json={request.json} cannot be written: {error.strerror}; name another file") from None
    draw(sys.stdout, found.title, found.facts, found.sections)
    return found.status
