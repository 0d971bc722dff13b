"""Where the layers lie."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_core.models.split import command_option, recipe_key
from mindspeed_core.parallel.pipeline import Placement, balanced


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any placement that has no problems: shared by the stages, named for each, or in chunks with noop layers."""
    pp = draw(st.integers(1, 6))
    how = draw(st.sampled_from(["shared", "named", "chunks"]))
    if how == "shared":
        return Placement(num_layers=draw(st.integers(pp, 40)), pp=pp)
    if how == "named":
        counts = tuple(draw(st.lists(st.integers(1, 6), min_size=pp, max_size=pp)))
        return Placement(num_layers=sum(counts), pp=pp, layers_per_stage=counts)
    vpp = draw(st.integers(1, 4)) if pp > 1 else 1
    slots = pp * vpp * draw(st.integers(1, 4))
    noops = draw(st.sets(st.integers(0, slots - 1), max_size=slots - 1))
    return Placement(num_layers=slots - len(noops), pp=pp, vpp=vpp, noop_layers=tuple(sorted(noops)))


@settings(deadline=None)
@given(placements())
def test_every_layer_has_one_place_and_the_model_runs_through_them_in_order(placement: Placement) -> None:
    assert placement.problems(recipe_key) == []
    held = [(stage, chunk, placement.held(stage, chunk)) for stage, chunk in placement.chunks]
    real = [layer for _, _, layers in held for layer in layers if layer is not None]
    assert real == list(range(placement.num_layers))
    assert sum(len(layers) for _, _, layers in held) == placement.slots
    for stage, chunk, layers in held:
        assert [layer for layer in layers if layer is not None] == list(placement.layers(stage, chunk))
        for local, layer in enumerate(layers):
            if layer is not None:
                place = placement.place(layer)
                assert (place.stage, place.chunk, place.local) == (stage, chunk, local)
    slots = [slot for stage, chunk in placement.chunks for slot in placement.chunk_slots(stage, chunk)]
    assert slots == list(range(placement.slots))
    noops = [
        slot for slot, layer in zip(slots, (x for _, _, layers in held for x in layers), strict=True) if layer is None
    ]
    assert noops == list(placement.noop_layers)
    assert [place for place in placement.chunks if placement.is_first(*place)] == placement.chunks[:1]
    assert [place for place in placement.chunks if placement.is_last(*place)] == placement.chunks[-1:]


@settings(deadline=None)
@given(st.integers(1, 100), st.data())
def test_stages_that_share_the_layers_differ_by_one_at_most(layers: int, data: st.DataObject) -> None:
    placement = Placement(num_layers=layers, pp=data.draw(st.integers(1, layers)))
    sizes = [len(placement.layers(stage)) for stage in range(placement.pp)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert placement.even == (sizes[0] == sizes[-1])


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(2, 4), st.integers(1, 4))
def test_chunks_lie_where_megatron_has_them(pp: int, vpp: int, each: int) -> None:
    placement = Placement(num_layers=pp * vpp * each, pp=pp, vpp=vpp)
    for layer in range(placement.num_layers):
        place = placement.place(layer)
        assert layer == place.chunk * (each * pp) + place.stage * each + place.local


def test_noop_layers_take_places() -> None:
    placement = Placement(num_layers=6, pp=2, vpp=2, noop_layers=(0, 7))
    assert [placement.held(*place) for place in placement.chunks] == [(None, 0), (1, 2), (3, 4), (5, None)]
    assert [list(placement.layers(*place)) for place in placement.chunks] == [[0], [1, 2], [3, 4], [5]]
    empty = Placement(num_layers=2, pp=3, noop_layers=(1,))
    assert [list(empty.layers(stage)) for stage in range(3)] == [[0], [], [1]]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_layers": 2, "pp": 4}, "parallel.pp=4 is more stages than num_hidden_layers=2; use at most 2"),
    ({"num_layers": 4, "vpp": 2}, "parallel.vpp=2: cuts pipeline stages into chunks and needs pp of at least 2"),
    (
        {"num_layers": 8, "pp": 2, "vpp": 3},
        "parallel.vpp=3: pp=2 x vpp=3 = 6 chunks cannot share 8 layers equally; "
        "use vpp=1 or 2 or 4, or add 4 more to noop_layers",
    ),
    (
        {"num_layers": 6, "pp": 4, "noop_layers": (6,)},
        "parallel.noop_layers=6: pp=4 stages cannot share 7 layers (1 of them noop) equally; add 1 more to noop_layers",
    ),
    (
        {"num_layers": 3, "pp": 2, "noop_layers": (4,)},
        "parallel.noop_layers=4: counts the 3 layers of the model and the noop layers together; "
        "use each number once, from 0 to 3",
    ),
    (
        {"num_layers": 2, "pp": 2, "noop_layers": (1, 1)},
        "parallel.noop_layers=1,1: counts the 2 layers of the model and the noop layers together; "
        "use each number once, from 0 to 3",
    ),
    *(
        (
            {"num_layers": 10, "pp": 4, "layers_per_stage": counts},
            f"parallel.layers_per_stage={','.join(map(str, counts))}: needs a number of at least 1 for each of the pp=4 "
            "stages, 10 together (num_hidden_layers), as in 3,3,2,2",
        )
        for counts in ((5, 5), (4, 3, 2, 2), (5, 5, 0, 0))
    ),
    (
        {"num_layers": 4, "pp": 2, "vpp": 2, "layers_per_stage": (2, 2)},
        "parallel.layers_per_stage=2,2: says all that parallel.vpp=2 says otherwise; leave one of them out",
    ),
    (
        {"num_layers": 4, "pp": 2, "noop_layers": (0,), "layers_per_stage": (2, 2)},
        "parallel.layers_per_stage=2,2: says all that parallel.noop_layers=0 says otherwise; leave one of them out",
    ),
]


@pytest.mark.parametrize(("fields", "line"), BAD)
def test_a_placement_that_cannot_be_is_told_in_one_line(fields: dict[str, Any], line: str) -> None:
    assert Placement(**fields).problems(recipe_key) == [line]


def test_a_command_hears_of_its_own_options() -> None:
    assert (
        Placement(num_layers=4, pp=2, layers_per_stage=(1, 2))
        .problems(command_option)[0]
        .startswith("--layers-per-stage 1,2: needs")
    )


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7).flatmap(
        lambda work: st.tuples(st.just(work), st.integers(0, 30), st.integers(1, len(work)))
    )
)
def test_balanced_stages_have_as_little_work_as_any_cut_leaves_the_busiest(case: tuple[list[int], int, int]) -> None:
    work, last, pp = case
    count = len(work)

    def busiest(counts: tuple[int, ...]) -> int:
        ends = [0, *itertools.accumulate(counts)]
        stages = [sum(work[start:stop]) for start, stop in itertools.pairwise(ends)]
        return max(*stages[:-1], stages[-1] + last) if pp > 1 else stages[0] + last

    found = balanced(work, last, pp)
    assert len(found) == pp
    assert sum(found) == count
    assert min(found) >= 1
    cuts = itertools.combinations(range(1, count), pp - 1)
    every = [tuple(b - a for a, b in itertools.pairwise((0, *cut, count))) for cut in cuts]
    assert busiest(found) == min(map(busiest, every))


def test_alike_stages_are_as_even_as_can_be() -> None:
    assert balanced([1.0] * 8, 0.0, 4) == (2, 2, 2, 2)
    assert balanced([1.0] * 8, 4.0, 2) == (6, 2)
    assert sorted(balanced([1.0] * 8, 0.0, 3)) == [2, 3, 3]
