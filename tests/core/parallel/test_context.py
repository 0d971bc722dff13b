"""Who holds which positions, and that the work of all ranks together is what attention needs: no pair of a query and a key is
left out, none counted twice."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mindspeed_core.kernels.segments import Segments
from mindspeed_core.parallel import context
from mindspeed_core.parallel.context import ContextSplit
from mindspeed_core.parallel.mesh import Axis, ParallelConfig
from mindspeed_core.parallel.ring_attention import Ring
from tests.harness import run_ranks


def split(ring: int, ulysses: int = 1, rank: int = 0, *, zigzag: bool = True) -> ContextSplit:
    """The split as one rank of ring x ulysses sees it, without groups."""
    place, part = divmod(rank, ulysses)
    nobody = cast("Any", None)
    return ContextSplit(Ring(ring, place, nobody), Axis(ulysses, part, nobody), zigzag and ring > 1)


def test_each_algorithm_holds_what_the_picture_shows() -> None:
    held = [split(2, rank=rank).positions(8).tolist() for rank in range(2)]
    assert held == [[0, 1, 6, 7], [2, 3, 4, 5]]
    held = [split(1, 2, rank).positions(8).tolist() for rank in range(2)]
    assert held == [[0, 1, 2, 3], [4, 5, 6, 7]]
    held = [split(2, 2, rank).positions(8).tolist() for rank in range(4)]
    assert held == [[0, 1], [6, 7], [2, 3], [4, 5]]
    held = [split(2, 2, rank, zigzag=False).positions(8).tolist() for rank in range(4)]
    assert held == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 3), (2, 1), (3, 1), (5, 1), (2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("zigzag", [True, False])
def test_every_position_is_held_once(ring: int, ulysses: int, zigzag: bool) -> None:
    ranks = [split(ring, ulysses, rank, zigzag=zigzag) for rank in range(ring * ulysses)]
    length = 2 * ranks[0].multiple
    held = torch.cat([rank.positions(length) for rank in ranks])
    assert held.sort().values.tolist() == list(range(length))
    batch = torch.arange(3 * length).view(3, length)
    for rank in ranks:
        assert torch.equal(rank.share(batch), batch[:, rank.positions(length)])
    with pytest.raises(AssertionError, match="does not divide"):
        ranks[0].positions(length + 1)


def pairs(
    ring: int, length: int, rows: int, *, zigzag: bool, mask: Tensor | None = None, segments: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """How often all ranks together compute each pair [rows, 1, length, length], and the work of each rank."""
    times = torch.zeros(rows, 1, length, length, dtype=torch.int64)
    areas = []
    for rank in range(ring):
        view = split(ring, rank=rank, zigzag=zigzag)
        works = view.plan(length, mask=mask, segments=segments).works
        assert works is not None
        area = 0
        for owner, found in enumerate(works):
            for work in found:
                queries = view.place(length, rank)[work.queries]
                keys = view.place(length, owner)[work.keys]
                seen = torch.ones(rows, 1, len(queries), len(keys), dtype=torch.bool)
                if work.mask is not None:
                    seen &= work.mask
                elif work.segments is not None:
                    seen = work.segments.mask(times.device, causal=work.causal)
                elif work.causal:
                    seen = seen.tril()
                times[:, :, queries[:, None], keys[None]] += seen
                area += int(seen.sum())
        areas.append(area)
    return times, areas


@pytest.mark.parametrize("ring", [2, 3, 4, 5])
def test_a_causal_ring_computes_the_triangle_once_and_evenly(ring: int) -> None:
    length = 6 * ring
    times, areas = pairs(ring, length, 1, zigzag=True)
    assert torch.equal(times[0, 0], torch.ones(length, length, dtype=torch.int64).tril())
    assert len(set(areas)) == 1, "zig-zag gives every rank the same work"
    times, areas = pairs(ring, length, 1, zigzag=False)
    assert torch.equal(times[0, 0], torch.ones(length, length, dtype=torch.int64).tril())
    assert areas == sorted(areas), "contiguous pieces do not"
    assert areas[0] < areas[-1]


@given(st.sampled_from([2, 3, 4]), st.booleans(), st.integers(0, 2**31))
def test_a_packed_ring_computes_each_document_once(ring: int, zigzag: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    length = 2 * ring * int(torch.randint(1, 4, (), generator=random))
    ids = (torch.rand(2, length, generator=random) < torch.rand((), generator=random)).cumsum(1)
    times, _ = pairs(ring, length, 2, zigzag=zigzag, segments=ids)
    expected = (ids[:, None, :, None] == ids[:, None, None, :]).tril()
    assert torch.equal(times, expected.long())
    assert torch.equal(Segments.of(ids).mask(ids.device, causal=True), expected)


@pytest.mark.parametrize("zigzag", [True, False])
def test_a_masked_ring_computes_what_the_mask_shows(zigzag: bool) -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 12, 12) > 0.5
    mask[..., :6, 6:] = False
    times, _ = pairs(3, 12, 2, zigzag=zigzag, mask=mask)
    assert torch.equal(times, mask.long())


def axes(parallel: dict[str, Any]) -> dict[str, Any]:
    """The ranks of this rank's context groups."""
    import torch.distributed as dist

    from mindspeed_core.device import Device
    from mindspeed_core.parallel.mesh import Mesh

    mesh = Mesh.create(ParallelConfig(**parallel), Device.open("cpu"))
    groups = {"cp": mesh.cp.group, "ring": mesh.ring.group, "ulysses": mesh.ulysses.group}
    found: dict[str, Any] = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
    found["places"] = mesh.ring.rank, mesh.ulysses.rank
    found["second"] = mesh.second_ring and dist.get_process_group_ranks(mesh.second_ring)
    mesh.close()
    return found


def test_the_ranks_of_a_hybrid_form_a_grid() -> None:
    found = run_ranks(axes, 4, {"cp": 4, "cp_algorithm": "hybrid", "ulysses": 2, "cp_overlap": True})
    assert [rank["ulysses"] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["ring"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["second"] for rank in found] == [rank["ring"] for rank in found]
    assert [rank["places"] for rank in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_ring_beside_tensor_parallelism_is_the_context_group() -> None:
    found = run_ranks(axes, 4, {"tp": 2, "cp": 2})
    assert [rank["ring"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["ring"] for rank in found] == [rank["cp"] for rank in found]
    assert [rank["ulysses"] for rank in found] == [[0], [1], [2], [3]]
    assert [rank["second"] for rank in found] == [None] * 4


@pytest.mark.parametrize(
    ("keys", "length", "fault"),
    [
        ({"cp": 3}, 32, "parallel.cp=3 (ring) needs a multiple of 6 and does not divide data.seq_length=32; "
                        "use a length of 30 or 36, or cp=1 or 2 or 4"),
        ({"cp": 3}, 36, None),
        ({"cp": 4, "cp_algorithm": "ulysses"}, 36, None),
        ({"cp": 4, "cp_algorithm": "ulysses"}, 34, "parallel.cp=4 (ulysses) needs a multiple of 4 and does not divide "
                                                   "data.seq_length=34; use a length of 32 or 36, or cp=2"),
        ({"cp": 4, "cp_algorithm": "hybrid", "ulysses": 2}, 36, None),
        ({"cp": 6, "cp_algorithm": "hybrid", "ulysses": 3}, 18, "parallel.cp=6 (hybrid) needs a multiple of 12 and does not "
                                                                "divide data.seq_length=18; use a length of 12 or 24"),
        ({"cp": 2, "tp": 4, "sp": True}, 12, "parallel.cp=2 (ring, sp) needs a multiple of 8 and does not divide "
                                             "data.seq_length=12; use a length of 8 or 16, or cp=1 or 3"),
        ({}, 7, None),
    ],
)  # fmt: skip
def test_a_length_that_cannot_be_cut_is_told_with_those_that_can(
    keys: dict[str, Any], length: int, fault: str | None
) -> None:
    assert context.length_problems(ParallelConfig(**keys), length) == ([] if fault is None else [fault])


def test_heads_that_cannot_be_dealt_are_told_with_the_ranks_that_can() -> None:
    assert context.head_problems(ParallelConfig(cp=3, cp_algorithm="ulysses", tp=2), 8) == [
        "parallel.cp=3 with parallel.tp=2 does not divide num_attention_heads=8; use 2 or 4"
    ]
    assert context.head_problems(ParallelConfig(cp=6, cp_algorithm="hybrid", ulysses=3), 8) == [
        "parallel.ulysses=3 with parallel.tp=1 does not divide num_attention_heads=8; use 2 or 4 or 8"
    ]
    assert context.head_problems(ParallelConfig(cp=3), 8) == []


@pytest.mark.parametrize("keys", [{"cp": 2}, {"cp": 4, "cp_algorithm": "hybrid", "ulysses": 2}])
def test_what_a_ring_does_not_attend_is_told_with_what_does(keys: dict[str, Any]) -> None:
    ring = ParallelConfig(**keys)
    faults = context.ring_problems(ring, window=4096, alibi=True)
    assert "sliding window of this model (sliding_window=4096); use parallel.cp_algorithm=ulysses" in faults[0]
    assert "linear biases of this model (ALiBi); use parallel.cp_algorithm=ulysses" in faults[1]
    assert context.ring_problems(ring, window=None, alibi=False) == []
    assert context.ring_problems(ParallelConfig(cp=2, cp_algorithm="ulysses"), window=4096, alibi=True) == []


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"cp": 4, "ulysses": 2}, "ulysses: 2 is for cp_algorithm=hybrid, not ring; leave it out"),
        ({"cp": 12, "cp_algorithm": "hybrid", "ulysses": 5}, "ulysses: 5 does not divide cp=12 into a ring of at least 2; "
                                                            "use 2 or 3 or 4 or 6"),
        ({"cp": 3, "cp_algorithm": "hybrid", "ulysses": 3}, "use cp_algorithm ring or ulysses, or cp=4"),
        ({"cp": 6, "cp_window": 4}, "cp_window: 4 does not divide the ring of 6; use 1 or 2 or 3 or 6"),
        ({"cp": 4, "cp_algorithm": "hybrid", "ulysses": 2, "cp_window": 4}, "the ring of 2; use 1 or 2"),
        ({"cp": 4, "cp_algorithm": "hybrid"}, "ulysses: hybrid needs it: how many of the cp=4 ranks deal heads, .*; use 2 "),
        ({"cp": 3, "cp_algorithm": "hybrid"}, "ulysses: hybrid needs it: .*; use cp_algorithm ring or ulysses, or cp=4"),
        ({"cp_algorithm": "hybrid", "ulysses": 2}, "cp_algorithm: hybrid cuts sequences over cp ranks, and cp=1; set cp"),
        ({"cp_algorithm": "ulysses"}, "cp_algorithm: ulysses cuts sequences over cp ranks, and cp=1; set cp, or leave it out"),
        ({"cp_window": 2}, "cp_window: is of a ring of at least 2 ranks, and cp=1 makes none; leave it out, or set cp"),
        ({"cp": 2, "cp_algorithm": "ulysses", "cp_window": 2}, "cp_window: .*, and cp_algorithm=ulysses makes none; leave it "
                                                               "out, or use ring or hybrid"),
        ({"cp": 2, "cp_algorithm": "ulysses", "cp_overlap": True}, "cp_overlap: .*, and cp_algorithm=ulysses makes none"),
        ({"cp_overlap": True}, "cp_overlap: .*, and cp=1 makes none; leave it out, or set cp"),
        ({"pp": 2, "vpp": 2, "layers_per_stage": "balanced"}, "layers_per_stage=balanced: chooses the layers of whole stages, which vpp=2 cuts"),
        ({"tp": 2, "coc_chunks": 2}, "coc_chunks: 2 is for collective_matmul=coc, not none; set collective_matmul, or leave"),
        ({"tp": 2, "collective_matmul": "mc2", "coc_chunks": 8}, "coc_chunks: 8 is for collective_matmul=coc, not mc2"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        ParallelConfig(**keys)


def test_all_keys_that_do_not_go_together_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)etp=2: .*coc_chunks: 2 .*cp_window: .*cp_overlap: "):
        ParallelConfig(tp=4, etp=2, coc_chunks=2, cp_window=2, cp_overlap=True)
