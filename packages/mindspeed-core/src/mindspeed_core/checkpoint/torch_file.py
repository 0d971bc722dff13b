"""`.pt` files: written one tensor at a time, and read as data that cannot run code."""

from __future__ import annotations

import errno
import pickle
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from mindspeed_core.errors import InputError

_STORAGES = {  # what torch.save calls the storage of a dtype
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_ALIGNMENT = 64  # torch.save puts every storage at a multiple of this, so that mapped tensors are aligned


class TorchFile:
    """A `.pt` file as `torch.save` lays it out, written without ever holding more than one tensor.

    `document` is what `torch.load` will return, with a tensor on the meta device wherever one belongs. `write` brings
    their values, in the order in which they stand in the document.
    """

    def __init__(self, path: Path, document: Any) -> None:
        pickled = BytesIO()
        pickler = _Pickler(pickled)
        pickler.dump(document)
        self._pending = pickler.tensors
        self._written = 0
        self._root = path.stem
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._record("data.pkl", pickled.getbuffer())
        self._record("byteorder", memoryview(b"little"))

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor of the document."""
        promised = self._pending[self._written]
        assert (tensor.shape, tensor.dtype) == (promised.shape, promised.dtype), f"{tensor.shape} {tensor.dtype}"
        self._record(f"data/{self._written}", tensor_bytes(tensor))
        self._written += 1

    def close(self) -> None:
        """Finish the file."""
        assert self._written == len(self._pending), f"{self._written} of {len(self._pending)} tensors were written"
        self._record("version", memoryview(b"3\n"))
        self._zip.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._zip.close()

    def _record(self, name: str, data: memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}")  # the date stays at 1980: equal tensors make equal files
        info.file_size = data.nbytes
        zip64 = data.nbytes >= zipfile.ZIP64_LIMIT // 2
        header = 30 + len(info.filename) + (20 if zip64 else 0) + 4
        padding = -(self._zip.start_dir + header) % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        with self._zip.open(info, "w", force_zip64=zip64) as record:
            record.write(data)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor; without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_torch_file(path: Path) -> Any:
    """Read a `.pt` file with its tensors mapped, not loaded. Nothing in it is executed.

    Classes it names, other than `argparse.Namespace`, become inert objects: Megatron stores enumerations among its
    arguments and NumPy's random state beside them.
    """
    foreign: list[str] = []
    try:
        foreign += [name for name in get_unsafe_globals_in_checkpoint(path) if name != "argparse.Namespace"]
        placeholders = [(type("Inert", (_Inert,), {}), name) for name in foreign]
        with safe_globals([Namespace, *placeholders]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a pickle protocol other than 2
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the checkpoint is incomplete, copy it again") from None
    except pickle.UnpicklingError:
        names = f"; it names {', '.join(sorted(foreign))}" if foreign else ""
        raise InputError(f"{path}: holds more than plain data and was not loaded{names}") from None
    except (RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        if (
            isinstance(error, OSError) and error.errno != errno.EINVAL
        ):  # torch seeks to before the start of a short file
            raise
        raise InputError(f"{path}: is cut, or is not a file of torch.save; copy it again") from None


class _Inert:
    """Stands where a pickle names a class that we do not load."""

    def __new__(cls, *args: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class _Storage:
    key: int
    dtype: torch.dtype
    numel: int


class _Pickler(pickle.Pickler):
    """Pickles as torch.save does: a tensor as its shape and the number of a record of the zip archive."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", _STORAGES[obj.dtype], str(obj.key), "cpu", obj.numel)
        return None

    def reducer_override(self, obj: Any, /) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        assert obj.is_meta, "the document holds stand-ins; values come through write()"
        storage = _Storage(len(self.tensors), obj.dtype, obj.numel())
        self.tensors.append(obj)
        # the two arguments after the stride: requires_grad, backward hooks
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(obj.shape), obj.stride(), False, OrderedDict())
