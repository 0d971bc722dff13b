"""The products of a mixture of experts: each run of rows meets a weight of its own.

rows 0..2 x weight 0        counts [3, 0, 2]
nothing   x weight 1        an expert without rows gets a gradient of zeros, not none: data parallelism waits for it
rows 3..4 x weight 2

Where weights have sums for their gradients (`matmul_add`), each run of rows goes to the sum of its own weight, as a linear's
does, and there is nothing to add for an expert without rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_core.kernels import matmul, matmul_add

WIDTH = 8  # bf16 features that make the 16 bytes by which rows must be aligned for CUTLASS's grouped kernel

GroupedMatmul = Callable[[Tensor, Sequence[Tensor], Sequence[int]], Tensor]


def reference(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Return each run of rows times the transpose of its weight: x [sum(counts), k], weights of [n, k] -> [sum(counts), n]."""
    return _Looped.apply(matmul.native, tuple(counts), x, *weights)


def cpu(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """As `reference`, each product by the fastest kernel of this CPU."""
    return _Looped.apply(matmul.cpu, tuple(counts), x, *weights)


def cuda(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """As `reference`, all experts in one kernel where this torch has one for them: for bf16, in widths of a multiple of 8."""
    grouped = getattr(F, "grouped_mm", None)  # since torch 2.10
    n, k = weights[0].shape
    if grouped is None or x.dtype != torch.bfloat16 or not len(x) or n % WIDTH or k % WIDTH:
        return reference(x, weights, counts)
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(x.device)
    return grouped(x, torch.stack(tuple(weights)).transpose(1, 2), offs=ends)


def npu(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """As `reference`, all experts in one kernel."""
    assert sum(counts) == len(x), f"{sum(counts)} rows of experts, {len(x)} rows"
    assert len(counts) == len(weights), f"rows of {len(counts)} experts for {len(weights)} weights"
    assert {weight.shape for weight in weights} == {(weights[0].shape[0], x.shape[1])}, "experts of different widths"
    return _Npu.apply(tuple(counts), x, *weights)


class _Looped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: matmul.Product, counts: tuple[int, ...], x: Tensor, *weights: Tensor) -> Tensor:
        ctx.product, ctx.counts = product, counts
        ctx.adding = [matmul_add.adding_to(weight, matmul.ADDS.get(product)) for weight in weights]
        ctx.save_for_backward(x, *weights)
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        for rows, result, weight in zip(x.split(counts), out.split(counts), weights, strict=True):
            if len(rows):
                result.copy_(product(rows, weight))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        _, _, needs_x, *needs_weight = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if needs_x else None
        grads: list[Tensor | None] = []
        start = 0
        for weight, count, needed, adding in zip(weights, ctx.counts, needs_weight, ctx.adding, strict=True):
            rows = slice(start, start + count)
            start += count
            if grad_x is not None and count:
                grad_x[rows] = ctx.product(grad[rows], weight.T)
            if not needed:
                grads.append(None)
            elif count:
                grads.append(matmul.weight_gradient(grad[rows], x[rows], ctx.product, adding))
            else:
                grads.append(torch.zeros_like(weight) if adding is None else None)
        return None, None, grad_x, *grads


class _Npu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counts: tuple[int, ...], x: Tensor, *weights: Tensor) -> Tensor:
        ctx.runs, ctx.counts = counts, torch.tensor(counts, device=x.device)
        ctx.adding = [matmul_add.adding_to(weight, matmul.ADDS[matmul.npu]) for weight in weights]
        ctx.save_for_backward(x, *weights)
        return _fused(x, torch.stack(weights).transpose(1, 2), ctx.counts, group_type=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        grad_x = _fused(grad, torch.stack(weights), ctx.counts, group_type=0) if ctx.needs_input_grad[1] else None
        needed = ctx.needs_input_grad[2:]
        if any(needs and adding is None for needs, adding in zip(needed, ctx.adding, strict=True)):
            # the sum runs over the rows of each expert; where there are none the kernel writes zeros
            return None, grad_x, *_fused(grad.T, x, ctx.counts, group_type=2).unbind(0)
        # the kernel that adds wants the sums of all experts in one tensor, and they lie apart
        for needs, adding, part, rows in zip(needed, ctx.adding, grad.split(ctx.runs), x.split(ctx.runs), strict=True):
            if needs and len(rows):
                adding(part, rows)
        return None, grad_x, *([None] * len(weights))


def _fused(a: Tensor, b: Tensor, counts: Tensor, *, group_type: int) -> Tensor:
    return torch.ops.npu.npu_grouped_matmul(
        [a], [b], group_list=counts, group_list_type=1, group_type=group_type, split_item=3
    )[0]
