"""Products beside collectives equal the whole product and its gradients, in any number of pieces."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import run_ranks

ROWS, BATCH, K, N = 6, 4, 10, 7  # rows of one rank times the batch: 24 divides into 2, 4 and 8 pieces, 6 x 3 does not


def _whole(world: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(world * ROWS, batch, K, generator=random, dtype=torch.float64)
    weight = torch.randn(world * N, K, generator=random, dtype=torch.float64)
    grad = torch.randn(world * ROWS, batch, world * N, generator=random, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), grad.to(dtype)


def _compare(world: int) -> dict[str, float]:
    """The largest relative differences from one process, by operation."""
    import torch.distributed as dist

    from mindspeed_core.kernels import matmul, matmul_collective

    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    found: dict[str, float] = {}

    def differs(name: str, mine: Tensor, whole: Tensor) -> None:
        found[name] = max(found.get(name, 0.0), float((mine - whole).abs().max() / whole.abs().max()))

    for chunks in (1, 2, 4, 8):
        for batch in (BATCH, 3):
            side = matmul_collective.chunked(chunks, matmul.native)
            x, weight, grad = _whole(world, batch, torch.float32)
            rows, columns = slice(rank * ROWS, (rank + 1) * ROWS), slice(rank * N, (rank + 1) * N)
            # column linear: rows of x and of the weight are cut
            part, w = x[rows].clone().requires_grad_(), weight[columns].clone().requires_grad_()
            out = matmul_collective.gather_matmul(part, w, group, side)
            out.backward(grad[..., columns])
            differs("column", out.detach(), x @ weight[columns].T)
            differs("column grad x", part.grad, (grad @ weight)[rows])
            differs("column grad w", w.grad, (grad.flatten(0, 1).T @ x.flatten(0, 1))[columns])
            # row linear: here the roles of `x` and `grad` change, [.., world * N] columns of the input are cut
            part, w = grad[..., columns].clone().requires_grad_(), weight.T[:, columns].clone().requires_grad_()
            whole = grad @ weight
            out = matmul_collective.matmul_scatter(part, w, group, side)
            out.backward(x[rows])
            differs("row", out.detach(), whole[rows])
            differs("row grad x", part.grad, (x @ weight.T)[..., columns])
            differs("row grad w", w.grad, (x.flatten(0, 1).T @ grad.flatten(0, 1))[:, columns])
            part, w = part.detach().requires_grad_(), w.detach().requires_grad_()
            out = matmul_collective.matmul_reduce(part, w, group, side)
            out.backward(x)
            differs("reduce", out.detach(), whole)
            differs("reduce grad x", part.grad, (x @ weight.T)[..., columns])
            differs("reduce grad w", w.grad, (x.flatten(0, 1).T @ grad.flatten(0, 1))[:, columns])
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_pieces_equal_the_whole(world: int) -> None:
    for found in run_ranks(_compare, world, world):
        assert len(found) == 9
        for name, difference in found.items():
            assert difference < 1e-6, f"{name}: {difference:.1e}"


def _travels(world: int) -> list[tuple[str, int]]:
    """The collectives of one column linear in four pieces, forward and backward, with the elements each moved."""
    import torch.distributed as dist

    from mindspeed_core.kernels import collective, matmul_collective

    seen: list[tuple[str, int]] = []
    group: Any = dist.group.WORLD
    gather, scatter = collective.all_gather, collective.reduce_scatter

    def watched(name: str, function: Any) -> Any:
        def call(out: Tensor, part: Tensor, **more: Any) -> Any:
            seen.append((name, part.numel()))
            return function(out, part, **more)

        return call

    collective.all_gather, collective.reduce_scatter = watched("gather", gather), watched("scatter", scatter)
    x = torch.randn(ROWS, BATCH, K, requires_grad=True)
    weight = torch.randn(N, K, requires_grad=True)
    matmul_collective.gather_matmul(x, weight, group, matmul_collective.chunked(4)).sum().backward()
    return seen


def test_rows_travel_in_pieces() -> None:
    part = ROWS * BATCH // 4
    expected = [("gather", part * K)] * 4 + [("gather", 4 * part * K)] + [("scatter", 2 * part * K)] * 4
    assert run_ranks(_travels, 2, 2) == [expected] * 2


def _learned(call: Callable[[Any], Tensor], weight: Tensor, grad: Tensor, **marks: Any) -> Any:
    """A weight after a backward pass, which has a sum in which something is already."""
    parameter: Any = torch.nn.Parameter(weight.clone())
    parameter.main_grad = torch.ones(weight.shape)
    for mark, value in marks.items():
        setattr(parameter, mark, value)
    call(parameter).backward(grad)
    return parameter


def _sums(dtype: torch.dtype) -> dict[str, list[bool]]:
    """Per operation and number of pieces: what holds of the sum that a weight has for its gradient."""
    import torch.distributed as dist

    from mindspeed_core.kernels import matmul, matmul_add, matmul_collective

    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    x, weight, grad = _whole(2, BATCH, dtype)
    rows, columns = slice(rank * ROWS, (rank + 1) * ROWS), slice(rank * N, (rank + 1) * N)
    cut, across = grad[..., columns].contiguous(), weight.T[:, columns].contiguous()
    # operation, its input, weight and gradient; then the rows and their gradients of a linear without a collective
    cases: dict[str, tuple[Any, ...]] = {
        "gather": (matmul_collective.gather_matmul, x[rows], weight[columns], cut, x, cut),
        "scatter": (matmul_collective.matmul_scatter, cut, across, x[rows], cut, x),
        "reduce": (matmul_collective.matmul_reduce, cut, across, x, cut, x),
    }
    made: list[Tensor] = []
    add = matmul_add.add

    def counted(into: Tensor, product: Tensor) -> None:
        made.append(product)
        add(into, product)

    def untouched(parameter: Any) -> bool:
        return not made and bool((parameter.main_grad == 1).all())

    found: dict[str, list[bool]] = {}
    for (name, case), chunks in itertools.product(cases.items(), (1, 4)):
        operation, mine, w, back, seen, whole = case
        expected = _learned(partial(matmul.cpu, seen), w, whole).main_grad
        ours, native = (matmul_collective.chunked(chunks, side) for side in (matmul.cpu, matmul.native))
        call = partial(operation, mine.clone().requires_grad_(), group=group, side=ours)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matmul_add, "add", counted)
            once = _learned(call, w, back)
            checks = [len(made) == 1, once.grad is None, torch.equal(once.main_grad, expected)]
            made.clear()
            waiting: list[Any] = []
            late = _learned(call, w, back, waiting=waiting)
            checks += [untouched(late), late.grad is None, len(waiting) == 1]
            with torch.no_grad():
                waiting[0]()
            checks += [len(made) == 1, torch.equal(late.main_grad, expected)]
            made.clear()
            apart = _learned(call, w, back, adds_apart=True)
            checks += [untouched(apart), apart.grad is not None]
            # the linears of the reference leave gradients to autograd
            reference = _learned(partial(call, side=native), w, back)
            checks += [untouched(reference), reference.grad is not None]
            frozen = _learned(call, w, back, requires_grad=False)
            checks += [untouched(frozen), frozen.grad is None]
        found[f"{name} in {chunks}"] = checks
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_weights_go_where_those_of_other_linears_go(dtype: torch.dtype) -> None:
    for found in run_ranks(_sums, 2, dtype):
        assert len(found) == 6
        for name, checks in found.items():
            assert all(checks), f"{name}: {checks}"
