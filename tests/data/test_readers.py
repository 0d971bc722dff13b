import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_core.errors import InputError
from mindspeed_data import readers
from mindspeed_data.readers import Fault, Row, Rows

RECORDS = [{"text": "one"}, {"text": 'two, "quoted"\nlines'}, {"text": "drei é中🙂"}, {"text": ""}]


def read(inputs: Sequence[Path], **options: Any) -> list[Any]:
    """Every record of the input, or the reason there is none."""
    sources = readers.find(inputs, **options)
    rows = [row for chunk in readers.chunks(sources) for row in Rows(chunk, sources)]
    return [row.record if isinstance(row, Row) else row.reason for row in rows]


def write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(records)), path, row_group_size=3)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    assert read([write(tmp_path / f"x{suffix}", RECORDS)]) == RECORDS


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_small_chunks_and_blocks_give_the_same_records(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"text": f"{i}" * (i % 50)} for i in range(1, 300)]
    path = write(tmp_path / f"x{suffix}", records)
    monkeypatch.setattr("mindspeed_data.readers.CHUNK", 700)
    monkeypatch.setattr("mindspeed_data.readers.BLOCK", 64)
    assert read([path]) == records
    sources = readers.find([path])
    chunks = list(readers.chunks(sources))
    assert len(chunks) > (5 if suffix == ".jsonl" else 0)
    assert sum(chunk.bytes for chunk in chunks) == path.stat().st_size


def test_a_txt_file_is_one_document_or_one_per_line(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeffone\r\n\n  \ntwo\nthree".encode())
    assert read([tmp_path / "x.txt"]) == [{"text": "one\r\n\n  \ntwo\nthree"}]
    assert [r["text"] for r in read([tmp_path / "x.txt"], per_line=True)] == ["one", "two", "three"]


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b/2.txt", "a.txt", "b/1.jsonl", "notes.md", ".hidden/x.txt"):
        (tmp_path / name).write_text('{"text": "1"}' if name.endswith("jsonl") else name)
    assert read([tmp_path]) == [{"text": "a.txt"}, {"text": "1"}, {"text": "b/2.txt"}]


def test_lines_of_json_in_a_json_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"text": "1"}\n{"text": "2"}\n')
    assert read([tmp_path / "x.json"]) == [{"text": "1"}, {"text": "2"}]


def test_bad_lines_become_faults_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "1"}\n{"text": \n\n[1]\n{"text": "\xe9"}\n' + b'{"text": "2"}')
    sources = readers.find([tmp_path / "x.jsonl"])
    rows = [row for chunk in readers.chunks(sources) for row in Rows(chunk, sources)]
    assert [(row.line, row.reason) for row in rows if isinstance(row, Fault)] == [
        (2, "not valid JSON: expecting value, column 10"),
        (4, "not a JSON object"),
        (5, "not UTF-8 (byte 0xe9)"),
    ]
    assert [row.line for row in rows if isinstance(row, Row)] == [1, 6]


def test_deep_nesting_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("[" * 100_000 + "\n" + '{"text": "1"}\n')
    assert read([tmp_path / "x.jsonl"])[1] == {"text": "1"}


def test_csv_rows_of_another_width_are_faults(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,n\na,1\nb\nc,1,2\nd,2\n")
    assert read([tmp_path / "x.csv"]) == [
        {"text": "a", "n": "1"},
        "1 fields under 2 columns",
        "3 fields under 2 columns",
        {"text": "d", "n": "2"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", b'[{"text": "1"},\n{"text": "2"', r"x.json:2: not valid JSON: expecting ',' delimiter, column 1"),
        ("x.json", b'[{"text": "1"},\n{"text": "2"}', r"x.json:2: the array is cut off"),
        ("x.json", b'[{"text": "1"}\n{"text": "2"}]', r"x.json:2: not valid JSON: a comma is missing"),
        ("x.json", b'[{"text": "1"},\n\n{"text" "2"}]' + b" " * 99, r"x.json:3: not valid JSON"),
        ("x.json", b'[{"text": "1"}] x', r"x.json:1: something follows"),
        ("x.json", b'[{"text": "1"},\n{"text": "\xff"}]', r"x.json:2: not UTF-8 \(byte 0xff\); convert it"),
        ("x.csv", b"text,text\n1,2\n", r"x.csv:1: the first line must name the columns"),
        ("x.csv", b'text\n"open\n', r"x.csv:2: not valid CSV: unexpected end of data"),
        ("x.csv", b"text\n\xff\n", r"x.csv:2: not UTF-8"),
        ("x.parquet", b"PAR1 not really", r"x.parquet: not a readable parquet file"),
        ("x.txt", b"", r"x.txt: this file is empty"),
        ("x.md", b"text", r"x.md: the name does not tell a format"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_in_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_all_missing_inputs_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        readers.find([tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "empty"])
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "no such file or folder",
        "no such file or folder",
        "this folder holds no txt, jsonl, json, csv, parquet file",
    ]


@given(st.binary(max_size=300), st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".parquet"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_bytes_make_a_reader_crash(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str, array: bool
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / f"x{suffix}"
    path.write_bytes((b"[" if array else b"") + content)
    with suppress(InputError):
        read([path])


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.none()), max_size=8))
@settings(max_examples=150, deadline=None)
def test_an_array_is_read_as_json_reads_it(tmp_path_factory: pytest.TempPathFactory, records: list[dict]) -> None:
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_text(json.dumps(records, indent=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mindspeed_data.readers.BLOCK", 7)
        assert read([path]) == records
