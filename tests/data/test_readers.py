import csv
import gzip
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mindspeed_core.errors import InputError
from mindspeed_data import readers
from mindspeed_data.readers import Chunk, Fault, Row, Rows
from mindspeed_data.sources import Source, find

SUFFIXES = [".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".csv.zst"]
RECORDS = [{"text": "one"}, {"text": 'two, "quoted"\nlines'}, {"text": "drei é中🙂"}, {"text": ""}]


def read(inputs: Sequence[Path], **options: Any) -> list[Any]:
    """Every record of the input, or the reason there is none."""
    sources = find(inputs, **options)
    rows = [row for chunk in readers.chunks(sources) for row in Rows(chunk, sources)]
    return [row.record if isinstance(row, Row) else row.reason for row in rows]


def write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write a file of the kind its name tells, with the tools of others."""
    if path.suffix in (".gz", ".zst"):
        plain = write(path.with_suffix(""), records).read_bytes()
        with pyarrow.CompressedOutputStream(str(path), {".gz": "gzip", ".zst": "zstd"}[path.suffix]) as file:
            file.write(plain)
        path.with_suffix("").unlink()
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        table = pyarrow.Table.from_pylist(list(records))
        if path.suffix == ".parquet":
            parquet.write_table(table, path, row_group_size=3)
        else:
            make = pyarrow.ipc.new_file if "file" in path.name else pyarrow.ipc.new_stream
            with make(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=100)
    return path


NAMES = ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow", "file.arrow", "x.jsonl.gz", "x.json.gz", "x.csv.zst"]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    assert read([write(tmp_path / name, RECORDS)]) == RECORDS


def many(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, str]], Path]:
    """A file that is cut into many pieces, and its records."""
    records = [{"text": f"{i}é\n" * (i % 50)} for i in range(1, 300)]
    path = write(tmp_path / name, records)
    monkeypatch.setattr("mindspeed_data.readers.CHUNK", 700)
    monkeypatch.setattr("mindspeed_data.json_array.BLOCK", 64)
    return records, path


@pytest.mark.parametrize("name", NAMES)
def test_small_chunks_and_blocks_give_the_same_records(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, path = many(tmp_path, name, monkeypatch)
    assert read([path]) == records
    chunks = list(readers.chunks(find([path])))
    assert len(chunks) > 20
    if not name.endswith((".csv", ".json")):  # these end behind their last row
        assert 0.9 < sum(chunk.bytes for chunk in chunks) / path.stat().st_size <= 1


def placed(chunks: list[Chunk], sources: list[Source]) -> list[tuple[int, Any]]:
    """The rows with their lines within the file, as whoever gets the chunks adds them up."""
    found, before = [], [0] * len(sources)
    for chunk in chunks:
        rows = Rows(chunk, sources)
        of_pieces = list(rows)
        starts = []
        for piece, lines in zip(chunk.pieces, rows.lines, strict=True):
            starts.append(before[piece.source] if piece.line is None else piece.line)
            before[piece.source] = starts[-1] + lines
        found += [(starts[row.piece] + row.line, row.record) for row in of_pieces if isinstance(row, Row)]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_reading_goes_on_behind_any_chunk_and_in_any_shard(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = many(tmp_path, name, monkeypatch)
    other = write(tmp_path / "b.jsonl", [{"text": "b" * i} for i in range(120)])
    sources = find([path, other])
    chunks = list(readers.chunks(sources))
    whole = placed(chunks, sources)
    for after in (0, 1, len(chunks) // 2, len(chunks) - 2):
        last = chunks[after].pieces[-1]
        rest = list(readers.chunks(sources, after=(last.source, last.stop)))
        assert placed(chunks[: after + 1], sources) + placed(rest, sources) == whole
        assert [chunk.pieces[0].start for chunk in rest] == [chunk.pieces[0].start for chunk in chunks[after + 1 :]]
    for shards in (2, 3, 7):
        parts = [list(readers.chunks(sources, shard=(i + 1, shards))) for i in range(shards)]
        assert [row for part in parts for row in placed(part, sources)] == whole
        assert sum(bool(part) for part in parts) >= 2


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl", "x.csv.gz", "x.parquet"])
def test_a_row_is_named_by_the_line_it_begins_on(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = many(tmp_path, name, monkeypatch)
    sources = find([path])
    rows = placed(list(readers.chunks(sources)), sources)
    for line, record in (rows[0], rows[1], rows[150], rows[-1]):
        number = record["text"].partition("é")[0]
        if name.endswith("parquet"):
            assert line == rows.index((line, record)) + 1
        elif name == "x.json":  # {, then the text on a line of its own
            assert f'"{number}\\u00e9' in path.read_text().splitlines()[line]
        else:
            raw = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
            assert f"{number}é" in raw.decode().split("\n")[line - 1]


def test_a_saved_hugging_face_data_set_is_read_in_its_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"row {i}", "n": i} for i in range(50)]
    saved = datasets.Dataset.from_list(rows).shuffle(seed=1)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    assert read([tmp_path / "one"]) == saved.to_list()
    splits = datasets.DatasetDict({"train": saved, "test": saved.select(range(5))})
    splits.save_to_disk(tmp_path / "two")
    assert read([tmp_path / "two/test"]) == saved.to_list()[:5]
    with pytest.raises(InputError, match=r"two: holds the splits train, test; name one: .*two/train"):
        find([tmp_path / "two"])
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "three")
    assert len(read([tmp_path / "three"])) == 50
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(InputError, match=r"arrow: missing, and .*state\.json names it"):
        find([tmp_path / "one"])


def test_patterns_stand_for_files_by_path(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "a.csv"):
        write(tmp_path / name, [{"text": name}])
    assert read([tmp_path / "*.jsonl"]) == [{"text": "a.jsonl"}, {"text": "b.jsonl"}]
    assert read([tmp_path / "**/*.jsonl"]) == [{"text": name} for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl")]
    assert [source.part for source in find([tmp_path / "a.csv", tmp_path / "*.jsonl"])] == [0, 1, 1]
    with pytest.raises(InputError, match=r"\*\.txt: no file matches this pattern"):
        find([tmp_path / "*.txt"])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compression_is_said(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"x.jsonl{suffix}", [{"text": f"{i}" * 50} for i in range(3000)])
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no such thing", whole + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged, or not (gzip|zstd) at all"):
            read([path])


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz", "x.csv", "x.csv.zst", "x.parquet", "x.arrow", "file.arrow"]
)
def test_a_line_of_absurd_length_is_left_out_alone(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindspeed_data.readers.CHUNK", 200)
    monkeypatch.setattr("mindspeed_data.readers.ROW_LIMIT", 1 << 20)
    monkeypatch.setattr("mindspeed_data.readers.BLOCK", 1000)
    monkeypatch.setattr("mindspeed_data.json_array.BLOCK", 1000)
    monkeypatch.setattr(readers, "_newlines", lambda data: data.count(b"\n"))
    rows = [{"text": "a"}, {"text": 'b"},\\\n' * (1 << 19)}, {"text": "c"}, {"text": "d"}]
    for order in (rows, rows[1:] + rows[:1], [rows[0], rows[2], rows[3], rows[1]]):
        path = write(tmp_path / name, order)
        assert read([path]) == [row if len(row["text"]) == 1 else "longer than 1 MiB" for row in order]
        sources = find([path])
        lines = [line for line, _ in placed(list(readers.chunks(sources)), sources)]
        if "csv" in name:  # behind the header, and the long one has many lines
            at = order.index(rows[1]) + 1
            assert lines == [i + 1 + (i > at) * (1 << 19) for i in range(1, 5) if i != at]
        else:
            expected = [i for i, row in enumerate(order, 1) if len(row["text"]) == 1]
            assert lines == ([3 * i - 1 for i in expected] if "json" in name and "jsonl" not in name else expected)


def test_what_is_longer_than_a_row_is_counted_from_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mindspeed_data.readers.ROW_LIMIT", 1 << 20)
    for name, size in (("x.json", 12), ("x.csv", 1), ("x.jsonl", 13)):  # {"text": ""} and newlines
        for more, kept in ((0, True), (1, False)):
            content = "a" * ((1 << 20) - size + more)
            if name == "x.csv":
                (tmp_path / name).write_text(f"text\n{content}\nb\n")
            elif name == "x.json":
                (tmp_path / name).write_text(f'[{{"text": "{content}"}}, {{"text": "b"}}]')
            else:
                (tmp_path / name).write_text(f'{{"text": "{content}"}}\n{{"text": "b"}}\n')
            monkeypatch.setattr("mindspeed_data.readers.CHUNK", 1000)
            found = read([tmp_path / name])
            assert found == [{"text": content} if kept else "longer than 1 MiB", {"text": "b"}], (name, more)


@pytest.mark.parametrize("name", ["x.txt", "x.txt.zst"])
def test_a_document_of_absurd_length_is_left_out(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindspeed_data.readers.ROW_LIMIT", 1 << 20)
    (tmp_path / "x.txt").write_text("a" * ((1 << 20) + 1))
    if name != "x.txt":
        with pyarrow.CompressedOutputStream(str(tmp_path / name), "zstd") as file:
            file.write((tmp_path / "x.txt").read_bytes())
    assert read([tmp_path / name]) == ["longer than 1 MiB; as documents of a line each: --per-line"]


def test_texts_of_tables_that_are_not_utf8_are_faults(tmp_path: Path) -> None:
    binary = pyarrow.array([b"one", b"caf\xe9", b"three"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, binary.buffers()[1], binary.buffers()[2])
    with pyarrow.ipc.new_stream(tmp_path / "x.arrow", pyarrow.schema([("text", pyarrow.string())])) as writer:
        writer.write_batch(pyarrow.record_batch({"text": text}))
    assert read([tmp_path / "x.arrow"]) == [{"text": "one"}, "not UTF-8: byte 0xe9", {"text": "three"}]


def test_rows_that_are_not_utf8_are_faults_and_their_neighbours_are_not(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'[{"text": "1"},\n{"text": "\xff"},\n{"text": "3"}]')
    (tmp_path / "x.csv").write_bytes(b"text\n1\n\xff\n3\n")
    for name in ("x.json", "x.csv"):
        assert read([tmp_path / name]) == [{"text": "1"}, "not UTF-8: byte 0xff", {"text": "3"}]


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


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "in/b").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    for name in ("in/c.txt", "in/b/1.txt", "far/2.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "in/a").symlink_to(tmp_path / "in/b")  # what has a name of its own there is read once, by that
    (tmp_path / "in/b/round").symlink_to(tmp_path / "in")
    (tmp_path / "in/far").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/broken").symlink_to(tmp_path / "none")
    assert [source.path for source in find([tmp_path / "in"])] == [
        tmp_path / name for name in ("in/b/1.txt", "in/c.txt", "in/far/2.txt")
    ]
    assert sorted(record["text"] for record in read([tmp_path / "in/**/*.txt"])) == [
        "far/2.txt",
        "in/b/1.txt",
        "in/c.txt",
    ]
    assert [record["text"] for record in read([tmp_path / "i?/**/b/*.txt"])] == ["in/b/1.txt"]


def test_lines_of_json_in_a_json_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"text": "1"}\n{"text": "2"}\n')
    assert read([tmp_path / "x.json"]) == [{"text": "1"}, {"text": "2"}]


def test_bad_lines_become_faults_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "1"}\n{"text": \n\n[1]\n{"text": "\xe9"}\n' + b'{"text": "2"}')
    sources = find([tmp_path / "x.jsonl"])
    rows = [row for chunk in readers.chunks(sources) for row in Rows(chunk, sources)]
    assert [(row.line, row.reason) for row in rows if isinstance(row, Fault)] == [
        (2, "not valid JSON: expecting value, column 10"),
        (4, "not a JSON object"),
        (5, "not UTF-8: byte 0xe9"),
    ]
    assert [row.line for row in rows if isinstance(row, Row)] == [1, 6]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_only_objects_are_rows(tmp_path: Path, name: str) -> None:
    values = ['"text"', "1", "null", "[{}]", "true", '{"text": "1"}']
    (tmp_path / name).write_text("\n".join(values) if name == "x.jsonl" else f"[{', '.join(values)}]")
    assert read([tmp_path / name]) == ["not a JSON object"] * 5 + [{"text": "1"}]


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "1e999", "123456789012345678901234567890", '"\\u0000"'])
def test_what_the_fast_parser_refuses_is_read_as_json_reads_it(tmp_path: Path, value: str) -> None:
    line = f'{{"text": {value}}}'
    (tmp_path / "x.jsonl").write_text(f"{line}\n")
    (record,) = read([tmp_path / "x.jsonl"])
    expected = json.loads(line)
    assert repr(record) == repr(expected) or float(record["text"]) == float(expected["text"])


def test_deep_nesting_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("[" * 100_000 + "\n" + '{"text": "1"}\n')
    assert read([tmp_path / "x.jsonl"])[1] == {"text": "1"}


def test_csv_rows_of_another_width_are_faults(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,n\na,1\nb\nc,1,2\nd,2\n")
    assert read([tmp_path / "x.csv"]) == [
        {"text": "a", "n": "1"},
        "other fields than the columns: 1 under 2",
        "other fields than the columns: 3 under 2",
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
        ("x.csv", b"text,text\n1,2\n", r"x.csv:1: the first line must name the columns"),
        ("x.csv", b'text\n"open\n', r"x.csv:2: not valid CSV: unexpected end of data"),
        ("x.arrow", b"not really", r"x.arrow: not a readable arrow file"),
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
        find([tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "empty"])
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "no such file or folder",
        "no such file or folder",
        "this folder holds no txt, jsonl, json, csv, parquet, arrow (the first four also as .gz and .zst) file",
    ]


@given(st.binary(max_size=300), st.sampled_from(SUFFIXES), st.booleans())
@settings(max_examples=400, deadline=None)
def test_no_bytes_make_a_reader_crash(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str, array: bool
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / f"x{suffix}"
    content = (b"[" if array else b"") + content
    if suffix.endswith((".gz", ".zst")):
        with pyarrow.CompressedOutputStream(str(path), "gzip" if suffix.endswith(".gz") else "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(content)
    with suppress(InputError):
        read([path])


@given(
    st.sampled_from(["x.parquet", "x.arrow", "file.arrow", "x.jsonl.gz", "x.jsonl.zst", "x.json", "x.csv"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_no_damage_makes_a_reader_crash(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[float, int]]
) -> None:
    path = write(tmp_path_factory.mktemp("fuzz") / name, RECORDS)
    data = bytearray(path.read_bytes())
    for place, byte in changes:
        data[int(place * len(data))] = byte
    path.write_bytes(data)
    with suppress(InputError):
        assert all(isinstance(row, dict | str) for row in read([path]))


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.none()), max_size=8))
@settings(max_examples=150, deadline=None)
def test_an_array_is_read_as_json_reads_it(tmp_path_factory: pytest.TempPathFactory, records: list[dict]) -> None:
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_text(json.dumps(records, indent=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mindspeed_data.json_array.BLOCK", 7)
        assert read([path]) == records
