"""Fills a parallel model from tensors in Hugging Face names, and reads it back out."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_core.errors import InputError
from mindspeed_core.models.family import Architecture, Family, Placed, Tensors, pad_vocab
from mindspeed_core.parallel.mesh import Axis, Mesh

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


class RandomTensors:
    """A random initialisation as a source of tensors.

    Each tensor is drawn from a generator of its own, seeded by (seed, name): what a weight starts as does not depend on
    how the model is split, nor on what was drawn before it.
    """

    def __init__(self, family: Family, arch: Architecture, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self._arch, self._seed, self._dtype = arch, seed, dtype
        self._rows: dict[str, tuple[Placed, tuple[int, ...]]] = {
            name: (placed, shape)
            for placed in family.placed(arch)
            for name, shape in zip(placed.hf_names, placed.row.hf_shapes(arch), strict=True)
        }

    def names(self) -> list[str]:
        return list(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._rows[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def __getitem__(self, name: str) -> Tensor:
        placed, shape = self._rows[name]
        init = placed.row.init
        if init in ("ones", "zeros"):
            return torch.full(shape, 1.0 if init == "ones" else 0.0, dtype=self._dtype)
        std = self._arch.init_std / (math.sqrt(2 * self._arch.num_layers) if init == "scaled" else 1.0)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return (torch.randn(shape, generator=generator) * std).to(self._dtype)


def random_tensors(family: Family, arch: Architecture, seed: int, dtype: torch.dtype = torch.float32) -> RandomTensors:
    """Return a random initialisation of the model; see `RandomTensors`."""
    return RandomTensors(family, arch, seed, dtype)


def parameters(chunks: Sequence[Any], family: Family, arch: Architecture) -> Iterator[tuple[str, Placed, Tensor]]:
    """Yield this rank's parameters and the buffers that are stored: the global Megatron name, the row behind it, the tensor.

    With tied embeddings the last of several stages holds a copy of the embedding under `output_layer.weight`.
    """
    rows = {placed.megatron: placed for placed in family.placed(arch)}
    for chunk in chunks:
        layers = {str(i): layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        stored = chunk.state_dict(keep_vars=True)
        buffers = ((name, buffer) for name, buffer in chunk.named_buffers() if name in stored)
        for local, parameter in itertools.chain(chunk.named_parameters(), buffers):
            name = LAYER.sub(lambda match, layers=layers: f"decoder.layers.{layers[match[1]]}.", local)
            if name == "output_layer.weight" and arch.tied:
                name = "embedding.word_embeddings.weight"
            if name not in rows:
                raise KeyError(f"family {family.name} has no row for parameter {name}")
            yield name, rows[name], parameter


@torch.no_grad()
def load_weights(chunks: Sequence[Any], tensors: Tensors, family: Family, arch: Architecture, mesh: Mesh) -> None:
    """Fill every parameter of this rank from `tensors`, one Megatron tensor at a time, and `mark` it."""
    chunks = [unwrap(chunk) for chunk in chunks]
    for name, placed, parameter in parameters(chunks, family, arch):
        parts = []
        for hf_name, shape in zip(placed.hf_names, placed.row.hf_shapes(arch), strict=True):
            part = tensors[hf_name]
            if tuple(part.shape) != shape:
                raise InputError(f"{hf_name}: shape {list(part.shape)}, but config.json says {list(shape)}")
            parts.append(part)
        kind, axis = placed.row.kind, _axis(placed, mesh)
        shard = kind.shard(
            kind.pack(parts, arch),
            rank=axis.rank,
            size=axis.size,
            padded_vocab=pad_vocab(arch.vocab_size, mesh.tp.size),
        )
        if shard.shape != parameter.shape:
            raise ValueError(f"{name}: the rows give {list(shard.shape)}, the model has {list(parameter.shape)}")
        parameter.copy_(shard)
    mark(chunks, family, arch)


def mark(chunks: Sequence[Any], family: Family, arch: Architecture) -> None:
    """Mark on every parameter how it is cut, as Megatron's own initialisation would: norms count what is replicated once.

    `load_weights` does it too; a run that goes on from a training checkpoint needs only this.
    """
    for _name, placed, parameter in parameters([unwrap(chunk) for chunk in chunks], family, arch):
        kind = placed.row.kind
        marks: Any = parameter
        marks.tensor_model_parallel = kind.axis is not None or placed.expert is not None
        marks.partition_dim = -1 if kind.axis is None else 1 if kind.name == "row" else 0
        marks.partition_stride = 2 if kind.name == "gated" else 1


@torch.no_grad()
def model_tensors(
    chunks: Sequence[Any], family: Family, arch: Architecture, mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor on the host) for the whole model, on rank 0; collective.

    Every rank walks the same rows in the same order. A row's shards meet on the first of the ranks that share it, which
    sends the whole to rank 0; one row is in memory at a time. Other ranks yield nothing.
    """
    chunks = [unwrap(chunk) for chunk in chunks]
    held = {}
    for name, _placed, parameter in parameters(chunks, family, arch):
        held.setdefault(name, parameter)
    # which stage holds what is known everywhere, so that no row needs a question
    names: list[list[str]] = [[] for _ in range(mesh.pp.size)]
    dist.all_gather_object(names, list(held), group=mesh.pp.group)
    stages = {name: stage for stage in reversed(range(mesh.pp.size)) for name in names[stage]}
    layers = {placed.layer: stages[placed.megatron] for placed in family.placed(arch) if placed.expert is None}
    for placed in family.placed(arch):
        stage, owner, first = layers[placed.layer], 0, not (mesh.dp.rank or mesh.cp.rank)
        if placed.layer is None:
            stage = stages[placed.megatron]
        if placed.expert is not None:  # another rank of the same stage may hold it
            assert arch.experts is not None
            owner = placed.expert // (arch.experts.count // mesh.ep.size)
            first = mesh.edp.rank == 0 and mesh.ep.rank == owner
        view = None
        holds = first and mesh.pp.rank == stage
        if holds:
            view = _joined(held[placed.megatron], placed, arch, mesh)
        sender = (stage * mesh.ep.size + owner) * mesh.etp.size
        if sender and (mesh.is_main or (holds and _axis(placed, mesh).rank == 0)):
            view = _handed(view, sender, mesh)
        if mesh.is_main:
            assert view is not None
            yield from zip(placed.hf_names, placed.row.kind.unpack(view.cpu(), arch), strict=True)


def _axis(placed: Placed, mesh: Mesh) -> Axis:
    """Return the ranks that a row is cut over."""
    return mesh.tp if placed.expert is None else mesh.etp


def _joined(parameter: Tensor, placed: Placed, arch: Architecture, mesh: Mesh) -> Tensor | None:
    kind, axis = placed.row.kind, _axis(placed, mesh)
    if axis.size == 1 or kind.axis is None:
        return kind.join([parameter.detach()], arch) if axis.rank == 0 else None
    shards = [torch.empty_like(parameter) for _ in range(axis.size)]
    dist.all_gather(shards, parameter.detach().contiguous(), group=axis.group)
    return kind.join(shards, arch) if axis.rank == 0 else None


def _handed(view: Tensor | None, sender: int, mesh: Mesh) -> Tensor | None:
    """Send the view from `sender` to rank 0, over the group of one copy of the model's experts (etp x ep x pp)."""
    group = mesh.groups.tp_ep_pp
    first, source = (dist.get_global_rank(group, i) for i in (0, sender))
    if mesh.rank == source:
        assert view is not None
        dist.send_object_list([(view.shape, view.dtype)], dst=first, group=group, device=mesh.device.torch)
        dist.send(view.contiguous(), dst=first, group=group)
    elif mesh.rank == first:
        meta: list[Any] = [None]
        dist.recv_object_list(meta, src=source, group=group, device=mesh.device.torch)
        view = torch.empty(meta[0][0], dtype=meta[0][1], device=mesh.device.torch)
        dist.recv(view, src=source, group=group)
    return view


def unwrap(chunk: Any) -> Any:
    """Return the LanguageModel inside data-parallel wrapping."""
    while not hasattr(chunk, "arch"):
        chunk = chunk.module
    return chunk
