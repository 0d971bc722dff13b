"""The products of experts: by torch's grouped kernel, which CUDA takes, on the CPU's own version of it; and where gradients go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_core.device import Device
from mindspeed_core.kernels import KernelConfig, grouped_matmul, matmul, matmul_add, select

COUNTS = (5, 0, 3)  # an expert without rows is among them


def results(side: Callable[..., Tensor], dtype: torch.dtype, width: int) -> list[Tensor]:
    """Output and gradients, of the same numbers whatever the dtype."""
    torch.manual_seed(0)
    x = torch.randn(sum(COUNTS), 16).bfloat16().to(dtype).requires_grad_()
    weights = [torch.randn(width, 16).bfloat16().to(dtype).requires_grad_() for _ in COUNTS]
    out = side(x, weights, COUNTS)
    grads = torch.autograd.grad(out, [x, *weights], torch.randn(out.shape).bfloat16().to(dtype))
    return [tensor.double() for tensor in (out, *grads)]


@pytest.mark.parametrize("width", [24, 20])  # the kernel does not take the second
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_products_are_those_of_fp64(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, calls = F.grouped_mm, []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return kernel(*args, **kwargs)

    expected = results(grouped_matmul.reference, torch.float64, width)
    monkeypatch.setattr(F, "grouped_mm", counted)
    found = results(grouped_matmul.cuda, dtype, width)
    for mine, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, oracle, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert not found[3].any(), "the expert without rows has a gradient of zeros"
    assert len(calls) == (dtype == torch.bfloat16 and width == 24)


def test_cuda_takes_the_grouped_kernel() -> None:
    assert select(Device("cuda"), KernelConfig()).grouped_matmul is grouped_matmul.cuda


def learned(side: Callable[..., Tensor], dtype: torch.dtype, **marks: Any) -> tuple[Tensor, list[Any]]:
    """The gradient of the rows, and the weights after a backward pass; each has a sum in which something is already."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(COUNTS), 16, generator=generator).to(dtype).requires_grad_()
    weights: list[Any] = [torch.nn.Parameter(torch.randn(24, 16, generator=generator).to(dtype)) for _ in COUNTS]
    for weight in weights:
        weight.main_grad = torch.randn(24, 16, generator=generator)
        for mark, value in marks.items():
            setattr(weight, mark, value)
    side(x, weights, COUNTS).backward(torch.randn(sum(COUNTS), 24, generator=generator).to(dtype))
    assert x.grad is not None
    return x.grad, weights


def apart(x: Tensor, weights: list[Tensor], counts: tuple[int, ...]) -> Tensor:
    """One linear of the CPU after another."""
    return torch.cat([matmul.cpu(rows, weight) for rows, weight in zip(x.split(counts), weights, strict=True)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_experts_go_where_those_of_linears_go(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[None] = []
    add = matmul_add.add

    def counted(into: Tensor, grad: Tensor) -> None:
        made.append(None)
        add(into, grad)

    monkeypatch.setattr(matmul_add, "add", counted)
    grad_x, expected = learned(apart, dtype)
    sums = [weight.main_grad for weight in expected]
    busy = sum(count > 0 for count in COUNTS)
    made.clear()
    found, weights = learned(grouped_matmul.cpu, dtype)
    assert torch.equal(found, grad_x)
    assert len(made) == busy, "an expert without rows adds nothing"
    assert all(weight.grad is None for weight in weights)
    assert all(torch.equal(weight.main_grad, total) for weight, total in zip(weights, sums, strict=True))

    made.clear()
    waiting: matmul_add.Waiting = []
    found, weights = learned(grouped_matmul.cpu, dtype, waiting=waiting)
    assert torch.equal(found, grad_x)
    assert (len(made), len(waiting)) == (0, busy)
    with torch.no_grad():
        for make in waiting:
            make()
    assert len(made) == busy
    assert all(weight.grad is None for weight in weights)
    assert all(torch.equal(weight.main_grad, total) for weight, total in zip(weights, sums, strict=True))


@pytest.mark.parametrize(
    ("side", "marks"),
    [(grouped_matmul.cpu, {"adds_apart": True}), (grouped_matmul.reference, {})],
    ids=["cpu", "reference"],
)
def test_gradients_of_experts_are_left_to_autograd_where_those_of_linears_are(
    side: Callable[..., Tensor], marks: dict[str, Any]
) -> None:
    _grad, expected = learned(apart, torch.float32)
    _grad, weights = learned(side, torch.float32, **marks)
    for weight, added in zip(weights, expected, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.main_grad + weight.grad, added.main_grad, rtol=0, atol=1e-5)
    assert not weights[1].grad.any(), "the expert without rows has a gradient of zeros"
