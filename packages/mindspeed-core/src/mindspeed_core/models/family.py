"""What a model family is: a table from Hugging Face tensors to Megatron tensors, and the architecture behind it.

Hugging Face names are the pivot of the whole toolchain: every checkpoint format presents itself as a mapping from
Hugging Face names to tensors, and a family's rows say how each Megatron tensor is packed from them and cut over the
tensor-parallel ranks. Conversion, training, evaluation and generation read the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes and switches that decide which tensors a model has and what it computes."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int  # key/value heads; equal to num_heads without grouped queries
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # as in config.json, without rope_theta
    tied: bool = False  # the output layer is the word embedding
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of q and k before the rotary embedding
    init_std: float = 0.02

    @property
    def untied(self) -> bool:
        """True when the output layer has a tensor of its own."""
        return not self.tied

    def dimension(self, letter: str) -> int:
        """Return the size that a letter of `Weight.dims` stands for."""
        return {
            "v": self.vocab_size,
            "h": self.hidden_size,
            "f": self.ffn_hidden_size,
            "d": self.head_dim,
            "nd": self.num_heads * self.head_dim,
            "gd": self.num_query_groups * self.head_dim,
        }[letter]


class Tensors(Protocol):
    """What every checkpoint is, whatever its format: names are known, a tensor is read when it is asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, on the CPU. It may be a view of a mapped file: never write into it."""
        ...


@dataclass(frozen=True)
class Kind:
    """How one Megatron tensor is packed from Hugging Face tensors and cut over tensor-parallel ranks.

    `pack` makes the whole tensor in a *view* whose dimension `axis` is what tensor parallelism cuts; `unpack` is its
    inverse. A stored shard is the cut view with its first two dimensions merged where `grouped`; `fold` gives such a
    shard its view back.
    """

    name: str
    axis: int | None  # None: every rank holds the whole tensor
    pack: Callable[[Sequence[Tensor], Architecture], Tensor]
    unpack: Callable[[Tensor, Architecture], list[Tensor]]
    fold: Callable[[Tensor, Architecture], Tensor] = field(default=lambda shard, arch: shard)
    grouped: bool = False
    padded: bool = False  # dimension 0 is the vocabulary, padded so that the ranks divide it

    def shard(self, view: Tensor, *, rank: int, size: int, padded_vocab: int) -> Tensor:
        """Return what tensor-parallel rank `rank` of `size` stores, contiguous, from the whole view."""
        if self.padded:
            view = pad_rows(view, padded_vocab)
        if self.axis is not None and size > 1:
            view = view.chunk(size, self.axis)[rank]
        return (view.flatten(0, 1) if self.grouped else view).contiguous()

    def join(self, shards: Sequence[Tensor], arch: Architecture) -> Tensor:
        """Return the whole view from the shards of all tensor-parallel ranks, in rank order."""
        if self.axis is None:
            return self.fold(shards[0], arch)
        return torch.cat([self.fold(shard, arch) for shard in shards], self.axis)


def pad_vocab(vocab_size: int, tp: int, divisor: int = 1) -> int:
    """Return the smallest multiple of `divisor * tp` that holds the vocabulary (Megatron's rule)."""
    multiple = divisor * tp
    return -(-vocab_size // multiple) * multiple


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return `tensor` with its last row repeated until it has `rows` rows (what the original converter does)."""
    missing = rows - tensor.shape[0]
    return tensor if missing <= 0 else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


def _one(tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
    return tensors[0]


def _alone(view: Tensor, arch: Architecture) -> list[Tensor]:
    return [view]


def _pack_qkv(tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
    # [groups, (queries per group + key + value) * head_dim, ...]: a group's queries lie beside its key and value
    return torch.cat([t.reshape(arch.num_query_groups, -1, *t.shape[1:]) for t in tensors], 1)


def _unpack_qkv(view: Tensor, arch: Architecture) -> list[Tensor]:
    queries = arch.num_heads // arch.num_query_groups * arch.head_dim
    parts = view.split([queries, arch.head_dim, arch.head_dim], 1)
    return [part.flatten(0, 1) for part in parts]


def _fold_qkv(shard: Tensor, arch: Architecture) -> Tensor:
    per_group = (arch.num_heads // arch.num_query_groups + 2) * arch.head_dim
    return shard.reshape(-1, per_group, *shard.shape[1:])


replicated = Kind("replicated", None, _one, _alone)
column = Kind("column", 0, _one, _alone)  # output rows are cut
row = Kind("row", 1, _one, _alone)  # input columns are cut
vocab = Kind("vocab", 0, _one, lambda view, arch: [view[: arch.vocab_size]], padded=True)
qkv = Kind("qkv", 0, _pack_qkv, _unpack_qkv, _fold_qkv, grouped=True)
gated = Kind(
    "gated",
    1,
    lambda tensors, arch: torch.stack(tuple(tensors)),  # [gate|up, ffn, hidden]
    lambda view, arch: list(view.unbind(0)),
    lambda shard, arch: shard.reshape(2, -1, *shard.shape[1:]),
    grouped=True,
)


@dataclass(frozen=True)
class Weight:
    """One row of a family: a Megatron name, its kind, and the Hugging Face names it is packed from.

    `{i}` stands for the layer, `{a,b}` for several tensors in that order. Shapes are words: `v` vocabulary, `h` hidden,
    `f` feed-forward, `d` head, `nd` all query heads, `gd` all key/value heads.
    """

    megatron: str
    kind: Kind
    hf: str
    dims: str  # the shape of the Hugging Face tensors, in the letters of `Architecture.dimension`; `|` between several
    when: str | None = None  # the Architecture switch this row needs
    init: str = "normal"  # normal | scaled (normal / sqrt(2 layers), for what writes the residual) | ones | zeros

    def hf_names(self, layer: int | None = None) -> list[str]:
        """Return the Hugging Face names of this row for one layer."""
        name = self.hf if layer is None else self.hf.replace("{i}", str(layer))
        match = re.search(r"\{([^}]*,[^}]*)\}", name)
        if match is None:
            return [name]
        return [name[: match.start()] + part + name[match.end() :] for part in match[1].split(",")]

    def hf_shapes(self, arch: Architecture) -> list[tuple[int, ...]]:
        """Return the shapes of the Hugging Face tensors, in the order of `hf_names`."""
        shapes = [tuple(arch.dimension(letter) for letter in one.split()) for one in self.dims.split("|")]
        return shapes * len(self.hf_names()) if len(shapes) == 1 else shapes


@dataclass(frozen=True)
class Placed:
    """One row at one place of the model: the global Megatron name and the Hugging Face names behind it."""

    megatron: str
    layer: int | None  # counted over the whole model from 0; None outside the layers
    row: Weight
    hf_names: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A declarative model family: everything the toolchain knows of it."""

    name: str
    hf_classes: tuple[str, ...]  # `architectures` entries of config.json
    architecture: Callable[[Mapping[str, Any]], Architecture]  # config.json -> Architecture
    weights: tuple[Weight, ...]
    sizes: Mapping[str, Mapping[str, Any]]  # preset name -> config.json
    template: str  # the chat template of its instruction models

    def placed(self, arch: Architecture) -> Iterator[Placed]:
        """Yield every tensor of a model of this architecture, embedding first, then layer by layer, then the head."""
        rows = [weight for weight in self.weights if weight.when is None or getattr(arch, weight.when)]
        layered = [weight for weight in rows if "{i}" in weight.megatron]
        first = rows.index(layered[0])
        for weight in rows[:first]:
            yield Placed(weight.megatron, None, weight, tuple(weight.hf_names()))
        for i in range(arch.num_layers):
            for weight in layered:
                yield Placed(weight.megatron.replace("{i}", str(i)), i, weight, tuple(weight.hf_names(i)))
        for weight in rows[first:]:
            if weight not in layered:
                yield Placed(weight.megatron, None, weight, tuple(weight.hf_names()))
