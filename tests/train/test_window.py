"""A model with a sliding window learns the same on ranks that share its sequences as on one, and something else without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindspeed_core.models.families import family_of
from mindspeed_train import rules
from mindspeed_train.config import Recipe
from tests.train import runs

WINDOW: dict[str, Any] = {**runs.SIZES, "preset": "mistral-7b-v0.1", "sliding_window": 6}
ULYSSES: dict[str, Any] = {"cp": 2, "cp_algorithm": "ulysses", "dp": 1}


def test_documents_learn_the_same_under_ulysses(tmp_path: Path) -> None:
    material = runs.material(tmp_path / "material")

    def losses(name: str, model: dict[str, Any], **parallel: Any) -> list[float]:
        sections = {"model": model, "data": {"pack": True}, "parallel": parallel, "train": {"steps": 3}}
        world = parallel.get("cp", 1)
        lines = runs.train(runs.values(material, tmp_path / name, **sections), world=world)
        return [line[key] for line in lines for key in ("loss", "grad_norm")]

    alone = losses("alone", WINDOW)
    assert losses("ulysses", WINDOW, **ULYSSES) == pytest.approx(alone, rel=1e-5)
    assert losses("everything", {**WINDOW, "sliding_window": 64}) != pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("parallel", [{"cp": 2}, {"cp": 4, "cp_algorithm": "hybrid", "ulysses": 2}])
def test_a_ring_is_refused_before_any_rank_starts(parallel: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.model_validate(runs.values(tmp_path, tmp_path / "run", model=WINDOW, parallel=parallel))
    arch = family_of(recipe.model.config()).architecture(recipe.model.config())
    (fault,) = rules.problems(rules.Case(recipe=recipe, dp=1, arch=arch, length=32))
    assert fault.startswith(f"parallel.cp_algorithm={recipe.parallel.cp_algorithm}: its ring does not attend in the")
    assert fault.endswith("(sliding_window=6); use parallel.cp_algorithm=ulysses")
