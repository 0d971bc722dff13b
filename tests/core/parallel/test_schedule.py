"""The order in which stages compute, against Megatron's own tables, and the bubble against its closed forms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_core.parallel import schedule
from mindspeed_core.parallel.pipeline import Placement
from mindspeed_core.parallel.schedule import Piece, pieces, simulate
from tests.harness import run_ranks


def _bubble(pp: int, vpp: int, micro_batches: int, **more: Any) -> float:
    placement = Placement(num_layers=pp * vpp, pp=pp, vpp=vpp)
    seconds = {False: 1.0 / vpp, True: 2.0 / vpp}
    return simulate(
        placement, micro_batches=micro_batches, seconds=lambda piece: seconds[piece.backward], **more
    ).bubble


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 30))
def test_the_bubble_of_equal_stages_is_the_closed_form(pp: int, micro_batches: int) -> None:
    assert _bubble(pp, 1, micro_batches) == pytest.approx((pp - 1) / micro_batches)


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(2, 4), st.integers(1, 5))
def test_chunks_divide_the_bubble(pp: int, vpp: int, groups: int) -> None:
    micro_batches = pp * groups
    assert _bubble(pp, vpp, micro_batches) == pytest.approx((pp - 1) / (micro_batches * vpp))


def test_the_picture_of_the_module_is_what_it_draws() -> None:
    timeline = simulate(
        Placement(num_layers=2, pp=2), micro_batches=4, seconds=lambda piece: 2.0 if piece.backward else 1.0
    )
    assert timeline.length == 15
    rows = [[".."] * 15 for _ in range(2)]
    for span in timeline.spans:
        for second in range(int(span.start), int(span.end)):
            rows[span.piece.stage][second] = f"{'FB'[span.piece.backward]}{span.piece.micro_batch}"
    for stage, row in enumerate(rows):
        assert f"    stage {stage}   {' '.join(row)}\n" in (schedule.__doc__ or "")


def test_transfers_and_a_slow_stage_widen_the_bubble() -> None:
    assert _bubble(2, 1, 8, transfer=0.1) > _bubble(2, 1, 8)
    placement = Placement(num_layers=4, pp=2, layers_per_stage=(1, 3))
    uneven = simulate(placement, micro_batches=8, seconds=lambda piece: float(len(placement.layers(piece.stage))))
    assert uneven.length == 3 * 16 + 2  # the slow stage never waits but for its first micro batch and the last backward
    assert uneven.bubble > 0.5


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 30))
def test_delayed_gradients_of_weights_narrow_the_bubble(pp: int, micro_batches: int) -> None:
    timeline = simulate(
        Placement(num_layers=pp, pp=pp),
        micro_batches=max(pp, micro_batches),
        seconds=lambda piece: 1.0,  # a third of a step each: forward, gradients of inputs, gradients of weights
        after=lambda piece: float(piece.backward),
    )
    assert timeline.length == 3 * max(pp, micro_batches) + 2 * (pp - 1)  # at once: 3 * (pp - 1)


def test_the_order_is_megatrons() -> None:
    run_ranks(_megatrons_order, 1)


def _megatrons_order() -> None:
    from mindspeed_core import megatron
    from mindspeed_core.device import Device

    megatron.load(Device.open("cpu"))
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    for pp, vpp, micro_batches in ((2, 2, 4), (2, 3, 8), (4, 2, 8)):
        table = get_schedule_table(micro_batches, vpp, pp)
        for stage in range(pp):
            found = pieces(stage, pp=pp, vpp=vpp, micro_batches=micro_batches)
            assert [(p.micro_batch, p.chunk) for p in found if not p.backward] == table
            assert [(p.micro_batch, vpp - 1 - p.chunk) for p in found if p.backward] == table
            ahead = found.index(next(piece for piece in found if piece.backward)) - 1
            assert ahead == min((pp - stage - 1) * 2 + (vpp - 1) * pp, len(table) - 1)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_every_piece_is_computed_once(pp: int, vpp: int, groups: int) -> None:
    vpp = vpp if pp > 1 else 1
    micro_batches = pp * groups
    for stage in range(pp):
        found = pieces(stage, pp=pp, vpp=vpp, micro_batches=micro_batches)
        assert len(set(found)) == len(found) == 2 * vpp * micro_batches
        for piece in found:
            if piece.backward:
                forward = Piece(stage=stage, chunk=piece.chunk, micro_batch=piece.micro_batch, backward=False)
                assert found.index(forward) < found.index(piece)
