"""Files of rows as chunks: pieces of known size that a worker can read on its own, in any order, in bounded memory.

    txt       one document per file, or one per line
    jsonl     an object per line (json files that hold lines instead of an array are read this way too)
    json      an array of objects, read as a stream
    csv       a header, then a row per record
    parquet   a row per record

A row that cannot be read becomes a `Fault` with its place; it never becomes another row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from mindspeed_core.errors import InputError

CHUNK = 4 << 20  # bytes of input per chunk
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
BLOCK = 1 << 20  # characters of a stream that are read at once
LINE_LIMIT = 1 << 30  # a longer line is no row but another kind of file

Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One file of the input and how it is read."""

    path: Path
    kind: str  # "text" (a document), "lines" (a document per line), "jsonl", "json", "csv", "parquet"
    size: int


@dataclass(frozen=True)
class Piece:
    """A stretch of one source: a range of bytes to be read by whoever gets the piece, or records read already."""

    source: int  # index into the sources
    start: int = 0
    stop: int = 0
    records: Sequence[tuple[int, Record | str]] = ()  # line or row, and its record or why there is none


@dataclass(frozen=True)
class Chunk:
    """Pieces that one worker turns into ids at a time."""

    pieces: tuple[Piece, ...]
    bytes: int  # of the input, for the progress bar


@dataclass(frozen=True)
class Row:
    """One record and its place; `line` counts from 1 within the piece for byte ranges, within the file otherwise."""

    piece: int
    line: int
    record: Record


@dataclass(frozen=True)
class Fault:
    """A row that is left out, and why."""

    piece: int
    line: int
    reason: str


@dataclass
class Rows:
    """The rows of a chunk, its faults, and the lines in each of its byte ranges (to place rows within the file)."""

    chunk: Chunk
    sources: Sequence[Source]
    lines: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row | Fault]:
        for i, piece in enumerate(self.chunk.pieces):
            source = self.sources[piece.source]
            if piece.records:
                self.lines.append(0)
                for line, record in piece.records:
                    yield Row(i, line, record) if isinstance(record, dict) else Fault(i, line, record)
            elif source.kind == "text":
                self.lines.append(0)
                yield _document(i, source, piece)
            else:
                yield from self._lines(i, source, piece)

    def _lines(self, i: int, source: Source, piece: Piece) -> Iterator[Row | Fault]:
        with open(source.path, "rb") as file:
            file.seek(piece.start)
            data = file.read(piece.stop - piece.start)
        lines = data.split(b"\n")
        if lines and not lines[-1]:
            lines.pop()
        self.lines.append(len(lines))
        if piece.start == 0 and lines:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        for number, line in enumerate(lines, 1):
            line = line.removesuffix(b"\r")
            if not line.strip():
                continue
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                yield Fault(i, number, _not_utf8(line, error))
                continue
            if source.kind == "lines":
                yield Row(i, number, {"text": text})
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield Fault(i, number, f"not valid JSON: {_json_reason(error)}")
                continue
            yield Row(i, number, record) if isinstance(record, dict) else Fault(i, number, "not a JSON object")


def find(inputs: Sequence[str | Path], *, per_line: bool = False) -> list[Source]:
    """Return the sources of files and folders, in the order given; a folder's files sorted by path."""
    sources: list[Source] = []
    problems = []
    for given in map(Path, inputs):
        if given.is_dir():
            found = sorted(
                path
                for path in given.rglob("*")
                if path.suffix.lower() in SUFFIXES
                and path.is_file()
                and not any(part.startswith(".") for part in path.relative_to(given).parts)
            )
            if not found:
                problems.append(f"{given}: this folder holds no {', '.join(s[1:] for s in SUFFIXES)} file")
        elif given.is_file():
            found = [given]
            if given.suffix.lower() not in SUFFIXES:
                kinds = ", ".join(s[1:] for s in SUFFIXES)
                problems.append(f"{given}: the name does not tell a format that is read; known are {kinds}")
        else:
            found = []
            problems.append(f"{given}: no such file or folder")
        sources += [Source(path, _kind(path, per_line=per_line), path.stat().st_size) for path in found]
    if problems:
        raise InputError("\n".join(problems))
    if all(source.size == 0 for source in sources):
        raise InputError("\n".join(f"{source.path}: this file is empty" for source in sources[:10]))
    return sources


def chunks(sources: Sequence[Source], *, columns: Collection[str] | None = None) -> Iterator[Chunk]:
    """Cut all sources into chunks of about the same number of bytes. `columns` limits what is read of parquet."""
    pieces: list[Piece] = []
    held = 0
    for piece, size in _pieces(sources, columns):
        if pieces and held + size > CHUNK:
            yield Chunk(tuple(pieces), held)
            pieces, held = [], 0
        pieces.append(piece)
        held += size
    if pieces:
        yield Chunk(tuple(pieces), held)


def _kind(path: Path, *, per_line: bool) -> str:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return "lines" if per_line else "text"
    if suffix == ".json":
        with open(path, "rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        return "json" if head.startswith(b"[") else "jsonl"
    return suffix[1:]


def _pieces(sources: Sequence[Source], columns: Collection[str] | None) -> Iterator[tuple[Piece, int]]:
    readers = {"json": _json, "csv": _csv}
    for index, source in enumerate(sources):
        if source.size == 0:
            continue
        if source.kind == "text":
            yield Piece(index, 0, source.size), source.size
        elif source.kind in ("lines", "jsonl"):
            for start, stop in _ranges(source):
                yield Piece(index, start, stop), stop - start
        else:
            records = _parquet(source, columns) if source.kind == "parquet" else readers[source.kind](source)
            yield from _gathered(index, source, records)


def _ranges(source: Source) -> Iterator[tuple[int, int]]:
    """Byte ranges of about CHUNK that end with a line."""
    with open(source.path, "rb") as file:
        start = 0
        while start < source.size:
            stop = min(start + CHUNK, source.size)
            if stop < source.size:
                file.seek(stop - 1)  # a range that ends with a newline already is kept
                stop = _line_end(source, file)
            yield start, stop
            start = stop


def _line_end(source: Source, file: BinaryIO) -> int:
    limit = file.tell() + LINE_LIMIT
    while block := file.readline(1 << 20):
        if block.endswith(b"\n"):
            break
        if file.tell() > limit:
            raise InputError(f"{source.path}: a line of more than {LINE_LIMIT >> 30} GiB; one row per line is expected")
    return file.tell()


def _gathered(
    index: int, source: Source, records: Iterator[tuple[int, Record | str, int]]
) -> Iterator[tuple[Piece, int]]:
    """Records that were read here, gathered to pieces of about CHUNK; sizes sum up to the file's."""
    held: list[tuple[int, Record | str]] = []
    counted = 0
    for line, record, read in records:  # read: bytes of the file that are consumed
        held.append((line, record))
        if read - counted >= CHUNK or len(held) >= 20000:
            yield Piece(index, records=tuple(held)), read - counted
            held, counted = [], read
    if held:
        yield Piece(index, records=tuple(held)), source.size - counted


def _document(i: int, source: Source, piece: Piece) -> Row | Fault:
    data = source.path.read_bytes()
    try:
        return Row(i, 0, {"text": data.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        return Fault(i, data.count(b"\n", 0, error.start) + 1, _not_utf8(data, error))


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{data[error.start]:02x})"


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


# ------------------------------------------------------- formats whose rows cannot be found without reading the file


def _json(source: Source) -> Iterator[tuple[int, Record | str, int]]:
    """The objects of an array, read as a stream; memory holds one block and one object."""
    decode = json.JSONDecoder().raw_decode
    with _text(source) as file:
        buffer, at, line = "", 0, 1
        ended = False
        state = "open"  # then "first", "comma" and "value" in turn
        while True:
            skipped = at
            while at < len(buffer) and buffer[at] in " \t\r\n":
                at += 1
            line += buffer.count("\n", skipped, at)
            if at == len(buffer):
                buffer, at = _read(source, file), 0
                if not buffer:
                    raise InputError(f"{source.path}:{line}: the array is cut off: its closing ] is missing")
                continue
            character = buffer[at]
            if state == "open":  # `_kind` has seen the [
                at, state = at + 1, "first"
            elif character == "]" and state in ("first", "comma"):
                break
            elif state == "comma":
                if character != ",":
                    raise InputError(f"{source.path}:{line}: not valid JSON: a comma is missing between two rows")
                at, state = at + 1, "value"
            else:
                try:
                    record, end = decode(buffer, at)
                except (ValueError, RecursionError) as error:
                    if not ended and _unfinished(error, buffer) and len(buffer) - at < LINE_LIMIT:
                        more = _read(source, file, max(len(buffer) - at, BLOCK))  # doubles what is held
                        ended = not more
                        buffer, at = buffer[at:] + more, 0
                        continue
                    if isinstance(error, json.JSONDecodeError):
                        line += buffer.count("\n", at, error.pos)
                    raise InputError(f"{source.path}:{line}: not valid JSON: {_json_reason(error)}") from error
                yield line, record if isinstance(record, dict) else "not a JSON object", file.buffer.tell()
                line += buffer.count("\n", at, end)
                at, state = end, "comma"
        if buffer[at + 1 :].strip() or _read(source, file).strip():
            raise InputError(f"{source.path}:{line}: something follows the end of the array")


def _unfinished(error: Exception, buffer: str) -> bool:
    """True when more of the file may complete a value that could not be read."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 16


def _csv(source: Source) -> Iterator[tuple[int, Record | str, int]]:
    csv.field_size_limit(LINE_LIMIT)
    with _text(source) as file:
        reader = csv.reader(_text_lines(source, file), strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header) or not any(header):
                raise InputError(f"{source.path}:1: the first line must name the columns, each once")
            while True:
                line = reader.line_num + 1
                values = next(reader, None)
                if values is None:
                    break
                if len(values) == len(header):
                    yield line, dict(zip(header, values, strict=True)), file.buffer.tell()
                elif values:
                    yield line, f"{len(values)} fields under {len(header)} columns", file.buffer.tell()
        except csv.Error as error:
            raise InputError(f"{source.path}:{reader.line_num}: not valid CSV: {error}") from error


def _parquet(source: Source, columns: Collection[str] | None) -> Iterator[tuple[int, Record | str, int]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(source.path)
        names = file.schema_arrow.names
        # Where one is missing, all are read: the message then tells the names there are.
        wanted = list(columns) if columns is not None and set(columns) <= set(names) else None
        total, row = max(file.metadata.num_rows, 1), 0
        for batch in file.iter_batches(batch_size=1000, columns=wanted):
            for record in batch.to_pylist():
                row += 1
                yield row, record, source.size * row // total
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{source.path}: not a readable parquet file: {' '.join(str(error).split())[:200]}") from error


def _text(source: Source) -> TextIO:
    return open(source.path, encoding="utf-8-sig", newline="")


def _read(source: Source, file: TextIO, size: int = BLOCK) -> str:
    try:
        return file.read(size)
    except UnicodeDecodeError as error:
        raise _encoding(source) from error


def _text_lines(source: Source, file: TextIO) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise _encoding(source) from error


def _encoding(source: Source) -> InputError:
    """Where a file stops being UTF-8, as one line."""
    with open(source.path, "rb") as file:
        for line, data in enumerate(file, 1):
            try:
                data.decode()
            except UnicodeDecodeError as error:
                return InputError(f"{source.path}:{line}: {_not_utf8(data, error)}; convert it with iconv -t utf-8")
    return InputError(f"{source.path}: not UTF-8; convert it with iconv -t utf-8")
