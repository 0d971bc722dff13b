"""Optimizer tensors stored in fewer bits lie in checkpoints as in any run: resumed bit for bit, with or without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import runs

HALFWAY: dict[str, Any] = {"train": {"steps": 6}, "precision": "bf16"}
PLAIN: dict[str, Any] = {}
OWN: dict[str, Any] = {"reuse_fp32_param": True}
ALL: dict[str, Any] = {"reuse_fp32_param": True, "bf16_states": True, "bf16_grads": True}


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


def _recipe(where: Path, run: Path, optim: dict[str, Any], dp: int) -> dict[str, Any]:
    checkpoint = {"every": 3, "folder": str(run)}
    return runs.values(where, run, **HALFWAY, optim=optim, parallel={"dp": dp}, checkpoint=checkpoint)


def _same(one: Path, other: Path) -> None:
    mine, theirs = (runs.stored(run / "checkpoints" / "step_6") for run in (one, other))
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]), key
    numbers = [[line["loss"], line["grad_norm"]] for line in runs.metrics(one)]
    assert numbers == [[line["loss"], line["grad_norm"]] for line in runs.metrics(other)]


@pytest.mark.parametrize(
    ("before", "after", "dp"),
    [
        (OWN, OWN, 1),  # the same files as without it, and the straight run's bits
        ({**OWN, "distributed": True}, {**OWN, "distributed": True}, 2),
        (OWN, PLAIN, 1),
        ({"distributed": True}, {**OWN, "distributed": True}, 2),
    ],
    ids=["own", "own distributed", "own then plain", "plain then own, distributed"],
)
def test_masters_of_their_own_resume_as_any(
    before: dict[str, Any], after: dict[str, Any], dp: int, where: Path, tmp_path: Path
) -> None:
    straight = {key: value for key, value in before.items() if key == "distributed"}
    runs.train(_recipe(where, tmp_path / "straight", straight, dp), world=dp)
    runs.stop(_recipe(where, tmp_path / "run", before, dp), world=dp)
    runs.train(_recipe(where, tmp_path / "run", after, dp), world=dp)
    _same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "distributed"])
def test_narrow_moments_and_gradients_resume_bit_for_bit(distributed: bool, where: Path, tmp_path: Path) -> None:
    optim, dp = {**ALL, "distributed": distributed}, 2 if distributed else 1
    runs.train(_recipe(where, tmp_path / "straight", optim, dp), world=dp)
    runs.stop(_recipe(where, tmp_path / "run", optim, dp), world=dp)
    runs.train(_recipe(where, tmp_path / "run", optim, dp), world=dp)
    _same(tmp_path / "run", tmp_path / "straight")
    stored = runs.stored(tmp_path / "run" / "checkpoints" / "step_6")
    moments = [tensor for key, tensor in stored.items() if ".exp_avg" in key]
    assert moments
    assert {tensor.dtype for tensor in moments} == {torch.bfloat16}
    assert all((tensor.float() >= 0).all() for key, tensor in stored.items() if ".exp_avg_sq." in key)
