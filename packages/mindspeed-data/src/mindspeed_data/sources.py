"""The files of the input: found from names, folders, patterns and saved Hugging Face data sets, and opened as bytes."""

from __future__ import annotations

import glob
import io
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from mindspeed_core.errors import InputError
from mindspeed_data.sidecar import DESCRIPTION, LEFT_OUT, ORIGIN

KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
COMPRESSIBLE = KINDS[:4]  # the others compress their own columns
KNOWN = f"{', '.join(kind[1:] for kind in KINDS)} (the first four also as .gz and .zst)"
BUFFER = 1 << 20  # bytes


@dataclass(frozen=True)
class Source:
    """One file of the input and how it is read."""

    path: Path
    kind: str  # "text" (a document), "lines" (a document per line), "jsonl", "json", "csv", "parquet", "arrow"
    size: int  # in bytes, as it lies on the disk
    part: int = 0  # which of the given inputs it belongs to
    compression: str | None = None  # "gzip" or "zstd"


def find(inputs: Sequence[str | Path], *, per_line: bool = False) -> list[Source]:
    """Return the sources of files, folders and patterns, in the order given; those of a folder or a pattern by path."""
    sources: list[Source] = []
    problems: list[str] = []
    for part, given in enumerate(map(Path, inputs)):
        try:
            for path in _files(given):
                check_name(path)
                kind, compression = _kind(path, per_line=per_line)
                sources.append(Source(path, kind, path.stat().st_size, part, compression))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    if all(source.size == 0 for source in sources):
        raise InputError("\n".join(f"{source.path}: this file is empty" for source in sources[:10]))
    return sources


def check_name(path: Path) -> None:
    """Refuse a name that the description of the data could not tell."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        told = os.fsencode(path).decode(errors="backslashreplace")
        raise InputError(f"{told}: this name is not UTF-8; rename it, or choose another") from error


def stamps(sources: Sequence[Source]) -> list[tuple[int, int]]:
    """Return what tells of every file that it has changed: its size and when it was written."""
    return [((stat := source.path.stat()).st_size, stat.st_mtime_ns) for source in sources]


def changed(source: Source) -> InputError:
    """Return what to say of a file that was written to while it was read."""
    return InputError(f"{source.path}: changed while it was read; run again when nothing writes to it any more")


@contextmanager
def opened(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The bytes of a file, uncompressed, and the file itself, whose position tells how much of it is read."""
    if source.compression is None:
        with open(source.path, "rb", buffering=BUFFER) as plain:
            yield plain, plain
        return
    import pyarrow

    try:
        with pyarrow.OSFile(str(source.path)) as file:
            stream = pyarrow.CompressedInputStream(file, source.compression)
            yield cast("BinaryIO", io.BufferedReader(stream, BUFFER)), cast("BinaryIO", file)
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{source.path}: damaged, or not {source.compression} at all: {error}") from error


def _files(given: Path) -> list[Path]:
    """The files that a name on the command line stands for."""
    if given.is_dir():
        saved = _saved(given)
        found = sorted(path for path in _walk(given) if _known(path) and not _ours(path)) if saved is None else saved
        if not found:
            raise InputError(f"{given}: this folder holds no {KNOWN} file")
        return found
    if given.is_file():
        if not _known(given):
            raise InputError(f"{given}: the name does not tell a format that is read; known are {KNOWN}")
        return [given]
    if glob.has_magic(str(given)):
        matches = sorted(path for path in _matches(given) if not path.is_dir() and not _ours(path))
        if not matches:
            raise InputError(f"{given}: no file matches this pattern")
        return [file for match in matches for file in _files(match)]
    raise InputError(f"{given}: no such file or folder")


def _matches(pattern: Path) -> Iterator[Path]:
    """What a pattern stands for. `**` is walked by us: glob goes round in loops of links, for ages where there are two."""
    if pattern.parts.count("**") != 1:
        yield from map(Path, glob.glob(str(pattern), recursive=True))
        return
    at = pattern.parts.index("**")
    tail = Path(*pattern.parts[at + 1 :] or "*")
    for folder in filter(Path.is_dir, map(Path, glob.glob(str(Path(*pattern.parts[:at]))))):
        yield from (path for path in _walk(folder) if path.relative_to(folder).match(str(tail)))


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder but hidden ones. A folder that links lead to as well is read once: so loops end."""
    seen: set[tuple[int, int]] = set()
    folders, links = deque([folder]), deque[Path]()  # a link goes last: a folder keeps its own name
    while folders or links:
        place = folders.popleft() if folders else links.popleft()
        stat = place.stat()
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        for path in sorted(place.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.is_file():
                yield path


def _ours(path: Path) -> bool:
    """True for what stands beside the ids of a data set of ours: its rows have been read already."""
    described = path.name.removesuffix(DESCRIPTION)
    return path.name.endswith((LEFT_OUT, ".tmp")) or (
        described != path.name and path.with_name(f"{described}{ORIGIN}.bin").exists()
    )


def _saved(folder: Path) -> list[Path] | None:
    """The files of a data set that `datasets.save_to_disk` wrote, in its order; None for any other folder."""
    splits = folder / "dataset_dict.json"
    state = folder / "state.json"
    try:
        if splits.exists():
            names = json.loads(splits.read_text())["splits"]
            if len(names) != 1:
                raise InputError(f"{folder}: holds the splits {', '.join(names)}; name one: {folder / names[0]}")
            return _saved(folder / names[0])
        if not state.exists():
            return None
        found = [folder / file["filename"] for file in json.loads(state.read_text())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: its {'state' if state.exists() else 'dataset_dict'}.json is damaged") from error
    missing = [path for path in found if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]}: missing, and {state} names it; save the data set again")
    return found


def _suffixes(path: Path) -> tuple[str, str | None]:
    """The suffix that tells the kind, and the compression."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), COMPRESSIONS[suffix]
    return suffix, None


def _known(path: Path) -> bool:
    suffix, compression = _suffixes(path)
    return suffix in (KINDS if compression is None else COMPRESSIBLE)


def _kind(path: Path, *, per_line: bool) -> tuple[str, str | None]:
    suffix, compression = _suffixes(path)
    if suffix == ".txt":
        return ("lines" if per_line else "text"), compression
    if suffix == ".json":  # of an array, or of lines
        with opened(Source(path, "json", 0, compression=compression)) as (stream, _):
            head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        return ("json" if head.startswith(b"[") else "jsonl"), compression
    return suffix[1:], compression
