"""A gradient added where it is made is the gradient added afterwards, less one rounding."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mindspeed_core.kernels import matmul, matmul_add


def grouped_matmul_add(
    into: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, *, transpose_x: bool, group_type: int
) -> torch.Tensor:
    """The NPU's operator in plain torch, strict about what it is given: fp32 sums of narrower products, by groups of rows."""
    assert (into.dtype, transpose_x, group_type) == (torch.float32, True, 2)
    assert x.dtype == weight.dtype
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert into.shape == (len(rows), x.shape[1], weight.shape[1])
    start = 0
    for group, end in zip(into, rows.tolist(), strict=True):
        group += x[start:end].float().T @ weight[start:end].float()
        start = end
    assert start == len(x)
    return into


@pytest.fixture
def npu():
    with mock.patch.object(torch.ops, "npu", SimpleNamespace(npu_grouped_matmul_add_=grouped_matmul_add), create=True):
        yield


def _sides(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(37, width, generator=generator).to(dtype) for width in (24, 16))
    return torch.randn(24, 16, generator=generator), grad, x


@pytest.mark.parametrize("side", [matmul_add.reference, matmul_add.npu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_has_the_product_added(side: matmul_add.Add, dtype: torch.dtype, npu: None) -> None:
    into, grad, x = _sides(dtype)
    expected = into.double() + grad.double().T @ x.double()
    side(into, grad, x)
    # torch's own product of bf16 is rounded to bf16 before it is added
    rounded = dtype == torch.bfloat16 and side is matmul_add.reference
    torch.testing.assert_close(into.double(), expected, rtol=0, atol=0.1 if rounded else 1e-4)


@pytest.mark.parametrize("kernel", [matmul.cpu, matmul.npu])
def test_a_weight_with_a_sum_leaves_autograd_nothing(kernel: matmul.Product, npu: None) -> None:
    total, grad, x = _sides(torch.bfloat16)
    weight = torch.nn.Parameter(torch.randn(24, 16).bfloat16())
    expected = total.double() + grad.double().T @ x.double()
    plain = torch.autograd.grad(x.requires_grad_() @ weight.T, (x, weight), grad)
    for apart in (True, False):
        weight.main_grad, weight.adds_apart = total.clone(), apart  # type: ignore[attr-defined]
        found = torch.autograd.grad(kernel(x, weight), (x, weight), grad, allow_unused=True)
        torch.testing.assert_close(found[0], plain[0])
        if apart:
            assert torch.equal(weight.main_grad, total)  # type: ignore[arg-type]
            torch.testing.assert_close(found[1], plain[1])
        else:
            assert found[1] is None
            # on a CPU the product is in bf16 before it is added
            bound = 1e-4 if kernel is matmul.npu else 0.1
            torch.testing.assert_close(weight.main_grad.double(), expected, rtol=0, atol=bound)  # type: ignore[operator]
