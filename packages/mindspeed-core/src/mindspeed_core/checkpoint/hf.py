"""Hugging Face folders: safetensors files, read lazily and written as a stream."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mindspeed_core.checkpoint.checkpoint import Checkpoint
from mindspeed_core.checkpoint.folder import copy_assets, new_folder, read_json
from mindspeed_core.checkpoint.tensors import Tensors, nbytes
from mindspeed_core.checkpoint.torch_file import tensor_bytes
from mindspeed_core.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PLAN = "shards.json"  # in the `hf/` folder of a converted checkpoint: how the source cut its files
EXTRA = "extra.safetensors"  # likewise: what the source held beside the weights of the model
SHARD_BYTES = 5_000_000_000  # where we choose the cut ourselves

TIED = {"lm_head.weight": "model.embed_tokens.weight"}  # some folders store the output layer though it is the embedding
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")  # old Llama folders store what the configuration says already

_DTYPES = {  # in the order of safetensors' own writer, which puts the last of these first
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = list(_NAMES)


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file, as the text that stands on disk."""

    text: str

    @cached_property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """What it says: name -> dtype, shape and data_offsets, in the order of the data."""
        entries = {name: entry for name, entry in json.loads(self.text).items() if name != "__metadata__"}
        return dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))

    @classmethod
    def read(cls, path: Path) -> Header:
        """Read the header of a file; raise unless the file is whole and of dtypes that we know."""
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            text = file.read(length) if 8 + length <= size else b""
        try:
            header = cls(text.decode())
            end = 0
            for name, entry in header.tensors.items():
                if entry["dtype"] not in _DTYPES:
                    raise InputError(f"{path}: {name} has dtype {entry['dtype']}, which this version does not read")
                begin, after = entry["data_offsets"]
                if begin != end or after - begin != nbytes(_DTYPES[entry["dtype"]], entry["shape"]):
                    raise ValueError(name)
                end = after
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path}: is cut, or is no safetensors file; fetch it again") from None
        if size != 8 + length + end:
            raise InputError(f"{path}: has {size} bytes where its header says {8 + length + end}; fetch it again")
        return header

    @classmethod
    def of(cls, tensors: Tensors, names: Iterable[str]) -> Header:
        """Return the header that safetensors' own writer gives these tensors."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in sorted(names, key=lambda name: (-_ORDER.index(tensors.dtype(name)), name)):
            dtype, shape = tensors.dtype(name), tensors.shape(name)
            end = offset + nbytes(dtype, shape)
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
        return cls(text + " " * (-len(text.encode()) % 8))


@dataclass(frozen=True)
class ShardPlan:
    """How a folder cuts its tensors into files: the header of each, and the index as it stands on disk."""

    files: Mapping[str, Header]
    index: str | None = None

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """What all headers say."""
        return {name: entry for header in self.files.values() for name, entry in header.tensors.items()}

    @classmethod
    def of_folder(cls, folder: Path) -> ShardPlan | None:
        """Return the plan of a Hugging Face folder, or the one kept in `hf/` of a converted one; None without either."""
        if (folder / PLAN).exists():
            kept = read_json(folder / PLAN)
            return cls({name: Header(text) for name, text in kept["files"].items()}, kept["index"])
        if not any(folder.glob("*.safetensors")):
            return None
        index = folder / INDEX
        text = index.read_bytes().decode() if index.exists() else None
        return cls({path.name: Header.read(path) for path in weight_files(folder)}, text)

    @classmethod
    def choose(cls, tensors: Tensors, *, limit: int = SHARD_BYTES) -> ShardPlan:
        """Cut the tensors, in their order, into files of at most `limit` bytes."""
        shards: list[list[str]] = [[]]
        total = filled = 0
        for name in tensors.names():
            size = nbytes(tensors.dtype(name), tensors.shape(name))
            if shards[-1] and filled + size > limit:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
            total += size
        if len(shards) == 1:
            return cls({SINGLE: Header.of(tensors, shards[0])})
        files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
        weight_map = {name: file for file, shard in files.items() for name in shard}
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
        return cls({file: Header.of(tensors, shard) for file, shard in files.items()}, index + "\n")

    def save(self, folder: Path) -> None:
        """Keep the plan in the `hf/` folder of a converted checkpoint."""
        kept = {"files": {name: header.text for name, header in self.files.items()}, "index": self.index}
        (folder / PLAN).write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")

    def fits(self, tensors: Tensors) -> bool:
        """Return whether the plan places exactly these tensors, in these shapes and dtypes."""
        planned = self.tensors
        return planned.keys() == set(tensors.names()) and all(
            entry["dtype"] == _NAMES.get(tensors.dtype(name)) and tuple(entry["shape"]) == tensors.shape(name)
            for name, entry in planned.items()
        )


class HFTensors:
    """The tensors of safetensors files. Only headers are read until a tensor is asked for, and then it is mapped."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._entries: dict[str, tuple[Path, dict[str, Any]]] = {}
        self._open: dict[Path, Any] = {}
        for path in files:
            for name, entry in Header.read(path).tensors.items():
                if name in self._entries:
                    raise InputError(f"{path}: holds {name}, as {self._entries[name][0].name} does; remove one of them")
                self._entries[name] = (path, entry)

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name][1]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._entries[name][1]["dtype"]]

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._entries[name][0]

    def __getitem__(self, name: str) -> Tensor:
        path = self._entries[name][0]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt", device="cpu")
        return self._open[path].get_tensor(name)


@dataclass(frozen=True)
class Renamed:
    """Tensors of several sources under names of our choice: name -> source and the name there."""

    sources: Mapping[str, tuple[Tensors, str]]

    def names(self) -> list[str]:
        return list(self.sources)

    def shape(self, name: str) -> tuple[int, ...]:
        tensors, there = self.sources[name]
        return tensors.shape(there)

    def dtype(self, name: str) -> torch.dtype:
        tensors, there = self.sources[name]
        return tensors.dtype(there)

    def __getitem__(self, name: str) -> Tensor:
        tensors, there = self.sources[name]
        return tensors[there]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a Hugging Face folder; raise where one is missing."""
    index = folder / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: has no weight_map; fetch it again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for path in files:
            if path.parent != folder:
                raise InputError(f"{index}: names {path.name} outside the folder; fetch it again")
            if not path.exists():
                raise InputError(f"{index}: names {path.name}, which is missing; fetch it into {folder}")
        return files
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = next(
            (name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).exists()), None
        )
        found = (
            f"holds {other}; load it with transformers and save it as safetensors"
            if other
            else "holds no *.safetensors"
        )
        raise InputError(f"{folder}: {found}")
    for path in files:
        numbered = re.fullmatch(r"(.*)-\d+-of-(\d+)\.safetensors", path.name)
        if numbered and len(files) != int(numbered[2]):
            raise InputError(
                f"{folder}: holds {len(files)} of the {int(numbered[2])} files that {path.name} belongs to"
            )
    return files


def write_hf(
    checkpoint: Checkpoint,
    target: Path,
    *,
    overwrite: bool = False,
    check: Callable[[Path], None] = lambda folder: None,
    report: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a Hugging Face folder: the tensors as safetensors, beside the configuration and the tokenizer.

    Where it is known how the source cut its files, and the tensors still have those shapes and dtypes, the files come
    out as they were, byte for byte. `check` sees the finished folder before it gets its name; `report` hears the size of
    every tensor once it is written.
    """
    tensors, plan = plan_hf(checkpoint)
    with new_folder(target, overwrite=overwrite) as folder:
        copy_assets(checkpoint.assets, folder, checkpoint.config)
        for name, header in plan.files.items():
            write_safetensors(folder / name, header, tensors, report)
        if plan.index is not None:
            (folder / INDEX).write_bytes(plan.index.encode())
        check(folder)


def plan_hf(checkpoint: Checkpoint) -> tuple[Tensors, ShardPlan]:
    """Return what is written into which files: as the source had it where that is known and fits, else our own cut."""
    tensors, assets = checkpoint.tensors, checkpoint.assets
    kept = ShardPlan.of_folder(assets)
    if kept is not None:
        sources: dict[str, tuple[Tensors, str]] = {name: (tensors, name) for name in tensors.names()}
        extra = HFTensors(_extra_files(assets))
        for name in kept.tensors.keys() - sources.keys():
            if name in TIED and TIED[name] in sources:
                sources[name] = (tensors, TIED[name])
            elif name in extra.names():
                sources[name] = (extra, name)
        whole = Renamed(sources)
        if kept.fits(whole):
            return whole, kept
    return tensors, ShardPlan.choose(tensors)


def carry_source(assets: Path, folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Fill the `hf/` folder of a converted checkpoint: the small files, how the source cut its own, and its buffers.

    `config` is what config.json shall say instead of the source's.
    """
    copy_assets(assets, folder, config)
    plan = ShardPlan.of_folder(assets)
    if plan is None:
        return
    plan.save(folder)
    if (assets / EXTRA).exists():
        shutil.copyfile(assets / EXTRA, folder / EXTRA)
        return
    buffers = [name for name in plan.tensors if BUFFERS.fullmatch(name)]
    if buffers:
        tensors = HFTensors(_extra_files(assets))
        write_safetensors(folder / EXTRA, Header.of(tensors, buffers), tensors)


def write_safetensors(
    path: Path, header: Header, tensors: Tensors, report: Callable[[int], None] = lambda size: None
) -> None:
    """Write one file with the tensors that its header names, one at a time."""
    text = header.text.encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in header.tensors:
            data = tensor_bytes(tensors[name])
            file.write(data)
            report(data.nbytes)


def _extra_files(assets: Path) -> list[Path]:
    """Where the buffers of a source are: beside its plan when it was converted, else in its own files."""
    if (assets / PLAN).exists():
        return [assets / EXTRA] if (assets / EXTRA).exists() else []
    return weight_files(assets)
