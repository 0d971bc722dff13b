"""Products beside a collective of tensor parallelism, so that one hides behind the other.

    gather_matmul     all-gather(x) @ weight.T        x [m, k] of each rank  -> [tp * m, n]     column linear, sequence cut
    matmul_scatter    reduce-scatter(x @ weight.T)    x [tp * m, k]          -> [m, n]          row linear, sequence cut
    matmul_reduce     all-reduce(x @ weight.T)        x [m, k]               -> [m, n]          row linear

The first two are each other's transpose: the gradient of one is the other with the transposed weight. Three sides do the
same sums:

    plain     the collective, then the product: the reference
    chunked   rows in pieces, the collective of one piece while the product of another runs ("CoC", communication over
              computation)
    fused     one operator of the NPU does both ("MC2")

The gradient of a weight has a product of its own, which ends as that of a linear without a collective: in the sum that the
weight has for it, at once or in its turn, where that side's linears bring it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_core.kernels import collective, matmul, matmul_add
from mindspeed_core.kernels.matmul import Product

# what the NPU's operators take, by their documentation
DTYPES = (torch.bfloat16, torch.float16)
RANKS = (2, 4, 8, 16)  # 16 on Atlas A3 only
FEATURES = range(256, 65535)  # summed over; the sum over ranks has no such limit


@dataclass(frozen=True)
class Collectives:
    """One side: the three operations on matrices, without their gradients."""

    gather: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]  # the product, and x of all ranks [tp * m, k]
    scatter: Callable[[Tensor, Tensor, Any], Tensor]
    reduce: Callable[[Tensor, Tensor, Any], Tensor]
    product: Product = matmul.native  # what no collective stands beside

    def adding_to(self, weight: Tensor) -> matmul_add.Adding | None:
        """Return what brings the gradient of a weight to its sum; None: autograd shall have it."""
        return matmul_add.adding_to(weight, matmul.ADDS.get(self.product))


def select(kind: str, device_type: str, *, chunks: int, product: Product) -> Collectives | None:
    """Return the side that `parallel.collective_matmul` names, None for Megatron's own linears."""
    if kind == "none":
        return None
    if kind == "coc":
        return chunked(chunks, product)
    side = fused if device_type == "npu" else plain  # only an NPU has the operators; the sums are the same
    return side(product)


def plain(product: Product = matmul.native) -> Collectives:
    """Return the reference."""
    return chunked(1, product)


def chunked(chunks: int, product: Product = matmul.native) -> Collectives:
    """Return the side that cuts the rows of a rank into `chunks`; rows that they do not divide go in one piece."""
    return Collectives(
        gather=partial(_gather, chunks=chunks, product=product),
        scatter=partial(_scatter, chunks=chunks, product=product),
        reduce=partial(_reduce, chunks=chunks, product=product),
        product=product,
    )


def fused(product: Product = matmul.native) -> Collectives:
    """Return the NPU's own operators."""
    return Collectives(gather=_npu_gather, scatter=_npu_scatter, reduce=_npu_reduce, product=product)


def gather_matmul(x: Tensor, weight: Tensor, group: dist.ProcessGroup, side: Collectives) -> Tensor:
    """Return all-gather(x) @ weight.T: x [s / tp, b, k], weight [n, k] -> [s, b, n]."""
    return _GatherMatmul.apply(x, weight, group, side)


def matmul_scatter(x: Tensor, weight: Tensor, group: dist.ProcessGroup, side: Collectives) -> Tensor:
    """Return reduce-scatter(x @ weight.T): x [s, b, k], weight [n, k] -> [s / tp, b, n]."""
    return _MatmulScatter.apply(x, weight, group, side)


def matmul_reduce(x: Tensor, weight: Tensor, group: dist.ProcessGroup, side: Collectives) -> Tensor:
    """Return all-reduce(x @ weight.T): x [s, b, k], weight [n, k] -> [s, b, n]."""
    return _MatmulReduce.apply(x, weight, group, side)


class _GatherMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup, side: Collectives) -> Tensor:
        ctx.group, ctx.side, ctx.adding = group, side, side.adding_to(weight)
        ctx.save_for_backward(x, weight)  # this rank's rows: all of them are gathered again for the gradient
        out, _ = side.gather(x.flatten(0, -2), weight, group)
        return out.view(-1, *x.shape[1:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = x.flatten(0, -2).contiguous()
        everything = rows.new_empty(ctx.group.size() * rows.shape[0], rows.shape[1])
        arriving = collective.all_gather(everything, rows, group=ctx.group, async_op=True)
        grad = grad.flatten(0, -2).contiguous()
        grad_x = ctx.side.scatter(grad, weight.T, ctx.group).view_as(x)
        arriving.wait()
        return grad_x, _weight_gradient(ctx, grad, everything), None, None


class _MatmulScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup, side: Collectives) -> Tensor:
        ctx.group, ctx.side, ctx.adding = group, side, side.adding_to(weight)
        ctx.save_for_backward(x, weight)
        out = side.scatter(x.flatten(0, -2), weight, group)
        return out.view(-1, *x.shape[1:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x, everything = ctx.side.gather(grad.flatten(0, -2).contiguous(), weight.T, ctx.group)
        return grad_x.view_as(x), _weight_gradient(ctx, everything, x.flatten(0, -2)), None, None


class _MatmulReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup, side: Collectives) -> Tensor:
        ctx.side, ctx.adding = side, side.adding_to(weight)
        ctx.save_for_backward(x, weight)
        return side.reduce(x.flatten(0, -2), weight, group).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors  # the sum is already known everywhere, and so is its gradient
        rows = grad.flatten(0, -2)
        return ctx.side.product(rows, weight.T).view_as(x), _weight_gradient(ctx, rows, x.flatten(0, -2)), None, None


def _weight_gradient(ctx: Any, grad: Tensor, x: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[1]:
        return None
    return matmul.weight_gradient(grad, x, ctx.side.product, ctx.adding)


def _pieces(rows: int, chunks: int) -> int:
    return chunks if rows and rows % chunks == 0 else 1


def _gather(
    x: Tensor, weight: Tensor, group: dist.ProcessGroup, *, chunks: int, product: Product
) -> tuple[Tensor, Tensor]:
    """The rows of rank r stand at [r] of the result, piece c of them at [r, c]:

    arrives       product     lands at
    piece 0       -           -
    piece 1       piece 0     [:, 0]      the next piece travels while the product of this one is made
    -             piece 1     [:, 1]
    """
    size = group.size()
    (rows, k), pieces = x.shape, _pieces(len(x), chunks)
    parts = x.contiguous().view(pieces, -1, k)
    arrived = [x.new_empty(size, rows // pieces, k) for _ in range(pieces)]

    def send(c: int) -> Any:
        return collective.all_gather(arrived[c].view(-1, k), parts[c], group=group, async_op=True)

    travelling = send(0)
    made: list[Tensor] = []
    for c in range(pieces):
        travelling.wait()
        if c + 1 < pieces:
            travelling = send(c + 1)
        made.append(product(arrived[c], weight))
    if pieces == 1:
        return made[0].flatten(0, 1), arrived[0].flatten(0, 1)
    return torch.stack(made, 1).flatten(0, 2), torch.stack(arrived, 1).flatten(0, 2)


def _scatter(x: Tensor, weight: Tensor, group: dist.ProcessGroup, *, chunks: int, product: Product) -> Tensor:
    size = group.size()
    rows = x.shape[0] // size
    pieces = _pieces(rows, chunks)
    parts = x.view(size, pieces, rows // pieces, x.shape[1])
    out, travelling = [], []
    for c in range(pieces):
        made = product(parts[:, c], weight).flatten(0, 1).contiguous()
        mine = made.new_empty(rows // pieces, made.shape[1])
        travelling.append((made, collective.reduce_scatter(mine, made, group=group, async_op=True)))
        out.append(mine)
    for _sent, work in travelling:
        work.wait()
    return out[0] if pieces == 1 else torch.cat(out)


def _reduce(x: Tensor, weight: Tensor, group: dist.ProcessGroup, *, chunks: int, product: Product) -> Tensor:
    pieces = _pieces(len(x), chunks)
    out, travelling = [], []
    for part in x.chunk(pieces):
        out.append(product(part, weight).contiguous())
        travelling.append(dist.all_reduce(out[-1], group=group, async_op=True))
    for work in travelling:
        work.wait()
    return out[0] if pieces == 1 else torch.cat(out)


def problems(*, tp: int, dtype: torch.dtype, features: Mapping[str, int]) -> list[str]:
    """Return what keeps a recipe from the NPU's operators; `features` are the sizes that its products sum over, by name."""
    key, found = "parallel.collective_matmul=mc2", []
    if dtype not in DTYPES:
        found.append(
            f"{key}: the NPU's operators compute in bf16 or fp16; use precision=bf16, or collective_matmul=coc"
        )
    if tp not in RANKS:
        found.append(f"{key}: the NPU's operators take tp={_spoken(RANKS)}, not {tp}; use collective_matmul=coc")
    wrong = [f"{what}={size:,}" for what, size in features.items() if size not in FEATURES]
    if wrong:
        found.append(
            f"{key}: the NPU's operators sum over {FEATURES[0]:,} to {FEATURES[-1]:,} features, not over "
            f"{', '.join(wrong)} of a rank; use a smaller tp, or collective_matmul=coc"
        )
    return found


def _spoken(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def _hcom(group: Any, x: Tensor) -> str:
    return group._get_backend(x.device).get_hccl_comm_name(dist.get_rank())


def _check(x: Tensor, weight: Tensor, group: dist.ProcessGroup, features: range | None = FEATURES) -> None:
    """Raise on what the operators would leave to CANN, or take without a word."""
    shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
    assert x.dtype == weight.dtype, f"x and weight are {x.dtype} and {weight.dtype}"
    assert x.dtype in DTYPES, f"MC2 computes in bf16 or fp16, not in {x.dtype}"
    assert x.dim() == weight.dim() == 2, f"MC2 takes matrices, not {shapes}"
    assert x.shape[1] == weight.shape[1], f"x and weight sum over other features: {shapes}"
    assert group.size() in RANKS, f"MC2 takes {_spoken(RANKS)} ranks, not {group.size()}"
    assert features is None or x.shape[1] in features, (
        f"MC2 sums over {features[0]:,} to {features[-1]:,} features, not over {x.shape[1]:,}"
    )


def _npu_gather(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    _check(x, weight, group)
    return torch.ops.npu.npu_all_gather_base_mm(
        x, weight.T, _hcom(group, x), group.size(), gather_index=0, gather_output=True
    )


def _npu_scatter(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    _check(x, weight, group)
    assert len(x) % group.size() == 0, f"{group.size()} ranks do not divide {len(x)} rows"
    return torch.ops.npu.npu_mm_reduce_scatter_base(x, weight.T, _hcom(group, x), group.size(), reduce_op="sum")


def _npu_reduce(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    _check(x, weight, group, None)
    return torch.ops.npu.npu_mm_all_reduce_base(x, weight.T, _hcom(group, x), reduce_op="sum")
