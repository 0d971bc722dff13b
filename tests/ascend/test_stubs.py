"""The stubs themselves: what they compute, what they refuse, and how their ranks talk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ascend.host import operators
from tests.ascend.ranks import run_ranks

pytestmark = pytest.mark.stubs


def _double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Any]:
    from tests.core.kernels import npu_attention

    out, peak, total, *_ = npu_attention.fusion_attention(q, k, v, 2, "SBH", scale=0.5, **options)

    def backward(grad: Tensor) -> Any:
        with torch.no_grad():
            return operators.fusion_attention_grad(
                *(x.detach().float() for x in (q, k, v, grad)),
                head_num=2,
                input_layout="SBH",
                softmax_max=peak.detach(),
                softmax_sum=total.detach(),
                attention_in=out.detach().float(),
                scale_value=0.5,
                **options,
            )[:3]

    return out, backward


def _case(name: str) -> tuple[list[Tensor], Tensor, Any]:
    """(inputs, what an operator makes of them, its own backward)"""
    torch.manual_seed(0)
    if name == "rms_norm":
        x, gamma = _double(3, 5, 8), _double(8)
        y, root = operators.rms_norm(x, gamma, 1e-5)
        return [x, gamma], y, lambda grad: operators.rms_norm_backward(grad, x, gamma, root)
    if name == "swiglu":
        x = _double(3, 8)
        return [x], operators.swiglu(x), lambda grad: [operators.swiglu_backward(grad, x)]
    if name.startswith("rotary"):
        mode, x, cos, sin = name.split()[1], _double(5, 2, 3, 8), _double(5, 2, 1, 8), _double(5, 2, 1, 8)
        out = operators.rotary_mul(x, cos, sin, mode)
        return [x, cos, sin], out, lambda grad: operators.rotary_mul_backward(grad, x, cos, sin, mode)
    if name == "unpermute":
        x, probs, places = _double(6, 4), _double(3, 2), torch.tensor([4, 0, 2, 5, 1, 3])
        out, kept = operators.moe_token_unpermute(x, places, probs)
        return [x, probs], out, lambda g: operators.moe_token_unpermute_grad(g, places, 6, g.dtype, probs, kept)
    if name == "permute":
        x, chosen = _double(3, 4), torch.tensor([[2, 0], [1, 2], [0, 1]])
        out, places = operators.moe_token_permute(x, chosen)
        return [x], out, lambda grad: [operators.moe_token_permute_grad(grad, places, 3, grad.dtype, 2)]
    hidden = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    inputs = [_double(6, 2, 8), _double(6, 2, 4), _double(6, 2, 4)]
    return [inputs, *_attention(*inputs, atten_mask=hidden, sparse_mode=3)]  # type: ignore[return-value]


@pytest.mark.parametrize(
    "name", ["rms_norm", "swiglu", "rotary half", "rotary interleave", "permute", "unpermute", "attention"]
)
def test_the_backward_of_an_operator_is_that_of_its_forward(name: str) -> None:
    inputs, out, backward = _case(name)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, grad)
    for found, wanted in zip(backward(grad), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("left", "right"),
    [((4,), (4,)), ((4,), (4, 3)), ((3, 4), (4,)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5))],
    ids=str,
)
def test_matmul_is_differentiated_by_torchs_rules(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = _double(*left), _double(*right)
    out = a @ b
    grad = torch.randn_like(out)
    found = operators.matmul_backward(grad, a.detach(), b.detach(), [True, True])
    for ours, wanted in zip(found, torch.autograd.grad(out, (a, b), grad), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_tensors_of_host_and_device_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device="npu") + torch.zeros(3)
    assert (torch.zeros(3, device="npu") + torch.tensor(1.0)).sum() == 3


def test_an_operator_that_nobody_wrote_is_an_error() -> None:
    x = torch.zeros(4, 8, device="npu")
    with pytest.raises(RuntimeError, match="aclnn"):
        torch.ops.npu.npu_gelu(x)


def test_random_numbers_follow_the_generator_of_the_device() -> None:
    npu: Any = torch.get_device_module("npu")
    torch.manual_seed(3)
    before, state = torch.get_rng_state(), npu.get_rng_state()
    first, second = (torch.randn(5, device="npu") for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before), "the host's generator has not moved"
    npu.set_rng_state(state)
    assert torch.equal(torch.randn(5, device="npu"), first)


def test_four_ranks_talk_in_every_way() -> None:
    world, base = 4, torch.arange(4.0)
    ranks = run_ranks("tests.ascend.collectives", "everything", world)
    shares = [base + 10 * rank for rank in range(world)]
    for rank, found in enumerate(ranks):
        expected: dict[str, Tensor] = {
            "integers": torch.tensor([6.0, 4.0]),
            "gathered": torch.cat(shares),
            "uneven": torch.tensor([i for i in range(world) for _ in range(i + 1)]),
            "scattered": sum(shares)[rank : rank + 1],  # type: ignore[index]
            "broadcast": shares[2],
            "dealt": torch.stack(shares)[:, rank],
            "dealt unevenly": torch.arange(world).repeat_interleave(rank + 1),
            "from before": shares[(rank - 1) % world],
            "half": shares[rank % 2] + shares[rank % 2 + 2],
        }
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected[f"sum {dtype}"] = sum(shares)  # type: ignore[assignment]
            expected[f"max {dtype}"] = shares[-1]
            expected[f"avg {dtype}"] = sum(shares) / world
        assert found == {name: tensor.float().tolist() for name, tensor in expected.items()}
