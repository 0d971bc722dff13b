"""The pivot of all checkpoint formats: a lazy mapping from Hugging Face names to tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_core.errors import InputError
from mindspeed_core.models.family import Architecture, Family, Placed, Tensors


@dataclass(frozen=True)
class CastTensors:
    """Other tensors with their floating-point ones in another dtype."""

    tensors: Tensors
    target: torch.dtype

    def names(self) -> list[str]:
        return self.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        dtype = self.tensors.dtype(name)
        return self.target if dtype.is_floating_point else dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype(name))


class PackedTensors(ABC):
    """Hugging Face names over a checkpoint that stores Megatron's packed tensors.

    One packed tensor is kept unpacked, since its parts (query, key, value; gate, up) are mostly asked for together.
    """

    def __init__(self, family: Family, arch: Architecture) -> None:
        self.family = family
        self.arch = arch
        self._places: dict[str, tuple[Placed, int]] = {
            name: (placed, part) for placed in family.placed(arch) for part, name in enumerate(placed.hf_names)
        }
        self._unpacked: tuple[Placed, list[Tensor]] | None = None

    @abstractmethod
    def packed(self, placed: Placed) -> Tensor:
        """Read the whole packed tensor of a row, as the view of its kind."""

    @abstractmethod
    def packed_dtype(self, placed: Placed) -> torch.dtype:
        """Return the dtype of the packed tensor of a row, without reading it."""

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        placed, part = self._places[name]
        return placed.row.hf_shapes(self.arch)[part]

    def dtype(self, name: str) -> torch.dtype:
        return self.packed_dtype(self._places[name][0])

    def __getitem__(self, name: str) -> Tensor:
        placed, part = self._places[name]
        if len(placed.hf_names) == 1:
            return placed.row.kind.unpack(self.packed(placed), self.arch)[0]
        if self._unpacked is None or self._unpacked[0] != placed:
            self._unpacked = None  # free the last one before the next is read
            self._unpacked = (placed, placed.row.kind.unpack(self.packed(placed), self.arch))
        return self._unpacked[1][part]


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Return the size of a tensor in bytes."""
    return dtype.itemsize * math.prod(shape)


def hf_shapes(family: Family, arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a model of this architecture has, by Hugging Face name."""
    return {
        name: shape
        for placed in family.placed(arch)
        for name, shape in zip(placed.hf_names, placed.row.hf_shapes(arch), strict=True)
    }


def pack(placed: Placed, tensors: Tensors, arch: Architecture) -> Tensor:
    """Read the tensors behind a row and pack them: the whole Megatron tensor, as the view of its kind."""
    dtypes = {name: tensors.dtype(name) for name in placed.hf_names}
    if len(set(dtypes.values())) > 1:
        told = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
        raise InputError(f"{told}: Megatron stores them as one tensor, of one dtype; convert them with --dtype")
    return placed.row.kind.pack([tensors[name] for name in placed.hf_names], arch)


def shard_shape(placed: Placed, arch: Architecture, *, tp: int, padded_vocab: int) -> tuple[int, ...]:
    """Return the shape in which one of `tp` ranks stores a row."""
    parts = [torch.empty(shape, device="meta") for shape in placed.row.hf_shapes(arch)]
    view = placed.row.kind.pack(parts, arch)
    return tuple(placed.row.kind.shard(view, rank=0, size=tp, padded_vocab=padded_vocab).shape)
