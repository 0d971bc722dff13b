"""Models whose attention a ring does not know learn the same on ranks that share their sequences by Ulysses as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindspeed_core.models.families import family_of
from mindspeed_train import rules
from mindspeed_train.config import Recipe
from tests.train import runs
from tests.train.models import ALIBI, WINDOW

# the model, what it would be without, and how it is refused
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "window": (WINDOW, {"sliding_window": 64}, "attend in the sliding window of this model (sliding_window=6)"),
    "alibi": (ALIBI, {"preset": "baichuan-7b"}, "add the linear biases of this model (ALiBi)"),
}


@pytest.mark.parametrize("name", MODELS)
def test_documents_learn_the_same_under_ulysses(name: str, tmp_path: Path) -> None:
    material = runs.material(tmp_path / "material")
    model, without, _ = MODELS[name]

    def losses(folder: str, model: dict[str, Any], **parallel: Any) -> list[float]:
        sections = {"data": {"pack": True}, "parallel": parallel, "train": {"steps": 3}}
        recipe = {**runs.values(material, tmp_path / folder, **sections), "model": model}
        lines = runs.train(recipe, world=parallel.get("cp", 1))
        return [line[key] for line in lines for key in ("loss", "grad_norm")]

    alone = losses("alone", model)
    assert losses("ulysses", model, cp=2, cp_algorithm="ulysses", dp=1) == pytest.approx(alone, rel=1e-5)
    assert losses("without", model | without) != pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parallel", [{"cp": 2}, {"cp": 4, "cp_algorithm": "hybrid", "ulysses": 2}])
def test_a_ring_is_refused_before_any_rank_starts(name: str, parallel: dict[str, Any], tmp_path: Path) -> None:
    model, _, what = MODELS[name]
    recipe = Recipe.model_validate({**runs.values(tmp_path, tmp_path / "run", parallel=parallel), "model": model})
    arch = family_of(recipe.model.config()).architecture(recipe.model.config())
    (fault,) = rules.problems(rules.Case(recipe=recipe, dp=1, arch=arch, length=32))
    kind = f"parallel.cp_algorithm={recipe.parallel.cp_algorithm}"
    assert fault == f"{kind}: its ring does not {what}; use parallel.cp_algorithm=ulysses"
