"""Attention of some queries to some keys, and how to put such blocks together: the pieces of ring attention.

A block knows nothing of the keys elsewhere. Besides its result it returns the logarithm of the sum of its exponentials,
with which results over different keys of the same queries are merged; the backward pass gets the merged result and its
logarithm, and the parts of the gradient simply add up.

Layouts: q [s, b, n, d]; k [t, b, g, d]; v [t, b, g, e]; out [s, b, n, e]; lse [b, n, s]. Results are fp32 (fp64 for
fp64). `mask` is boolean [b or 1, 1, s, t], True where a query sees a key; `causal` has s = t; `segments` holds documents.
A query that sees no key of the block has out 0 and lse -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed_core.kernels import matmul
from mindspeed_core.kernels.attention import check, triangle
from mindspeed_core.kernels.segments import Segments

ROWS = 256  # queries whose scores exist at once
BLOCKS = 4  # of query rows in a short causal block: more skip more of the empty triangle, fewer make larger products


class Block(NamedTuple):
    """The two directions of one side."""

    forward: Callable[..., tuple[Tensor, Tensor]]  # (q, k, v) -> out, lse
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]  # (grad, q, k, v, out, lse) -> dq, dk, dv


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and lse over the keys of both blocks."""
    total = torch.logaddexp(lse, more_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)  # no key so far: -inf minus -inf would be nan
    share, more_share = ((x - safe).exp().permute(2, 0, 1)[..., None] for x in (lse, more_lse))
    return out * share + more * more_share, total


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _seen(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, segments: Segments | None) -> Tensor | None:
    """Return the mask that all three ways to say it come to."""
    if mask is not None:
        return mask
    if segments is not None:
        return segments.mask(q.device, causal=causal)
    return torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).tril()[None, None] if causal else None


def _scores(q: Tensor, k: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    repeat = q.shape[2] // k.shape[2]
    scores = torch.einsum("sbnd,tbnd->bnst", _wide(q), _wide(k).repeat_interleave(repeat, 2)) * scale
    return scores if seen is None else scores.masked_fill(~seen, float("-inf"))


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula, with all scores at once."""
    scores = _scores(q, k, scale, _seen(q, k, causal, mask, segments))
    lse = scores.logsumexp(-1)
    probabilities = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    values = _wide(v).repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bnst,tbne->sbne", probabilities, values), lse


def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, groups, repeat = _wide(grad), k.shape[2], q.shape[2] // k.shape[2]
    probabilities = (_scores(q, k, scale, _seen(q, k, causal, mask, segments)) - lse[..., None]).exp()
    inner = torch.einsum("sbne,tbne->bnst", grad, _wide(v).repeat_interleave(repeat, 2))
    # the softmax's own backward: p * (x - sum(p * x)), whose sum over all keys is grad * out
    inner = probabilities * (inner - (grad * _wide(out)).sum(-1).permute(1, 2, 0)[..., None]) * scale
    grad_q = torch.einsum("bnst,tbnd->sbnd", inner, _wide(k).repeat_interleave(repeat, 2))
    grad_k = torch.einsum("bnst,sbnd->tbnd", inner, _wide(q))
    grad_v = torch.einsum("bnst,sbne->tbne", probabilities, grad)
    grad_k, grad_v = (x.unflatten(2, (groups, repeat)).sum(3) for x in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


class _Part(NamedTuple):
    """Some batch rows, some of their queries, and the keys they may see."""

    rows: slice
    queries: slice
    keys: slice
    corner: int  # how many of the last keys form a triangle with the queries; 0: all are seen


def _parts(q: Tensor, k: Tensor, causal: bool, segments: Segments | None) -> list[_Part]:
    """Cut a block into products of bounded size that leave out what no query sees."""
    s, b, t = q.shape[0], q.shape[1], k.shape[0]
    if segments is None:
        whole = [(slice(0, b), 0, s, 0, t)]
    else:
        whole = [(slice(x.row, x.row + 1), *x[1:]) for x in segments.spans]
    parts = []
    for rows, first_query, last_query, first_key, last_key in whole:
        length = last_query - first_query
        size = min(ROWS, -(-length // BLOCKS) if causal else length)
        for start in range(0, length, size):
            stop = min(start + size, length)
            end = first_key + stop if causal else last_key
            parts.append(
                _Part(
                    rows,
                    slice(first_query + start, first_query + stop),
                    slice(first_key, end),
                    stop - start if causal else 0,
                )
            )
    return parts


def _heads_first(*tensors: Tensor, groups: int) -> list[Tensor]:
    """[s, b, n, d] -> [b, g, n/g, s, d], in fp32 where products of the narrower type are no faster."""
    wide = tensors[0].device.type == "cpu" and matmul.widens()
    return [(_wide(x) if wide else x).unflatten(2, (groups, -1)).permute(1, 2, 3, 0, 4).contiguous() for x in tensors]


def _part_scores(part: _Part, q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries [b*g, n/g*s, d], the keys [b*g, t, d] and the scores [b, g, n/g, s, t] of a part."""
    queries = q[part.rows, :, :, part.queries]
    rows, keys = queries.flatten(0, 1).flatten(1, 2), k[part.rows, :, 0, part.keys].flatten(0, 1)
    scores = _wide(torch.bmm(rows, keys.transpose(1, 2))).mul_(scale).view(*queries.shape[:4], -1)
    if mask is not None:
        scores.masked_fill_(~mask[part.rows, :, None, part.queries, part.keys], float("-inf"))
    elif part.corner:
        upper = torch.ones(part.corner, part.corner, dtype=torch.bool, device=q.device).triu(1)
        scores[..., -part.corner :].masked_fill_(upper, float("-inf"))
    return rows, keys, scores


def _blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain products of query rows and the keys they see; the scores of few rows exist at once."""
    s, b, n, _ = q.shape
    g, width = k.shape[2], v.shape[-1]
    dtype = _wide(q).dtype
    queries, keys, values = _heads_first(q, k, v, groups=g)
    mask = None if mask is None else mask.expand(b, -1, -1, -1)
    out = torch.zeros(b, g, n // g, s, width, dtype=dtype, device=q.device)
    lse = torch.full((b, g, n // g, s), float("-inf"), dtype=dtype, device=q.device)
    for part in _parts(q, k, causal and mask is None, segments):
        _rows, _keys, scores = _part_scores(part, queries, keys, scale, mask)
        peak = scores.amax(-1, keepdim=True)
        if mask is not None:
            peak = peak.masked_fill(peak == float("-inf"), 0.0)
        probabilities = scores.sub_(peak).exp_()
        total = probabilities.sum(-1, keepdim=True)
        lse[part.rows, :, :, part.queries] = (peak + total.log())[..., 0]
        products = torch.bmm(
            probabilities.flatten(0, 1).flatten(1, 2).to(values.dtype), values[part.rows, :, 0, part.keys].flatten(0, 1)
        )
        if mask is not None:
            total = total.masked_fill(total == 0, 1.0)
        out[part.rows, :, :, part.queries] = products.view(*scores.shape[:4], -1) / total
    return out.permute(3, 0, 1, 2, 4).flatten(2, 3), lse.flatten(1, 2)


def _blocked_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    s, b, n, d = q.shape
    g = k.shape[2]
    dtype = _wide(q).dtype
    queries, keys, values, grads = _heads_first(q, k, v, grad, groups=g)
    mask = None if mask is None else mask.expand(b, -1, -1, -1)
    lse = lse.unflatten(1, (g, -1))
    delta = (_wide(grad) * _wide(out)).sum(-1).permute(1, 2, 0).unflatten(1, (g, -1))
    grad_q = torch.zeros(b, g, n // g, s, d, dtype=dtype, device=q.device)
    grad_k, grad_v = (torch.zeros(b, g, *x.shape[3:], dtype=dtype, device=q.device) for x in (keys, values))
    for part in _parts(q, k, causal and mask is None, segments):
        rows, part_keys, scores = _part_scores(part, queries, keys, scale, mask)
        at = (part.rows, slice(None), slice(None), part.queries)
        probabilities = scores.sub_(lse[at][..., None]).exp_()
        mine = grads[at].flatten(0, 1).flatten(1, 2)
        inner = _wide(torch.bmm(mine, values[part.rows, :, 0, part.keys].flatten(0, 1).transpose(1, 2)))
        # the softmax's own backward: p * (x - sum(p * x)), whose sum over all keys is grad * out
        inner = inner.view_as(probabilities).sub_(delta[at][..., None]).mul_(probabilities).mul_(scale)
        inner = inner.flatten(0, 1).flatten(1, 2).to(rows.dtype)
        flat = probabilities.flatten(0, 1).flatten(1, 2).to(rows.dtype)
        grad_q[at] = torch.bmm(inner, part_keys).view(*scores.shape[:4], d).to(dtype)
        for total, left, right in ((grad_k, inner, rows), (grad_v, flat, mine)):
            product = torch.bmm(left.transpose(1, 2), right)
            total[part.rows, :, part.keys] += product.unflatten(0, (-1, g)).to(dtype)
    grad_k, grad_v = (x.permute(2, 0, 1, 3) for x in (grad_k, grad_v))
    return grad_q.permute(3, 0, 1, 2, 4).flatten(2, 3), grad_k, grad_v


class _NpuCall(NamedTuple):
    """How a block is said to the NPU's operators."""

    queries: Tensor | None  # the rows to take out of [b * s], with documents
    keys: Tensor | None
    options: dict[str, object]  # what both operators take

    @property
    def layout(self) -> str:
        return "SBH" if self.queries is None else "TND"

    def pack(self, x: Tensor, at: Tensor | None) -> Tensor:
        """[s, b, n, d] -> [s, b, n * d], or the rows of the documents one after another [total, n, d]."""
        return x.flatten(2) if at is None else x.transpose(0, 1).flatten(0, 1).index_select(0, at)


def _npu_call(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, segments: Segments | None) -> _NpuCall:
    options: dict[str, object] = {}
    if mask is not None:
        options = {"atten_mask": ~mask.expand(q.shape[1], 1, q.shape[0], k.shape[0])}
    elif causal:
        options = {"atten_mask": triangle(q.device), "sparse_mode": 3}
    if segments is None:
        return _NpuCall(None, None, options)
    ends: tuple[list[int], list[int]] = ([], [])
    places: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row, first_query, last_query, first_key, last_key in segments.spans:
        sides = ((first_query, last_query, segments.queries), (first_key, last_key, segments.keys))
        for side, (first, last, length) in enumerate(sides):
            places[side].append(torch.arange(row * length + first, row * length + last, device=q.device))
            ends[side].append((ends[side][-1] if ends[side] else 0) + last - first)
    options |= {"actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1]}
    return _NpuCall(torch.cat(places[0]), torch.cat(places[1]), options)


def _npu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """By `npu_fusion_attention`, whose maxima and sums [b, n, s, 8] (TND: [total, n, 8]) hold each number eight times."""
    check(q, k, v)
    s, b, n, _ = q.shape
    call = _npu_call(q, k, causal, mask, segments)
    out, peak, total = torch.ops.npu.npu_fusion_attention(
        call.pack(q, call.queries),
        call.pack(k, call.keys),
        call.pack(v, call.keys),
        n,
        call.layout,
        scale=scale,
        **call.options,
    )[:3]
    lse = peak[..., 0] + total[..., 0].log()
    if call.queries is not None:
        whole = torch.zeros(b * s, n, v.shape[-1], dtype=torch.float32, device=q.device)
        whole[call.queries] = out.float()
        logs = torch.full((b * s, n), float("-inf"), dtype=torch.float32, device=q.device)
        logs[call.queries] = lse
        return whole.unflatten(0, (b, s)).transpose(0, 1), logs.unflatten(0, (b, s)).transpose(1, 2)
    out = out.unflatten(2, (n, -1)).float()
    if mask is not None:  # the operator leaves its own numbers where a query sees nothing
        empty = ~mask.expand(b, 1, s, -1).any(-1)  # [b, 1, s]
        lse = lse.masked_fill(empty, float("-inf"))
        out = out.masked_fill(empty.permute(2, 0, 1)[..., None], 0.0)
    return out, lse


def _npu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """By `npu_fusion_attention_grad`: exp(x - lse) / 1 is the softmax, so lse stands for the maximum and 1 for the sum."""
    (s, b, n, _), t = q.shape, k.shape[0]
    call = _npu_call(q, k, causal, mask, segments)
    peak = lse if call.queries is None else lse.transpose(1, 2).flatten(0, 1).index_select(0, call.queries)
    peak = peak[..., None].expand(*peak.shape, 8).contiguous()
    grads = torch.ops.npu.npu_fusion_attention_grad(
        call.pack(q, call.queries),
        call.pack(k, call.keys),
        call.pack(v, call.keys),
        call.pack(grad, call.queries),
        n,
        call.layout,
        softmax_max=peak,
        softmax_sum=torch.ones_like(peak),
        attention_in=call.pack(out, call.queries),
        scale_value=scale,
        **call.options,
    )[:3]
    back = []
    for x, like, at in zip(grads, (q, k, v), (call.queries, call.keys, call.keys), strict=True):
        if at is None:
            back.append(x.unflatten(2, like.shape[2:]).float())
        else:
            length = s if like is q else t
            whole = torch.zeros(b * length, *like.shape[2:], dtype=torch.float32, device=q.device)
            whole[at] = x.float()
            back.append(whole.unflatten(0, (b, length)).transpose(0, 1))
    return back[0], back[1], back[2]


reference = Block(_reference, _reference_backward)
blocked = Block(_blocked, _blocked_backward)
npu = Block(_npu, _npu_backward)
