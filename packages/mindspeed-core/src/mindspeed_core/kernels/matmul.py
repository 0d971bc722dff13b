"""The product of a linear layer, x @ weight.T.

On a CPU two things make it faster than torch's own. fp32 goes to oneDNN, which uses the whole width of the vector units
where torch's default library (MKL) takes half of it on AMD. And a weight that has a `main_grad`, the fp32 sum over micro
batches that data parallelism keeps, gets its gradient added there at once: torch would write it in the weight's dtype,
widen it and add it, three times the memory traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mindspeed_core.kernels import matmul_add

FEW = 16  # rows up to which reading bf16 weights once is faster than widening them
LEAST = 4  # rows from which oneDNN is faster than torch's own fp32

Product = Callable[[Tensor, Tensor], Tensor]  # x [..., k], weight [n, k] -> x @ weight.T [..., n]


def native(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T as torch does it: x [..., k], weight [n, k] -> [..., n]."""
    return x @ weight.T


def cpu(x: Tensor, weight: Tensor) -> Tensor:
    """As `native`, by the fastest kernel of this CPU that sums in fp32.

    Where the weight has a `main_grad` its gradient is added there and autograd sees none.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, product, ADDS[cpu])
    return product(x, weight)


def npu(x: Tensor, weight: Tensor) -> Tensor:
    """As `native`; a gradient that has a sum to go to is added there by the same kernel that makes it."""
    if torch.is_grad_enabled() and weight.requires_grad and matmul_add.sum_of(weight) is not None:
        return _Linear.apply(x, weight, native, ADDS[npu])
    return native(x, weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T without a gradient."""
    # a sum over nothing, the gradient of an expert without rows, is none of oneDNN's either
    if x.dtype == torch.float32 and onednn_is_exact() and x.numel() >= LEAST * max(1, x.shape[-1]):
        return onednn(x, weight)
    if x.dtype == torch.bfloat16 and widens() and x.numel() > FEW * x.shape[-1]:
        return widened(x, weight)
    return native(x, weight)


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T by oneDNN, whichever library torch was told to use."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T computed in fp32 and rounded once.

    Without bf16 instructions torch multiplies bf16 matrices one scalar at a time, ten times slower than fp32.
    """
    return product(x.float(), weight.float()).to(x.dtype)


@cache
def widens() -> bool:
    """True on a CPU that has no bf16 instructions."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def onednn_is_exact() -> bool:
    """True where oneDNN is there and multiplies fp32 in fp32: it can be told to round to bf16 or TF32 on some CPUs."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 384, generator=generator) for rows in (256, 512))
    exact = x.double() @ weight.double().T
    # fp32 is off by 1e-6 of the largest result, TF32 by 3e-4, bf16 by 3e-3
    return bool((onednn(x, weight) - exact).abs().max() < 1e-5 * exact.abs().max())


def accumulate(into: Tensor, grad: Tensor, x: Tensor, product: Product) -> None:
    """Add the gradient of a weight, grad.T @ x, to `into`: grad [m, n], x [m, k], into [n, k]."""
    if product is native:
        matmul_add.reference(into, grad, x)
    else:
        matmul_add.add(into, product(grad.T, x.T))


# how the linears of a side bring gradients of weights to their sums; those of others leave them to autograd
ADDS: dict[Product, matmul_add.Add] = {cpu: partial(accumulate, product=product), npu: matmul_add.npu}


def weight_gradient(grad: Tensor, x: Tensor, product: Product, adding: matmul_add.Adding | None) -> Tensor | None:
    """Return the gradient of a weight, grad.T @ x of grad [m, n] and x [m, k]; None where it goes to its sum instead."""
    if adding is None:
        return product(grad.T, x.T)
    adding(grad, x)
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, product: Product, add: matmul_add.Add | None = None) -> Tensor:
        ctx.product, ctx.adding = product, matmul_add.adding_to(weight, add)
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.product(grad, weight.T)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad.flatten(0, -2), x.flatten(0, -2), ctx.product, ctx.adding)
        return grad_x, grad_weight, None, None
