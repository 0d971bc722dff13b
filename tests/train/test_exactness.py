"""The table of what does not equal one process: it departs where the table says, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindspeed_core.models.families import family_of
from mindspeed_train import exactness
from mindspeed_train.config import Recipe
from mindspeed_train.rules import Case
from tests.harness import run_ranks
from tests.train import runs
from tests.train.models import EXPERTS

JITTER, SPARSEMIXER, SINKHORN = {"jitter": 0.1}, {"router": "sparsemixer"}, {"router": "sinkhorn"}
CAPACITY = {"capacity_factor": 1.0, "drop": "position"}
TENSOR, CONTEXT, STAGES, COPIES = {"tp": 2, "sp": True}, {"cp": 2}, {"pp": 2}, {"dp": 2}
CASES = [
    (JITTER, {"recompute": "full"}, []),
    (SPARSEMIXER, {"recompute": "full"}, []),
    (JITTER, COPIES, ["experts.jitter=0.1"]),
    (JITTER, STAGES, ["experts.jitter=0.1"]),
    (SPARSEMIXER, TENSOR, ["experts.router=sparsemixer"]),
    (SPARSEMIXER, COPIES, ["experts.router=sparsemixer"]),
    (SINKHORN, COPIES, []),
    (SINKHORN, STAGES, []),
    (SINKHORN, {"ep": 2}, []),
    (SINKHORN, CONTEXT, ["experts.router=sinkhorn"]),
    (CAPACITY, COPIES, []),
    (CAPACITY, {"ep": 2}, []),
    (CAPACITY, TENSOR, ["experts.capacity_factor=1.0"]),
    (CAPACITY, CONTEXT, ["experts.capacity_factor=1.0"]),
    ({"balance": "micro_batch", "aux_loss": 0.1, "z_loss": 0.01}, TENSOR, []),
    ({"balance": "micro_batch", "aux_loss": 0.1, "z_loss": 0.01}, COPIES, []),
]  # fmt: skip


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


def _case(values: dict[str, Any]) -> Case:
    recipe = Recipe.model_validate(values)
    config = recipe.model.config()
    dp = recipe.parallel.world_size() // recipe.parallel.model_ranks
    return Case(recipe=recipe, dp=dp, arch=family_of(config, where="model").architecture(config))


def _name(experts: dict[str, Any], layout: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in {**experts, **layout}.items())


def _values(where: Path, folder: Path, experts: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    run = folder / _name(experts, layout)
    memory = {"memory": layout} if "recompute" in layout else {"parallel": layout}
    return runs.values(where, run, model=EXPERTS, train={"steps": 3}, experts=experts, **memory)


def train_all(recipes: list[dict[str, Any]]) -> None:
    for recipe in recipes:
        runs.trains(recipe, "pretrain")


@pytest.fixture(scope="module")
def losses(where: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of every case and of its run in one process; starting ranks costs more than training."""
    folder = tmp_path_factory.mktemp("runs")
    wanted = {_name(experts, layout): _values(where, folder, experts, layout)
              for experts, case, _told in CASES for layout in ({}, case)}  # fmt: skip
    for ranks in (1, 2):
        alike = [values for values in wanted.values() if _ranks(values) == ranks]
        run_ranks(train_all, ranks, alike, timeout=60 + 10 * len(alike))
    return {name: [line["loss"] for line in runs.metrics(folder / name)] for name in wanted}


def _ranks(values: dict[str, Any]) -> int:
    return Recipe.model_validate(values).parallel.world_size()


@pytest.mark.parametrize(("experts", "layout", "told"), CASES)
def test_a_run_departs_where_the_table_says(
    experts: dict[str, Any], layout: dict[str, Any], told: list[str], losses: dict[str, list[float]], where: Path
) -> None:
    found = exactness.departures(_case(_values(where, where, experts, layout)))
    assert [str(one).split()[0] for one in found] == told
    split, one = (losses[_name(experts, its)] for its in (layout, {}))
    apart = max(abs(a - b) / b for a, b in zip(split, one, strict=True))
    assert (apart > 1e-5) == bool(told), apart


def test_what_a_model_brings_is_told_like_what_a_recipe_says(where: Path) -> None:
    """The keys of Mixtral's own configuration hold where the section is silent."""
    values = runs.values(where, where, model={**EXPERTS, "router_jitter_noise": 0.25}, parallel={"dp": 2})
    (found,) = exactness.departures(_case(values))
    assert str(found) == (
        "experts.jitter=0.25 left out of both runs: on more than one rank it is expected to differ from one process, "
        "since every rank draws random numbers of its own"
    )
    assert exactness.departures(_case({**values, "experts": {"jitter": 0.0}})) == []
    assert exactness.departures(_case(runs.values(where, where, parallel={"dp": 2}))) == []


def test_what_is_compared_instead_departs_nowhere(where: Path) -> None:
    for row in exactness.DEPARTURES:
        value = row.value or 0.5
        values = runs.values(where, where, model=EXPERTS, parallel={"tp": 2, "sp": True}, experts={row.key: value})
        (found,) = exactness.departures(_case(values))
        assert found.departure == row
        assert exactness.departures(_case({**values, "experts": {row.key: value, **row.instead}})) == []
