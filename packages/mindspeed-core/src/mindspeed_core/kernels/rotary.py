"""Rotary position embedding (Su et al., 2021) in Hugging Face's half layout: dimension i turns with i + d/2."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [s, b, n, d] turned by the angles whose cosine and sine are [s, b or 1, 1, d]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def npu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference`; the kernel broadcasts only over the leading dimensions it knows, so b is written out."""
    shape = (*x.shape[:2], 1, x.shape[-1])
    return torch.ops.npu.npu_rotary_mul(x, cos.expand(shape), sin.expand(shape), "half")
