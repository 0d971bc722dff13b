"""Scaled dot-product attention with grouped queries.

Layouts: q [s, b, n, d]; k, v [t, b, g, d] with g dividing n; result [s, b, n, d]. `mask` is boolean [b or 1, 1, s, t],
True where a query may see a key, at least one key per query; without it attention is causal, the queries being the last
s of the t positions. With `segments` several documents share a row and each is causal for itself; then s = t. A `window`
hides the keys that lie as many positions as that, or more, before a query. `alibi` adds linear biases.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_core.kernels import matmul
from mindspeed_core.kernels.alibi import Alibi
from mindspeed_core.kernels.segments import Segments


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    segments: Segments | None = None,
    window: int | None = None,
    alibi: Alibi | None = None,
) -> Tensor:
    """Attention by torch's own fused paths (flash on CPU and CUDA)."""
    s, t = q.shape[0], k.shape[0]
    if segments is not None:
        assert mask is None, "a mask holds its documents itself"
        mask = segments.mask(q.device, causal=True)
    if narrows(window, t):
        near = within(window, s, t, q.device)
        mask = near.tril(t - s) if mask is None else mask & near
    elif mask is None and 1 < s < t and alibi is None:
        mask = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)[None, None]
    if alibi is not None:
        added = alibi(s, t, q.dtype, causal=mask is None)
        mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
    out = F.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (q, k, v)),
        attn_mask=mask,
        is_causal=mask is None and s > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.permute(2, 0, 1, 3)


def narrows(window: int | None, t: int) -> TypeGuard[int]:
    """Return True for a window that hides one of t keys from some query."""
    return window is not None and window < t


def within(window: int, s: int, t: int, device: torch.device) -> Tensor:
    """Return [1, 1, s, t], False where a key lies too far before a query; the queries are the last s positions."""
    return torch.ones(1, 1, s, t, dtype=torch.bool, device=device).triu(t - s - window + 1)


WIDEST = 768  # an NPU attends with heads of at most this width
LAST = 1024  # rows of biases that it asks for where they tell those before them: causal, as many queries as keys
BLOCKS = 4  # of query rows, at least: more skip more of the empty triangle, fewer make larger products
ROWS = 128  # of a block, at most: the scores of more would leave the cache
LONGEST = 512  # the probabilities kept for the backward pass grow with the square of the length


def cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    segments: Segments | None = None,
    window: int | None = None,
    alibi: Alibi | None = None,
) -> Tensor:
    """Attention on a CPU: in blocks of rows, and by torch's flash attention where that is no slower.

    That is in fp32 for long sequences, where it too makes the probabilities anew in the backward pass. Biases are left to it
    as well: it adds them in fp32, where the scores of blocks have the precision of q.
    """
    if segments is not None:
        return _each(q, k, v, segments, scale=scale, window=window, alibi=alibi)
    s, t = q.shape[0], k.shape[0]
    if mask is None and alibi is None and not narrows(window, t) and s == t and s >= BLOCKS:
        if q.dtype == torch.bfloat16 and not matmul.widens():
            return _Blocked.apply(q, k, v, scale)
        if s <= LONGEST:
            wide = torch.promote_types(q.dtype, torch.float32)
            return _Blocked.apply(q.to(wide), k.to(wide), v.to(wide), scale).to(q.dtype)
    return reference(q, k, v, scale=scale, mask=mask, window=window, alibi=alibi)


def _each(q: Tensor, k: Tensor, v: Tensor, segments: Segments, **how: Any) -> Tensor:
    """Attention document by document: the work falls with the square of their lengths."""
    rows = []
    for row, lengths in zip(zip(*(x.split(1, 1) for x in (q, k, v)), strict=True), segments.lengths, strict=True):
        documents = zip(*(x.split(lengths) for x in row), strict=True)
        rows.append(torch.cat([cpu(*document, **how) for document in documents]))
    return torch.cat(rows, 1)


class _Blocked(torch.autograd.Function):
    """Causal attention, a block of query rows at a time against the keys up to its end.

    queries 0..3   x . . .        the queries of one group lie under each other, so that a block is one product
    queries 4..7   x x . .        of [rows, d] and [d, keys] for every key head

    The probabilities of short sequences are kept for the backward pass, those of long ones are made anew.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        s, b, n, d = q.shape
        g, width = k.shape[2], v.shape[3]  # values may be narrower than keys
        queries = q.permute(1, 2, 0, 3).reshape(b * g, n // g, s, d)
        keys, values = (x.permute(1, 2, 0, 3).reshape(b * g, s, -1) for x in (k, v))
        out = queries.new_empty(b * g, n // g, s, width)
        kept = []
        for start, stop in _spans(s):
            probabilities = _probabilities(queries[:, :, start:stop], keys[:, :stop], scale)
            out[:, :, start:stop] = torch.bmm(probabilities, values[:, :stop]).view(b * g, n // g, -1, width)
            if s <= LONGEST:
                kept.append(probabilities)
        ctx.scale, ctx.shape = scale, (s, b, n, g)
        ctx.save_for_backward(queries, keys, values, *kept)
        return out.view(b, n, s, width).permute(2, 0, 1, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, keys, values, *kept = ctx.saved_tensors
        s, b, n, g = ctx.shape
        grad = grad.permute(1, 2, 0, 3).reshape(b * g, n // g, s, -1)
        grad_queries = torch.empty_like(queries)
        # sums of a few blocks lose nothing in the precision of their terms, those of many would
        wide = keys.dtype if kept else torch.promote_types(keys.dtype, torch.float32)
        grad_keys, grad_values = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
        for i, (start, stop) in enumerate(_spans(s)):
            part = queries[:, :, start:stop]
            probabilities = kept[i] if kept else _probabilities(part, keys[:, :stop], ctx.scale)
            rows, mine = part.flatten(1, 2), grad[:, :, start:stop].flatten(1, 2)
            grad_values[:, :stop] += torch.bmm(probabilities.transpose(1, 2), mine)
            inner = torch.bmm(mine, values[:, :stop].transpose(1, 2))
            # the softmax's own backward: p * (x - sum(p * x)), then the scale of the scores
            inner = torch._softmax_backward_data(inner, probabilities, -1, probabilities.dtype).mul_(ctx.scale)
            grad_queries[:, :, start:stop] = torch.bmm(inner, keys[:, :stop]).unflatten(1, (n // g, -1))
            grad_keys[:, :stop] += torch.bmm(inner.transpose(1, 2), rows)
        grads = (grad_queries, grad_keys.to(keys.dtype), grad_values.to(values.dtype))
        return (*(x.view(b, -1, s, x.shape[-1]).permute(2, 0, 1, 3) for x in grads), None)


def _spans(s: int) -> list[tuple[int, int]]:
    size = min(ROWS, -(-s // BLOCKS))
    return [(start, min(start + size, s)) for start in range(0, s, size)]


def _probabilities(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return [b*g, n/g * r, t] for queries [b*g, n/g, r, d], the last of those that see the keys [b*g, t, d]."""
    _, heads, r, _ = queries.shape
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2)).mul_(scale)
    corner = scores.unflatten(1, (heads, r))[..., -r:]
    corner.masked_fill_(_upper(r, keys.device), float("-inf"))
    return scores.softmax(-1)


@cache
def _upper(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def npu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    segments: Segments | None = None,
    window: int | None = None,
    alibi: Alibi | None = None,
) -> Tensor:
    """Attention by `npu_fusion_attention` in layout SBH; its masks are True where a key is hidden."""
    check(q, k, v)
    if segments is not None and alibi is not None:
        mask = segments.mask(q.device, causal=True)  # what TND makes of biases where lengths differ is not documented
    elif segments is not None:
        return _npu_documents(q, k, v, scale, segments, window)
    s, t = q.shape[0], k.shape[0]
    how: dict[str, Any]
    if mask is not None:
        seen = mask & within(window, s, t, q.device) if narrows(window, t) else mask
        how = {"atten_mask": ~seen.expand(q.shape[1], 1, s, t)}
    elif s == 1:
        how = {}
        if narrows(window, t):
            k, v = k[-window:], v[-window:]
    else:
        how = _causal(window, t, q.device)
    if alibi is not None:
        rows = min(s, LAST) if s == t and how.get("sparse_mode") == 3 else s
        how["pse"] = alibi(rows, len(k), q.dtype, scale=scale)  # is added before the scores are scaled
    out = torch.ops.npu.npu_fusion_attention(
        *(x.flatten(2) for x in (q, k, v)),
        q.shape[2],
        "SBH",
        scale=scale,
        **how,
    )[0]
    return out.unflatten(2, (q.shape[2], -1))


def _npu_documents(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments, window: int | None) -> Tensor:
    """The documents of all rows one after another, in layout TND: row 0 first, in the order of `segments`."""
    s, b, n, _ = q.shape
    ends = [span.row * s + span.last_query for span in segments.spans]
    longest = max(length for row in segments.lengths for length in row)
    out = torch.ops.npu.npu_fusion_attention(
        *(x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)),
        n,
        "TND",
        scale=scale,
        **_causal(window, longest, q.device),
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
    )[0]
    return out.unflatten(0, (b, s)).transpose(0, 1)


def _causal(window: int | None, t: int, device: torch.device) -> dict[str, Any]:
    """Return how causality is said to the operator; both modes have their corner at the last query and the last key."""
    if narrows(window, t):  # it counts the positions before a query, not the query's own
        return {"atten_mask": triangle(device), "sparse_mode": 4, "pre_tockens": window - 1, "next_tockens": 0}
    return {"atten_mask": triangle(device), "sparse_mode": 3}


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise on what the NPU's attention operators take without a word."""
    shapes = [tuple(x.shape) for x in (q, k, v)]
    assert q.dtype == k.dtype == v.dtype, f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
    assert k.shape[:3] == v.shape[:3], f"keys and values differ: {shapes}"
    assert q.shape[1] == k.shape[1], f"q, k, v have other rows: {shapes}"
    assert q.shape[2] % k.shape[2] == 0, f"groups do not divide heads: {shapes}"
    assert v.shape[3] <= k.shape[3] == q.shape[3] <= WIDEST, f"heads do not fit: {shapes}"


@cache
def triangle(device: torch.device) -> Tensor:
    # the compressed causal mask every sparse mode but 0 wants, whatever the lengths
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)
