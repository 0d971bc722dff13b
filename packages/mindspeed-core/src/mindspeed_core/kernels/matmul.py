"""Products with bf16 weights on a CPU that has no bf16 instructions.

torch multiplies bf16 matrices there one scalar at a time, ten times slower than fp32. `widened` computes in fp32 and
stores in bf16: the rounding of one bf16 product, at nearly the speed of fp32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

FEW = 16  # rows up to which reading the weights once in bf16 is faster than widening them


def native(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T as torch does it: x [..., k], weight [n, k] -> [..., n]."""
    return x @ weight.T


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """As `native`, computed in fp32 and rounded once."""
    if x.dtype != torch.bfloat16 or x.numel() <= FEW * x.shape[-1]:
        return native(x, weight)
    return _Widened.apply(x, weight)


@cache
def widens() -> bool:
    """True on a CPU that has no bf16 instructions."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x.float() @ weight.float().T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wide = grad.float()
        grad_x = (wide @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        return grad_x, (wide.flatten(0, -2).T @ x.flatten(0, -2).float()).to(weight.dtype)
