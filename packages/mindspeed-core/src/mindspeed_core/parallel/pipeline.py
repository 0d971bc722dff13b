"""Which layers of the model each pipeline stage holds: the one rule that training and conversion share."""

from __future__ import annotations


def stage_layers(num_layers: int, pp: int, stage: int) -> range:
    """Return the layers of stage `stage` of `pp`, counted over the whole model.

        num_layers=8 pp=4      stage 0     1     2     3          num_layers=5 pp=2      stage 0       1
                               layers 0 1   2 3   4 5   6 7                              layers 0 1 2   3 4

    Where the stages do not divide the layers, the first ones hold one more: the last one has the output layer besides.
    A stage numbers its own layers from 0: layer `i` of the model is layer `i - stage_layers(...).start` of its stage.
    """
    assert 0 <= stage < pp <= num_layers, f"stage {stage} of {pp} for {num_layers} layers"
    each, more = divmod(num_layers, pp)
    start = stage * each + min(stage, more)
    return range(start, start + each + (stage < more))
