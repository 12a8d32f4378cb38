"""A stream gives every row once a pass, in order, and goes on from its cursor as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.config import SourceConfig
from burnish.data.streams import Stream, open_stream
from burnish.types import RowError, UserError

ROWS = [{"text": f"row {number} größer", "number": number} for number in range(1_200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROWS as two .jsonl files with blank lines and a byte order mark, and as two .parquet files."""
    folder = tmp_path_factory.mktemp("streams")
    for name, rows in (("a", ROWS[:1_100]), ("b", ROWS[1_100:])):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "\ufeff" * (name == "a") + "\n" + "\r\n".join(lines) + "\n" * (name == "a")
        (folder / f"{name}.jsonl").write_bytes(text.encode())
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def opened(path: Path | str, **keys: Any) -> Stream:
    return open_stream(SourceConfig(path=str(path), streaming=True, **keys))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_stream_wraps_round(kind: str, folder: Path) -> None:
    stream = opened(f"{folder}/*.{kind}")
    assert stream.schema.columns == {"text": 1_000, "number": 1_000}
    found = [row for _ in range(5) for _, row in stream.read(600)]
    assert found == (ROWS * 3)[:3_000]
    assert stream.passes == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@settings(max_examples=8, deadline=None)
@given(
    before=st.sampled_from([0, 1, 7, 99, 1_099, 1_100, 1_199, 1_200, 1_201, 2_500]),
    bounds=st.sampled_from([None, (5, None), (1_000, 1_150), (None, 7)]),
)
def test_a_stream_resumes_at_its_cursor(kind: str, folder: Path, before: int, bounds: Any) -> None:
    text = None if bounds is None else ":".join("" if bound is None else str(bound) for bound in bounds)
    kept = ROWS if bounds is None else ROWS[slice(*bounds)]
    stream = opened(f"{folder}/*.{kind}", slice=text)
    stream.read(before)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = stream.read(150)
    assert [row for _, row in expected] == [kept[(before + i) % len(kept)] for i in range(150)]

    again = opened(f"{folder}/*.{kind}", slice=text)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert again.read(150) == expected
    assert (again.state_dict(), again.passes) == (stream.state_dict(), stream.passes)


def test_where_rows_stand(folder: Path) -> None:
    assert [where for where, _ in opened(folder / "a.jsonl").read(2)] == ["a.jsonl:2", "a.jsonl:3"]
    assert [where for where, _ in opened(f"{folder}/*.jsonl").read(1_102)[-3:]] == [
        "a.jsonl:1101",
        "b.jsonl:2",
        "b.jsonl:3",
    ]
    assert [where for where, _ in opened(folder / "b.parquet", slice="3:").read(2)] == [
        "b.parquet row 3",
        "b.parquet row 4",
    ]


def test_broken_rows_are_given_as_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\nbroken\n{"a": 2}\n')
    stream = opened(path)
    (_, first), (where, error), _ = stream.read(3)
    assert first == {"a": 1}
    assert where == "x.jsonl:2"
    assert isinstance(error, RowError)
    assert str(error) == "broken JSON: Expecting value at column 1"
    assert stream.schema.columns == {"a": 2}


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    before = opened(path).fingerprint
    assert opened(path).fingerprint == before
    assert opened(path, slice=":1").fingerprint != before
    path.write_text('{"a": 2}\n')
    assert opened(path).fingerprint != before


@pytest.mark.parametrize(
    ("name", "slice", "message"),
    [
        ("x.json", None, "a .json array cannot be read as it comes; set streaming=false, or write a row per line"),
        ("x.jsonl", "-3:", "a slice of a stream cannot count from the end"),
        ("x.jsonl", "5:", "it holds no rows, or its slice keeps none of them"),
        ("empty.jsonl", None, "it holds no rows"),
        ("mixed", None, "a stream reads files of one kind, and these are .jsonl, .parquet"),
        ("saved", None, "a saved `datasets` folder is read from disk as it is; set streaming=false"),
        ("some-org/some-name", None, "cannot be had from the hub"),
    ],
)
def test_what_cannot_be_streamed(name: str, slice: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"a": 1}]')
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "mixed").mkdir()
    for file in ("a.jsonl", "b.parquet"):
        (tmp_path / "mixed" / file).touch()
    datasets.Dataset.from_list(ROWS[:1]).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError) as caught:
        opened(name if "/" in name else tmp_path / name, slice=slice)
    assert message in str(caught.value)
