"""The files of a `torch_dist` checkpoint: boxes of tensors in `__R_0.distcp`, and `.metadata` that says where each lies.

The format is PyTorch's and Megatron's. `.metadata` is a pickle; here it is read as data: only the classes of the format
are known to the reader, so a foreign checkpoint cannot run code.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mindspeed_core.checkpoint.folder import sync
from mindspeed_core.errors import InputError

METADATA = ".metadata"


@dataclass(frozen=True)
class Box:
    """A stored box of a tensor: where it lies in the tensor, and in which bytes of which file."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its whole shape and the boxes that fill it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]


def write_boxes(
    folder: Path, rank: int, boxes: Iterable[tuple[str, tuple[int, ...], Tensor]]
) -> list[tuple[str, torch.dtype, Box]]:
    """Write this rank's boxes, (key, offset, values) each, into its file; return where each lies.

    One box is in memory at a time. The file is on the disk when the call returns.
    """
    name = f"__{rank}_0.distcp"
    written = []
    with open(folder / name, "xb") as file:
        stream: Any = _Told(file)
        for key, offset, values in boxes:
            start = file.tell()
            values = values.detach()
            # torch.save writes the whole storage of a view: give it one of its own
            values = (
                values.cpu() if values.device.type != "cpu" else values.clone(memory_format=torch.contiguous_format)
            )
            try:
                torch.save(values, stream)
            except Exception as error:
                raise stream.error or error from None
            written.append(
                (key, values.dtype, Box(tuple(offset), tuple(values.shape), name, start, file.tell() - start))
            )
    sync(folder / name)
    return written


def write_metadata(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Write what makes the files of all ranks one checkpoint, for our reader, PyTorch's and Megatron's."""
    from torch.distributed.checkpoint import filesystem, metadata

    index = metadata.Metadata(state_dict_metadata={}, planner_data=None, storage_data={})
    for key, stored in tensors.items():
        filled = sum(math.prod(box.sizes) for box in stored.boxes)
        assert filled == math.prod(stored.shape), f"{key}: boxes of {filled} elements for a shape of {stored.shape}"
        index.state_dict_metadata[key] = metadata.TensorStorageMetadata(
            properties=metadata.TensorProperties(dtype=stored.dtype),
            size=torch.Size(stored.shape),
            chunks=[
                metadata.ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.sizes)) for box in stored.boxes
            ],
        )
        for place, box in enumerate(stored.boxes):
            at = metadata.MetadataIndex(key, torch.Size(box.offset), place)
            index.storage_data[at] = filesystem._StorageInfo(box.file, box.start, box.length)
    (folder / METADATA).write_bytes(pickle.dumps(index))
    # what megatron.core.dist_checkpointing looks for first
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}\n')
    torch.save({}, folder / "common.pt")


def read_metadata(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a checkpoint by key, after checking that all files have the length they must have."""
    file = folder / METADATA
    try:
        index = _Unpickler(io.BytesIO(file.read_bytes())).load()
        tensors = dict(_stored(index))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; the checkpoint is incomplete, use another one") from None
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        TypeError,
        ValueError,
        KeyError,
        IndexError,
        ImportError,
    ) as error:
        if isinstance(error, _ForeignError):
            raise InputError(f"{file}: {error}; it was not loaded") from None
        raise InputError(f"{file}: is cut or damaged; use another checkpoint") from None
    ends: dict[str, int] = {}
    for stored in tensors.values():
        for box in stored.boxes:
            ends[box.file] = max(ends.get(box.file, 0), box.start + box.length)
    for name, end in ends.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None:
            raise InputError(f"{folder / name}: no such file; the checkpoint is incomplete, use another one")
        if size < end:
            raise InputError(f"{folder / name}: is cut at {size} of {end} bytes; use another checkpoint")
    return tensors


def read_box(folder: Path, box: Box) -> Tensor:
    """Read one stored box."""
    path = folder / box.file
    try:
        with open(path, "rb") as file:
            file.seek(box.start)
            values = torch.load(io.BytesIO(file.read(box.length)), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError):
        raise InputError(f"{path}: is damaged at byte {box.start}; use another checkpoint") from None
    if not isinstance(values, Tensor) or tuple(values.shape) != box.sizes:
        raise InputError(
            f"{path}: holds something else than {METADATA} says at byte {box.start}; use another checkpoint"
        )
    return values


def overlap(
    one: tuple[tuple[int, ...], tuple[int, ...]], other: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return what two boxes, (offset, sizes) each, have in common, as slices of the one and of the other."""
    mine, theirs = [], []
    for own_start, own_size, start, size in zip(*one, *other, strict=True):
        low, high = max(own_start, start), min(own_start + own_size, start + size)
        if low >= high:
            return None
        mine.append(slice(low - own_start, high - own_start))
        theirs.append(slice(low - start, high - start))
    return tuple(mine), tuple(theirs)


class _Told:
    """A file that remembers why writing failed: torch.save hides it behind an error of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _stored(index: Any) -> Iterator[tuple[str, Stored]]:
    places = {(at.fqn, tuple(at.offset)): info for at, info in index.storage_data.items() if at.offset is not None}
    for key, value in index.state_dict_metadata.items():
        if not hasattr(value, "chunks"):
            continue  # bytes, such as Megatron's extra state
        boxes = []
        for chunk in value.chunks:
            info = places[key, tuple(chunk.offsets)]
            boxes.append(
                Box(tuple(chunk.offsets), tuple(chunk.sizes), Path(info.relative_path).name, info.offset, info.length)
            )
        yield key, Stored(tuple(value.size), value.properties.dtype, tuple(boxes))


class _ForeignError(pickle.UnpicklingError):
    """The pickle names something that is not of the format."""


_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},  # PyTorch notes where it wrote
    "pathlib._local": {"PosixPath"},  # its name in Python 3.13
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of the format and torch's constants, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, torch.dtype | torch.layout | torch.memory_format):
                return found
        raise _ForeignError(f"names {module}.{name}, which is no part of a checkpoint")
