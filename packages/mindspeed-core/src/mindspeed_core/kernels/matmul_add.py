"""The gradient of a weight, added at once to the sum over micro batches that data parallelism keeps: into += grad.T @ x.

Otherwise the product is written in the weight's dtype, read, widened and added: three times the memory traffic, and a
rounding to bf16 before each addition.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

PIECE = 1 << 19  # elements that are widened at a time: they stay in the last cache

Add = Callable[[Tensor, Tensor, Tensor], None]  # to [n, k], of grad [m, n] and x [m, k]
Adding = Callable[[Tensor, Tensor], None]  # the same to the sum of one weight, at once or in its turn
Waiting = list[Callable[[], None]]  # what makes gradients that others are in more of a hurry than


def sum_of(weight: Tensor) -> Tensor | None:
    """Return what the gradient of a weight is to be added to; None: autograd shall have it."""
    return None if getattr(weight, "adds_apart", False) else getattr(weight, "main_grad", None)


def waiting_of(weight: Tensor) -> Waiting | None:
    """Return where the gradient of a weight shall wait to be made; None: it is made at once."""
    return getattr(weight, "waiting", None)


def adding_to(weight: Tensor, add: Add | None) -> Adding | None:
    """Return what brings the gradient of a weight to its sum; None: autograd shall have it."""
    into = sum_of(weight)
    return None if into is None or add is None else partial(make, waiting_of(weight), add, into)


def make(waiting: Waiting | None, add: Add, into: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add the gradient of a weight to its sum, now or when it is its turn."""
    if waiting is None:
        add(into, grad, x)
    else:
        waiting.append(partial(add, into, grad, x))


def reference(into: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add grad.T @ x to `into` [n, k]: grad [m, n], x [m, k]."""
    if into.dtype == grad.dtype:
        into.addmm_(grad.T, x)
    else:
        add(into, grad.T @ x)


def npu(into: Tensor, grad: Tensor, x: Tensor) -> None:
    """As `reference`; bf16 products are added to fp32 sums unrounded, as one group of the kernel for experts."""
    if into.dtype != torch.float32 or grad.dtype == torch.float32:
        reference(into, grad, x)
        return
    rows = torch.full((1,), x.shape[0], device=x.device)  # made there: a copy from the host would wait for the device
    torch.ops.npu.npu_grouped_matmul_add_(into[None], grad, x, rows, transpose_x=True, group_type=2)


def add(into: Tensor, grad: Tensor) -> None:
    """Add a matrix of any dtype to another."""
    if into.dtype == grad.dtype:
        into += grad
        return
    rows = max(1, PIECE // grad.shape[1])  # torch widens the whole operand first
    for part, piece in zip(into.split(rows), grad.split(rows), strict=True):
        part += piece
