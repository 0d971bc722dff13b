"""Ulysses moves heads and positions and nothing else, and no more key heads than the ranks need."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_core.parallel.ulysses import gather_heads, scatter_heads
from tests.harness import run_ranks

LENGTH, ROWS, WIDTH = 12, 2, 4


def whole(heads: int) -> Tensor:
    """[s, b, heads, d], each number of its own."""
    return torch.arange(LENGTH * ROWS * heads * WIDTH, dtype=torch.float64).view(LENGTH, ROWS, heads, WIDTH)


def moves(cases: list[tuple[int, int]]) -> list[tuple[list[Tensor], Tensor, list[Tensor], int]]:
    """For each pair of head counts: q, k, v dealt, q gathered again, the gradients, and the numbers sent for q, k and v."""
    world, rank = dist.get_world_size(), dist.get_rank()
    group: Any = dist.group.WORLD
    real, found = dist.all_to_all_single, []
    for heads, groups in cases:
        local = [whole(n).chunk(world)[rank].clone().requires_grad_() for n in (heads, groups, groups)]
        sent: list[int] = []

        def counting(out: Tensor, x: Tensor, *, group: Any, sent: list[int] = sent) -> None:
            sent.append(x.numel())
            real(out, x, group=group)

        with mock.patch.object(dist, "all_to_all_single", counting):
            dealt = scatter_heads(local[0], local[1], local[2], group)
        back = gather_heads(dealt[0], group)
        total = sum(((rank + 1) * x).sum() for x in dealt)
        grads = torch.autograd.grad(total, local)
        assert len(sent) == 1
        found.append(([x.detach() for x in dealt], back.detach(), list(grads), sent[0]))
    return found


CASES = [(12, 12), (12, 4), (12, 2), (12, 1), (12, 6), (12, 3)]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_heads_are_dealt_and_come_back(world: int) -> None:
    ranks = run_ranks(moves, world, CASES)
    for case, (heads, groups) in enumerate(CASES):
        mine = heads // world
        for rank in range(world):
            (q, k, v), back, grads, _sent = ranks[rank][case]
            assert torch.equal(q, whole(heads)[:, :, rank * mine : (rank + 1) * mine])
            assert torch.equal(k, v)
            # whatever was repeated: a query head finds its own key head where grouped attention looks for it
            found = k.repeat_interleave(mine // k.shape[2], 2)
            wanted = whole(groups).repeat_interleave(heads // groups, 2)[:, :, rank * mine : (rank + 1) * mine]
            assert torch.equal(found, wanted)
            assert torch.equal(back, whole(heads).chunk(world)[rank])
            # rank r weighs what it got with r + 1: each head's gradient is the sum over the ranks that it went to
            times = torch.zeros(groups, dtype=torch.float64)
            for other in range(world):
                copies = ranks[other][case][0][1].shape[2]
                repeat = copies * world // groups
                for copy in range(copies):
                    times[(other * copies + copy) // repeat] += other + 1
            assert torch.equal(grads[1], times[None, None, :, None].expand_as(grads[1]))


@pytest.mark.parametrize(
    ("world", "copies"), [(2, (12, 4, 2, 2, 6, 6)), (3, (12, 12, 6, 3, 6, 3)), (4, (12, 4, 4, 4, 12, 12))]
)
def test_key_heads_are_repeated_only_as_far_as_needed(world: int, copies: tuple[int, ...]) -> None:
    """`copies` are the key heads that travel for each case: the fewest that the ranks divide and that hold each head alike."""
    for rank in run_ranks(moves, world, CASES):
        for (heads, _groups), wanted, (_dealt, _back, _grads, sent) in zip(CASES, copies, rank, strict=True):
            assert sent == LENGTH // world * ROWS * WIDTH * (heads + 2 * wanted)
