"""Ranks that do one thing together: a failure of one is raised by all, whatever class it is of."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ranks import run_ranks

from burnish.train.together import Together


class Locked(Exception):
    """It cannot be pickled."""

    def __init__(self, file: str) -> None:
        super().__init__(f"{file} is broken")
        self.lock = threading.Lock()


class Named(Exception):
    """It can be pickled, and not be read again."""

    def __init__(self, file: str, line: int) -> None:
        super().__init__(f"{file} is broken")


ERRORS = (ValueError("a.json is broken"), Locked("a.json"), Named("a.json", 3))


def _fail(number: int, at: int) -> None:
    if Together().rank == at:
        raise ERRORS[number]


def _raised(how: str, number: int, at: int) -> tuple[str, str]:
    ranks = Together()

    def divide(given: Sequence[None]) -> Sequence[None]:
        _fail(number, at)
        return given

    try:
        if how == "each":
            ranks.each(lambda: _fail(number, at))
        elif how == "given":
            ranks.divide(lambda: _fail(number, at), lambda given: given)
        else:
            ranks.divide(lambda: None, divide)
    except Exception as error:
        return str(error), "".join(error.__notes__)
    return "nothing", ""


def _all_raised() -> list[tuple[str, str]]:
    cases = [("each", 1), ("each", 0), ("given", 1), ("divided", 0)]
    return [_raised(how, number, at) for how, at in cases for number in range(len(ERRORS))]


def test_what_fails_on_one_rank_is_raised_by_all_whatever_it_is() -> None:
    both = run_ranks(2, _all_raised, timeout=60)
    assert len(both[0]) == 12
    for raised in zip(*both, strict=True):
        for text, notes in raised:
            assert "a.json is broken" in text
            assert f"{text}{notes}".count("on rank") == 1
