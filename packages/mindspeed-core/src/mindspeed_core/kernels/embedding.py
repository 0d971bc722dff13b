"""The rows of a matrix that tokens stand for.

A micro batch names a few thousand rows of perhaps 150,000. Autograd makes a gradient of them all, mostly zeros, which is
then widened and added to the sum over micro batches; `accumulating` adds the few to that sum at once, in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_core.kernels import matmul_add


def reference(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return the rows of weight [V, h] that tokens [b, s] name: [b, s, h]."""
    return F.embedding(tokens, weight)


def accumulating(tokens: Tensor, weight: Tensor) -> Tensor:
    """As `reference`. Where the weight has a `main_grad` its gradient is added there, and autograd sees none."""
    into = matmul_add.sum_of(weight) if torch.is_grad_enabled() and weight.requires_grad else None
    return reference(tokens, weight) if into is None else _Lookup.apply(tokens, weight, into)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, into: Tensor) -> Tensor:
        ctx.into = into
        ctx.save_for_backward(tokens)
        return reference(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        (tokens,) = ctx.saved_tensors
        ctx.into.index_add_(0, tokens.flatten(), grad.flatten(0, -2).to(ctx.into.dtype))
        return None, None, None
