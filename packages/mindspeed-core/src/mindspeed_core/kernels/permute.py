"""Sorting tokens by the expert that computes them, and back.

    tokens [t, h]                a  b  c         experts [t, k]   a: 1 0   b: 1 2   c: 0 2
    rows of experts 0, 1, 2      a  c  a  b  b  c                 places  2 0   3 4   1 5   (where each pair has gone)

A pair whose expert is `count` or more is left out: its place lies behind the last row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Permutation(NamedTuple):
    """Both directions of one side."""

    sort: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    back: Callable[[Tensor, Tensor, Tensor], Tensor]


def reference(tokens: Tensor, experts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return (the tokens [rows, h] sorted by expert, the place [t * k] of every pair of token and expert).

    Pairs of one expert keep the order of their tokens. The first `rows` pairs in that order are made into rows.
    """
    order = experts.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return tokens.index_select(0, order[:rows] // max(1, experts.shape[1])), places


def reference_back(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Return for every token the sum of its rows, weighted: rows [r, h], places [t * k], weights [t, k] -> [t, h].

    A place behind the last row counts as zeros.
    """
    tokens, chosen = weights.shape
    if len(rows) < len(places):
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        places = places.clamp(max=len(rows) - 1)
    # fp32: the weights are, and the sum of a token's experts is rounded once
    parts = rows.index_select(0, places).view(tokens, chosen, rows.shape[1])
    return (parts * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def npu(tokens: Tensor, experts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """As `reference`, in one kernel; it takes every pair."""
    if rows < experts.numel():
        return reference(tokens, experts, rows)
    assert len(experts) == len(tokens), f"experts of {len(experts)} tokens for {len(tokens)}"
    return torch.ops.npu.npu_moe_token_permute(tokens, experts, rows)


def npu_back(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """As `reference_back`, in one kernel; it takes every place to be a row."""
    if len(rows) < len(places):
        return reference_back(rows, places, weights)
    assert weights.numel() == len(places), f"{weights.numel()} weights for {len(places)} places"
    return torch.ops.npu.npu_moe_token_unpermute(rows, places, weights.to(rows.dtype))


REFERENCE = Permutation(reference, reference_back)
NPU = Permutation(npu, npu_back)
