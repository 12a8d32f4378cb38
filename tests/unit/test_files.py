"""write_whole at the hands of killed processes and full disks, and what is on the disk when it returns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from burnish.files import write_whole


def test_text_is_utf_8_with_its_line_ends_and_bytes_are_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for data, content in (("ä\r\n", b"\xc3\xa4\r\n"), (b"\xff", b"\xff"), ("", b"")):
        write_whole(file, data)
        assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_at_any_call_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    file, survivors = tmp_path / "a.txt", []
    for count in range(10):
        write_whole(file, "old")
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = fail_at(monkeypatch, count)
            try:
                write_whole(file, "new")
            except OSError:
                survivors.append(file.read_text())
            else:
                break
    # The content reaches the disk before the name does, and the name before the call returns.
    assert calls == ["fsync", "replace", "fsync"]
    assert survivors == ["old", "old", "new"]


def fail_at(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Raise at call number `count`, from 0, of those that change the disk for good; return the list of them."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def failing(*arguments: Any, original: Any = original) -> None:
            calls.append(original.__name__)
            if len(calls) == count + 1:
                raise OSError("disk full")
            original(*arguments)

        monkeypatch.setattr(os, name, failing)
    return calls


def test_what_a_death_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.writing").write_text("a longer part of what was")
    write_whole(tmp_path / "a.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"
