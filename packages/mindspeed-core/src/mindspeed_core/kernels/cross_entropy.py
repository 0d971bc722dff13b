"""The output layer and its cross entropy in one operator, over a vocabulary cut across ranks.

The logits of a large vocabulary are the largest tensor of a training step, and most of their time is memory traffic.
`chunked` makes them for a few tokens at a time and turns them into gradients at once, so that only a chunk of them ever
exists. Rank r holds rows [r * V/tp, (r + 1) * V/tp) of the output matrix; rows at and past `vocab_size` are padding and
take no part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mindspeed_core.kernels import matmul, matmul_add
from mindspeed_core.kernels.matmul import Product

CACHED = 1 << 18  # logits that fit into a core's own cache with room to spare


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
    into = matmul_add.sum_of(weight) if product is not matmul.native else None
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # the gradients are made on the way
    if wide and hidden.dtype != torch.float32:
        hidden, weight = hidden.float(), weight.float()  # once for all chunks; autograd casts the gradients back
    return _Chunked.apply(hidden, weight, labels, weights, vocab_size, group, chunk, product, into)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        chunk: int,
        product: Product,
        into: Tensor | None,
    ) -> Tensor:
        if group is not None and group.size() == 1:
            group = None
        rows = weight.shape[0]
        first = 0 if group is None else group.rank() * rows
        real = min(rows, max(0, vocab_size - first))  # rows of this rank that are no padding
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # a few tokens at a time stay in the cache from their logits to their gradients; a collective is for all of them
        few = max(1, CACHED // rows) if group is None and hidden.device.type == "cpu" else chunk
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            x, local, scale = hidden[part], labels[part] - first, weights[part].float()
            logits = product(x, weight)  # [c, rows]
            for tokens in zip(logits.split(few), local.split(few), scale.split(few), strict=True):
                total += _differentiate(*tokens, real, group)
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
        return grad_hidden, grad_weight, *(None,) * 7


def _differentiate(logits: Tensor, local: Tensor, scale: Tensor, real: int, group: dist.ProcessGroup | None) -> Tensor:
    """Turn logits [c, rows] into the gradient of the loss by them, in place, and return the loss.

    `local` [c] are the labels counted from this rank's first row, `scale` [c] the weights.
    """
    rows = logits.shape[1]
    wide = logits.float()  # the same tensor where it is fp32 already
    if real < rows:
        wide[:, real:] = float("-inf")
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
