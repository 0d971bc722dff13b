"""Ring attention, Ulysses and both together give full attention: the result, and the gradients of queries, keys and values."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mindspeed_core.device import Device
from mindspeed_core.kernels import KernelConfig, Kernels, alibi, attention_block, select
from mindspeed_core.parallel.context import ContextSplit
from mindspeed_core.parallel.mesh import Axis
from mindspeed_core.parallel.ring_attention import Ring
from tests.harness import run_ranks

LENGTH = 24
DOCUMENTS = ([5, 1, 11, 7], [24], [2, 19, 3], [1, 1, 9, 13])  # of each row; no chunk ends where one of them does
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    """One way to split, to see and to compute."""

    ulysses: int = 1
    window: int = 1
    overlap: bool = False
    zigzag: bool = True
    sees: str = "causal"
    rows: int = 2
    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (8, 8)  # of keys and of values
    dtype: torch.dtype = torch.float64
    side: str = "auto"
    reach: int | None = None  # positions that a query sees
    alibi: bool = False

    def __str__(self) -> str:
        values = zip(self._fields, self, Case(), strict=True)
        changed = [f"{name}={str(value).replace(' ', '')}" for name, value, usual in values if value != usual]
        return "-".join(changed).replace("torch.", "") or "plain"


def cases(world: int) -> list[Case]:
    """What a job on that many ranks computes."""
    even = (
        (12, 2) if world == 3 else (8, 2)
    )  # key heads that the ranks of Ulysses do not divide, in one way or the other
    found = [
        Case(sees=sees, rows=rows, side=side)
        for sees, rows, side in product(("causal", "general", "packed"), (1, 2), ("auto", "reference"))
    ]
    found += [Case(ulysses=world, sees=sees, heads=even) for sees in ("causal", "general", "packed")]
    found += [Case(ulysses=world, sees=sees, heads=even, reach=7) for sees in ("causal", "general", "packed")]
    found += [Case(ulysses=world, sees=sees, heads=even, alibi=True) for sees in ("causal", "general", "packed")]
    found += [Case(ulysses=world, rows=1, heads=heads) for heads in ((12, 12), (12, 4), (12, 1))]
    found += [Case(zigzag=False, sees=sees) for sees in ("causal", "general", "packed")]
    found += [Case(overlap=True), Case(window=world), Case(heads=(6, 1)), Case(widths=(12, 8), heads=(4, 4))]
    found += [
        Case(dtype=dtype, sees=sees) for dtype in (torch.float32, torch.bfloat16) for sees in ("causal", "packed")
    ]
    found += [Case(ulysses=world, heads=(12, 4), widths=(12, 8), dtype=torch.float32)]
    if world == 4:
        found += [Case(ulysses=2, sees=sees, rows=rows) for sees in ("causal", "general", "packed") for rows in (1, 2)]
        found += [Case(ulysses=2, heads=(8, 1), overlap=True), Case(ulysses=2, zigzag=False, sees="general")]
        found += [Case(window=2, sees=sees) for sees in ("causal", "general", "packed")]
        found += [Case(window=2, overlap=True, zigzag=False), Case(window=2, side="reference")]
        found += [Case(ulysses=2, dtype=torch.float32)]
    return found


def material(case: Case) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Whole q, k, v and the gradient of the result; the mask; the documents. The same on every rank."""
    torch.manual_seed(7)
    (n, g), (d, e), b = case.heads, case.widths, case.rows
    shapes = ((n, d), (g, d), (g, e), (n, e))
    tensors = [torch.randn(LENGTH, b, *shape, dtype=torch.float64).to(case.dtype) for shape in shapes]
    mask = segments = None
    if case.sees == "general":
        mask = torch.rand(b, 1, LENGTH, LENGTH) > 0.4
        mask[..., :8, 12:] = False  # so that a piece of the ring may be left out
        mask |= torch.eye(LENGTH, dtype=torch.bool).flip(0) | torch.eye(LENGTH, dtype=torch.bool)
        mask[..., 3, :] = torch.arange(LENGTH) == 20  # a query whose only key is far away
    if case.sees == "packed":
        segments = torch.stack(
            [torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in DOCUMENTS[:b]]
        )
    return tensors, mask, segments


def oracle(case: Case) -> list[Tensor]:
    """The result and the gradients by torch's own attention over the whole sequence with the mask written out, in fp64."""
    (q, k, v, grad), mask, segments = material(case)
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    if mask is not None:
        seen = mask
    if case.reach is not None:
        seen = seen & (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) < case.reach)
    if case.alibi:
        distance = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
        bias = alibi.slopes(case.heads[0]).double()[:, None, None] * distance
        seen = bias.masked_fill(~seen, float("-inf"))
    out = F.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (q, k, v)),
        attn_mask=seen,
        scale=0.3,
        enable_gqa=True,
    ).permute(2, 0, 1, 3)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())]


def kernels(side: str) -> Kernels:
    return select(Device("cpu"), KernelConfig(attention="reference" if side == "reference" else "auto"))


def attends(world: int) -> dict[str, float]:
    """The largest difference from the oracle of each case on this rank."""
    alone = dist.new_subgroups_by_enumeration([[rank] for rank in range(world)])[0]
    grid = torch.arange(world).view(-1, 2) if world == 4 else None
    groups: dict[int, tuple[Any, Any]] = {1: (dist.group.WORLD, alone), world: (alone, dist.group.WORLD)}
    if grid is not None:
        columns, rows = (dist.new_subgroups_by_enumeration(x.tolist())[0] for x in (grid.T, grid))
        groups[2] = (columns, rows)
    seconds = {id(ring): dist.new_group() if ring is dist.group.WORLD else None for ring, _ in groups.values()}
    if grid is not None:
        seconds[id(groups[2][0])] = dist.new_subgroups_by_enumeration(grid.T.tolist())[0]
    found = {}
    for case in cases(world):
        around, across = groups[case.ulysses]
        second = seconds[id(around)] if case.overlap else None
        ring = Ring(around.size(), around.rank(), around, second, case.window)
        split = ContextSplit(ring, Axis(across.size(), across.rank(), across), case.zigzag and ring.size > 1)
        tensors, mask, segments = material(case)
        mine = split.positions(LENGTH)
        q, k, v, grad = (x[mine] for x in tensors)
        q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
        slopes = alibi.slopes(case.heads[0]).double().chunk(across.size())[across.rank()]
        biases = alibi.Alibi(slopes) if case.alibi else None
        plan = split.plan(LENGTH, mask=mask, segments=segments, window=case.reach, alibi=biases)
        out = plan.attention(q, k, v, scale=0.3, kernels=kernels(case.side))
        got = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        got = [x.detach() for x in got]
        assert [x.dtype for x in got] == [case.dtype] * 4
        found[str(case)] = max(
            float((x.double() - whole[mine]).abs().max() / whole.abs().max())
            for x, whole in zip(got, oracle(case), strict=True)
        )
    return found


@cache
def differences(world: int) -> dict[str, float]:
    ranks = run_ranks(attends, world, world, timeout=120)
    return {case: max(rank[case] for rank in ranks) for case in ranks[0]}


@pytest.mark.parametrize(
    ("world", "case"),
    [pytest.param(world, case, id=f"cp={world}-{case}") for world in (2, 3, 4) for case in cases(world)],
)
def test_a_sequence_cut_over_ranks_is_attended_as_a_whole(world: int, case: Case) -> None:
    assert differences(world)[str(case)] < CLOSE[case.dtype]


def counts_the_ring() -> dict[str, list[int]]:
    """The numbers that this rank sends, forward and backward."""
    sent: dict[str, list[int]] = {}
    real = dist.batch_isend_irecv
    world, rank = dist.get_world_size(), dist.get_rank()
    split = ContextSplit(Ring(world, rank, dist.group.WORLD), Axis(1, 0, dist.group.WORLD))
    q, k, v = (torch.randn(LENGTH // world, 1, n, 8, requires_grad=True) for n in (6, 2, 2))

    def counting(messages: list[Any], into: list[int]) -> Any:
        into += [message.tensor.numel() for message in messages if message.op is dist.isend]
        return real(messages)

    for way in ("forward", "backward"):
        sent[way] = []
        with mock.patch.object(dist, "batch_isend_irecv", lambda messages, into=sent[way]: counting(messages, into)):
            if way == "forward":
                out = split.plan(LENGTH).attention(q, k, v, scale=0.3, kernels=kernels("auto"))
            else:
                out.sum().backward()
    return sent


def test_the_ring_carries_key_heads_only() -> None:
    one = LENGTH // 3 * 2 * (8 + 8)  # a rank's positions, two key heads, keys and values
    for sent in run_ranks(counts_the_ring, 3):
        assert sent["forward"] == [one] * 2
        assert sent["backward"] == [one] * 5  # keys and values round once more, their gradients all the way home


def test_only_what_is_needed_is_kept_for_the_backward_pass() -> None:
    """Queries, keys with values, the result and one number per query and head: nothing that grows with s times t."""
    (kept,) = set(run_ranks(keeps, 2))
    rows = LENGTH // 2
    assert kept == (rows * 4 * 8, rows * 4 * 8, rows * 2 * 16, rows * 4)


def keeps() -> tuple[int, ...]:
    split = ContextSplit(Ring(2, dist.get_rank(), dist.group.WORLD), Axis(1, 0, dist.group.WORLD))
    q, k, v = (torch.randn(LENGTH // 2, 1, n, 8, requires_grad=True) for n in (4, 2, 2))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        split.plan(LENGTH).attention(q, k, v, scale=0.3, kernels=kernels("auto"))
    return tuple(sorted(kept, reverse=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_every_rank_meets_every_other_once_in_any_window(size: int) -> None:
    nobody: Any = None
    for window in (w for w in range(1, size + 1) if size % w == 0):
        rings = [Ring(size, rank, nobody, None, window) for rank in range(size)]
        for ring in rings:
            assert sorted(ring.owner(step) for step in range(size)) == list(range(size))
            assert ring.owner(0) == ring.rank
        for step in range(size):
            # what follows the keys of a rank is next where those keys are next, and home in the end
            last = step % window == window - 1
            for ring in rings:
                next_holder = rings[ring.neighbour(int(last), 1)]
                assert next_holder.owner((step + 1) % size) == ring.owner(step)


def test_merging_blocks_is_attention_to_all_their_keys() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 2, 4, 8), (9, 2, 2, 8), (9, 2, 2, 6)))
    mask = torch.rand(2, 1, 5, 9) > 0.5
    mask[:, :, 1, :4] = False  # nothing to see in the first block
    mask[:, :, 2] = False  # nor anywhere: the result is 0
    for side in (attention_block.reference, attention_block.blocked):
        whole = side.forward(q, k, v, scale=0.3, mask=mask)
        parts = [side.forward(q, k[at], v[at], scale=0.3, mask=mask[..., at]) for at in (slice(0, 4), slice(4, 9))]
        for got, expected in zip(attention_block.merge(*parts[0], *parts[1]), whole, strict=True):
            torch.testing.assert_close(got, expected)
        assert not whole[0][2].any()
        assert torch.isneginf(whole[1][:, :, 2]).all()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_both_sides_of_a_block_agree(groups: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_block, "ROWS", 8)  # several parts, the last one shorter
    torch.manual_seed(0)
    q, k, v = (torch.randn(length, 2, n, d, dtype=torch.float64) for n, d in ((4, 8), (groups, 8), (groups, 6)))
    grad = torch.randn(length, 2, 4, 6, dtype=torch.float64)
    for options in ({}, {"causal": True}):
        out, lse = attention_block.reference.forward(q, k, v, scale=0.3, **options)
        for got, expected in zip(
            attention_block.blocked.forward(q, k, v, scale=0.3, **options), (out, lse), strict=True
        ):
            torch.testing.assert_close(got, expected)
        back = [
            side.backward(grad, q, k, v, out, lse, scale=0.3, **options)
            for side in (attention_block.reference, attention_block.blocked)
        ]
        for got, expected in zip(*back, strict=True):
            torch.testing.assert_close(got, expected)


def test_the_side_of_a_block_goes_with_that_of_attention() -> None:
    assert kernels("auto").attention_block is attention_block.blocked
    assert kernels("reference").attention_block is attention_block.reference
    assert select(Device("npu")).attention_block is attention_block.npu
