"""Rows come back as they were written, from every kind of file, and what cannot be read says why and where."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.config import SourceConfig
from burnish.data.json_files import BLOCK_BYTES
from burnish.data.rows import MemoryRows, Rows, open_rows
from burnish.types import RowError, UserError

ROWS = [{"text": f"row {number} größer 🦆", "number": number} for number in range(2_000)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def opened(path: Path | str, **keys: Any) -> Rows:
    return open_rows(SourceConfig(path=str(path), **keys))


def error_of(path: Path | str, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(path, **keys)
    return str(caught.value)


def write(kind: str, folder: Path) -> Path:
    """ROWS in a file or folder of a kind."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return write_lines(path, ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("jsonl", "rows.jsonl:17"),
        ("json", "rows.json[16]"),
        ("parquet", "rows.parquet row 16"),
        ("saved", "rows.saved row 16"),
    ],
)
def test_every_kind_gives_the_same_rows(kind: str, where: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    rows = opened(path)
    assert [rows[i] for i in range(len(rows))] == ROWS
    assert rows.where(16) == where
    assert rows.schema.columns == {"text": 2_000, "number": 2_000}
    assert rows.schema.shapes == {frozenset({"text", "number"}): 2_000}
    (facts,) = rows.files
    assert (facts["path"], facts["rows"]) == (str(path), 2_000)

    sent = pickle.dumps(rows)
    assert len(sent) < 5_000, "a pickled source is its paths and a sparse index"
    assert pickle.loads(sent)[1_999] == ROWS[-1]

    copies = tmp_path / "copies"
    copies.mkdir()
    copy = path.rename(copies / f"other.{kind}")
    assert opened(copy).fingerprint == rows.fingerprint
    assert opened(copy, slice=":100").fingerprint != rows.fingerprint


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    before = opened(write_lines(tmp_path / "a.jsonl", [{"text": "a"}])).fingerprint
    assert opened(write_lines(tmp_path / "a.jsonl", [{"text": "b"}])).fingerprint != before


def test_a_table_has_one_fingerprint_however_it_is_cut() -> None:
    rows = [{**row, "turns": [{"role": "user", "ids": list(range(row["number"] % 5))}]} for row in ROWS]
    whole = datasets.Dataset.from_list(rows)
    pieces = datasets.concatenate_datasets(
        [datasets.Dataset.from_list(rows[:70]), datasets.Dataset.from_list(rows[70:])]
    )
    assert MemoryRows(whole).fingerprint == MemoryRows(pieces).fingerprint
    backwards = whole.select(range(1_999, -1, -1))
    assert MemoryRows(whole).fingerprint != MemoryRows(backwards).fingerprint
    assert MemoryRows(backwards)[0] == rows[-1]


lines = st.lists(
    st.one_of(
        st.dictionaries(st.text(max_size=5), st.text(max_size=40) | st.integers() | st.none(), max_size=3),
        st.sampled_from(["", "   ", "\t"]),
        st.just({"long": "é" * (BLOCK_BYTES // 3)}),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(lines, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_lines_come_back_with_their_numbers(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Any], end: str, bom: bool, closed: bool
) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    expected = [(number, line) for number, line in enumerate(lines, 1) if isinstance(line, dict)]
    data = end.join(texts) + (end if closed else "")
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + data.encode())
    if not expected:
        assert "holds no rows" in error_of(path)
        return
    rows = opened(path)
    assert [rows[i] for i in range(len(rows))] == [line for _, line in expected]
    assert [rows.where(i) for i in range(len(rows))] == [f"x.jsonl:{number}" for number, _ in expected]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.just("é" * 20_000), max_size=3), min_size=1),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
def test_array_elements_come_back(
    tmp_path_factory: pytest.TempPathFactory, elements: list[Any], indent: int | None, bom: bool
) -> None:
    path = tmp_path_factory.mktemp("array") / "x.json"
    path.write_text(
        ("\ufeff" if bom else "") + json.dumps(elements, ensure_ascii=False, indent=indent) + "\n\n", "utf-8"
    )
    rows = opened(path)
    assert [rows[i] for i in range(len(rows))] == elements


nested = st.recursive(
    st.integers() | st.floats(allow_nan=False) | st.sampled_from(['}, {"a"', "é" * 3_000, "\\", '"', "]"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"a": nested, "b": nested}) | nested, min_size=1, max_size=30),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
def test_an_array_is_cut_between_its_elements_alone(
    tmp_path_factory: pytest.TempPathFactory, elements: list[Any], indent: int | None, ascii: bool
) -> None:
    elements = [{"a": "first"}, *elements]
    path = tmp_path_factory.mktemp("array") / "x.json"
    path.write_text(json.dumps(elements, ensure_ascii=ascii, indent=indent), "utf-8")
    rows = opened(path)
    assert len(rows) == len(elements)
    for number, element in enumerate(elements):
        if isinstance(element, dict):
            assert rows[number] == element
        else:
            with pytest.raises(RowError, match="not a JSON object"):
                rows[number]


def test_an_array_that_only_the_standard_parser_reads(tmp_path: Path) -> None:
    elements = [{"a": "x" * 3_000, "b": float("inf")}, *[{"a": "y" * 3_000, "b": 10**30}] * 5]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(elements))
    assert [opened(path)[i] for i in range(6)] == elements


def test_rows_of_many_parts_are_found_past_empty_ones() -> None:
    parts = [MemoryRows(ROWS[start:stop]).parts[0] for start, stop in ((0, 0), (0, 3), (3, 3), (3, 3), (3, 7), (7, 7))]
    rows = Rows("many", tuple(parts), 1, 6)
    assert [rows[i] for i in range(len(rows))] == ROWS[1:6]


bound = st.none() | st.integers(-12, 12)


@settings(max_examples=100, deadline=None)
@given(bound, bound, st.booleans())
def test_slices_mean_what_python_means(
    tmp_path_factory: pytest.TempPathFactory, start: int | None, stop: int | None, as_suffix: bool
) -> None:
    folder = tmp_path_factory.mktemp("slices")
    write_lines(folder / "a.jsonl", ROWS[:4])
    (folder / "b.json").write_text(json.dumps(ROWS[4:9]))
    text = f"{'' if start is None else start}:{'' if stop is None else stop}"
    source = {"path": f"{folder}@[{text}]"} if as_suffix else {"path": str(folder), "slice": text}
    expected = ROWS[:9][start:stop]
    if not expected:
        assert "keeps none of 9 rows" in error_of(**source)
        return
    rows = opened(**source)
    assert [rows[i] for i in range(len(rows))] == expected
    for beyond in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[beyond]


def test_a_folder_or_glob_is_its_files_in_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", ROWS[2:4])
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:2]))
    datasets.Dataset.from_list(ROWS[4:6]).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("no rows")
    for path in (tmp_path, f"{tmp_path}/*"):
        rows = opened(path)
        assert [rows[i] for i in range(len(rows))] == ROWS[:6]
        assert [rows.where(i) for i in (0, 3, 5)] == ["a.json[0]", "b.jsonl:2", "c.parquet row 1"]
        assert rows.schema.columns == {"text": 6, "number": 6}
        assert rows.name == tmp_path.name
    assert opened(tmp_path / "b.jsonl").name == "b"
    assert opened(tmp_path / "b.jsonl", name="mine").name == "mine"


def test_the_schema_counts_all_rows(tmp_path: Path) -> None:
    rows: list[Any] = [{"a": 1, "b": None}, {"a": "", "b": 0}, {"a": "x", "b": []}, [1], {"b": False, "c": {}}]
    expected = {
        frozenset({"a"}): 2,
        frozenset({"b"}): 2,
    }
    schema = opened(write_lines(tmp_path / "x.jsonl", rows)).schema
    assert schema.columns == {"a": 3, "b": 3, "c": 1}
    assert schema.shapes == expected
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert opened(tmp_path / "x.json").schema == schema


def test_the_schema_of_a_table_is_that_of_its_rows() -> None:
    rows = [{"a": "x", "b": [1], "c": 0}, {"a": "", "b": [], "c": None}, {"a": None, "b": None, "c": 2}]
    assert MemoryRows(datasets.Dataset.from_list(rows)).schema == MemoryRows(rows).schema


def test_nulls_that_arrow_adds_are_taken_out_again(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "b"}}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    read = opened(path)
    assert [read[0], read[1]] == rows


def test_integers_beyond_64_bits_stay_whole(tmp_path: Path) -> None:
    row = {"arguments": {"id": 123456789012345678901234567890}}
    assert opened(write_lines(tmp_path / "x.jsonl", [row]))[0] == row


BROKEN = {
    b'{"a": 1': "broken JSON: Expecting ',' delimiter at column 8",
    b"{'a': 1}": "broken JSON: Expecting property name enclosed in double quotes at column 2",
    b"hello": "broken JSON: Expecting value at column 1",
    b'{"a": 1} {"a": 2}': "broken JSON: Extra data at column 10",
    b"[1, 2]": "the row is a list, not a JSON object",
    b'"text"': "the row is text, not a JSON object",
    b"null": "the row is null, not a JSON object",
    b'{"a": "\xff"}': "not UTF-8: invalid start byte at byte 8",
    b'{"a": "\\ud83d"}': r"'\ud83d' is half of a character",
    b"[" * 100_000: "broken JSON: nested too deeply",
}


def test_broken_lines_are_rows_that_say_why(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "ok"}\n' + b"\n".join(BROKEN) + b'\n{"a": "\\ud83e\\udd86"}\n')
    rows = opened(path)
    assert len(rows) == len(BROKEN) + 2
    assert (rows[0], rows[len(rows) - 1]) == ({"a": "ok"}, {"a": "🦆"})
    for row, message in enumerate(BROKEN.values(), 1):
        with pytest.raises(RowError) as caught:
            rows[row]
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", '[{"a": 1},\n {"a": tru}]', "x.json: broken JSON: Expecting value at line 2 column 8"),
        ("x.json", '[{"a": 1}\n{"a": 2}]', "x.json: broken JSON: Expecting ',' delimiter at line 2 column 1"),
        ("x.json", '[{"a": 1},]', "x.json: broken JSON: Expecting value at line 1 column 11"),
        ("x.json", '[{"a": 1}', "x.json: broken JSON: Expecting ',' delimiter at line 1 column 10"),
        ("x.json", '[{"a": 1}] 3', "x.json: broken JSON: Extra data at line 1 column 12"),
        ("x.json", '{"a": 1}', "x.json holds an object; a .json source must hold one array of rows"),
        ("x.json", '{"data": [{"a": 1}]}', "jq -c '.data[]' x.json > x.jsonl"),
        ("x.json", '{"a": 1}\n{"a": 2}\n', "x.json holds one JSON value per line, not one array; rename it to x.jsonl"),
        ("x.json", " ", "x.json is empty"),
        ("x.json", "[]", "it holds no rows"),
        ("x.jsonl", "\n\n", "it holds no rows"),
        (
            "x.jsonl",
            '[\n {"a": 1},\n {"a": 2}\n]',
            "x.jsonl holds a JSON array, not one JSON object per line; rename it",
        ),
        ("x.csv", "a,b", "a .csv cannot be read, only .jsonl, .json, .parquet; convert it to .jsonl"),
        ("x.jsonl.gz", "", "decompress it first"),
    ],
)
def test_files_that_are_no_rows(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert message in error_of(path)


def test_missing_paths_say_where_they_were_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "train.jsonl", ROWS[:1])
    monkeypatch.chdir(tmp_path)
    message = error_of("trian.jsonl")
    assert message.startswith("data.train.path=trian.jsonl: there is no file or folder")
    assert str(tmp_path / "trian.jsonl") in message
    assert "near it is train.jsonl" in message
    assert "org/name" in message
    assert f"nor the folder {tmp_path / 'nowhere'}" in error_of("nowhere/train.jsonl")
    assert "matches" in error_of("*.parquet")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    assert "holds no .jsonl, .json, .parquet file" in error_of("outer")
    write_lines(tmp_path / "outer" / "inner" / "x.jsonl", ROWS[:1])
    assert "outer/inner holds some" in error_of("outer")
    assert "cannot be had from the hub" in error_of("some-org/some-name")


def test_slices_that_are_none(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ROWS[:3])
    assert "a slice is a:b" in error_of(f"{path}@[3]")
    assert "slice=3: a slice is a:b" in error_of(path, slice="3")
    assert "both name a slice" in error_of(f"{path}@[:2]", slice=":1")


def test_a_split_is_chosen_and_a_wrong_one_refused(tmp_path: Path) -> None:
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS[:3]), "test": datasets.Dataset.from_list(ROWS[3:5])}
    )
    splits.save_to_disk(tmp_path / "saved")
    rows = opened(tmp_path / "saved", split="test")
    assert (len(rows), rows.where(1)) == (2, "saved[test] row 1")
    assert "has the splits train, test" in error_of(tmp_path / "saved", split="validation")


def test_a_file_that_shrinks_under_the_run_is_noticed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ROWS)
    rows = opened(path)
    write_lines(path, ROWS[:10])
    with pytest.raises(UserError, match="was changed while in use"):
        rows[3]


def test_rows_in_memory_are_as_if_written(tmp_path: Path) -> None:
    given = [*map(dict, ROWS[:3]), {"ids": np.arange(3), "weight": float("nan"), "pair": (1, 2)}]
    rows = MemoryRows(given, "mine")
    assert rows[1] == ROWS[1]
    assert rows[3]["ids"] == [0, 1, 2]
    assert np.isnan(rows[3]["weight"])
    assert rows[3]["pair"] == [1, 2]
    assert (rows.name, rows.where(2), len(rows)) == ("mine", "mine[2]", 4)
    again = pickle.loads(pickle.dumps(rows))
    assert (again[2], again.fingerprint) == (ROWS[2], rows.fingerprint)
    given[0]["text"] = "changed later"
    assert rows[0] == ROWS[0]
    assert MemoryRows(ROWS[:3]).schema == opened(write_lines(tmp_path / "x.jsonl", ROWS[:3])).schema


def test_what_is_no_list_of_rows_is_refused() -> None:
    with pytest.raises(UserError, match="pass one of its splits, train"):
        MemoryRows(datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:1])}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"rows\[1\]: a set cannot be written as JSON"):
        MemoryRows([{"a": 1}, {"a": {1}}])
    with pytest.raises(RowError, match="a number, not a JSON object"):
        MemoryRows([3])[0]  # type: ignore[list-item]


def test_images_are_refused_before_they_are_decoded() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    rows = {"text": ["a", "b"], "images": [[], [{"path": None, "bytes": b"no image"}]]}
    with pytest.raises(UserError, match="column images holds images, audio or video"):
        MemoryRows(datasets.Dataset.from_dict(rows, features=features))
    rows["images"] = [[], []]
    assert MemoryRows(datasets.Dataset.from_dict(rows, features=features))[1]["text"] == "b"


def test_real_files(shared: Path) -> None:
    rows = opened(shared / "data" / "gsm8k_train.jsonl@[-73:]")
    assert len(rows) == 73
    assert rows.where(72) == "gsm8k_train.jsonl:7473"
    assert rows.schema.columns == {"question": 7_473, "answer": 7_473}
    alpaca = opened(shared / "data" / "alpaca_en.json")
    assert [alpaca[i] for i in range(len(alpaca))] == json.loads((shared / "data" / "alpaca_en.json").read_text())


def test_data_modules_import_nothing_heavy() -> None:
    code = (
        "import sys, burnish.data.rows, burnish.data.streams, burnish.data.conversation\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("keys", "message"), [({"split": "test"}, "have no splits"), ({"config": "main"}, "only a hub data set")]
)
def test_a_split_of_files_is_refused_not_ignored(tmp_path: Path, keys: dict[str, str], message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match=message):
        open_rows(SourceConfig(path=str(tmp_path / "a.jsonl"), **keys), "data.train.0")
