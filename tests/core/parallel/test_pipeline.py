"""Where the layers lie."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mindspeed_core.parallel.pipeline import stage_layers


@given(st.integers(1, 100), st.data())
def test_stages_follow_one_another_and_differ_by_one_layer_at_most(layers: int, data: st.DataObject) -> None:
    pp = data.draw(st.integers(1, layers))
    stages = [stage_layers(layers, pp, stage) for stage in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    sizes = [len(stage) for stage in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
