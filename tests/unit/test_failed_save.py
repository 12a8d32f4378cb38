"""What is said of a save that was under way when a run failed."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from burnish.cluster.ranks import ClusterError
from burnish.rank import Rank
from burnish.sft import _finish_after_failure
from burnish.train.checkpoint import CheckpointError


class Saving:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def finish_saves(self) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CheckpointError("the disk is full"), ["the save under way failed, too: the disk is full"]),
        (ClusterError("x"), []),
    ],
)
def test_a_save_that_fails_as_well_is_said_and_not_raised(
    error: Exception, said: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _finish_after_failure(cast(Rank, Saving(error)))
    assert caplog.messages == said


def test_what_nobody_foresaw_goes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        _finish_after_failure(cast(Rank, Saving(ZeroDivisionError())))
