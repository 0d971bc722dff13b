"""A decoder layer launches the fused kernels it should, forward and back, and nothing else: a silent fallback shows here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ascend import layers
from tests.ascend.trace import golden, traced, written

pytestmark = pytest.mark.stubs
FUSED = {"FlashAttentionScore": 1, "SwiGlu": 1, "RotaryPositionEmbeddingV2": 2}  # of every kind of layer
APART = {"Softmax", "Exp", "Sigmoid", "Silu", "Rsqrt", "Pow", "Mean", "Neg", "Cos", "Sin"}  # what they are made of


@pytest.fixture(scope="module")
def found(libraries: Path) -> dict[str, dict[str, list[str]]]:
    return traced("tests.ascend.layers", libraries)


@pytest.mark.parametrize("kind", layers.SIZES)
def test_a_layer_launches_its_kernels(kind: str, found: dict[str, dict[str, list[str]]]) -> None:
    came = found[kind]
    assert {name: came["forward"].count(name) for name in FUSED} == FUSED
    assert not APART & {*came["forward"], *came["backward"]}
    assert (came["forward"], came["backward"]) == golden("layers.txt")[kind], written(came)
