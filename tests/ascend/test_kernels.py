"""Each NPU side of a kernel gives the results and gradients of its reference, in fp32 and, to its rounding, in bf16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mindspeed_core.kernels import (
    alibi,
    attention,
    attention_block,
    cached_attention,
    grouped_matmul,
    matmul,
    permute,
    rms_norm,
    rotary,
    swiglu,
)
from mindspeed_core.kernels.cached_attention import Extent
from mindspeed_core.kernels.segments import Segments

S, B, N, G, D = 12, 2, 4, 2, 16
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest number; bf16 keeps 8 bits
QKV = ((S, B, N, D), (S, B, G, D), (S, B, G, D))
COUNTS = (5, 0, 3, 4)  # rows of each expert

Side = Callable[..., Tensor]  # of tensors, and of what it puts on their device
Sides = tuple[Side, Side, tuple[tuple[int, ...], ...]]


def _attention(**options: Any) -> Callable[[Any], Side]:
    def side(kernel: Any) -> Side:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            there = {name: copy.deepcopy(x).to(q.device) if hasattr(x, "to") else x for name, x in options.items()}
            return kernel(q, k, v, scale=0.3, **there)

        return call

    return side


def _masked() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(B, 1, S, S, generator=generator) > 0.5) | torch.eye(S, dtype=torch.bool)


def _biases() -> alibi.Alibi:
    return alibi.Alibi(alibi.slopes(N))


def _documents() -> Segments:
    return Segments.of(torch.tensor([[0] * 5 + [1] * 7, [0] * 2 + [1] * 9 + [2]]))


def _angles(x: Tensor) -> tuple[Tensor, Tensor]:
    angle = torch.arange(S)[:, None, None, None] * torch.tensor([1.0, 0.3, 0.1, 0.03] * (D // 4))
    return angle.cos().to(x.device, x.dtype), angle.sin().to(x.device, x.dtype)


def _pairs(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    angle = (torch.arange(S)[:, None] + torch.arange(rows))[..., None, None] * torch.arange(D // 2).repeat_interleave(2)
    return angle.cos().to(x.device, x.dtype), angle.sin().to(x.device, x.dtype)


def _experts(x: Tensor) -> Tensor:
    return torch.tensor([[2, 0], [1, 2], [0, 1], [3, 0], [1, 3]], device=x.device)


def _there_and_back(sides: permute.Permutation) -> Side:
    def call(tokens: Tensor, weights: Tensor) -> Tensor:
        experts = _experts(tokens)
        rows, places = sides.sort(tokens, experts, experts.numel())
        return sides.back(rows * rows, places, weights)

    return call


CASES: dict[str, Sides] = {
    **{
        name: (options(attention.npu), options(attention.reference), shapes)
        for name, options, shapes in (
            ("attention", _attention(), QKV),
            ("attention of the last query", _attention(), ((1, B, N, D), *QKV[1:])),
            ("attention of later queries", _attention(), ((5, B, N, D), *QKV[1:])),
            ("attention with a mask", _attention(mask=_masked()), QKV),
            ("attention of documents", _attention(segments=_documents()), QKV),
            ("attention in a window", _attention(window=5), QKV),
            ("attention of the last query in a window", _attention(window=5), ((1, B, N, D), *QKV[1:])),
            ("attention of later queries in a window", _attention(window=5), ((5, B, N, D), *QKV[1:])),
            ("attention with a mask in a window", _attention(mask=_masked(), window=5), QKV),
            ("attention of documents in a window", _attention(segments=_documents(), window=4), QKV),
            ("attention with biases", _attention(alibi=_biases()), QKV),
            ("attention of later queries with biases", _attention(alibi=_biases()), ((5, B, N, D), *QKV[1:])),
            ("attention with a mask and biases", _attention(mask=_masked(), alibi=_biases()), QKV),
            ("attention of documents with biases", _attention(segments=_documents(), alibi=_biases()), QKV),
            ("attention with narrow values", _attention(), ((S, B, N, D), (S, B, N, D), (S, B, N, 8))),
        )
    },
    "rms_norm": (lambda *x: rms_norm.npu(*x, 1e-5), lambda *x: rms_norm.reference(*x, 1e-5), ((S, B, D), (D,))),
    "swiglu": (swiglu.npu, swiglu.reference, ((S, B, D),)),
    "rotary": (lambda x: rotary.npu(x, *_angles(x)), lambda x: rotary.reference(x, *_angles(x)), ((S, B, N, D),)),
    **{
        f"rotary of pairs, {rows} rows of angles": (
            partial(lambda side, rows, x: side(x, *_pairs(x, rows), interleaved=True), rotary.npu, rows),
            partial(lambda side, rows, x: side(x, *_pairs(x, rows), interleaved=True), rotary.reference, rows),
            ((S, B, N, D),),
        )
        for rows in (1, B)
    },
    "matmul": (matmul.npu, matmul.native, ((S, B, D), (8, D))),
    "grouped_matmul": (
        lambda x, *weights: grouped_matmul.npu(x, weights, COUNTS),
        lambda x, *weights: grouped_matmul.reference(x, weights, COUNTS),
        ((S, D), *[(8, D)] * len(COUNTS)),
    ),
    "permute": (_there_and_back(permute.NPU), _there_and_back(permute.REFERENCE), ((5, D), (5, 2))),
}


def _close(found: Tensor, expected: Tensor, bound: float) -> bool:
    return bool((found.cpu().double() - expected.double()).abs().max() <= bound * expected.abs().max())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_npu_side_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    side, reference, shapes = CASES[name]
    torch.manual_seed(0)
    given = [torch.randn(shape).to(dtype) for shape in shapes]
    exact = [x.float().requires_grad_() for x in given]
    inputs = [x.to("npu").requires_grad_() for x in given]
    expected, found = reference(*exact), side(*inputs)
    assert found.dtype == dtype
    grad = torch.randn_like(expected).to(dtype)
    grads = torch.autograd.grad(found, inputs, grad.to("npu"))
    for ours, wanted in zip(
        (found, *grads), (expected, *torch.autograd.grad(expected, exact, grad.float())), strict=True
    ):
        assert _close(ours, wanted, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_sum_and_its_norm_equal_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = [torch.randn(shape).to(dtype) for shape in ((S, B, D), (S, B, D), (D,))]
    with torch.no_grad():
        found = rms_norm.npu_add(*(x.to("npu") for x in given), 1e-5)
    norm, total = rms_norm.reference_add(*(x.float() for x in given), 1e-5)
    for ours, wanted in zip(found, (norm, total), strict=True):
        assert ours.dtype == dtype
        assert _close(ours, wanted, BOUNDS[dtype])


@pytest.mark.parametrize("options", [{"causal": True}, {}, {"mask": _masked()}, {"segments": _documents()}], ids=list)
def test_a_block_of_a_ring_equals_the_reference(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape) for shape in QKV)
    grad = torch.randn_like(q)
    made = []
    for block, device in ((attention_block.reference, "cpu"), (attention_block.npu, "npu")):
        there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
        x = [tensor.to(device) for tensor in (q, k, v, grad)]
        out, lse = block.forward(*x[:3], scale=0.3, **there)
        made.append((out, lse, *block.backward(x[3], *x[:3], out, lse, scale=0.3, **there)))
    for expected, found in zip(*made, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (0, 4), (3, 5)], ids=str)
@pytest.mark.parametrize(("window", "biased"), [(None, False), (5, False), (None, True)])
@pytest.mark.parametrize(("queries", "end"), [(7, 7), (6, 9), (1, 9), (1, 12)])
def test_attention_over_a_cache_equals_the_reference(
    queries: int, end: int, window: int | None, biased: bool, padding: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    q, keys, values = (torch.randn(*shape).to(dtype) for shape in ((queries, B, N, D), (B, G, S, D), (B, G, S, D)))
    keys[:, :, end:] = values[:, :, end:] = float("nan")  # what is not written yet is not read
    exact = Extent(queries, end, S, padding, torch.device("cpu"), window)
    biases = _biases() if biased else None
    expected = cached_attention.reference(q.float(), keys.float(), values.float(), exact, scale=0.3, alibi=biases)
    extent = Extent(queries, end, S, padding, torch.device("npu", 0), window)
    biases = _biases().to("npu") if biased else None
    found = cached_attention.npu(q.to("npu"), keys.to("npu"), values.to("npu"), extent, scale=0.3, alibi=biases)
    assert found.dtype == dtype
    for row, begin in enumerate(padding):  # what stands at a row's padding is nobody's
        real = max(0, begin - (end - queries))
        assert _close(found[real:, row], expected[real:, row], BOUNDS[dtype])


def test_a_bf16_gradient_is_added_to_its_fp32_sum_unrounded() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(S, B, D).bfloat16(), torch.randn(8, D).bfloat16()
    grad, before = torch.randn(S, B, 8).bfloat16(), torch.randn(8, D)
    parameter = weight.to("npu").requires_grad_()
    parameter.main_grad = before.to("npu")  # type: ignore[attr-defined]
    matmul.npu(x.to("npu"), parameter).backward(grad.to("npu"))
    assert parameter.grad is None
    expected = before + grad.flatten(0, 1).float().T @ x.flatten(0, 1).float()
    torch.testing.assert_close(parameter.main_grad.cpu(), expected, rtol=1e-6, atol=1e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("delayed", [False, True])
def test_bf16_gradients_of_experts_are_added_to_their_fp32_sums_unrounded(delayed: bool) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(S, D).bfloat16(), torch.randn(S, 8).bfloat16()
    before = [torch.randn(8, D) for _ in COUNTS]
    parameters: list[Any] = [torch.randn(8, D).bfloat16().to("npu").requires_grad_() for _ in COUNTS]
    waiting: list[Callable[[], None]] = []
    for parameter, total in zip(parameters, before, strict=True):
        parameter.main_grad, parameter.waiting = total.to("npu"), waiting if delayed else None
    grouped_matmul.npu(x.to("npu"), parameters, COUNTS).backward(grad.to("npu"))
    assert len(waiting) == (3 if delayed else 0), "one of the experts has no rows"
    if delayed:
        assert all(torch.equal(p.main_grad.cpu(), total) for p, total in zip(parameters, before, strict=True))
    with torch.no_grad():
        for make in waiting:
            make()
    runs = zip(parameters, before, grad.float().split(COUNTS), x.float().split(COUNTS), strict=True)
    for parameter, total, part, rows in runs:
        assert parameter.grad is None
        torch.testing.assert_close(parameter.main_grad.cpu(), total + part.T @ rows, rtol=1e-6, atol=1e-5)
