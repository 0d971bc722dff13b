"""Self-attention with grouped queries, its cache of keys and values, and what a forward pass tells every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mindspeed_core.kernels import Kernels
from mindspeed_core.kernels.alibi import Alibi
from mindspeed_core.kernels.cached_attention import Extent
from mindspeed_core.kernels.segments import Segments
from mindspeed_core.models.family import Architecture
from mindspeed_core.models.norm import RMSNorm
from mindspeed_core.parallel.context import ContextPlan
from mindspeed_core.parallel.linear import ColumnLinear, RowLinear


class Cache:
    """The keys and values of past positions, preallocated: one pair [b, heads, max_length, width] per layer of this stage.

    A forward pass writes behind `length`; `advance` makes that part of the past.
    """

    def __init__(
        self,
        layers: list[int],
        max_length: int,
        batch: int,
        widths: tuple[tuple[int, int], tuple[int, int]],  # (heads, width) of each of the pair
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_length, self.batch, self.device = max_length, batch, device
        self.length = 0
        self._pairs = {
            layer: tuple(
                torch.zeros(batch, heads, max_length, width, dtype=dtype, device=device) for heads, width in widths
            )
            for layer in layers
        }

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [s, b, heads, width] behind the past of one layer and return the pair, all of its room."""
        end = self.length + k.shape[0]
        keys, values = self._pairs[layer]
        keys[:, :, self.length : end] = k.permute(1, 2, 0, 3)
        values[:, :, self.length : end] = v.permute(1, 2, 0, 3)
        return keys, values

    def extent(self, positions: int, padding: Sequence[int] | None, window: int | None = None) -> Extent:
        """Return what a pass over the next `positions` attends to; `padding` positions of each row at its beginning are empty."""
        padding = (0,) * self.batch if padding is None else tuple(padding)
        return Extent(positions, self.length + positions, self.max_length, padding, self.device, window)

    def written(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `extend`, but return the pair as [t, b, heads, width] without the room behind it."""
        end = self.length + len(k)
        k, v = (x[:, :, :end].permute(2, 0, 1, 3) for x in self.extend(layer, k, v))
        return k, v

    def advance(self, positions: int) -> None:
        """Make the last `positions` written part of the past."""
        self.length += positions

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat, or reorder) the batch rows with these indices."""
        self._pairs = {layer: (k[rows], v[rows]) for layer, (k, v) in self._pairs.items()}
        self.batch = len(rows)


@dataclass(frozen=True)
class AttentionPlan:
    """What one forward pass tells every attention layer. Made once by the model and passed through unchanged.

    It travels in the argument that Megatron's layers call `packed_seq_params` and hand on unread.
    """

    cos: Tensor | None  # [s, b or 1, 1, d]; None: positions are told by `alibi`
    sin: Tensor | None
    mask: Tensor | None = None  # bool [b or 1, 1, s, t], True where a query sees a key; None: causal
    cache: Cache | None = None
    extent: Extent | None = None  # of the cache; it holds mask and window then
    segments: Segments | None = None  # the documents of each row; each is causal for itself
    window: int | None = None  # how many positions a query sees, its own among them; None: all
    alibi: Alibi | None = None  # the linear biases of the heads that are attended on this rank
    context: ContextPlan | None = None  # how sequences cut over ranks are attended; it holds these four then

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, kernels: Kernels) -> Tensor:
        """Return attention [s, b, n, e] of q [s, b, n, d] to k [t, b, g, d] and v [t, b, g, e], by the rules of this pass."""
        if self.context is not None:
            return self.context.attention(q, k, v, scale=scale, kernels=kernels)
        mask = self.mask if self.extent is None else self.extent.mask
        how = {"mask": mask, "segments": self.segments, "window": self.window, "alibi": self.alibi}
        return kernels.attention(q, k, v, scale=scale, **how)

    def cached_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, kernels: Kernels
    ) -> Tensor:
        """Return the same to k and v [s, b, g, d] and all that a layer's cache holds before them; it holds them as well then."""
        assert self.cache is not None
        keys, values = self.cache.extend(layer, k, v)
        return kernels.cached_attention(q, keys, values, self.extent, scale=scale, alibi=self.alibi)


class SelfAttention(MegatronModule):
    """Attention over the heads of this tensor-parallel rank: [s, b, h] -> [s, b, h]."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        arch: Architecture,
        kernels: Kernels,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number  # over the whole model, from 1
        self.attend = AttentionPlan.attention  # recompute puts another way of calling it here
        self.arch, self.kernels = arch, kernels
        cut: dict[str, Any] = {"config": config, "kernels": kernels, "tp_group": pg_collection.tp}
        mixed = (arch.num_heads + 2 * arch.num_query_groups) * arch.head_dim
        self.linear_qkv = ColumnLinear.of(arch.hidden_size, mixed, bias=arch.qkv_bias, **cut)
        if arch.qk_norm:
            self.q_layernorm = RMSNorm(config, arch.head_dim, arch.norm_eps, kernels=kernels)
            self.k_layernorm = RMSNorm(config, arch.head_dim, arch.norm_eps, kernels=kernels)
        self.linear_proj = RowLinear.of(arch.num_heads * arch.head_dim, arch.hidden_size, **cut)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: AttentionPlan, **_: Any
    ) -> tuple[Tensor, None]:
        """Return the attention output and no bias, as Megatron's layer expects. Its other arguments are always None."""
        arch, plan = self.arch, packed_seq_params
        mixed, _bias = self.linear_qkv(hidden_states)
        s, b, _width = mixed.shape
        per_group = arch.num_heads // arch.num_query_groups
        mixed = mixed.view(s, b, -1, per_group + 2, arch.head_dim)  # a group's queries, then its key, then its value
        q, k, v = mixed.split((per_group, 1, 1), 3)
        q, k, v = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
        if arch.qk_norm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if not arch.alibi:
            q = self.kernels.rotary(q, plan.cos, plan.sin)
            k = self.kernels.rotary(k, plan.cos, plan.sin)
        how: dict[str, Any] = {"scale": arch.head_dim**-0.5, "kernels": self.kernels}
        if plan.cache is None:
            out = self.attend(plan, q, k, v, **how)
        else:
            out = plan.cached_attention(self.layer_number, q, k, v, **how)
        return self.linear_proj(out.flatten(2))[0], None
