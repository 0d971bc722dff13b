"""Attention in a sliding window: every side sees a query's own position and those shortly before it, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mindspeed_core.kernels import attention
from mindspeed_core.kernels.segments import Segments
from tests.core.kernels import npu_attention

T = 12
IDS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3], [0] * 7 + [1] * 5])
GENERAL = (torch.arange(2 * T * T).view(2, 1, T, T) % 3 != 0) | torch.eye(T, dtype=torch.bool)  # the future too
SEES: dict[str, tuple[int, dict[str, Any]]] = {  # how many queries there are, and what they are told
    "causal": (T, {}),
    "the last ones": (5, {}),
    "the last one": (1, {}),
    "general": (T, {"mask": GENERAL}),
    "documents": (T, {"segments": Segments.of(IDS)}),
}


def oracle(q: Tensor, k: Tensor, v: Tensor, sees: str, window: int, slopes: list[float] | None = None) -> Tensor:
    """The formula, with its mask (and linear biases) made pair by pair."""
    s, repeat = len(q), q.shape[2] // k.shape[2]
    seen = torch.zeros(2, 1, s, T, dtype=torch.bool)
    bias = torch.zeros(q.shape[2], s, T, dtype=torch.float64)
    for row in range(2):
        for i, query in enumerate(range(T - s, T)):
            for key in range(T):
                if sees == "general":
                    allowed = bool(GENERAL[row, 0, query, key])
                else:
                    allowed = key <= query and (sees != "documents" or bool(IDS[row, query] == IDS[row, key]))
                seen[row, 0, i, key] = allowed and query - key < window
                for head, slope in enumerate(slopes or []):
                    bias[head, i, key] = slope * (key - query)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k.repeat_interleave(repeat, 2)) * 0.3 + bias
    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", shares, v.repeat_interleave(repeat, 2))


def tensors(sees: str, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((SEES[sees][0], 4), (T, groups), (T, groups))
    q, k, v = (torch.randn(n, 2, heads, 8, dtype=torch.float64, requires_grad=True) for n, heads in shapes)
    return q, k, v


@pytest.mark.parametrize("side", ["reference", "cpu", "npu"])
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize(("window", "groups"), [(1, 2), (3, 4), (4, 1), (11, 2), (12, 2), (50, 2)])
def test_a_query_sees_its_window(side: str, sees: str, window: int, groups: int) -> None:
    q, k, v = tensors(sees, groups)
    function: Callable[..., Tensor] = getattr(attention, side)
    expected = oracle(q, k, v, sees, window)
    with npu_attention.installed():
        ours = function(q, k, v, scale=0.3, window=window, **SEES[sees][1])
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        grad = torch.randn_like(expected)
        for a, b in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (ours, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["reference", "cpu", "npu"])
def test_a_window_that_hides_nothing_takes_the_way_without_one(side: str) -> None:
    q, k, v = tensors("causal", 2)
    function: Callable[..., Tensor] = getattr(attention, side)
    with npu_attention.installed():
        assert torch.equal(function(q, k, v, scale=0.3, window=T), function(q, k, v, scale=0.3))
