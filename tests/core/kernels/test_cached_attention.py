"""Attention over a cache equals attention written out query by query, whatever each row holds and whatever lies behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mindspeed_core.device import Device
from mindspeed_core.kernels import KernelConfig, cached_attention, select
from mindspeed_core.kernels.alibi import Alibi
from mindspeed_core.kernels.cached_attention import Extent

B, N, G, D, ROOM = 3, 6, 2, 16, 12
SCALE = 0.3


def query_by_query(
    q: Tensor, keys: Tensor, values: Tensor, end: int, padding: tuple[int, ...], window: int | None, slopes: Tensor
) -> Tensor:
    """The oracle, in double; zeros where a row's query is padding."""
    out = torch.zeros(*q.shape[:3], values.shape[3], dtype=torch.float64)
    for i, row, head in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        last = end - len(q) + i  # the position of this query
        first = padding[row] if window is None else max(padding[row], last - window + 1)
        scores = [
            SCALE * float(q[i, row, head].double() @ keys[row, head * G // N, t].double()) + slopes[head] * (t - last)
            for t in range(first, last + 1)
        ]
        peak = max(map(float, scores), default=0.0)
        total = sum(math.exp(score - peak) for score in scores)
        for t, score in enumerate(scores, first):
            out[i, row, head] += math.exp(score - peak) / total * values[row, head * G // N, t].double()
    return out


@pytest.mark.parametrize("side", [cached_attention.reference, cached_attention.cpu])
@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 4, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize(("window", "biased"), [(None, 0), (1, 0), (3, 0), (7, 0), (20, 0), (None, 1), (7, 1)])
@pytest.mark.parametrize(("queries", "end"), [(6, 6), (5, 9), (1, 9), (1, 12)])
def test_it_equals_attention_query_by_query(
    side, padding: tuple[int, ...], queries: int, end: int, window: int | None, biased: int
) -> None:
    torch.manual_seed(0)
    q, keys, values = torch.randn(queries, B, N, D), torch.randn(B, G, ROOM, D), torch.randn(B, G, ROOM, D)
    slopes = torch.rand(N) * biased
    expected = query_by_query(q, keys, values, end, padding, window, slopes)
    keys[:, :, end:] = values[:, :, end:] = float("nan")  # what is not written yet is not read
    if window is not None:  # nor is what lies before every window
        past = max(0, end - queries + 1 - window)
        keys[:, :, :past] = values[:, :, :past] = float("nan")
    extent = Extent(queries, end, ROOM, padding, q.device, window)
    found = side(q, keys, values, extent, scale=SCALE, alibi=Alibi(slopes) if biased else None)
    assert found.shape == q.shape
    for row, begin in enumerate(padding):
        real = max(0, begin - (end - queries))
        torch.testing.assert_close(found[real:, row].double(), expected[real:, row], rtol=1e-5, atol=1e-5)
    assert found.isfinite().all(), "a query of padding poisons the layers above"


def test_an_extent_says_what_each_operator_asks_for() -> None:
    extent = Extent(2, 4, 6, (0, 3), torch.device("cpu"))
    assert extent.lengths == [4, 1]
    assert extent.behind.tolist() == [2]
    assert extent.mask is not None
    assert extent.mask.int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]], [[[0, 0, 1, 0], [0, 0, 0, 1]]]]
    assert extent.hidden is not None
    assert torch.equal(extent.hidden[..., :4], ~extent.mask)
    assert extent.hidden[..., 4:].all()
    even = Extent(2, 4, 6, (0, 0), torch.device("cpu"))
    assert even.mask is even.hidden is None
    near = Extent(2, 4, 6, (0, 3), torch.device("cpu"), window=2)
    assert (near.first, near.lengths) == (1, [3, 1])
    assert near.mask is not None
    assert near.mask.int().tolist() == [[[[1, 1, 0], [0, 1, 1]]], [[[0, 1, 0], [0, 0, 1]]]]
    assert near.hidden is not None
    assert near.hidden.shape == (2, 1, 2, 6)
    assert torch.equal(near.hidden[..., 1:4], ~near.mask)
    assert near.hidden[..., [0, 4, 5]].all()
    token = Extent(1, 4, 6, (0, 0), torch.device("cpu"), window=2)
    assert (token.first, token.lengths, token.mask) == (2, [2, 2], None)


@pytest.mark.parametrize(
    ("q", "cache", "dtype", "taken"),
    [
        ((1, B, N, D), (G, D, D), torch.bfloat16, True),
        ((1, B, N, D), (G, D, D), torch.float32, False),
        ((1, B, N, 24), (G, 24, 24), torch.bfloat16, False),  # the width is no multiple of 16
        ((1, B, N, 576), (G, 576, 576), torch.bfloat16, False),
        ((1, B, N, 192), (N, 192, 128), torch.bfloat16, False),  # values narrower than keys
        ((1, B, 65, D), (1, D, D), torch.bfloat16, False),  # too many heads to one key head
        ((1, B, 264, D), (132, D, D), torch.bfloat16, False),
    ],
)
def test_what_the_operator_for_inference_takes(q, cache, dtype: torch.dtype, taken: bool) -> None:
    heads, width, value_width = cache
    tensors = (torch.empty(q), torch.empty(B, heads, ROOM, width), torch.empty(B, heads, ROOM, value_width))
    assert cached_attention.takes(*(x.to(dtype) for x in tensors)) == taken


def test_it_is_chosen_with_attention() -> None:
    assert select(Device("cpu")).cached_attention is cached_attention.cpu
    assert select(Device("npu")).cached_attention is cached_attention.npu
    assert select(Device("npu"), KernelConfig(attention="reference")).cached_attention is cached_attention.reference
