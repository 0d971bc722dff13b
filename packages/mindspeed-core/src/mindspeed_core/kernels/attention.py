"""Scaled dot-product attention with grouped queries.

Layouts: q [s, b, n, d]; k, v [t, b, g, d] with g dividing n; result [s, b, n, d]. `mask` is boolean [b or 1, 1, s, t],
True where a query may see a key, at least one key per query; without it attention is causal, the queries being the last
s of the t positions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention by torch's own fused paths (flash on CPU and CUDA)."""
    s, t = q.shape[0], k.shape[0]
    if mask is None and 1 < s < t:
        mask = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)[None, None]
    out = F.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (q, k, v)),
        attn_mask=mask,
        is_causal=mask is None and s > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.permute(2, 0, 1, 3)


def npu(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention by `npu_fusion_attention` in layout SBH; its masks are True where a key is hidden."""
    s, t = q.shape[0], k.shape[0]
    if mask is not None:
        hidden, sparse_mode = ~mask.expand(q.shape[1], 1, s, t), 0
    elif s == 1:
        hidden, sparse_mode = None, 0
    else:
        hidden, sparse_mode = _triangle(q.device), 3  # causal, the corner at the last query and the last key
    out = torch.ops.npu.npu_fusion_attention(
        *(x.flatten(2) for x in (q, k, v)),
        q.shape[2],
        "SBH",
        atten_mask=hidden,
        scale=scale,
        sparse_mode=sparse_mode,
    )[0]
    return out.unflatten(2, q.shape[2:])


@lru_cache(maxsize=None)
def _triangle(device: torch.device) -> Tensor:
    # the compressed causal mask every sparse mode but 0 wants, whatever the lengths
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)
