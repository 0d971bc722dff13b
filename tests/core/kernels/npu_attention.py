"""The NPU's two attention operators in plain torch, strict about what they are given, for machines that have no NPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ALL = 2**31 - 1  # positions before and behind a query where nothing else is said
LAST = 1024  # rows of biases
HIDDEN = -1e4  # what a hidden score is set to: a query that sees nothing gets the mean of all values, not 0


def installed() -> Any:
    """While it is entered, `torch.ops.npu` is this."""
    ops = SimpleNamespace(npu_fusion_attention=fusion_attention, npu_fusion_attention_grad=fusion_attention_grad)
    return mock.patch.object(torch.ops, "npu", ops, create=True)


def fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    pre_tockens: int = ALL,
    next_tockens: int = ALL,
    sparse_mode: int = 0,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
) -> tuple[Any, ...]:
    """(result, maxima, sums, ...): maxima and sums are fp32 [b, n, s, 8], under TND [total, n, 8]."""
    assert pse is None or input_layout == "SBH", "for documents it has another form"
    documents = []
    for q, k, v in _documents(query, key, value, head_num, input_layout, actual_seq_qlen, actual_seq_kvlen):
        scores = _scores(q, k, pse, scale, atten_mask, sparse_mode, (pre_tockens, next_tockens))
        peak = scores.amax(-1, keepdim=True)
        total = (scores - peak).exp().sum(-1, keepdim=True)
        out = ((scores - peak).exp() / total) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        documents.append((out, peak.expand(*peak.shape[:-1], 8), total.expand(*total.shape[:-1], 8)))
    outs, peaks, totals = zip(*documents, strict=True)
    if input_layout == "SBH":
        return outs[0].permute(2, 0, 1, 3).flatten(2), peaks[0].float(), totals[0].float(), None, 0, 0, 0
    out, peak, total = (torch.cat([x[0].transpose(0, 1) for x in found]) for found in (outs, peaks, totals))
    return out, peak.float(), total.float(), None, 0, 0, 0


def fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    attention_in: Tensor | None = None,
    scale_value: float = 1.0,
    pre_tockens: int = ALL,
    next_tockens: int = ALL,
    sparse_mode: int = 0,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
) -> tuple[Any, ...]:
    """(dq, dk, dv, ...) from the result, maxima and sums that it is given."""
    assert softmax_max is not None
    assert softmax_sum is not None
    assert attention_in is not None
    assert softmax_max.dtype == softmax_sum.dtype == torch.float32
    assert query.dtype == key.dtype == value.dtype == dy.dtype == attention_in.dtype
    lengths = (head_num, input_layout, actual_seq_qlen, actual_seq_kvlen)
    parts = _documents(query, key, value, *lengths)
    others = _documents(dy, key, attention_in, head_num, input_layout, actual_seq_qlen, actual_seq_kvlen, own=True)
    if input_layout == "SBH":
        stats = [(softmax_max, softmax_sum)]
    else:
        assert actual_seq_qlen is not None
        cuts = actual_seq_qlen[:-1]
        stats = [
            (a.transpose(0, 1)[None], b.transpose(0, 1)[None])
            for a, b in zip(softmax_max.tensor_split(cuts), softmax_sum.tensor_split(cuts), strict=True)
        ]
    grads = []
    for (q, k, v), (grad, _key, out), (peak, total) in zip(parts, others, stats, strict=True):
        repeat = q.shape[1] // k.shape[1]
        scores = _scores(q, k, pse, scale_value, atten_mask, sparse_mode, (pre_tockens, next_tockens))
        shares = (scores - peak[..., :1]).exp() / total[..., :1]
        inner = grad @ v.repeat_interleave(repeat, 1).transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)
        inner = inner * shares * scale_value
        back = (
            inner @ k.repeat_interleave(repeat, 1),
            (inner.transpose(-1, -2) @ q).unflatten(1, (-1, repeat)).sum(2),
            (shares.transpose(-1, -2) @ grad).unflatten(1, (-1, repeat)).sum(2),
        )
        grads.append([x.to(query.dtype) for x in back])
    if input_layout == "SBH":
        return (*(x.permute(2, 0, 1, 3).flatten(2) for x in grads[0]), None, None)
    return (*(torch.cat([x[i][0].transpose(0, 1) for x in grads]) for i in range(3)), None, None)


def _documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n: int,
    layout: str,
    ends: list[int] | None,
    key_ends: list[int] | None,
    *,
    own: bool = False,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v [b, heads, s, d] of each piece that is attended for itself; with `own` v is as long as q."""
    if layout == "SBH":
        assert ends is None
        assert key_ends is None
        d = q.shape[2] // n
        assert k.shape[2] % d == 0 or own
        heads = n if own else k.shape[2] // d
        return [
            (
                q.unflatten(2, (n, -1)).permute(1, 2, 0, 3),
                k.unflatten(2, (heads, -1)).permute(1, 2, 0, 3) if not own else k,
                v.unflatten(2, (heads, -1)).permute(1, 2, 0, 3),
            )
        ]
    assert layout == "TND"
    assert ends
    assert key_ends
    assert len(ends) == len(key_ends)
    assert ends[-1] == len(q)
    assert key_ends[-1] == len(k)
    assert ends == sorted(set(ends)), "an empty document"
    pieces = (x.tensor_split(cuts[:-1]) for x, cuts in ((q, ends), (k, key_ends), (v, ends if own else key_ends)))
    return [tuple(x.transpose(0, 1)[None] for x in piece) for piece in zip(*pieces, strict=True)]


def _scores(
    q: Tensor,
    k: Tensor,
    pse: Tensor | None,
    scale: float,
    mask: Tensor | None,
    sparse_mode: int,
    around: tuple[int, int],
) -> Tensor:
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    s, t = scores.shape[-2:]
    if pse is not None:
        scores = scores + _whole(pse.to(q.dtype), q.shape[1], s, t, sparse_mode)
    scores = scores * scale
    if mask is None:
        return scores  # whatever the mode
    assert mask.dtype == torch.bool
    if sparse_mode in (3, 4):
        assert mask.shape == (2048, 2048)
        before, behind = (ALL, 0) if sparse_mode == 3 else around
        distance = (torch.arange(s) + t - s)[:, None] - torch.arange(t)
        return scores.masked_fill((distance > before) | (distance < -behind), HIDDEN)
    assert sparse_mode == 0
    assert around == (ALL, ALL), "which the mask would have to agree with"
    assert mask.shape == (q.shape[0], 1, s, t)
    return scores.masked_fill(mask, HIDDEN)


def _whole(pse: Tensor, n: int, s: int, t: int, sparse_mode: int) -> Tensor:
    """Return biases [1, n, s, t]; of more than 1024 rows the last ones may say it all, the others being like them, shifted."""
    if pse.shape == (1, n, s, t):
        return pse
    assert s == t > LAST, "as many queries as keys, and more than that"
    assert sparse_mode in (0, 2, 3)
    assert pse.shape == (1, n, LAST, t)
    before = s - LAST
    shift = (torch.arange(before, 0, -1)[:, None] + torch.arange(t)).clamp(max=t - 1)  # beyond it lies what is masked
    return torch.cat((pse[:, :, 0, shift], pse), 2)
