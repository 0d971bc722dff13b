"""The next token from logits: temperature, then top-k, then top-p, then one draw; temperature 0 takes the likeliest."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are chosen; every value is checked here, before a model is asked for anything."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # 0: off; 1 is the likeliest token
    top_p: float = 1.0  # 1: off
    seed: int | None = None  # None: a new one for every answer
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        """Tell everything that is out of range at once."""
        faults = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            faults.append(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            faults.append(f"top_k={self.top_k} must be 0 (off) or a number of tokens")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p={self.top_p} must be above 0 and at most 1 (off)")
        if self.max_new_tokens < 1:
            faults.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            faults.append(f"seed={self.seed} must be between 0 and 2^63 - 1")
        if faults:
            raise InputError("\n".join(faults))

    @property
    def greedy(self) -> bool:
        """True when no token is drawn."""
        return self.temperature == 0 or self.top_k == 1


class Sampler:
    """Chooses tokens for a batch; each row draws from its own stream, so an answer does not depend on its neighbours."""

    def __init__(self, config: SamplingConfig, rows: int, device: torch.device) -> None:
        self.config = config
        seed = secrets.randbits(63) if config.seed is None else config.seed
        # without a seed the rows must differ, with one every row repeats what it would be alone
        step = 1 if config.seed is None else 0
        self.streams: list[torch.Generator] = []
        if not config.greedy:
            self.streams = [torch.Generator(device).manual_seed((seed + i * step) % 2**63) for i in range(rows)]

    def choose(self, logits: Tensor) -> Tensor:
        """Return one token per row of `logits` [b, v]."""
        if self.config.greedy:
            return logits.argmax(-1)
        # fp32: the cumulative sum of 10^5 bf16 probabilities does not reach 1
        kept = filter_logits(logits.float(), self.config)
        probabilities = kept.softmax(-1)
        draws = [torch.multinomial(row, 1, generator=s) for row, s in zip(probabilities, self.streams, strict=True)]
        return torch.cat(draws)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        self.streams = [self.streams[row] for row in rows] if self.streams else []


def filter_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Return `logits` [b, v] over the temperature, with -inf at every token that top-k or top-p rules out."""
    if config.temperature != 0:
        logits = logits / config.temperature
    if config.top_k:
        logits = _keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = _keep_top_p(logits, config.top_p)
    return logits


def _keep_top_k(logits: Tensor, k: int) -> Tensor:
    # tokens that tie with the k-th stay
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def _keep_top_p(logits: Tensor, p: float) -> Tensor:
    ascending, order = logits.sort(-1)
    # the smallest set whose probability reaches p: from below, all whose sum with their lesser ones is at most 1 - p go
    surplus = ascending.softmax(-1).cumsum(-1) <= 1 - p
    surplus[..., -1] = False  # the likeliest always stays
    return logits.masked_fill(torch.zeros_like(surplus).scatter(-1, order, surplus), -math.inf)
