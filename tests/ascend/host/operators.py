"""What the operators of torch_npu compute, written out from their documentation for tensors on the host.

Parameters have the names of the operators' schemas; an argument that a formula does not name is an error. Sums are made in
fp32 and rounded once. These are our reading of the documentation, not the hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.core.kernels import npu_attention

INTEGER = torch.int32  # of the places that permuting returns


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(y, the reciprocal root [..., 1])"""
    wide = input.float()
    root = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * root * gamma.float()).to(input.dtype), root


def rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    grad, normal = dy.float() * gamma.float(), input.float() * rstd
    grad_gamma = (dy.float() * normal).flatten(0, -2).sum(0)
    return (rstd * (grad - normal * (grad * normal).mean(-1, keepdim=True))).to(input.dtype), grad_gamma


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """(y, the reciprocal root [..., 1], the sum, whose norm is y)"""
    assert x1.dtype == x2.dtype == gamma.dtype
    total = x1 + x2
    return *rms_norm(total, gamma, epsilon), total


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.float().chunk(2, dim)
    return (F.silu(gate) * up).to(input.dtype)


def swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    (gate, up), grad = input.float().chunk(2, dim), grad_output.float()
    share = gate.sigmoid()
    return torch.cat((grad * up * share * (1 + gate * (1 - share)), grad * gate * share), dim).to(input.dtype)


def _turned(x: Tensor, mode: str, sign: int) -> Tensor:
    """Return the other of each pair, one of them negative; sign -1 is the transpose."""
    if mode == "half":
        left, right = x.chunk(2, -1)
        return torch.cat((-sign * right, sign * left), -1)
    assert mode == "interleave", mode
    return torch.stack((-sign * x[..., 1::2], sign * x[..., ::2]), -1).flatten(-2)


def rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    assert input.dim() == 4, "the operator takes four dimensions"
    wide = input.float()
    return (wide * r1.float() + _turned(wide, rotary_mode, 1) * r2.float()).to(input.dtype)


def rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    back = grad * r1 + _turned(grad * r2, rotary_mode, -1)
    return back, (grad * input).sum_to_size(r1.shape), (grad * _turned(input, rotary_mode, 1)).sum_to_size(r2.shape)


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.float() for x in tensors]


def fusion_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Any, ...]:
    assert "pse" not in options or options["pse"].dtype == query.dtype
    out, peak, total, *_ = npu_attention.fusion_attention(*_wide(query, key, value), **options)
    return out.to(query.dtype), peak, total, query.new_empty(0), 0, 0, 0


def fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    *,
    softmax_in: Tensor | None = None,  # reserved
    attention_in: Tensor,
    **options: Any,
) -> tuple[Any, ...]:
    assert query.dtype == key.dtype == value.dtype == dy.dtype == attention_in.dtype
    wide = _wide(query, key, value, dy)
    grads = npu_attention.fusion_attention_grad(*wide, attention_in=attention_in.float(), **options)[:3]
    return (*(x.to(query.dtype) for x in grads), torch.empty(0), None)


def _heads_last(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [s, b, n * d]"""
    return x.permute(2, 0, 1, 3).flatten(2)


def _sdpa(options: dict[str, Any], query: Tensor, key: Tensor) -> dict[str, Any]:
    """Return what torch's scaled_dot_product_attention says, in the words of the older operator."""
    assert options.pop("input_layout") == "BNSD"
    if options.get("sparse_mode") == 2:  # the corner at the first query and the first key
        assert query.shape[2] == key.shape[2]
        options["sparse_mode"] = 3
        options.pop("next_tockens", None)  # of other modes
    return {**options, "input_layout": "SBH"}


def fusion_attention_v3(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """What torch's scaled_dot_product_attention calls."""
    heads, options = query.shape[1], _sdpa(options, query, key)
    out, peak, total, reserved, *_ = fusion_attention(*map(_heads_last, (query, key, value)), **options)
    zero = torch.zeros(1, dtype=torch.int64)
    return out.unflatten(2, (heads, -1)).permute(1, 2, 0, 3), peak, total, reserved, zero, zero


def fusion_attention_grad_v3(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    *,
    attention_in: Tensor,
    seed: Tensor | None = None,  # of dropout, as is the next
    offset: Tensor | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    options = _sdpa(options, query, key)
    tensors = map(_heads_last, (query, key, value, dy))
    *grads, pse, _sink = fusion_attention_grad(*tensors, attention_in=_heads_last(attention_in), **options)
    shaped = zip(grads, (query, key, value), strict=True)
    return (*(x.unflatten(2, (like.shape[1], -1)).permute(1, 2, 0, 3) for x, like in shaped), pse, query.new_empty(()))


def fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    input_layout: str,
    actual_seq_lengths_kv: list[int],
    atten_mask: Tensor | None = None,
    sparse_mode: int = 0,
    kv_padding_size: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row by row; (result, nothing: the logarithms of the sums are not asked for)."""
    assert query.dtype == key.dtype == value.dtype
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert query.is_contiguous()
    assert key.is_contiguous()
    assert value.is_contiguous()
    assert key.shape == value.shape
    (b, n, s, d), (_, g, room, _) = query.shape, key.shape
    assert (n, g) == (num_heads, num_key_value_heads)
    assert d % 16 == 0
    assert input_layout == ("BNSD_BSND" if s > 1 else "BNSD")
    assert len(actual_seq_lengths_kv) == b
    if s == 1:
        assert atten_mask is None, "one query has no causality"
    out = torch.empty(b, n, s, d)
    for row, length in enumerate(actual_seq_lengths_kv):
        assert 0 < length <= room
        end = length if kv_padding_size is None else room - int(kv_padding_size)
        assert end >= length, "rows that begin before the cache"
        keys, values = (x[row, :, end - length : end].float().repeat_interleave(n // g, 0) for x in (key, value))
        scores = query[row].float() @ keys.mT * scale
        if sparse_mode == 3:
            assert atten_mask is not None
            assert atten_mask.shape == (2048, 2048)
            later = torch.ones(s, length, dtype=torch.bool).triu(1 + length - s)
            scores = scores.masked_fill(later, npu_attention.HIDDEN)
        elif atten_mask is not None:
            assert kv_padding_size is None
            assert atten_mask.dtype == torch.bool
            assert atten_mask.shape == (b, 1, s, room)
            scores = scores.masked_fill(atten_mask[row, :, :, :length], npu_attention.HIDDEN)
        out[row] = scores.softmax(-1) @ values
    if input_layout == "BNSD_BSND":
        out = out.transpose(1, 2)
    return out.to(query.dtype), torch.empty(0)


def _pairs(tokens: int, indices: Tensor) -> int:
    assert indices.shape[0] == tokens, indices.shape
    return indices.shape[1] if indices.dim() == 2 else 1


def moe_token_permute(tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    each = _pairs(len(tokens), indices)
    order = indices.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return tokens[order // each][: num_out_tokens or len(order)], places.to(INTEGER)


def moe_token_permute_grad(
    grad_permuted_tokens: Tensor, sorted_indices: Tensor, tokens_size_0: int, tokens_dtype: torch.dtype, num_topK: int
) -> Tensor:
    rows = grad_permuted_tokens.float()[sorted_indices.long()]
    return rows.view(tokens_size_0, num_topK, -1).sum(1).to(tokens_dtype)


def moe_token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(the tokens, the rows again: they are kept for the backward pass)"""
    rows = permuted_tokens.float()[sorted_indices.long()]
    if probs is not None:
        assert probs.dtype == permuted_tokens.dtype, (probs.dtype, permuted_tokens.dtype)
        rows = (rows.unflatten(0, probs.shape) * probs.float()[..., None]).sum(1)
    return rows.to(permuted_tokens.dtype), permuted_tokens.clone()


def moe_token_unpermute_grad(
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: Tensor | None = None,
    permuted_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad, places = grad_unpermuted_tokens.float(), sorted_indices.long()
    made = torch.zeros(permuted_tokens_size_0, grad.shape[1])
    if probs is None:
        made[places] = grad
        return made.to(permuted_tokens_dtype), grad.new_empty(0)
    assert permuted_tokens is not None
    made[places] = (grad[:, None] * probs.float()[..., None]).flatten(0, 1)
    rows = permuted_tokens.float()[places].unflatten(0, probs.shape)
    return made.to(permuted_tokens_dtype), (grad[:, None] * rows).sum(-1).to(probs.dtype)


def _counts(group_list: Tensor, kind: int) -> list[int]:
    if kind == 1:
        return group_list.tolist()
    assert kind == 0, kind
    return torch.diff(group_list, prepend=group_list.new_zeros(1)).tolist()


def grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    group_list: Tensor,
    group_type: int,
    split_item: int = 0,
    group_list_type: int = 0,
) -> list[Tensor]:
    """Rows of each group times its weight (0), or columns times rows of each group (2)."""
    assert group_list.dtype == torch.int64
    assert split_item in (2, 3), "results in one tensor"
    ((a,), (b,)), counts = (x, weight), _counts(group_list, group_list_type)
    assert sum(counts) == (len(a) if group_type == 0 else a.shape[1]), "the groups are not the rows"
    assert len(counts) == (len(b) if group_type == 0 else len(counts))
    if group_type == 0:
        return [torch.cat([part.float() @ b[i].float() for i, part in enumerate(a.split(counts))]).to(a.dtype)]
    assert group_type == 2, group_type
    parts = zip(a.float().split(counts, 1), b.float().split(counts), strict=True)
    return [torch.stack([left @ right for left, right in parts]).to(a.dtype)]


def grouped_matmul_add(
    input: Tensor,
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    *,
    transpose_x: bool = True,
    group_type: int = 2,
    group_list_type: int = 0,
) -> Tensor:
    """Add x.T @ weight of each group's rows to its part of `input`, in fp32."""
    assert input.dtype == torch.float32
    assert x.dtype == weight.dtype != torch.float32
    assert transpose_x
    assert group_type == 2
    counts = _counts(group_list, group_list_type)
    parts = zip(x.float().split(counts), weight.float().split(counts), strict=True)
    input += torch.stack([left.T @ right for left, right in parts]).view(input.shape)
    return input


def matmul_backward(
    grad: Tensor, self: Tensor, other: Tensor, mask: list[bool] | tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Differentiate `matmul`, which torch_npu keeps as one operator, with its rules for vectors and for broadcasting."""
    left = self[None] if self.dim() == 1 else self
    right = other[:, None] if other.dim() == 1 else other
    if self.dim() == 1:
        grad = grad.unsqueeze(-1 if other.dim() == 1 else -2)
    if other.dim() == 1:
        grad = grad.unsqueeze(-1)
    grad_left = grad_right = None
    if mask[0]:
        grad_left = (grad @ right.transpose(-1, -2)).sum_to_size(left.shape).reshape(self.shape)
    if mask[1] and right.dim() == 2:
        grad_right = (left.flatten(0, -2).T @ grad.flatten(0, -2)).reshape(other.shape)
    elif mask[1]:
        grad_right = (left.transpose(-1, -2) @ grad).sum_to_size(right.shape)
    return grad_left, grad_right


def _group(name: str) -> dist.ProcessGroup:
    """Return the process group of a communicator."""
    for group in dist.distributed_c10d._world.pg_map:
        backend: Any = group._get_backend(torch.device("npu"))
        if backend.get_hccl_comm_name(dist.get_rank()) == name:
            return group
    raise AssertionError(f"no communicator is called {name}")


def all_gather_base_mm(
    input: Tensor, x2: Tensor, hcom: str, world_size: int, *, gather_index: int = 0, gather_output: bool = True
) -> tuple[Tensor, Tensor]:
    group = _group(hcom)
    assert group.size() == world_size
    assert gather_index == 0
    assert gather_output
    everything = input.new_empty(len(input) * world_size, input.shape[1])
    dist.all_gather_into_tensor(everything, input.contiguous(), group=group)
    return everything @ x2, everything


def mm_reduce_scatter_base(input: Tensor, x2: Tensor, hcom: str, world_size: int, *, reduce_op: str = "sum") -> Tensor:
    group = _group(hcom)
    assert group.size() == world_size
    assert reduce_op == "sum"
    product = input @ x2
    mine = product.new_empty(len(product) // world_size, product.shape[1])
    dist.reduce_scatter_tensor(mine, product, group=group)
    return mine


def mm_all_reduce_base(x1: Tensor, x2: Tensor, hcom: str, *, reduce_op: str = "sum") -> Tensor:
    assert reduce_op == "sum"
    product = x1 @ x2
    dist.all_reduce(product, group=_group(hcom))
    return product


FORMULAS: dict[str, Callable[..., Any]] = {
    "aten::matmul_backward": matmul_backward,
    "npu::npu_fusion_attention": fusion_attention,
    "npu::npu_fusion_attention_grad": fusion_attention_grad,
    "npu::npu_fusion_attention_v3": fusion_attention_v3,
    "npu::npu_fusion_attention_grad_v3": fusion_attention_grad_v3,
    "npu::npu_fused_infer_attention_score": fused_infer_attention_score,
    "npu::npu_rms_norm": rms_norm,
    "npu::npu_rms_norm_backward": rms_norm_backward,
    "npu::npu_add_rms_norm": add_rms_norm,
    "npu::npu_swiglu": swiglu,
    "npu::npu_swiglu_backward": swiglu_backward,
    "npu::npu_rotary_mul": rotary_mul,
    "npu::npu_rotary_mul_backward": rotary_mul_backward,
    "npu::npu_moe_token_permute": moe_token_permute,
    "npu::npu_moe_token_permute_grad_v2": moe_token_permute_grad,
    "npu::_npu_moe_token_unpermute": moe_token_unpermute,
    "npu::npu_moe_token_unpermute_grad_v2": moe_token_unpermute_grad,
    "npu::npu_grouped_matmul": grouped_matmul,
    "npu::npu_grouped_matmul_add_": grouped_matmul_add,
}
# these move data between ranks: on the device, by its own collectives
ON_DEVICE: dict[str, Callable[..., Any]] = {
    "npu::npu_all_gather_base_mm": all_gather_base_mm,
    "npu::npu_mm_reduce_scatter_base": mm_reduce_scatter_base,
    "npu::npu_mm_all_reduce_base": mm_all_reduce_base,
}
