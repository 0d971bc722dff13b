"""Context parallelism: one sequence on several ranks, each with its share of the positions.

    ring, cp=2, s=8         chunks    0     1     2     3         every rank holds an early chunk and the late one that
    (zig-zag)               rank      0     1     1     0         mirrors it: under a causal mask all have equal work
    ulysses, cp=2           rank      0 0 0 0     1 1 1 1         contiguous
    hybrid, cp=4, ulysses=2           ring place 0 holds chunks 0 and 3: its first Ulysses rank 0, its second 3

A batch comes whole to every rank, with its labels shifted already; `ContextSplit.share` takes this rank's positions of
each tensor, and `ContextPlan.attention` attends over the sequences of all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_core.kernels import Kernels
from mindspeed_core.kernels.alibi import Alibi
from mindspeed_core.kernels.segments import Segments
from mindspeed_core.parallel.mesh import Axis, Mesh, ParallelConfig
from mindspeed_core.parallel.ring_attention import Ring, Work, ring_attention
from mindspeed_core.parallel.ulysses import gather_heads, scatter_heads


@dataclass(frozen=True)
class ContextSplit:
    """Which positions of a sequence each context-parallel rank holds."""

    ring: Ring
    ulysses: Axis
    zigzag: bool = True  # False: each place of the ring holds one piece, which suits a mask that is not causal

    @classmethod
    def of(cls, mesh: Mesh, *, zigzag: bool = True) -> ContextSplit | None:
        """Return the split of a mesh, None where sequences stay whole."""
        if mesh.cp.size == 1:
            return None
        axis = mesh.ring
        ring = Ring(axis.size, axis.rank, axis.group, mesh.second_ring, mesh.config.cp_window)
        return cls(ring, mesh.ulysses, zigzag and axis.size > 1)

    @property
    def size(self) -> int:
        """How many ranks share a sequence."""
        return self.ring.size * self.ulysses.size

    @property
    def multiple(self) -> int:
        """What must divide the length of a sequence."""
        return multiple_of(self.ring.size if self.zigzag else 1, self.ulysses.size, self.size)

    def place(self, length: int, rank: int) -> Tensor:
        """Return the positions of the whole sequence that a place of the ring holds, with all its Ulysses ranks."""
        size = self.ring.size
        if not self.zigzag:
            return torch.arange(length).chunk(size)[rank]
        chunks = torch.arange(length).chunk(2 * size)
        return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))

    def positions(self, length: int) -> Tensor:
        """Return the positions of the whole sequence that this rank holds, in its order."""
        assert length % self.multiple == 0, f"{self.multiple} does not divide the length {length}"
        return self.place(length, self.ring.rank).chunk(self.ulysses.size)[self.ulysses.rank]

    def share(self, tensor: Tensor) -> Tensor:
        """Return this rank's positions [b, s/cp] of a tensor [b, s]."""
        return tensor.index_select(1, self.positions(tensor.shape[1]).to(tensor.device))

    def plan(
        self,
        length: int,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        window: int | None = None,
        alibi: Alibi | None = None,
    ) -> ContextPlan:
        """Return how to attend in sequences of that length: causal, by a mask [b or 1, 1, s, s], or by document [b, s].

        A ring has neither windows nor linear biases; `ring_problems` says so before a model is built.
        """
        if self.ring.size == 1:
            documents = None if segments is None else Segments.of(segments)
            return ContextPlan(self, mask=mask, segments=documents, window=window, alibi=alibi)
        assert window is alibi is None, "a window or biases in a ring"
        places = [self.place(length, rank) for rank in range(self.ring.size)]
        ids = (
            None if segments is None else segments.cpu()
        )  # once for all layers: documents are arguments of the kernels
        works = tuple(tuple(self._works(places, owner, mask, ids)) for owner in range(self.ring.size))
        return ContextPlan(self, works=works)

    def _works(self, places: list[Tensor], owner: int, mask: Tensor | None, ids: Tensor | None) -> list[Work]:
        """Return what there is to compute while the keys of a place are here."""
        rank, mine, theirs = self.ring.rank, places[self.ring.rank], places[owner]
        every, half = slice(None), len(mine) // 2
        if mask is not None:
            assert ids is None, "a mask holds its documents itself"
            seen = mask[:, :, mine.to(mask.device)][..., theirs.to(mask.device)]
            # what no query sees is not computed, at the price of reading the mask once for all layers
            return [Work(every, every, mask=seen)] if bool(seen.any()) else []
        if owner == rank:
            return [Work(every, every, causal=True, segments=None if ids is None else Segments.of(ids[:, mine]))]
        if not self.zigzag:
            work = Work(every, every) if owner < rank else None
        elif owner < rank:
            work = Work(every, slice(0, half))  # their late chunk lies behind all of ours
        else:
            work = Work(slice(half, None), every)  # our early chunk lies before all of theirs
        if work is None or ids is None:
            return [] if work is None else [work]
        documents = Segments.shared(ids[:, mine[work.queries]], ids[:, theirs[work.keys]])
        return [work._replace(segments=documents)] if documents.spans else []


@dataclass(frozen=True)
class ContextPlan:
    """How one forward pass attends over the ranks that share its sequences."""

    split: ContextSplit
    works: tuple[tuple[Work, ...], ...] | None = None  # by place of the ring; None: there is no ring
    mask: Tensor | None = None
    segments: Segments | None = None
    window: int | None = None
    alibi: Alibi | None = None  # of the heads that come to this rank

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, kernels: Kernels) -> Tensor:
        """Return attention [s/cp, b, n, e] of this rank's queries to the keys of all: q, k, v are its positions."""
        ulysses = self.split.ulysses
        if ulysses.size > 1:
            q, k, v = scatter_heads(q, k, v, ulysses.group)
        if self.works is None:
            how = {"mask": self.mask, "segments": self.segments, "window": self.window, "alibi": self.alibi}
            out = kernels.attention(q, k, v, scale=scale, **how)
        else:
            out = ring_attention(
                q, k, v, scale=scale, ring=self.split.ring, works=self.works, block=kernels.attention_block
            )
        return gather_heads(out, ulysses.group) if ulysses.size > 1 else out


def multiple_of(ring: int, ulysses: int, cp: int) -> int:
    """Return what must divide the length of a sequence: two chunks for each place of a ring, equal shares for each rank."""
    return math.lcm(2 * ring if ring > 1 else 1, ring * ulysses, cp)


def length_multiple(config: ParallelConfig) -> int:
    """Return what must divide the length of a sequence under a recipe, sequence parallelism included."""
    multiple = multiple_of(config.ring_size, config.ulysses_size, config.cp)
    return math.lcm(multiple, config.cp * config.tp) if config.sp else multiple


def length_problems(config: ParallelConfig, length: int) -> list[str]:
    """Return what keeps a sequence from being cut so."""
    multiple = length_multiple(config)
    if config.cp == 1 or length % multiple == 0:
        return []
    fitting = [
        str(cp)
        for cp in range(1 if config.cp_algorithm == "ring" else 2, 2 * config.cp)
        if config.cp_algorithm != "hybrid" and length % length_multiple(config.model_copy(update={"cp": cp})) == 0
    ]
    near = sorted({max(multiple, length // multiple * multiple), (length // multiple + 1) * multiple})
    mend = f"use a length of {' or '.join(map(str, near))}" + (f", or cp={' or '.join(fitting)}" if fitting else "")
    return [
        f"parallel.cp={config.cp} ({config.cp_algorithm}{', sp' if config.sp else ''}) needs a multiple of {multiple} "
        f"and does not divide data.seq_length={length}; {mend}"
    ]


def head_problems(config: ParallelConfig, num_heads: int) -> list[str]:
    """Return what keeps the heads of the model from being dealt to the ranks of Ulysses."""
    ranks = config.ulysses_size * config.tp
    if config.ulysses_size == 1 or num_heads % ranks == 0:
        return []
    key = "parallel.cp" if config.cp_algorithm == "ulysses" else "parallel.ulysses"
    fitting = [str(n) for n in range(2, num_heads // config.tp + 1) if num_heads % (n * config.tp) == 0]
    return [
        f"{key}={config.ulysses_size} with parallel.tp={config.tp} does not divide num_attention_heads={num_heads}; "
        f"use {' or '.join(fitting) or 'a smaller parallel.tp'}"
    ]


def ring_problems(config: ParallelConfig, *, window: int | None, alibi: bool) -> list[str]:
    """Return what keeps a model's attention from going round a ring."""
    if config.ring_size == 1:
        return []
    found = []
    if window is not None:
        found.append(f"attend in the sliding window of this model (sliding_window={window})")
    if alibi:
        found.append("add the linear biases of this model (ALiBi)")
    return [
        f"parallel.cp_algorithm={config.cp_algorithm}: its ring does not {what}; use parallel.cp_algorithm=ulysses"
        for what in found
    ]
