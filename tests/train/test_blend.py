"""Fine-tuning on a blend: a run that was stopped goes on as it would have, and copies change nothing."""

from pathlib import Path
from typing import Any

import pytest

from tests.train import runs


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


def _values(where: Path, run: Path, **sections: Any) -> dict[str, Any]:
    mix = {str(where / "chat"): 3.0, str(where / "chat_valid"): 1.0}
    data = {"train": mix, "valid": mix, **sections.pop("data", {})}
    train = {"steps": 4, "eval_every": 2, "eval_steps": 1, **sections.pop("train", {})}
    return runs.values(where, run, "sft", data=data, train=train, **sections)


@pytest.mark.parametrize("pack", [False, True])
def test_a_run_on_a_blend_resumes_where_it_stopped(where: Path, tmp_path: Path, pack: bool) -> None:
    straight = runs.train(_values(where, tmp_path / "one", data={"pack": pack}), "sft")
    recipe = _values(where, tmp_path / "two", data={"pack": pack}, checkpoint={"every": 2})
    runs.stop(recipe, "sft")
    runs.train(recipe, "sft")
    assert [line.get("loss") for line in runs.metrics(tmp_path / "two")] == [line.get("loss") for line in straight]
    alone = runs.train(_values(where, tmp_path / "three", data={"pack": pack, "train": str(where / "chat")}), "sft")
    assert [line.get("loss") for line in alone] != [line.get("loss") for line in straight]


def test_copies_of_the_model_see_the_samples_of_one(where: Path, tmp_path: Path) -> None:
    losses = []
    for dp in (1, 2):
        lines = runs.train(_values(where, tmp_path / str(dp), parallel={"dp": dp}), "sft", world=dp)
        losses.append([line[name] for line in lines for name in ("loss", "valid_loss") if name in line])
    assert len(losses[0]) > 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
