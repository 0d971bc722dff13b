"""Attention with linear biases (ALiBi; Press et al., 2021): what a key adds to its score falls with its distance.

score = scale * q . k + slope * (position of the key - position of the query)        a slope for each head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def slopes(heads: int) -> Tensor:
    """Return the slopes [heads] in fp32.

    A power of two has 2^(-8 i / heads), i = 1, 2 ...; other numbers those of the next smaller power, and behind them every
    other one of twice that power.
    """
    power = 1 << (heads.bit_length() - 1)
    own = torch.arange(1, power + 1) / power
    between = torch.arange(1, 2 * power, 2)[: heads - power] / (2 * power)
    return torch.exp2(-8 * torch.cat((own, between)))


class Alibi(torch.nn.Module):
    """The biases of some heads. Layers and micro batches of one length share a tensor: it is as large as their scores."""

    def __init__(self, slopes: Tensor) -> None:
        super().__init__()
        self.slopes: Tensor  # [n]
        self.register_buffer("slopes", slopes, persistent=False)
        self._last: tuple[Any, Tensor] | None = None

    def forward(self, s: int, t: int, dtype: torch.dtype, *, scale: float = 1.0, causal: bool = False) -> Tensor:
        """Return bias / scale [1, n, s, t], the queries being the last s of t positions; `causal`: -inf for later keys."""
        kept = (s, t, dtype, scale, causal, self.slopes.device, torch.is_inference_mode_enabled())
        if self._last is None or self._last[0] != kept:
            key = torch.arange(t, device=self.slopes.device)
            made = (self.slopes[:, None, None] / scale * (key - key[t - s :, None]))[None].to(dtype)
            if causal:
                made = made.masked_fill_(key > key[t - s :, None], float("-inf"))
            self._last = kept, made
        return self._last[1]
