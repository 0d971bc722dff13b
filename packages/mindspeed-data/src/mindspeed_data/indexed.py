"""Megatron's `.bin`/`.idx` pair: sequences of ids, written as a stream and read through a memory map.

PREFIX.bin   the ids of all sequences, one after the other, little-endian, nothing else
PREFIX.idx   magic, version, dtype code, number of sequences, number of documents + 1,
             int32 lengths, int64 byte offsets into .bin, int64 first sequence of each document and one past the last
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mindspeed_core.errors import InputError, writing

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}
BLOCK = 1 << 16  # sequences of the index that are held in memory at once


def path_of(prefix: str | Path, suffix: str) -> Path:
    """Return `prefix` + `suffix` (".bin", ".idx"); prefixes may hold dots."""
    return Path(f"{os.fspath(prefix)}{suffix}")


class IndexedDataset:
    """A pair of files that are read as needed. `dataset[i]` is sequence i as an array."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        bin, idx = path_of(prefix, ".bin"), path_of(prefix, ".idx")
        for path in (idx, bin):
            if not path.is_file():
                raise InputError(f"{path}: no such file; a data set is a pair of .bin and .idx files")
        size = idx.stat().st_size
        with open(idx, "rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size or head[:9] != MAGIC:
            raise InputError(f"{idx}: not the index of a data set; write it again with mindspeed-data")
        _, version, code, sequences, documents = HEADER.unpack(head)
        if version != 1 or code not in DTYPES:
            raise InputError(f"{idx}: version {version}, dtype code {code}: only version 1 with codes 1 to 8 is known")
        self.dtype = np.dtype(DTYPES[code])
        needed = HEADER.size + sequences * 12 + documents * 8
        if size < needed:
            raise InputError(f"{idx}: cut off ({size:,} of {needed:,} bytes); write it again with mindspeed-data")
        at = HEADER.size
        self.lengths: NDArray[np.int32] = _map(idx, "<i4", sequences, at)
        self.offsets: NDArray[np.int64] = _map(idx, "<i8", sequences, at + sequences * 4)
        self.documents: NDArray[np.int64] = _map(idx, "<i8", documents, at + sequences * 12)
        held = bin.stat().st_size
        if sequences and held < int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize:
            raise InputError(f"{bin}: cut off; its index asks for more than its {held:,} bytes; write it again")
        self.ids = _map(bin, self.dtype.newbyteorder("<"), held // self.dtype.itemsize, 0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.part(index, 0, None)

    def part(self, index: int, start: int, stop: int | None) -> NDArray[Any]:
        """Return the ids [start, stop) of a sequence, without copying."""
        first = int(self.offsets[index]) // self.dtype.itemsize
        length = int(self.lengths[index])
        return self.ids[first + start : first + (length if stop is None else min(stop, length))]

    @property
    def tokens(self) -> int:
        """The number of ids in all sequences."""
        return int(self.lengths.sum(dtype=np.int64))


def _map(path: Path, dtype: DTypeLike, count: int, offset: int) -> NDArray[Any]:
    """Map part of a file; an empty file cannot be mapped."""
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


class IndexedWriter:
    """Writes a pair of files beside their final names; memory does not grow with the data.

    Nothing carries a final name before `publish`. Lengths wait in a file of their own until the index is written.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike = np.int32) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.sequences = 0
        self.tokens = 0
        self._paths = {name: path_of(prefix, f"{name}.tmp") for name in (".bin", ".idx", ".lengths")}
        self._ids: BinaryIO = open(self._paths[".bin"], "wb")  # noqa: SIM115 - closed by finish or discard
        self._lengths: BinaryIO = open(self._paths[".lengths"], "wb")  # noqa: SIM115

    def add(self, ids: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Append sequences that lie one after the other in `ids`; each is a document."""
        if ids.dtype != self.dtype:
            raise TypeError(f"{ids.dtype} ids for a file of {self.dtype}")
        with writing(self._paths[".bin"]):
            self._ids.write(ids.tobytes())
        with writing(self._paths[".lengths"]):
            self._lengths.write(np.ascontiguousarray(lengths, "<i4").tobytes())
        self.sequences += len(lengths)
        self.tokens += len(ids)

    def finish(self) -> None:
        """Write everything to the disk, still under temporary names."""
        with writing(self._paths[".bin"]):
            _sync(self._ids)
        with writing(self._paths[".lengths"]):
            self._lengths.close()
        with writing(self._paths[".idx"]), open(self._paths[".idx"], "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], self.sequences, self.sequences + 1))
            for lengths in self._blocks():
                file.write(lengths.tobytes())
            offset = 0
            for lengths in self._blocks():
                ends = offset + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
                file.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
                offset = int(ends[-1])
            for start in range(0, self.sequences + 1, BLOCK):
                file.write(np.arange(start, min(start + BLOCK, self.sequences + 1), dtype="<i8").tobytes())
            _sync(file)
        self._paths[".lengths"].unlink()

    def discard(self) -> None:
        """Remove what was not published."""
        for file in (self._ids, self._lengths):
            with suppress(OSError):  # what is still in the buffer of a full disk
                file.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def _blocks(self) -> Iterator[NDArray[np.int32]]:
        with open(self._paths[".lengths"], "rb") as file:
            while block := file.read(BLOCK * 4):
                yield np.frombuffer(block, "<i4")


def publish(*writers: IndexedWriter, beside: Path) -> None:
    """Give finished pairs and the file `beside` them their names: an old index goes first and a new one comes last, so
    that no index ever stands with ids that are not its own."""
    for writer in writers:
        path_of(writer.prefix, ".idx").unlink(missing_ok=True)
    os.replace(f"{beside}.tmp", beside)
    for suffix in (".bin", ".idx"):
        for writer in writers:
            os.replace(path_of(writer.prefix, f"{suffix}.tmp"), path_of(writer.prefix, suffix))


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
