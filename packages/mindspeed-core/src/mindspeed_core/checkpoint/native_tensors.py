"""The weights of our training checkpoints, read in one process, without Megatron and without process groups."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mindspeed_core.checkpoint.tensors import PackedTensors, shard_shape
from mindspeed_core.checkpoint.torch_dist import Stored, read_box, read_metadata
from mindspeed_core.errors import InputError
from mindspeed_core.models.family import Architecture, Family, Placed


class NativeTensors(PackedTensors):
    """The tensors of a `step_N` folder, whatever number of ranks wrote it.

    They stand there under global Megatron names (`decoder.layers.3.mlp.linear_fc1.weight`, or with `model.` before it),
    whole and in the layout of one rank. The vocabulary may be padded.
    """

    def __init__(self, folder: Path, family: Family, arch: Architecture) -> None:
        super().__init__(family, arch)
        self.folder = folder
        stored = read_metadata(folder)
        self._stored: dict[str, Stored] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for placed in family.placed(arch):
            name, row = placed.megatron, placed.row
            found = stored.get(name) or stored.get(f"model.{name}")
            if found is None:
                raise InputError(f"{folder}: holds no {name}, which config.json asks for")
            if row.megatron not in shapes:
                shapes[row.megatron] = shard_shape(placed, arch, tp=1, padded_vocab=found.shape[0])
            if found.shape != shapes[row.megatron]:
                raise InputError(
                    f"{folder}: {name} has shape {found.shape} where config.json asks for {shapes[row.megatron]}"
                )
            self._stored[name] = found

    def packed(self, placed: Placed) -> Tensor:
        stored = self._stored[placed.megatron]
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        for box in stored.boxes:
            place = tuple(slice(start, start + size) for start, size in zip(box.offset, box.sizes, strict=True))
            whole[place] = read_box(self.folder, box)
        return placed.row.kind.fold(whole, self.arch)

    def packed_dtype(self, placed: Placed) -> torch.dtype:
        return self._stored[placed.megatron].dtype
