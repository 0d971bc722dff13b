"""The output layer and its cross entropy in one operator, over a vocabulary cut across ranks.

The logits of a large vocabulary are the largest tensor of a training step, and most of their time is memory traffic.
`chunked` makes them for a few tokens at a time and turns them into gradients at once, so that only a chunk of them ever
exists: a single one is kept for the backward pass, of several the gradient of the weight is made on the way. Rank r holds
rows [r * V/tp, (r + 1) * V/tp) of the output matrix; rows at and past `vocab_size` are padding and take no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mindspeed_core.kernels import matmul, matmul_add
from mindspeed_core.kernels.matmul import Product

CACHED = 1 << 19  # logits of which the passes over them stay near a core


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, vocab_size: int) -> Tensor:
    """Return sum(weights * cross entropy) for one rank that holds the whole vocabulary.

    hidden [n, h], weight [V, h], labels [n] in [0, vocab_size), weights [n] fp32; the result is an fp32 scalar.
    """
    logits = (hidden @ weight[:vocab_size].T).float()
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk: int = 1024,
    product: Product = matmul.native,
    wide: bool = False,
) -> Tensor:
    """As `reference`, over the ranks of `group`, `chunk` tokens at a time (0: all at once).

    Every rank passes the same hidden, labels and weights and its own rows of `weight`. The gradient of `hidden` is this
    rank's share: the caller's copy to the tensor-parallel region sums it. `wide` computes bf16 products in fp32, which is
    faster where there are no bf16 instructions. Where `weight` has a `main_grad` its gradient is added there, unrounded,
    and autograd sees none.
    """
    chunk = chunk or max(1, hidden.shape[0])
    # asked before `wide` makes a tensor of its own of the weight
    adds = None if product is matmul.native else partial(matmul.accumulate, product=product)
    into, adding = None if adds is None else matmul_add.sum_of(weight), matmul_add.adding_to(weight, adds)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # the gradients are made on the way
    if wide and hidden.dtype != torch.float32:
        hidden, weight = hidden.float(), weight.float()  # once for all chunks; autograd casts the gradients back
    split = _Split.of(weight, vocab_size, group)
    if hidden.shape[0] <= chunk:
        return _Whole.apply(hidden, weight, labels, weights, split, product, adding)
    return _Chunked.apply(hidden, weight, labels, weights, split, product, into, chunk)


@dataclass(frozen=True)
class _Split:
    """Which rows of the output matrix are whose."""

    group: dist.ProcessGroup | None  # None: one rank holds them all
    rows: int  # of this rank
    first: int  # of its rows
    real: int  # of its rows that are no padding

    @classmethod
    def of(cls, weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> _Split:
        group = None if group is None or group.size() == 1 else group
        rows = weight.shape[0]
        first = 0 if group is None else group.rank() * rows
        return cls(group, rows, first, min(rows, max(0, vocab_size - first)))


class _Whole(torch.autograd.Function):
    """All logits at once; their gradient lives until the backward pass, which makes those of hidden and weight of it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        split: _Split,
        product: Product,
        adding: matmul_add.Adding | None,
    ) -> Tensor:
        logits = product(hidden, weight)
        total = _differentiate(logits, labels, weights, split)
        ctx.product, ctx.adding = product, adding
        ctx.save_for_backward(logits, hidden, weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, hidden, weight = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = ctx.product(logits, weight.T) * grad.to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = matmul.weight_gradient(logits, hidden * grad.to(hidden.dtype), ctx.product, ctx.adding)
        return grad_hidden, grad_weight, *(None,) * 5


class _Chunked(torch.autograd.Function):
    """A chunk of logits at a time; the gradients are made with them and wait for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        split: _Split,
        product: Product,
        into: Tensor | None,
        chunk: int,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            x = hidden[part]
            logits = product(x, weight)  # [c, rows]
            total += _differentiate(logits, labels[part], weights[part], split)
            if grad_hidden is not None:
                grad_hidden[part] = product(logits, weight.T)
            if grad_weight is not None:
                matmul.accumulate(grad_weight, logits, x, product)
            elif need_weight:
                grad_weight = product(logits.T, x.T).float()  # the sum over chunks would lose the small terms in bf16
        ctx.dtype, ctx.into = weight.dtype, into
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None and ctx.into is not None:
            ctx.into.addcmul_(grad_weight, grad)
            grad_weight = None
        elif grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.dtype)
        return grad_hidden, grad_weight, *(None,) * 6


def _differentiate(logits: Tensor, labels: Tensor, weights: Tensor, split: _Split) -> Tensor:
    """Turn logits [c, rows] into the gradient of the loss by them, in place, and return the loss."""
    # a few tokens at a time stay in the cache from their logits to their gradients; a collective is for all of them
    few = max(1, CACHED // split.rows) if split.group is None and logits.device.type == "cpu" else max(1, len(logits))
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    tokens = zip(logits.split(few), (labels - split.first).split(few), weights.float().split(few), strict=True)
    for some, local, scale in tokens:
        total += _differentiate_few(some, local, scale, split)
    return total


def _differentiate_few(logits: Tensor, local: Tensor, scale: Tensor, split: _Split) -> Tensor:
    """As `_differentiate`: `local` [c] are the labels counted from this rank's first row, `scale` [c] the weights."""
    rows, group = split.rows, split.group
    wide = logits.float()  # the same tensor where it is fp32 already
    if split.real < rows:
        wide[:, split.real :] = float("-inf")
    mine = (local >= 0) & (local < rows)
    at = local.clamp(0, rows - 1)[:, None]
    target, peak = wide.gather(1, at)[:, 0], wide.amax(-1)
    if group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    target = (target - peak).masked_fill(~mine, 0.0)
    # d loss / d logits = (softmax - one hot) * weight of the token
    if group is None:
        wide = torch.softmax(wide, -1)  # fewer passes than its parts
        sums = 1 / wide.amax(-1)
        wide *= scale[:, None]
    else:
        wide -= peak[:, None]
        both = torch.stack((wide.exp_().sum(-1), target))
        dist.all_reduce(both, group=group)
        sums, target = both.unbind(0)
        wide *= (scale / sums)[:, None]
    wide.scatter_add_(1, at, torch.where(mine, -scale, torch.zeros_like(scale))[:, None])
    if wide is not logits:
        logits.copy_(wide)
    return ((sums.log() - target) * scale).sum()
