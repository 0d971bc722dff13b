"""Each kernel's reference against the formula written out, with its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_core.device import Device
from mindspeed_core.errors import InputError
from mindspeed_core.kernels import (
    KernelConfig,
    attention,
    cross_entropy,
    embedding,
    matmul,
    matmul_add,
    rms_norm,
    rotary,
    select,
    swiglu,
)
from mindspeed_core.models.family import pad_rows
from tests.harness import run_ranks


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Attention written out: q [s, b, n, d], mask [b, 1, s, t] True where a key is seen."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * scale
    return torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(~mask, -math.inf).softmax(-1), v)


@pytest.mark.parametrize(("s", "t"), [(6, 6), (1, 6), (3, 6)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_causal_with_the_queries_last(s: int, t: int, groups: int):
    torch.manual_seed(0)
    q = torch.randn(s, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(t, 2, groups, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.ones(s, t, dtype=torch.bool).tril(t - s)[None, None]
    ours, oracle = attention.reference(q, k, v, scale=0.3), _attention(q, k, v, 0.3, mask)
    torch.testing.assert_close(ours, oracle)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, oracle)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("s", [4, 5, 16, 33])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kept", [True, False])
def test_attention_in_blocks_equals_the_reference(s: int, groups: int, kept: bool, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    q = torch.randn(s, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(s, 2, groups, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    monkeypatch.setattr(attention, "LONGEST", s if kept else 0)
    monkeypatch.setattr(attention, "ROWS", 3)
    # of fp64 the kernel of CPUs takes those in blocks whose probabilities are kept
    ours = attention.cpu(q, k, v, scale=0.3) if kept else attention._Blocked.apply(q, k, v, 0.3)
    oracle = attention.reference(q, k, v, scale=0.3)
    torch.testing.assert_close(ours, oracle)
    weight = torch.randn_like(oracle)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, oracle)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("s", [300, 600])  # with probabilities kept, and made anew
def test_attention_of_bf16_on_a_cpu_is_off_by_a_rounding(s: int):
    torch.manual_seed(0)
    inputs = [torch.randn(s, 1, heads, 32, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    weight = torch.randn(s, 1, 4, 32, dtype=torch.bfloat16)

    def results(side: Any, dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in inputs]
        out = side(*given, scale=32**-0.5)
        return [out, *torch.autograd.grad(out, given, weight.to(dtype))]

    for ours, exact in zip(
        results(attention.cpu, torch.bfloat16), results(attention.reference, torch.float64), strict=True
    ):
        assert (ours.double() - exact).norm() < 2**-7 * exact.norm()


def test_attention_sees_what_the_mask_shows():
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 2, 8, dtype=torch.float64) for _ in range(3))
    mask = (torch.rand(2, 1, 5, 5) > 0.5) | torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(attention.reference(q, k, v, scale=1.0, mask=mask), _attention(q, k, v, 1.0, mask))


def test_rms_norm_swiglu_and_rotary_follow_their_formulas():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(
        rms_norm.reference(x, weight, 1e-5), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    )
    torch.testing.assert_close(swiglu.reference(x), x[..., :4] * x[..., :4].sigmoid() * x[..., 4:])
    q, angle = torch.randn(5, 2, 3, 8, dtype=torch.float64), torch.randn(5, 1, 1, 4, dtype=torch.float64)
    both = torch.cat((angle, angle), -1)
    turned = torch.view_as_complex(torch.stack((q[..., :4], q[..., 4:]), -1)) * torch.polar(
        torch.ones_like(angle), angle
    )
    torch.testing.assert_close(rotary.reference(q, both.cos(), both.sin()), torch.cat((turned.real, turned.imag), -1))
    twice = angle.repeat_interleave(2, -1)
    pairs = q.unflatten(-1, (4, 2))
    turns = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).unflatten(-1, (2, 2))
    turned = torch.einsum("siac,sunic->sunia", turns[:, 0, 0], pairs)
    torch.testing.assert_close(rotary.reference(q, twice.cos(), twice.sin(), interleaved=True), turned.flatten(-2))


def _pointwise(dtype: torch.dtype) -> list[tuple[Any, Any, list[Tensor], tuple[Any, ...]]]:
    """(side, reference, inputs with a gradient, other inputs)"""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    angle = torch.rand(5, 1, 1, 4, dtype=dtype) * 6
    angles = torch.cat((angle, angle + 1), -1)  # the halves need not agree
    twice = angle.repeat_interleave(2, -1)
    pairs = (partial(rotary.cpu, interleaved=True), partial(rotary.reference, interleaved=True))
    return [
        (rms_norm.cpu, rms_norm.reference, [random(5, 3, 8), random(8)], (1e-5,)),
        (rms_norm.cpu, rms_norm.reference, [random(5, 8, 3).mT, random(8)], (0.1,)),
        (rotary.cpu, rotary.reference, [random(5, 2, 3, 8)], (angles.cos(), angles.sin())),
        (rotary.cpu, rotary.reference, [random(5, 3, 2, 8).transpose(1, 2)], (angles.cos(), angles.sin())),
        (*pairs, [random(5, 2, 3, 8)], (twice.cos(), twice.sin())),
        (*pairs, [random(5, 2, 3, 11)[..., 3:]], (twice.cos(), twice.sin())),  # a slice that begins at an odd place
    ]


@pytest.mark.parametrize("side", [rms_norm.cpu_add, rms_norm.reference_add])
def test_a_sum_and_its_norm_follow_their_formula(side: Callable[..., tuple[Tensor, Tensor]]):
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3, 8), (5, 3, 8), (8,)))
    norm, total = side(x, residual, weight, 0.1)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(norm, total / (total.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight)


@pytest.mark.parametrize("case", range(6))
def test_the_sides_of_a_cpu_pass_gradcheck(case: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rms_norm, "CACHED", 8 * 4)  # several parts, the last one short
    side, reference, inputs, others = _pointwise(torch.float64)[case]
    inputs = [x.requires_grad_() for x in inputs]
    torch.testing.assert_close(side(*inputs, *others), reference(*inputs, *others))
    assert torch.autograd.gradcheck(lambda *x: side(*x, *others), inputs)


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=str)
def test_the_sides_of_a_cpu_are_as_exact_as_the_reference(case: int, dtype: torch.dtype, error: float):
    side, reference, inputs, others = _pointwise(dtype)[case]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = side(*inputs, *others)
    oracle = reference(*exact, *(x.double() if isinstance(x, Tensor) else x for x in others))
    grad = torch.randn_like(out)
    pairs = zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(oracle, exact, grad.double()), strict=True)
    for ours, theirs in ((out, oracle), *pairs):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() < error * theirs.abs().max()


def _head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 13, (11,))
    labels[:4] = torch.tensor([0, 6, 7, 12])  # the edges of every shard of 14 rows over two ranks
    weights = torch.rand(11)
    weights[5] = 0.0
    return torch.randn(11, 6, dtype=dtype), torch.randn(13, 6, dtype=dtype), labels, weights


@pytest.mark.parametrize("chunk", [0, 1, 4, 11, 100])
@pytest.mark.parametrize("product", [matmul.native, matmul.cpu])
@pytest.mark.parametrize("cached", [1, 13 * 3, 1 << 18])  # one token at a time, three, all
def test_chunked_cross_entropy_equals_the_reference(
    chunk: int, product: matmul.Product, cached: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cross_entropy, "CACHED", cached)
    hidden, weight, labels, weights = _head(torch.float32)
    weights = weights.to(torch.float32)
    results = []
    for fn in (
        lambda h, w: cross_entropy.chunked(h, w, labels, weights, vocab_size=13, chunk=chunk, product=product),
        lambda h, w: cross_entropy.reference(h, w, labels, weights, 13),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = fn(h, w)
        (loss * 0.7).backward()
        results.append((loss, h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_adds_its_gradient_to_main_grad(dtype: torch.dtype, chunk: int):
    hidden, weight, labels, weights = _head(dtype)
    weights = weights.float()

    def gradients(w: Tensor) -> Tensor:
        h = hidden.clone().requires_grad_()
        loss = cross_entropy.chunked(h, w, labels, weights, vocab_size=13, chunk=chunk, product=matmul.cpu)
        (loss * 0.7).backward()
        assert h.grad is not None
        return h.grad

    plain: Any = weight.clone().requires_grad_()
    added: Any = weight.clone().requires_grad_()
    added.main_grad = torch.ones(13, 6)
    assert torch.equal(gradients(plain), gradients(added))
    assert added.grad is None
    torch.testing.assert_close(
        added.main_grad - 1, plain.grad.float(), rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6
    )


def split_head(chunk: int) -> tuple[float, Tensor, Tensor]:
    """The loss over two ranks of 7 rows each, the last of them padding; the share of dhidden is summed here."""
    hidden, weight, labels, weights = (x.float() if x.is_floating_point() else x for x in _head())
    rank = torch.distributed.get_rank()
    h = hidden.clone().requires_grad_()
    w = pad_rows(weight, 14).chunk(2)[rank].clone().requires_grad_()
    loss = cross_entropy.chunked(h, w, labels, weights, vocab_size=13, group=torch.distributed.group.WORLD, chunk=chunk)
    loss.backward()
    assert h.grad is not None
    assert w.grad is not None
    torch.distributed.all_reduce(h.grad)
    return loss.item(), h.grad, w.grad


@pytest.mark.parametrize("chunk", [0, 4])
def test_a_vocabulary_cut_over_ranks_gives_the_same_loss_and_gradients(chunk: int):
    hidden, weight, labels, weights = (x.float() if x.is_floating_point() else x for x in _head())
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = F.cross_entropy(h @ w.T, labels, reduction="none") @ weights
    loss.backward()
    assert w.grad is not None
    ranks = run_ranks(split_head, 2, chunk)
    for got, dhidden, _ in ranks:
        assert got == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(dhidden, h.grad, rtol=1e-5, atol=1e-6)
    joined = torch.cat([dweight for _, _, dweight in ranks])
    torch.testing.assert_close(joined[:13], w.grad, rtol=1e-5, atol=1e-6)
    assert not joined[13:].any(), "padding rows must not learn"


def test_an_ignored_label_costs_nothing():
    hidden, weight, labels, weights = (x.float() if x.is_floating_point() else x for x in _head())
    ignored = labels.clone()
    ignored[5] = -100
    a, b = (
        cross_entropy.chunked(hidden, weight, target, weights, vocab_size=13, chunk=4) for target in (labels, ignored)
    )
    assert a == b


def test_fused_where_the_device_has_none_is_refused():
    with pytest.raises(InputError, match="cpu has no fused swiglu"):
        select(Device("cpu"), KernelConfig(swiglu="fused"))
    assert select(Device("cpu")).attention is attention.cpu
    assert select(Device("cuda")).attention is attention.reference
    assert select(Device("npu")).attention is attention.npu
    assert select(Device("npu"), KernelConfig(attention="reference")).attention is attention.reference


SHAPES = [(1, 1), (3, 2), (40, 1), (17, 3)]  # rows, batch


def _linear_cases(rows: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, grad = torch.randn(rows, batch, 64, dtype=dtype), torch.randn(rows, batch, 48, dtype=dtype)
    return x.requires_grad_(), torch.randn(48, 64, dtype=dtype, requires_grad=True), grad


@pytest.mark.parametrize(("rows", "batch"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=str
)
def test_the_product_of_a_cpu_is_the_exact_one_rounded(rows: int, batch: int, dtype: torch.dtype, error: float):
    x, weight, grad = _linear_cases(rows, batch, dtype)
    exact = x.double() @ weight.double().T
    oracles = torch.autograd.grad(exact, (x, weight), grad.double())
    for product in (matmul.native, matmul.product, *([matmul.widened] if dtype == torch.bfloat16 else [])):
        out = matmul._Linear.apply(x, weight, product)
        grads = torch.autograd.grad(out, (x, weight), grad)
        for ours, oracle in ((out, exact), *zip(grads, oracles, strict=True)):
            assert ours.dtype == dtype
            assert (ours.double() - oracle.double()).abs().max() < error * oracle.abs().max(), product


def test_the_product_of_no_rows_has_a_gradient_of_zeros():
    """An expert that no token chose, where experts are computed one after another."""
    x, weight, grad = (tensor[:0] if tensor.dim() == 3 else tensor for tensor in _linear_cases(3, 2, torch.float32))
    out = matmul.cpu(x, weight)
    assert out.shape == (0, 2, 48)
    found = torch.autograd.grad(out, (x, weight), grad)
    assert found[0].shape == x.shape
    assert torch.equal(found[1], torch.zeros_like(weight))


def test_the_product_of_a_cpu_passes_gradcheck():
    x, weight, _ = _linear_cases(3, 2, torch.float64)
    assert torch.autograd.gradcheck(matmul.cpu, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_weights_are_added_to_main_grad(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matmul_add, "PIECE", 64 * 5)  # several pieces, the last one short
    x, leaf, grad = _linear_cases(17, 3, dtype)
    weight: Any = leaf
    plain = torch.autograd.grad(matmul.cpu(x, weight), weight, grad)[0]
    before = torch.randn(48, 64)
    weight.main_grad = before.clone()
    matmul.cpu(x, weight).backward(grad)
    matmul.cpu(x, weight).backward(grad)  # the next micro batch
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, before + plain.float() + plain.float(), rtol=0, atol=1e-6 * 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_an_embedding_are_added_to_main_grad(dtype: torch.dtype):
    tokens = torch.tensor([[3, 0, 3], [5, 3, 0]])
    weight: Any = torch.randn(7, 4, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 3, 4, dtype=dtype)
    exact = weight.detach().float().requires_grad_()
    embedding.reference(tokens, exact).backward(grad.float())
    assert torch.equal(embedding.accumulating(tokens, weight), weight[tokens])
    plain = torch.autograd.grad(embedding.accumulating(tokens, weight), weight, grad)[0]
    torch.testing.assert_close(plain.float(), exact.grad, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    before = torch.randn(7, 4)
    weight.main_grad = before.clone()
    for _micro_batch in range(2):
        embedding.accumulating(tokens, weight).backward(grad)
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, before + 2 * exact.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_the_gradient_of_an_output_layer_waits(wide: bool):
    hidden, weight, labels, weights = (x.float() if x.is_floating_point() else x for x in _head())
    grads = []
    for waiting in (None, []):
        leaf: Any = torch.nn.Parameter(weight.detach().bfloat16())
        leaf.main_grad, leaf.waiting = torch.zeros(weight.shape), waiting
        narrow = hidden.detach().bfloat16().requires_grad_()
        cross_entropy.chunked(
            narrow, leaf, labels, weights, vocab_size=13, chunk=0, product=matmul.cpu, wide=wide
        ).backward()
        assert leaf.grad is None
        if waiting is not None:
            assert not leaf.main_grad.any()
            assert len(waiting) == 1
            with torch.no_grad():
                waiting[0]()
        grads.append(leaf.main_grad)
    assert grads[0].any()
    assert torch.equal(*grads)


def test_onednn_is_taken_only_where_it_is_exact(monkeypatch: pytest.MonkeyPatch):
    matmul.onednn_is_exact.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(matmul, "onednn", lambda x, w: (x.bfloat16() @ w.bfloat16().T).float())
        assert not matmul.onednn_is_exact()
        x, weight, _ = _linear_cases(17, 3, torch.float32)
        assert torch.equal(matmul.product(x, weight), x @ weight.T)
    matmul.onednn_is_exact.cache_clear()


def test_a_widened_head_gives_the_loss_of_fp32():
    hidden, weight, labels, weights = (x.float() if x.is_floating_point() else x for x in _head())
    narrow = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    loss = cross_entropy.chunked(*narrow, labels, weights, vocab_size=13, chunk=4, wide=True)
    wide = narrow[0].detach().float(), narrow[1].detach().float()
    assert loss.item() == pytest.approx(cross_entropy.reference(*wide, labels, weights, 13).item(), rel=1e-6)
    loss.backward()
    assert narrow[0].grad is not None
    assert narrow[0].grad.dtype == torch.bfloat16
