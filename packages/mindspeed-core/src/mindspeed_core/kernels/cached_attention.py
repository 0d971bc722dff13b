"""Attention over a cache of keys and values, for generation: no gradients, and never longer than one pass at a time.

Layouts: q [s, b, n, d]; keys and values [b, g, room, d] as the cache holds them, g dividing n; result [s, b, n, d]. Queries
are the last s of the `extent.end` positions that are written, and attention is causal. A row's first `padding` positions hold
nothing, so that rows of different lengths end together:

    row 0    a b c d e .  .      end 5, room 7, padding 0
    row 1    - - x y z .  .                     padding 2

With a `window` a query sees of these the last `window` positions, its own among them. `alibi` adds linear biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_core.kernels import attention
from mindspeed_core.kernels.alibi import Alibi

DTYPES = (torch.float16, torch.bfloat16)  # what the operators for inference compute in
WIDEST, STEP = 512, 16  # their heads: at most so wide, and a multiple of that
MOST_HEADS, LARGEST_GROUP = 256, 64  # query heads, and of them to one key head


@dataclass(frozen=True)
class Extent:
    """Which positions of a cache a pass attends to. Made once for all layers; what the sides need of it is made when asked."""

    queries: int  # s
    end: int  # positions that are written, those of this pass among them
    room: int  # positions that the cache has room for
    padding: tuple[int, ...]  # of each row
    device: torch.device
    window: int | None = None

    @property
    def ragged(self) -> bool:
        """True where rows have different beginnings, or all of them a later one."""
        return any(self.padding)

    @property
    def lengths(self) -> list[int]:
        """How many positions of each row hold something that a query sees."""
        return [self.end - max(padding, self.first) for padding in self.padding]

    @property
    def first(self) -> int:
        """The first position that a query sees: a window leaves those before it behind."""
        return 0 if self.window is None else max(0, self.end - self.queries - self.window + 1)

    @cached_property
    def mask(self) -> Tensor | None:
        """True where a query sees a key, [b, 1, s, end - first]; None where causality says it all."""
        # one query sees all that its window reaches
        window = self.window if self.queries > 1 and attention.narrows(self.window, self.end) else None
        if window is None and not self.ragged:
            return None
        key = torch.arange(self.first, self.end, device=self.device)
        query = key[-self.queries :, None]
        begin = torch.tensor(self.padding, device=self.device)[:, None, None]
        seen = (key <= query) & (key >= begin)
        if window is not None:
            seen &= key > query - window
        # a position of padding sees itself: nothing at all would be NaN, which a mask does not stop
        return (seen | (key == query))[:, None]

    @cached_property
    def hidden(self) -> Tensor | None:
        """The contrary over all of the cache's room, [b, 1, s, room]."""
        return None if self.mask is None else F.pad(~self.mask, (self.first, self.room - self.end), value=True)

    @cached_property
    def behind(self) -> Tensor:
        """How many positions of the room are not written, [1]."""
        return torch.tensor([self.room - self.end], device=self.device)


def reference(
    q: Tensor, keys: Tensor, values: Tensor, extent: Extent, *, scale: float, alibi: Alibi | None = None
) -> Tensor:
    """Attention by torch's own fused paths."""
    s, b, n, d = q.shape
    if s > 1:
        return attention.reference(q, *_written(keys, values, extent), scale=scale, mask=extent.mask, alibi=alibi)
    mask = extent.mask
    if alibi is not None:
        added = alibi(1, extent.end - extent.first, q.dtype).unflatten(1, (keys.shape[1], -1))[:, :, :, 0]
        mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
    # a group's heads look at the same keys: as queries of one head they read them once
    out = F.scaled_dot_product_attention(
        q.reshape(b, keys.shape[1], -1, d),
        keys[:, :, extent.first : extent.end],
        values[:, :, extent.first : extent.end],
        attn_mask=mask,
        scale=scale,
    )
    return out.reshape(1, b, n, -1)


def cpu(q: Tensor, keys: Tensor, values: Tensor, extent: Extent, *, scale: float, alibi: Alibi | None = None) -> Tensor:
    """As `reference`; prompts go the way of training."""
    if len(q) == 1:
        return reference(q, keys, values, extent, scale=scale, alibi=alibi)
    return attention.cpu(q, *_written(keys, values, extent), scale=scale, mask=extent.mask, alibi=alibi)


def npu(q: Tensor, keys: Tensor, values: Tensor, extent: Extent, *, scale: float, alibi: Alibi | None = None) -> Tensor:
    """By `npu_fused_infer_attention_score`, or where that does not take the tensors by `npu_fusion_attention`.

    The one operator holds both of the older: a single query is attended incrementally, more as a prompt. It reads the cache
    where it lies, with the rows' lengths beside it.
    """
    assert not q.requires_grad, "attention over a cache has no gradient"
    # whether this operator scales a bias with the scores or adds it behind is not documented
    if alibi is not None or not takes(q, keys, values):
        return attention.npu(q, *_written(keys, values, extent), scale=scale, mask=extent.mask, alibi=alibi)
    s, b, n, _ = q.shape
    how: dict[str, Any] = {"input_layout": "BNSD_BSND", "actual_seq_lengths_kv": [extent.end] * b}
    if s == 1:
        how = {"input_layout": "BNSD", "actual_seq_lengths_kv": extent.lengths}
        if extent.ragged or extent.first:
            how["kv_padding_size"] = extent.behind  # rows end there, and begin at different places
    elif extent.hidden is not None:
        how["atten_mask"] = extent.hidden  # for a window too: it is not documented where this operator's band begins
    else:
        how |= {"atten_mask": attention.triangle(q.device), "sparse_mode": 3}  # the corner at the last query and key
    out, _lse = torch.ops.npu.npu_fused_infer_attention_score(
        q.permute(1, 2, 0, 3).contiguous(),
        keys,
        values,
        num_heads=n,
        num_key_value_heads=keys.shape[1],
        scale=scale,
        **how,
    )
    return out.permute(2, 0, 1, 3) if s == 1 else out.transpose(0, 1)


def takes(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return True for what `npu_fused_infer_attention_score` computes; raise on what it would take without a word."""
    (_, b, n, d), shapes = q.shape, [tuple(x.shape) for x in (q, keys, values)]
    assert q.dtype == keys.dtype == values.dtype, f"q, keys, values are {q.dtype}, {keys.dtype}, {values.dtype}"
    assert keys.shape[:3] == values.shape[:3], f"keys and values differ: {shapes}"
    assert len(keys) == b, f"the cache has other rows: {shapes}"
    assert n % keys.shape[1] == 0, f"groups do not divide heads: {shapes}"
    assert d == keys.shape[3], f"heads do not fit: {shapes}"
    return (
        q.dtype in DTYPES
        and keys.shape == values.shape
        and d <= WIDEST
        and d % STEP == 0
        and n <= MOST_HEADS
        and n // keys.shape[1] <= LARGEST_GROUP
    )


def _written(keys: Tensor, values: Tensor, extent: Extent) -> tuple[Tensor, Tensor]:
    """Return what is seen of the cache as [t, b, g, d], the layout of the other kernels, without a copy."""
    seen = slice(extent.first, extent.end)
    return keys[:, :, seen].permute(2, 0, 1, 3), values[:, :, seen].permute(2, 0, 1, 3)
