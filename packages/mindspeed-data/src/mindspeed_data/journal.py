"""What a run has done so far, on the disk: after a kill the same command goes on behind the last chunk that was written.

The journal holds a line about the job, then one per chunk: where it ended, what was counted, and how long every file was and its
hash then. Files are appended to before that line is. Whatever ends a run, the next one cuts them back to the last line whose
hashes hold, which after a kill is the last line, and after a loss of power perhaps one before.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from mindspeed_core.errors import InputError, writing

BLOCK = 1 << 22  # bytes that are read at once
TAIL = 1 << 18  # bytes of the end of a journal that are looked at
HASH = "xxh3_128"  # it tells damage; SHA-256 takes as long as encoding where the CPU has no instructions for it

Mark = tuple[int, str]  # the size of a file, and the hash of that much of it
Line = dict[str, Any]


class GrowingFile:
    """A file that is appended to, and its hash. Nothing waits in memory: what was written outlives a kill."""

    def __init__(self, path: Path, *, size: int = 0) -> None:
        self.path = path
        self.size = 0
        self._hash = xxhash.xxh3_128()
        with writing(path):
            if not size:
                self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close
                return
            self._file = open(path, "r+b", buffering=0)  # noqa: SIM115
            while self.size < size and (block := self._file.read(min(BLOCK, size - self.size))):
                self._hash.update(block)
                self.size += len(block)
            self._file.truncate(self.size)

    @property
    def mark(self) -> Mark:
        return self.size, self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        done, size = 0, memoryview(data).nbytes
        with writing(self.path):
            while done < size:
                done += self._file.write(data[done:])
        self._hash.update(data)
        self.size += size

    def sync(self) -> None:
        """Wait until everything is on the disk, and close the file."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()


class Journal:
    """The journal of one run, locked while it is open."""

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        with writing(path):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close
        if _locked(self._file):
            self._file.close()
            raise InputError(f"{path}: another run is writing this data set; wait for it, or end it")
        self._head = json.dumps(job, sort_keys=True).encode() + b"\n"
        self._file.seek(0)
        found = self._file.read(len(self._head))
        self.known = found == self._head  # what it holds is of this job
        self.other = bool(found) and not self.known  # and of another one

    def clear(self) -> None:
        """Begin anew, whatever it held."""
        self._cut(0)
        self._write(self._head)
        self.known, self.other = True, False

    def add(self, line: Mapping[str, Any], files: Sequence[GrowingFile]) -> None:
        """Note a chunk that is written to the files."""
        marks = {file.path.name: file.mark for file in files}
        self._write(json.dumps({**line, "files": marks}).encode() + b"\n")

    def resume(self) -> Line | None:
        """Return the last line whose files hold, and forget those behind it; None where none does, or another job wrote it."""
        for line, end in reversed(self._tail() if self.known else []):
            if _holds(self.path.parent, line["files"]):
                self._cut(end)
                return line
        self.clear()
        return None

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()

    def _tail(self) -> list[tuple[Line, int]]:
        """The last whole lines but the head, and where each of them ends."""
        size = self._file.seek(0, os.SEEK_END)
        start = max(len(self._head), size - TAIL)
        self._file.seek(start)
        *lines, _ = self._file.read().split(b"\n")  # behind the last newline is what a kill cut short
        ends = list(accumulate((len(line) + 1 for line in lines), initial=start))[1:]
        if start > len(self._head):
            lines, ends = lines[1:], ends[1:]
        return [(json.loads(line), end) for line, end in zip(lines, ends, strict=True)]

    def _cut(self, size: int) -> None:
        with writing(self.path):
            self._file.truncate(size)

    def _write(self, data: bytes) -> None:
        with writing(self.path):
            self._file.write(data)


def described(marks: Mapping[str, Mark]) -> dict[str, dict[str, Any]]:
    """Return what the description of a data set says of its files."""
    return {name: {"bytes": size, HASH: hashed} for name, (size, hashed) in sorted(marks.items())}


def _locked(file: FileIO) -> bool:
    """True where another process holds the lock of a file; else it is ours, if the file system has locks at all."""
    with suppress(OSError):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def digest(path: Path, size: int | None = None) -> str:
    """Return the hash of a file, or of its first bytes; of a file that has fewer, that of all of them."""
    hashed, left = xxhash.xxh3_128(), path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(BLOCK, left))):
            hashed.update(block)
            left -= len(block)
    return hashed.hexdigest()


def _holds(folder: Path, marks: Mapping[str, Sequence[Any]]) -> bool:
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size >= size and digest(folder / name, size) == known
        for name, (size, known) in marks.items()
    )
