"""Ulysses (Jacobs et al., 2023): a part of the sequence with all heads becomes the whole sequence with a part of the heads.

               before                       after                      u ranks, rank r: one all-to-all before attention,
    rank 0     positions 0..s/u, n heads    all s, heads 0..n/u        one behind it; between them attention is local
    rank 1     positions s/u..,  n heads    all s, heads n/u..

Where there are fewer key heads than ranks, a key head goes to each rank that has queries for it, and to no other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def scatter_heads(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v [s, b, heads/u, d] of the whole sequence, from [s/u, b, heads, d]. The u ranks divide the query heads.

    Key heads that the ranks do not divide are repeated to the next number that they do.
    """
    ranks, groups = group.size(), k.shape[2]
    repeat = math.lcm(groups, ranks) // groups
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, 2) for x in (k, v))
    s, b = q.shape[:2]
    parts = [x.reshape(s, b, ranks, -1) for x in (q, k, v)]  # the heads of each rank side by side
    widths = [part.shape[-1] for part in parts]
    mixed = _AllToAll.apply(torch.cat(parts, -1).permute(2, 0, 1, 3), group)  # [u, s/u, b, width]
    whole = mixed.flatten(0, 1).split(widths, -1)
    q, k, v = (part.unflatten(-1, (x.shape[2] // ranks, x.shape[3])) for part, x in zip(whole, (q, k, v), strict=True))
    return q, k, v


def gather_heads(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return out [s/u, b, n, d] from the heads [s, b, n/u, d] of each rank: the way back."""
    ranks = group.size()
    parts = _AllToAll.apply(out.unflatten(0, (ranks, -1)), group)  # [u, s/u, b, n/u, d]
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Sends part i of [u, ...] to rank i and returns what each rank sent; the gradient goes the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _AllToAll.apply(grad, ctx.group), None
