"""Every way to split a run, alone and combined, gives the losses, gradient norms, weights and moments of one process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import RankError, run_ranks
from tests.integration import layouts
from tests.integration.layouts import Choice
from tests.train import runs
from tests.train.models import LLAMA

STEPS = 10
SHARED = 8  # choices that one job runs: gloo's threads stay until a process ends, a few dozen for each mesh
# fp32 sums in another order; measured over all rows: losses 2.6e-7, norms 7.3e-7, weights and moments 6.4e-6
RELATIVE = 1e-5
OPTIM = {"lr": 1e-2, "min_lr": 1e-3, "warmup": 0, "eps": runs.EPS}
ALONE = tuple(layouts.alone())
COMBINED = tuple(layouts.pairwise())
WIDE = tuple(layouts.wide())
MOST = 8  # ranks of those
ALWAYS = 40  # combinations that every run of the tests takes: drawing begins with those in which most pairs meet
# and the first in which these meet, wherever it is drawn: gradients of weights wait beside collectives, and in experts
WAITING = (("tensor", "coc2"), ("pipeline", "delayed"), ("model", "mixtral"))


@pytest.fixture(scope="session")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


class Runs:
    """The runs of this session by choice. Starting ranks costs more than running a choice, so that some share a job."""

    def __init__(self, where: Path, folder: Path, wanted: Iterable[Choice]) -> None:
        self._where, self._folder = where, folder
        self._waiting = {choice: layouts.ranks_of(choice, MOST) for choice in wanted}
        self._failed: dict[Choice, RankError] = {}

    def folder(self, choice: Choice) -> Path:
        """Return the folder of a choice's run; raise what stopped it."""
        while choice in self._waiting:
            ranks = self._waiting[choice]
            alike = [one for one, needs in self._waiting.items() if needs == ranks]
            self._job(alike[:SHARED], ranks or 0)
        if choice in self._failed:
            raise self._failed[choice]
        return self._path(choice)

    def _job(self, choices: list[Choice], ranks: int) -> None:
        """Run choices one after the other, up to the first that fails."""
        values = [(self._values(choice), layouts.task_of(choice)) for choice in choices]
        failure = None
        try:
            run_ranks(train_all, ranks, values, timeout=60 + 10 * len(values))
        except RankError as error:
            failure = error
        for choice in choices:
            del self._waiting[choice]
            if not (self._path(choice) / "checkpoints" / "latest").exists():
                assert failure is not None
                self._failed[choice] = failure
                return

    def _path(self, choice: Choice) -> Path:
        return self._folder / layouts.name_of(choice)

    def _values(self, choice: Choice) -> dict[str, Any]:
        sections = layouts.sections_of(choice)
        sections["data"] = {"seq_length": layouts.LENGTH} | sections.get("data", {})
        sections["optim"] = OPTIM | sections.get("optim", {})
        model = sections.pop("model")
        values = runs.values(
            self._where, self._path(choice), layouts.task_of(choice), train={"steps": STEPS}, **sections
        )
        return {**values, "model": model}


def train_all(recipes: list[tuple[dict[str, Any], str]]) -> None:
    for recipe, task in recipes:
        runs.trains(recipe, task)


@pytest.fixture(scope="session")
def done(where: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    chosen = [item.callspec.params.get("choice") for item in request.session.items if hasattr(item, "callspec")]
    wanted = [choice for choice in chosen if choice is not None]
    wanted = dict.fromkeys([layouts.PLAIN, *map(layouts.baseline_of, wanted), *wanted])
    return Runs(where, tmp_path_factory.mktemp("parity"), wanted)


def _meet(choice: Choice) -> bool:
    return set(WAITING) <= set(zip(layouts.AXES, choice, strict=True))


def _rows() -> list[Any]:
    rows = []
    every = {*ALONE, *COMBINED[:ALWAYS], *[choice for choice in COMBINED if _meet(choice)][:1]}
    for choice in (*ALONE, *COMBINED, *WIDE):
        marks = [] if choice in every else [pytest.mark.slow]
        rows.append(pytest.param(choice, id=layouts.name_of(choice), marks=marks))
    return rows


@pytest.mark.parametrize("choice", _rows())
def test_a_split_run_equals_one_process(choice: Choice, done: Runs) -> None:
    one, split = done.folder(layouts.baseline_of(choice)), done.folder(choice)
    expected, found = runs.metrics(one), runs.metrics(split)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.1, "it learns, so there is something to compare"
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
    for name in {"loss", "grad_norm", "aux_loss"} & expected[0].keys():
        values = [[line[name] for line in lines] for lines in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=RELATIVE), name
    apart = differences(split, one)
    key = max(apart, key=apart.__getitem__)
    assert apart[key] < RELATIVE, f"{key}: {apart[key]:.2e}"


def differences(split: Path, one: Path) -> dict[str, float]:
    """The largest difference in each weight and moment, over the largest number in it."""
    step = f"checkpoints/step_{STEPS}"
    found, expected = (
        {key: tensor for key, tensor in runs.stored(path / step).items() if not key.startswith("random.")}
        for path in (split, one)
    )
    assert found.keys() == expected.keys()
    return {
        key: ((found[key] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30)).item()
        for key, tensor in expected.items()
    }


def test_the_rows_are_drawn_from_what_the_rules_allow() -> None:
    assert len(ALONE) >= 33
    assert len(COMBINED) >= 40
    assert len(set(ALONE) | set(COMBINED)) == len(ALONE) + len(COMBINED)
    assert tuple(layouts.pairwise()) == COMBINED
    assert all(layouts.ranks_of(choice, MOST) for choice in WIDE)
    assert any(map(_meet, COMBINED))
    # any two options that may meet have met: what is missing is refused in each of these ways to try it
    pairs = {pair for choice in (*ALONE, *COMBINED) for pair in layouts.pairs(choice)}
    for pair in set(layouts.all_pairs()) - pairs:
        (one, a), (other, b) = pair
        for model in layouts.AXES["model"]:
            sections = {"model": model, one: a, other: b}
            choice = tuple(sections.get(axis, "-") for axis in layouts.AXES)
            assert layouts.ranks_of(choice) is None, choice


def test_a_difference_is_seen(done: Runs, where: Path, tmp_path: Path) -> None:
    """What the rows allow is far less than what a wrong run does: here one of another seed's order of samples."""
    recipe = runs.values(
        where, tmp_path, data={"seq_length": layouts.LENGTH}, optim=OPTIM, train={"steps": STEPS, "seed": 7}
    )
    runs.train({**recipe, "model": LLAMA})
    assert max(differences(tmp_path, done.folder(layouts.PLAIN)).values()) > 1000 * RELATIVE


@pytest.mark.parametrize(
    ("micro", "total", "parallel"),
    [(8, 8, {}), (1, 8, {}), (4, 8, {"dp": 2})],
    ids=["whole", "single", "dp2"],
)
def test_micro_batches_change_nothing(
    micro: int, total: int, parallel: dict[str, int], where: Path, tmp_path: Path
) -> None:
    batch = {"micro": micro, "global": total}
    one = runs.train(runs.values(where, tmp_path / "one", "sft"), "sft")
    recipe = runs.values(where, tmp_path / "other", "sft", batch=batch, parallel=parallel)
    lines = runs.train(recipe, "sft", world=parallel.get("dp", 1))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in one], rel=RELATIVE), name


@pytest.mark.parametrize(
    ("parallel", "optim"),
    [({"tp": 2, "sp": True}, {}), ({"pp": 2}, {}), ({"dp": 2}, {"distributed": True})],
    ids=["tp2-sp", "pp2", "dp2-distributed"],
)
def test_bf16_stays_near_one_process(
    parallel: dict[str, Any], optim: dict[str, Any], where: Path, tmp_path: Path
) -> None:
    one = runs.train(runs.values(where, tmp_path / "one", precision="bf16"))
    split = runs.values(where, tmp_path / "split", precision="bf16", parallel=parallel, optim=optim)
    # bf16 keeps 8 bits, and the split sums round elsewhere
    found = runs.train(split, world=2)
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in one], rel=5e-3)
