"""Linear biases: the slopes of any number of heads, and every side of attention with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mindspeed_core.kernels import alibi, attention
from mindspeed_core.kernels.alibi import Alibi
from tests.core.kernels import npu_attention
from tests.core.kernels.test_window import SEES, T, oracle, tensors

SLOPES = [0.7, 0.4, 0.25, 0.05]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 40, 64, 112])
def test_slopes_equal_those_of_transformers(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    torch.testing.assert_close(alibi.slopes(heads), _get_alibi_slopes(heads, torch.device("cpu")))


@pytest.mark.parametrize("side", ["reference", "cpu", "npu"])
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize(("window", "groups"), [(None, 2), (None, 4), (4, 1)])
def test_a_distant_key_scores_less(side: str, sees: str, window: int | None, groups: int) -> None:
    q, k, v = tensors(sees, groups)
    function: Callable[..., Tensor] = getattr(attention, side)
    biases = Alibi(torch.tensor(SLOPES, dtype=torch.float64))
    expected = oracle(q, k, v, sees, window or T, SLOPES)
    with npu_attention.installed():
        ours = function(q, k, v, scale=0.3, window=window, alibi=biases, **SEES[sees][1])
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        grad = torch.randn_like(expected)
        for a, b in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (ours, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["reference", "cpu"])
def test_a_steep_slope_costs_bf16_no_precision(side: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(256, 1, 8, 64, dtype=torch.bfloat16) for _ in range(3))
    biases = Alibi(alibi.slopes(8))
    exact = attention.reference(q.double(), k.double(), v.double(), scale=0.125, alibi=biases)
    found = getattr(attention, side)(q, k, v, scale=0.125, alibi=biases)
    assert (found.double() - exact).square().mean().sqrt() < 1e-3


@pytest.mark.parametrize("length", [1024, 1100])
def test_the_npu_is_told_the_last_rows_of_a_long_sequence(length: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(length, 1, 2, 8) for _ in range(3))
    biases = Alibi(alibi.slopes(2))
    expected = attention.reference(q, k, v, scale=0.3, alibi=biases)
    with npu_attention.installed():
        torch.testing.assert_close(attention.npu(q, k, v, scale=0.3, alibi=biases), expected, rtol=1e-4, atol=1e-5)


def test_layers_share_a_tensor() -> None:
    biases = Alibi(torch.tensor(SLOPES))
    assert biases(3, 5, torch.float32) is biases(3, 5, torch.float32)
    assert biases(3, 5, torch.float32, scale=0.5) is not biases(3, 5, torch.float32)
    with torch.inference_mode():
        biases(3, 5, torch.float32)
    assert not biases(3, 5, torch.float32).is_inference(), "a backward pass could not keep it"
