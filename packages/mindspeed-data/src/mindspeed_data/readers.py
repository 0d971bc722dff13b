"""Files of rows as chunks: pieces of known size that are read in any order, by any worker, in bounded memory.

    txt       one document per file, or one per line
    jsonl     an object per line (json files that hold lines instead of an array are read this way too)
    json      an array of objects
    csv       a header, then a row per record
    parquet   a row per record
    arrow     a row per record, in either of Arrow's file formats

A worker gets the place of a piece and reads it by itself; of what cannot be read from the middle (compressed files, parquet,
arrow) it gets the bytes. Where a piece ends depends on the file alone, so pieces are the same in every run.

A row that cannot be read becomes a `Fault` with its place; it never becomes another row.
"""

from __future__ import annotations

import csv
import io
import json
import mmap
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson

from mindspeed_core.errors import InputError
from mindspeed_data.json_array import BOM, ArrayError, elements, reason_of, too_long
from mindspeed_data.sources import Source, changed, opened

CHUNK = 2 << 20  # bytes of uncompressed input per chunk
ROW_LIMIT = 64 << 20  # bytes; what is longer is no row but another kind of file
BLOCK = 1 << 20  # bytes that are read at once

Record = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A stretch of one source: bytes of the uncompressed file, or rows of a table."""

    source: int  # index into the sources
    start: int
    stop: int
    line: int | None = None  # lines or rows before it; None: it follows the piece before
    data: bytes | None = None  # what stands there, where a worker cannot read it by itself
    columns: tuple[str, ...] = ()  # of a csv
    fault: str | None = None  # why the one row that it is cannot be used


@dataclass(frozen=True)
class Chunk:
    """Pieces that one worker turns into ids at a time."""

    pieces: tuple[Piece, ...]
    bytes: int  # of the input as it lies on the disk, for the progress bar


class Row(NamedTuple):
    """One record and its place; `line` counts from 1 within the piece, and is 0 for a document that is a file."""

    piece: int
    line: int
    record: Record


class Fault(NamedTuple):
    """A row that is left out, and why."""

    piece: int
    line: int
    reason: str


@dataclass
class Rows:
    """The rows of a chunk, its faults, and the lines in each of its pieces (to place rows within the file)."""

    chunk: Chunk
    sources: Sequence[Source]
    lines: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row | Fault]:
        for i, piece in enumerate(self.chunk.pieces):
            source = self.sources[piece.source]
            if piece.fault is not None:
                self.lines.append(1)
                yield Fault(i, int(source.kind != "text"), piece.fault)
                continue
            data = _bytes(source, piece)
            self.lines.append(piece.stop - piece.start if source.kind in TABLES else _newlines(data))
            for line, record in DECODERS[source.kind](data, piece):
                yield Row(i, line, record) if isinstance(record, dict) else Fault(i, line, record)


def chunks(
    sources: Sequence[Source],
    *,
    columns: Collection[str] | None = None,
    after: tuple[int, int] = (0, 0),
    shard: tuple[int, int] = (1, 1),
) -> Iterator[Chunk]:
    """Cut all sources into chunks of about the same number of bytes. `columns` limits what is read of tables.

    `after` names the source and the place in it where the chunk before the first one ended. Of n shards, number i gets the
    i-th part of the bytes; all of them together have every row once, in order.
    """
    pieces: list[Piece] = []
    held = consumed = 0
    for piece, size, read in _pieces(sources, columns, after, shard):
        if pieces and held + size > CHUNK:
            yield Chunk(tuple(pieces), consumed)
            pieces, held, consumed = [], 0, 0
        pieces.append(piece)
        held += size
        consumed += read
    if pieces:
        yield Chunk(tuple(pieces), consumed)


def share(sources: Sequence[Source], shard: tuple[int, int]) -> int:
    """Return how many bytes of the input, as it lies on the disk, a shard reads: to about a chunk."""
    total, (number, shards) = sum(source.size for source in sources), shard
    low, high = (total * (number - 1) // shards, total * number // shards)
    read = begin = 0
    for source in sources:
        if source.compression is not None or source.kind == "text":  # whole, where it begins
            read += source.size if low <= begin < high else 0
        else:
            read += max(0, min(begin + source.size, high) - max(begin, low))
        begin += source.size
    return read


def _newlines(data: bytes) -> int:
    """`data.count(b"\\n")`, several times faster."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))


def _bytes(source: Source, piece: Piece) -> bytes:
    if piece.data is not None:
        return piece.data
    with open(source.path, "rb") as file:
        file.seek(piece.start)
        data = file.read(piece.stop - piece.start)
    if len(data) < piece.stop - piece.start:
        raise changed(source)
    return data


# ------------------------------------------------------------------------------------------- from the bytes of a piece


def _document(data: bytes, _: Piece) -> Iterator[tuple[int, Record | str]]:
    try:
        yield 0, {"text": data.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, _not_utf8(data, error)


def _text_lines(data: bytes, piece: Piece) -> Iterator[tuple[int, Record | str]]:
    for number, line in _lines(data, piece):
        try:
            yield number, {"text": line.decode()}
        except UnicodeDecodeError as error:
            yield number, _not_utf8(line, error)


def _json_lines(data: bytes, piece: Piece) -> Iterator[tuple[int, Record | str]]:
    for number, line in _lines(data, piece):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            yield number, _patiently(line)
        else:
            yield number, record if isinstance(record, dict) else "not a JSON object"


def _patiently(line: bytes) -> Record | str:
    """What json makes of a line that orjson refuses (NaN, half surrogates), else the reason, as text."""
    try:
        record = json.loads(line.decode())
        return record if isinstance(record, dict) else "not a JSON object"
    except UnicodeDecodeError as error:
        return _not_utf8(line, error)
    except (ValueError, RecursionError) as error:
        return f"not valid JSON: {reason_of(error)}"


def _lines(data: bytes, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, with their numbers."""
    number, start = 0, len(BOM) if piece.start == 0 and data.startswith(BOM) else 0
    while start < len(data):
        stop = data.find(b"\n", start)
        line = data[start : stop if stop >= 0 else None]  # one by one: all lines at once would leave the cache
        number, start = number + 1, stop + 1 if stop >= 0 else len(data)
        if line and not line.isspace():
            yield number, line.removesuffix(b"\r")


def _array(data: bytes, piece: Piece) -> Iterator[tuple[int, Record | str]]:
    for element in elements(io.BytesIO(data), inside=piece.start > 0, whole=False, limit=ROW_LIMIT):
        record = element.value if isinstance(element.value, dict) else "not a JSON object"
        yield element.line, element.fault or record


def _csv(data: bytes, piece: Piece) -> Iterator[tuple[int, Record | str]]:
    lines = _CountedLines(io.BytesIO(data), bom=False)
    reader = _csv_reader(lines)
    while True:
        line = reader.line_num + 1
        lines.begin_row()
        values = next(reader, None)
        if values is None:
            return
        if lines.fault is not None:
            yield line, lines.fault
        elif len(values) == len(piece.columns):
            yield line, dict(zip(piece.columns, values, strict=True))
        elif values:
            yield line, f"other fields than the columns: {len(values)} under {len(piece.columns)}"


def _table(data: bytes, _: Piece) -> Iterator[tuple[int, Record | str]]:
    import pyarrow

    with pyarrow.ipc.open_stream(data) as reader:
        batch = reader.read_next_batch()
    try:
        yield from enumerate(batch.to_pylist(), 1)
    except ValueError:  # somewhere is a text that is not UTF-8, or a time that Python does not have
        for i in range(batch.num_rows):
            try:
                yield i + 1, batch.slice(i, 1).to_pylist()[0]
            except ValueError as error:
                bad = isinstance(error, UnicodeDecodeError)
                yield i + 1, _not_utf8(error.object, error) if bad else f"not a value of JSON: {error}"


TABLES = ("parquet", "arrow")
DECODERS: dict[str, Callable[[bytes, Piece], Iterator[tuple[int, Record | str]]]] = {
    "text": _document,
    "lines": _text_lines,
    "jsonl": _json_lines,
    "json": _array,
    "csv": _csv,
    "parquet": _table,
    "arrow": _table,
}


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{data[error.start]:02x}"


NO_MARKS = re.compile(rb'[^",\r\n]+')


class _CountedLines:
    """The lines of a csv for its reader: how many bytes they had, and what is wrong with them.

    Of what is longer than any row only the marks are kept that say where its fields, and with them the row, end."""

    def __init__(self, stream: BinaryIO, *, bom: bool) -> None:
        self._stream, self._bom = stream, bom
        self.offset = 0
        self.begin_row()

    def begin_row(self) -> None:
        """What comes next is of another row."""
        self.start = self.offset
        self.fault: str | None = None

    def __iter__(self) -> _CountedLines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(ROW_LIMIT + 1)
        if not line:
            raise StopIteration
        first, self.offset = self.offset == 0, self.offset + len(line)
        if self.offset - self.start > ROW_LIMIT:
            marks = [NO_MARKS.sub(b"x", line)]
            while not line.endswith(b"\n") and (line := self._stream.readline(BLOCK)):
                self.offset += len(line)
                marks.append(NO_MARKS.sub(b"x", line))
            self.fault = too_long(ROW_LIMIT)
            return b"".join(marks).decode()
        if self._bom and first:
            line = line.removeprefix(BOM)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.fault = _not_utf8(line, error)
            return line.decode(errors="replace")


def _csv_reader(lines: _CountedLines) -> Any:
    csv.field_size_limit(sys.maxsize)  # what is too long is told by its lines, and left out alone
    return csv.reader(lines, strict=True)


# ---------------------------------------------------------------------------------------- where the pieces of a file end


def _pieces(
    sources: Sequence[Source], columns: Collection[str] | None, after: tuple[int, int], shard: tuple[int, int]
) -> Iterator[tuple[Piece, int, int]]:
    """Every piece with its bytes, uncompressed and on the disk."""
    total, (number, shards) = sum(source.size for source in sources), shard
    low, high = (total * (number - 1) // shards, total * number // shards)
    ends = list(accumulate(source.size for source in sources))  # among the bytes of all
    for index, (source, end) in enumerate(zip(sources, ends, strict=True)):
        begin = end - source.size
        if index < after[0] or source.size == 0 or end <= low or begin >= high:
            continue
        done = after[1] if index == after[0] else 0
        follows = False
        for piece, size, read, at in _cut(index, source, columns):
            if piece.stop <= done or not low <= begin + at < high:
                follows = False
                continue
            if piece.line is None and not follows:
                piece = _placed(source, piece)
            follows = True
            yield piece, size, read


def _cut(index: int, source: Source, columns: Collection[str] | None) -> Iterator[tuple[Piece, int, int, int]]:
    """The pieces of one source; with each its bytes uncompressed, its bytes on the disk, and where those begin.

    Of a compressed file all begin at 0: how far reading is ahead of them differs from version to version."""
    if source.kind in TABLES:
        yield from _tables(index, source, columns)
    elif source.compression is None and source.kind in ("text", "lines", "jsonl"):
        cuts = _whole if source.kind == "text" else _ranges
        for piece in cuts(index, source):
            size = piece.stop - piece.start
            yield piece, size if piece.fault is None else 0, size, piece.start
    else:
        with opened(source) as (stream, file):
            told = 0
            for piece in CUTTERS[source.kind](index, source, stream):
                read = min(file.tell(), source.size) if source.compression is not None else piece.stop
                at = 0 if source.compression is not None else piece.start
                yield piece, piece.stop - piece.start, read - told, at
                told = read


def _placed(source: Source, piece: Piece) -> Piece:
    """The piece with the lines before it counted."""
    lines, left = 0, piece.start
    with open(source.path, "rb") as file:
        while left and (block := file.read(min(left, BLOCK))):
            lines += block.count(b"\n")
            left -= len(block)
    return replace(piece, line=lines)


def _whole(index: int, source: Source) -> Iterator[Piece]:
    yield Piece(index, 0, source.size, 0, fault=_too_long(source.size, "; as documents of a line each: --per-line"))


def _ranges(index: int, source: Source) -> Iterator[Piece]:
    """Ranges of about CHUNK bytes that end with a line."""
    with open(source.path, "rb") as file:
        start = 0
        while start < source.size:
            stop = min(start + CHUNK, source.size)
            if stop < source.size:
                file.seek(stop - 1)  # a range that ends with a newline already is kept
                while (block := file.readline(BLOCK)) and not block.endswith(b"\n"):
                    pass
                stop = file.tell()
            fault = None
            if stop - start > ROW_LIMIT:  # the line that goes on past CHUNK is a piece of its own
                file.seek(start)
                begin = file.read(CHUNK).rfind(b"\n") + 1
                if begin:
                    stop = start + begin
                else:
                    fault = _too_long(stop - start)
            yield Piece(index, start, stop, fault=fault)
            start = stop


def _too_long(size: int, hint: str = "") -> str | None:
    return f"{too_long(ROW_LIMIT)}{hint}" if size > ROW_LIMIT else None


def _document_stream(index: int, _: Source, stream: BinaryIO) -> Iterator[Piece]:
    data = stream.read(ROW_LIMIT + 1)
    fault = _too_long(len(data), "; as documents of a line each: --per-line")
    if data:
        yield Piece(index, 0, len(data), 0, None if fault else data, fault=fault)


def _line_stream(index: int, _: Source, stream: BinaryIO) -> Iterator[Piece]:
    start = line = 0
    while data := stream.read(CHUNK):
        if not data.endswith(b"\n"):
            data += stream.readline(ROW_LIMIT)
        size, fault = len(data), None
        if size > ROW_LIMIT:
            begin = data.rfind(b"\n", 0, CHUNK) + 1
            if begin:
                yield Piece(index, start, start + begin, line, data[:begin])
                start, line = start + begin, line + data.count(b"\n", 0, begin)
            size -= begin
            while not data.endswith(b"\n") and (data := stream.readline(BLOCK)):
                size += len(data)
            data, fault = b"\n", _too_long(size)
        yield Piece(index, start, start + size, line, None if fault else data, fault=fault)
        start, line = start + size, line + data.count(b"\n")


def _array_stream(index: int, source: Source, stream: BinaryIO) -> Iterator[Piece]:
    kept = _Kept(stream, keep=source.compression is not None)
    start = stop = lines = line = 0
    try:
        for element in elements(kept, limit=ROW_LIMIT):  # pyrefly: ignore  # all that it asks for is `read`
            if element.fault == too_long(ROW_LIMIT):
                if stop > start:
                    yield Piece(index, start, stop, line, kept.take(stop - start))
                yield Piece(index, stop, element.stop, element.line - 1, fault=element.fault)
                kept.take(element.stop - stop)
                start = stop = element.stop
                line = lines = element.lines
                continue
            stop, lines = element.stop, element.lines
            if stop - start >= CHUNK:
                yield Piece(index, start, stop, line, kept.take(stop - start))
                start, line = stop, lines
    except ArrayError as error:
        raise InputError(f"{source.path}:{error.line}: {error.reason}") from error
    if stop > start:
        yield Piece(index, start, stop, line, kept.take(stop - start))


def _csv_stream(index: int, source: Source, stream: BinaryIO) -> Iterator[Piece]:
    kept = _Kept(stream, keep=source.compression is not None)
    lines = _CountedLines(kept, bom=True)  # pyrefly: ignore  # all that it asks for is `readline`
    reader = _csv_reader(lines)
    try:
        columns = tuple(next(reader, []))
        if lines.fault is not None:
            raise InputError(
                f"{source.path}:1: the line that names the columns is {lines.fault}; write the file as UTF-8"
            )
        if any("\0" in column for column in columns):
            raise InputError(f"{source.path}:1: not UTF-8: it holds NULs, as UTF-16 does; write the file as UTF-8")
        if len(set(columns)) != len(columns) or not any(columns):
            raise InputError(f"{source.path}:1: the first line must name the columns, each once")
        start, line = lines.offset, reader.line_num
        kept.take(start)
        lines.begin_row()
        before = line
        for _ in reader:
            stop = lines.start if lines.fault == too_long(ROW_LIMIT) else lines.offset
            if stop > start and (stop - start >= CHUNK or stop < lines.offset):
                yield Piece(index, start, stop, line, kept.take(stop - start), columns)
                start, line = stop, before if stop < lines.offset else reader.line_num
            if stop < lines.offset:
                yield Piece(index, stop, lines.offset, line, fault=lines.fault)
                kept.take(lines.offset - stop)
                start, line = lines.offset, reader.line_num
            lines.begin_row()
            before = reader.line_num
    except csv.Error as error:
        raise InputError(f"{source.path}:{reader.line_num}: not valid CSV: {error}") from error
    if lines.offset > start:
        yield Piece(index, start, lines.offset, line, kept.take(lines.offset - start), columns)


CUTTERS: dict[str, Callable[[int, Source, BinaryIO], Iterator[Piece]]] = {
    "text": _document_stream,
    "lines": _line_stream,
    "jsonl": _line_stream,
    "json": _array_stream,
    "csv": _csv_stream,
}


class _Kept:
    """A stream that keeps what was read of it, where a worker could not read it again."""

    def __init__(self, stream: BinaryIO, *, keep: bool) -> None:
        self._stream = stream
        self._kept = bytearray() if keep else None

    def read(self, size: int) -> bytes:
        return self._keep(self._stream.read(size))

    def readline(self, size: int) -> bytes:
        return self._keep(self._stream.readline(size))

    def take(self, size: int) -> bytes | None:
        """Return the first bytes of what is kept, and keep them no longer; None where nothing is."""
        if self._kept is None:
            return None
        taken = bytes(self._kept[:size])
        del self._kept[:size]
        return taken

    def _keep(self, data: bytes) -> bytes:
        if self._kept is not None:
            self._kept += data
        return data


def _tables(index: int, source: Source, columns: Collection[str] | None) -> Iterator[tuple[Piece, int, int, int]]:
    """Rows of a table of about CHUNK bytes, as Arrow writes them; with each piece what `_cut` says of it."""
    import pyarrow

    try:
        row = begin = 0
        batches, release = (_parquet if source.kind == "parquet" else _arrow)(source, columns)
        for batch, end in batches:
            _validate(batch)
            first = row
            for part in _parts(batch):
                _validate(part, full=True)
                fault, data = _too_long(part.nbytes), b""
                if fault is None:
                    sink = pyarrow.BufferOutputStream()
                    with pyarrow.ipc.new_stream(sink, part.schema) as writer:
                        writer.write_batch(part)
                    data = sink.getvalue().to_pybytes()
                stop = row + part.num_rows
                at, to = (begin + (end - begin) * (r - first) // batch.num_rows for r in (row, stop))
                yield Piece(index, row, stop, row, None if fault else data, fault=fault), len(data), to - at, at
                row = stop
                release()
            begin = end
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a damaged name
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source.path}: not a readable {source.kind} file: {reason}") from error


def _parts(batch: Any) -> Iterator[Any]:
    """Rows of about CHUNK bytes; a row that is too long alone."""
    height = max(1, batch.num_rows * CHUNK // max(batch.nbytes, 1))
    left = [batch.slice(start, height) for start in reversed(range(0, batch.num_rows, height))]
    while left:
        part = left.pop()
        half = part.num_rows // 2
        if half and part.nbytes > ROW_LIMIT:
            left += [part.slice(half), part.slice(0, half)]
        else:
            yield part


def _validate(batch: Any, *, full: bool = False) -> None:
    """Refuse a table whose buffers contradict each other: Arrow itself would read past their ends. `full` looks at every value."""
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=full)
        except pyarrow.ArrowInvalid as error:
            text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
            if not (text and "UTF8" in str(error)):  # that one is told of the row
                raise


Batches = Iterator[tuple[Any, int]]  # of rows, and how much of the file they and those before them make up


def _parquet(source: Source, columns: Collection[str] | None) -> tuple[Batches, Callable[[], object]]:
    """The batches of a file, and what lets go of the memory of those that were used."""
    from pyarrow import parquet

    # Without these two a whole row group would be held.
    file = parquet.ParquetFile(source.path, pre_buffer=False, buffer_size=BLOCK)
    total, wanted = file.metadata.num_rows, _wanted(file.schema_arrow.names, columns)

    def batches() -> Batches:
        rows = 0
        for batch in file.iter_batches(1000, columns=wanted):
            rows += batch.num_rows
            yield batch, source.size * rows // total

    return batches(), lambda: None


def _arrow(source: Source, columns: Collection[str] | None) -> tuple[Batches, Callable[[], object]]:
    """The same of either of Arrow's formats: the one that ends with an index, and the stream that `datasets` writes."""
    import pyarrow

    with open(source.path, "rb") as file:  # it stays a map: one batch may be as large as all of it
        if not file.read(1):
            raise changed(source)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    stream = pyarrow.BufferReader(pyarrow.py_buffer(mapped))
    if mapped[:6] == b"ARROW1":
        reader = pyarrow.ipc.open_file(stream)
        count = reader.num_record_batches
        batches = ((reader.get_batch(i), source.size * (i + 1) // count) for i in range(count))
    else:
        reader = pyarrow.ipc.open_stream(stream)
        batches = ((batch, stream.tell()) for batch in reader)
    wanted = _wanted(reader.schema.names, columns)
    chosen = ((batch if wanted is None else batch.select(wanted), end) for batch, end in batches)

    def release() -> None:
        if mapped.size() < source.size:  # a look behind the new end would kill us
            raise changed(source)
        mapped.madvise(mmap.MADV_DONTNEED)  # pages that were looked at count as memory until told otherwise

    return chosen, release


def _wanted(names: Sequence[str], columns: Collection[str] | None) -> list[str] | None:
    """The columns to read; all where one is missing: the message then tells the names there are."""
    return [name for name in names if name in columns] if columns is not None and set(columns) <= set(names) else None
