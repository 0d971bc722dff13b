"""Which layers of the model each pipeline stage holds: the one rule that training and conversion share."""

from __future__ import annotations


def stage_layers(num_layers: int, pp: int, stage: int) -> range:
    """Return the layers of stage `stage` of `pp`, counted over the whole model.

        num_layers=8 pp=4      stage 0     1     2     3
                               layers 0 1   2 3   4 5   6 7

    A stage numbers its own layers from 0: layer `i` of the model is layer `i - stage_layers(...).start` of its stage.
    """
    assert 0 <= stage < pp, f"stage {stage} of {pp}"
    assert num_layers % pp == 0, f"{num_layers} layers do not divide into {pp} stages"
    per_stage = num_layers // pp
    return range(stage * per_stage, (stage + 1) * per_stage)
