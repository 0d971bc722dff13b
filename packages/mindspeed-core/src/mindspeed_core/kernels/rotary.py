"""Rotary position embedding (Su et al., 2021) in Hugging Face's half layout: dimension i turns with i + d/2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WIDEST = 896  # an NPU turns heads narrower than this


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [s, b, n, d] turned by the angles whose cosine and sine are [s, b or 1, 1, d]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference`, in three passes instead of five, and three back; no gradient of the angles."""
    return _Turn.apply(x, cos, sin)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = x * cos
        (left, right), (sin_left, sin_right), (out_left, out_right) = (y.chunk(2, -1) for y in (x, sin, out))
        out_left.addcmul_(right, sin_left, value=-1)
        out_right.addcmul_(left, sin_right)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        out = grad * cos
        (left, right), (sin_left, sin_right), (out_left, out_right) = (y.chunk(2, -1) for y in (grad, sin, out))
        out_left.addcmul_(right, sin_right)
        out_right.addcmul_(left, sin_left, value=-1)
        return out, None, None


def npu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference`; the kernel broadcasts only over the leading dimensions it knows, so b is written out."""
    assert x.shape[-1] % 2 == 0, f"the halves of {tuple(x.shape)} differ in width"
    assert x.shape[-1] < WIDEST, f"heads of {x.shape[-1]} are wider than the operator turns"
    shape = (*x.shape[:2], 1, x.shape[-1])
    return torch.ops.npu.npu_rotary_mul(x, cos.expand(shape), sin.expand(shape), "half")
