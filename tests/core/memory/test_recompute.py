"""Recompute changes no bit of a gradient, and keeps less."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mindspeed_core.memory.config import MemoryConfig
from tests.core.memory import forgetful
from tests.core.memory.forgetful import FFN, HEADS, HIDDEN, LAYERS, LENGTH, ROWS
from tests.harness import run_ranks

NORM_AND_ACTIVATION = {"recompute_norm": True, "recompute_activation": True}
FEATURES: dict[str, dict[str, Any]] = {
    "full": {"recompute": "full"},
    "full, two layers": {"recompute": "full", "recompute_layers": 2},
    "full, groups of three": {"recompute": "full", "recompute_method": "uniform", "recompute_layers": 3},
    "selective": {"recompute": "selective"},
    "norm": {"recompute_norm": True},
    "activation": {"recompute_activation": True},
    "selective, norm, activation": {"recompute": "selective", **NORM_AND_ACTIVATION},
    "full, then norm, activation": {
        "recompute": "full",
        "recompute_layers": 1,
        "recompute_norm": True,
        "recompute_activation": 2,
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tp": 2},
    "tp2 sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "cp2 ring": {"cp": 2},
    "cp2 ulysses": {"cp": 2, "cp_algorithm": "ulysses"},
}
PER_RANK = {"recompute": "full", "recompute_layers": 3, "recompute_per_rank": True, "recompute_activation": 2}
TOKENS = ROWS * LENGTH * 4  # bytes of one fp32 number per token


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_the_same_to_the_bit(layout: str) -> None:
    parallel = LAYOUTS[layout]
    world = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("cp", 1)
    features = {**FEATURES, "per rank": PER_RANK} if "vpp" in parallel else FEATURES
    for rank, answers in enumerate(run_ranks(forgetful.compare, world, list(features.values()), parallel)):
        for name, answer in zip(("plain", *features), answers, strict=True):
            assert (answer["losses"], answer["gradients"]) == (True, True), f"{name} on rank {rank}"


@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "sp": True}, {"dp": 2, "ep": 2}], ids=["one", "tp2 sp", "ep2"])
def test_experts_forget_too(parallel: dict[str, Any]) -> None:
    world = 2 if parallel else 1
    answers = run_ranks(forgetful.compare, world, list(FEATURES.values()), parallel, {"with_experts": True})[0]
    for name, answer in zip(("plain", *FEATURES), answers, strict=True):
        assert (answer["losses"], answer["gradients"]) == (True, True), name
    plain, saved = answers[0]["saved"], {name: a["saved"] for name, a in zip(FEATURES, answers[1:], strict=True)}
    assert plain - saved["activation"] > 0
    assert plain - saved["norm"] > 0


def test_bf16_gradients_too() -> None:
    answers = run_ranks(forgetful.compare, 1, list(FEATURES.values()), {}, {"precision": "bf16"})[0]
    assert all(answer["losses"] and answer["gradients"] for answer in answers)


def test_less_is_kept() -> None:
    answers = run_ranks(forgetful.compare, 1, list(FEATURES.values()), {})[0]
    plain, saved = answers[0]["saved"], {name: a["saved"] for name, a in zip(FEATURES, answers[1:], strict=True)}
    layer = (plain - saved["full, two layers"]) / 2
    angles = 2 * LENGTH * HIDDEN // HEADS * 4  # the cosines and sines, which all layers share
    assert plain - saved["full"] == LAYERS * layer + angles
    assert saved["full"] - saved["full, groups of three"] == (LAYERS - 2) * HIDDEN * TOKENS
    # outputs, and what a kernel of several steps keeps between them
    norm, activation = (plain - saved["norm"]) / LAYERS, (plain - saved["activation"]) / LAYERS
    assert norm >= 2 * HIDDEN * TOKENS
    assert activation >= FFN * TOKENS
    assert saved["selective"] < plain
    assert plain - saved["selective, norm, activation"] == plain - saved["selective"] + LAYERS * (norm + activation)
    assert plain - saved["full, then norm, activation"] == layer + 3 * norm + 2 * activation


def _layers(config: MemoryConfig, layers: int, **place: int) -> tuple[list[int], list[int], list[int]]:
    plan = config.plan(layers, **place)
    return [i for group in plan.groups for i in group], sorted(plan.norm), sorted(plan.activation)


def test_layers_take_their_turn() -> None:
    config = MemoryConfig(recompute="full", recompute_layers=1, recompute_norm=2, recompute_activation=True)
    assert _layers(config, 4) == ([0], [1, 2], [1, 2, 3])
    assert _layers(config, 4, chunk=1, chunks=2) == ([0], [1, 2], [1, 2, 3])  # in every chunk alike
    assert _layers(MemoryConfig(recompute_norm=1), 3) == ([], [0], [])


def test_on_a_rank_the_turn_goes_round_its_chunks() -> None:
    config = MemoryConfig(recompute="full", recompute_layers=3, recompute_per_rank=True, recompute_activation=2)
    assert _layers(config, 3, chunk=0, chunks=2) == ([0, 1], [], [2])
    assert _layers(config, 3, chunk=1, chunks=2) == ([0], [], [1])


def test_groups_end_with_the_chunk() -> None:
    config = MemoryConfig(recompute="full", recompute_method="uniform", recompute_layers=2)
    assert config.plan(5).groups == (range(2), range(2, 4), range(4, 5))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"recompute_layers": 2}, "recompute_layers: is about whole layers; set recompute: full too"),
        ({"recompute": "full", "recompute_per_rank": True}, "recompute_per_rank: is how recompute_layers counts"),
        ({"recompute": "selective", "recompute_method": "uniform"}, "recompute_method: is about whole layers"),
        (
            {"recompute": "full", "recompute_method": "uniform", "recompute_norm": True},
            "recompute_norm: uniform recomputes every layer whole; use recompute_method: block",
        ),
        (
            {"recompute": "full", "swap_attention": True},
            "swap_attention: recompute: full takes every layer whole; set recompute_layers too, or leave it out",
        ),
        ({"recompute": "full", "recompute_norm": 2}, "recompute_norm: recompute: full takes every layer whole"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        MemoryConfig(**values)


FOUR, CHUNKS, NOOPS = [[4]], [[1, 1], [1, 1]], [[1, 2], [0, 1]]


@pytest.mark.parametrize(
    ("values", "stages", "line"),
    [
        ({"recompute": "full"}, FOUR, None),
        ({"recompute": "full", "recompute_layers": 4}, FOUR, None),
        (
            {"recompute": "full", "recompute_layers": 99},
            FOUR,
            "memory.recompute_layers=99: a pipeline chunk has at most 4 layers; use at most 4, or leave it out",
        ),
        (
            {"recompute": "full", "recompute_method": "uniform", "recompute_layers": 2},
            CHUNKS,
            "memory.recompute_layers=2: a pipeline chunk has at most 1 layer; use at most 1, or leave it out",
        ),
        ({"recompute": "full", "recompute_layers": 2}, NOOPS, None),
        ({"recompute": "full", "recompute_layers": 2, "recompute_per_rank": True}, CHUNKS, None),
        (
            {"recompute": "full", "recompute_layers": 3, "recompute_per_rank": True},
            CHUNKS,
            "memory.recompute_layers=3: a pipeline stage has at most 2 layers; use at most 2, or leave it out",
        ),
        ({"recompute": "full", "recompute_layers": 3, "swap_attention": True, "recompute_norm": 1}, FOUR, None),
        (
            {"recompute": "full", "recompute_layers": 4, "swap_attention": True},
            FOUR,
            "memory.swap_attention: a pipeline chunk has at most 4 layers, all recomputed whole; use fewer recompute_layers, "
            "or leave it out",
        ),
        (
            {"recompute": "full", "recompute_layers": 1, "recompute_norm": 4},
            FOUR,
            "memory.recompute_norm=4: a pipeline chunk has at most 4 layers, 3 behind those recomputed whole; use at most 3, "
            "or true",
        ),
        (
            {"recompute_activation": 5},
            FOUR,
            "memory.recompute_activation=5: a pipeline chunk has at most 4 layers; use at most 4, or true",
        ),
    ],
)
def test_layers_that_no_chunk_has_are_refused(
    values: dict[str, Any], stages: list[list[int]], line: str | None
) -> None:
    assert MemoryConfig(**values).problems(stages) == ([] if line is None else [line])
