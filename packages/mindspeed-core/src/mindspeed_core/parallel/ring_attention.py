"""Ring attention (Liu et al., 2023): queries stay, keys and values go round the ranks that share a sequence.

    step        0       1       2       3         each rank attends to what it holds and merges the result into what it
    rank 0    kv 0    kv 3    kv 2    kv 1        has, while the next keys and values are under way. In the backward pass
    rank 1    kv 1    kv 0    kv 3    kv 2        they go round once more, and their gradient follows them home.

With a window of 2 (a double ring) the inner ring turns within a window while the next window's turn is under way:

    rank 0    kv 0    kv 1    kv 2    kv 3        windows [0, 1] and [2, 3]: few of the transfers leave a window
    rank 1    kv 1    kv 0    kv 3    kv 2

Keys and values travel as one message [t, b, g, d + e], with their own heads: grouped queries cost nothing on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_core.kernels.attention_block import Block, merge
from mindspeed_core.kernels.segments import Segments


class Work(NamedTuple):
    """One product of local queries and visiting keys."""

    queries: slice
    keys: slice
    causal: bool = False
    mask: Tensor | None = None
    segments: Segments | None = None


@dataclass(frozen=True)
class Ring:
    """The ranks that keys and values go round, as one of them sees it."""

    size: int
    rank: int
    group: dist.ProcessGroup
    second: dist.ProcessGroup | None = None  # the same ranks: sending and receiving then never wait for one another
    window: int = 1  # ranks of an inner ring; 1 and `size` make a single ring

    def owner(self, step: int) -> int:
        """Return whose keys and values this rank holds at a step."""
        outer, inner = divmod(step, self.window)
        window, place = divmod(self.rank, self.window)
        return (window - outer) % (self.size // self.window) * self.window + (place - inner) % self.window

    def neighbour(self, windows: int, places: int) -> int:
        """Return the rank so many windows and places further."""
        window, place = divmod(self.rank, self.window)
        return (window + windows) % (self.size // self.window) * self.window + (place + places) % self.window

    def exchange(self, tensor: Tensor, windows: int, places: int) -> Callable[[], Tensor]:
        """Send a tensor so far round the ring, and return what waits for the one that comes from as far before."""
        to, source = self.neighbour(windows, places), self.neighbour(-windows, -places)
        if to == self.rank:
            return lambda: tensor
        received = torch.empty_like(tensor)
        # both ends of a message must agree on its group: that of the sender's parity
        groups = [
            self.second if self.second is not None and sender % 2 else self.group for sender in (self.rank, source)
        ]
        messages = [
            dist.P2POp(dist.isend, tensor, dist.get_global_rank(groups[0], to), groups[0]),
            dist.P2POp(dist.irecv, received, dist.get_global_rank(groups[1], source), groups[1]),
        ]
        if groups[0] is groups[1]:
            works = dist.batch_isend_irecv(messages)
        else:
            works = [work for message in messages for work in dist.batch_isend_irecv([message])]

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return received

        return wait

    def turn(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (owner, its tensor) for every rank of the ring, one's own first; the next is under way meanwhile."""
        windows = self.size // self.window
        first = tensor
        for outer in range(windows):
            coming = self.exchange(first, 1, 0) if outer + 1 < windows else None
            held = first
            for inner in range(self.window):
                following = self.exchange(held, 0, 1) if inner + 1 < self.window else None
                yield self.owner(outer * self.window + inner), held
                if following is not None:
                    held = following()
            if coming is not None:
                first = coming()

    def follow(self, step: int, tensor: Tensor) -> Callable[[], Tensor]:
        """Send what belongs to the tensor held at a step after it, the last time home."""
        last = step % self.window == self.window - 1
        return self.exchange(tensor.contiguous(), int(last), 1)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, ring: Ring, works: tuple[tuple[Work, ...], ...], block: Block
) -> Tensor:
    """Return attention [s, b, n, e] of local queries q [s, b, n, d] to the keys k [s, b, g, d] and v [s, b, g, e] of all.

    `works[owner]` says what to compute while the keys of that rank are here. Every rank of the ring calls it.
    """
    return _Ring.apply(q, torch.cat((k, v), -1), scale, k.shape[-1], ring, works, block)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        scale: float,
        width: int,
        ring: Ring,
        works: tuple[tuple[Work, ...], ...],
        block: Block,
    ) -> Tensor:
        out = lse = None
        for owner, held in ring.turn(kv):
            for work in works[owner]:
                keys, values = held[work.keys].tensor_split((width,), -1)
                more, more_lse = block.forward(
                    q[work.queries],
                    keys,
                    values,
                    scale=scale,
                    causal=work.causal,
                    mask=work.mask,
                    segments=work.segments,
                )
                if out is None or lse is None:
                    # fp32 until the end: every merge would round
                    out = more.new_zeros(q.shape[0], *more.shape[1:])
                    lse = more_lse.new_full((*more_lse.shape[:2], q.shape[0]), float("-inf"))
                rows = work.queries
                out[rows], lse[..., rows] = merge(out[rows], lse[..., rows], more, more_lse)
        assert out is not None, "every query sees a key"
        assert lse is not None
        result = out.to(q.dtype)
        ctx.save_for_backward(q, kv, result, lse)
        ctx.scale, ctx.width, ctx.ring, ctx.works, ctx.block = scale, width, ring, works, block
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, kv, out, lse = ctx.saved_tensors
        ring, works, block = ctx.ring, ctx.works, ctx.block
        grad_q = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        coming: Callable[[], Tensor] | None = None
        for step, (owner, held) in enumerate(ring.turn(kv)):
            grad_kv = torch.zeros(held.shape, dtype=lse.dtype, device=q.device)
            for work in works[owner]:
                keys, values = held[work.keys].tensor_split((ctx.width,), -1)
                rows = work.queries
                parts = block.backward(
                    grad[rows],
                    q[rows],
                    keys,
                    values,
                    out[rows],
                    lse[..., rows],
                    scale=ctx.scale,
                    causal=work.causal,
                    mask=work.mask,
                    segments=work.segments,
                )
                grad_q[rows] += parts[0]
                grad_kv[work.keys, ..., : ctx.width] += parts[1]
                grad_kv[work.keys, ..., ctx.width :] += parts[2]
            if coming is not None:
                grad_kv += coming()
            coming = ring.follow(step, grad_kv)
        assert coming is not None
        return grad_q.to(q.dtype), coming().to(kv.dtype), None, None, None, None, None
