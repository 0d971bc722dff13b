"""Documents that share a row do not see one another, on every side of attention, and the work falls with their lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mindspeed_core.kernels import attention, attention_block
from mindspeed_core.kernels.segments import Segments, Span
from tests.core.kernels import npu_attention

IDS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3], [0] * 7 + [1] * 5])
SHARED = torch.tensor([[2, 2, 2, 3, 3, 3, 4], [1, 1, 1, 1, 5, 5, 5]])  # keys elsewhere: some documents are in both


def tensors(s: int, t: int, groups: int = 2, width: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((s, 4, 8), (t, groups, 8), (t, groups, width), (s, 4, width))
    return [torch.randn(n, 2, *rest, dtype=torch.float64, requires_grad=True) for n, *rest in shapes]


def oracle(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True).permute(2, 0, 1, 3)


def test_a_document_is_a_run_of_one_id() -> None:
    segments = Segments.of(IDS)
    assert segments.lengths == [[3, 1, 6, 2], [7, 5]]
    assert segments.spans[1] == Span(0, 3, 4, 3, 4)
    shared = Segments.shared(IDS, SHARED)
    assert shared.spans == (Span(0, 4, 10, 0, 3), Span(0, 10, 12, 3, 6), Span(1, 7, 12, 0, 4))
    mask = shared.mask(IDS.device, causal=False)
    assert torch.equal(mask, IDS[:, None, :, None] == SHARED[:, None, None, :])


@pytest.mark.parametrize("side", ["reference", "cpu", "npu"])
@pytest.mark.parametrize("width", [8, 6])
def test_documents_of_a_row_are_attended_apart(side: str, width: int) -> None:
    q, k, v, grad = tensors(12, 12, width=width)
    seen = (IDS[:, None, :, None] == IDS[:, None, None, :]).tril()
    expected = oracle(q, k, v, seen)
    function: Callable[..., Tensor] = getattr(attention, side)
    with npu_attention.installed():
        ours = function(q, k, v, scale=0.3, segments=Segments.of(IDS))
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (ours, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [8, 6])
def test_the_operator_of_the_npu_is_asked_for_causal_and_for_masked_attention(width: int) -> None:
    q, k, v, _grad = tensors(12, 12, width=width)
    triangle = torch.ones(12, 12, dtype=torch.bool).tril()
    mask = triangle[None, None] | (torch.rand(2, 1, 12, 12) > 0.5)
    with npu_attention.installed():
        torch.testing.assert_close(attention.npu(q, k, v, scale=0.3), oracle(q, k, v, triangle))
        torch.testing.assert_close(attention.npu(q, k, v, scale=0.3, mask=mask), oracle(q, k, v, mask))


KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (7, {}),
    "causal": (12, {"causal": True}),
    "masked": (
        7,
        {"mask": (torch.arange(84) % 3 != 0).view(12, 7).index_fill(0, torch.tensor([4]), False)[None, None]},
    ),
    "documents": (12, {"causal": True, "segments": Segments.of(IDS)}),
    "shared documents": (7, {"segments": Segments.shared(IDS, SHARED)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("groups", "width"), [(2, 8), (1, 8), (4, 6)])
def test_the_sides_of_a_block_agree(kind: str, groups: int, width: int) -> None:
    t, options = KINDS[kind]
    q, k, v, grad = (x.detach().float() for x in tensors(12, t, groups, width))
    out, lse = attention_block.reference.forward(q, k, v, scale=0.3, **options)
    # as in a ring: the softmax goes over more keys than those of this block
    total = torch.logaddexp(lse, torch.zeros_like(lse))
    back = attention_block.reference.backward(grad, q, k, v, out, total, scale=0.3, **options)
    with npu_attention.installed():
        for side in (attention_block.blocked, attention_block.npu):
            got = side.forward(q, k, v, scale=0.3, **options)
            got_back = side.backward(grad, q, k, v, out, total, scale=0.3, **options)
            for ours, expected in zip((*got, *got_back), (out, lse, *back), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_work_falls_with_the_length_of_documents() -> None:
    """Eight documents of 16 cost an eighth of one of 128, in attention and in a block of a ring."""
    ids = torch.arange(128).div(16, rounding_mode="floor").expand(2, -1)
    one, eight = Segments.of(torch.zeros_like(ids)), Segments.of(ids)
    q, k, v, grad = tensors(128, 128)

    def flops(segments: Segments, *, block: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            if block:
                out, lse = attention_block.blocked.forward(q, k, v, scale=0.3, causal=True, segments=segments)
                attention_block.blocked.backward(grad, q, k, v, out, lse, scale=0.3, causal=True, segments=segments)
            else:
                attention.cpu(q, k, v, scale=0.3, segments=segments).backward(grad)
        return counter.get_total_flops()

    for block in (False, True):
        assert 0 < flops(eight, block=block) * 7.5 < flops(one, block=block)
