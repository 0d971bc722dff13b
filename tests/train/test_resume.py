"""A run that stops goes on as if it had not, whatever stopped it and however it is split afterwards."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import RankError, run_ranks
from tests.train import runs

SIX: dict[str, Any] = {"train": {"steps": 6}, "checkpoint": {"every": 3}}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "dp2 distributed": (2, {"dp": 2}, {"distributed": True}),
    "tp2": (2, {"tp": 2}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "tp2 pp2 sp": (4, {"tp": 2, "pp": 2, "sp": True}, {}),
    "pp2 vpp2 noop": (2, {"pp": 2, "vpp": 2, "noop_layers": [1, 2]}, {}),
}


@pytest.fixture(scope="session")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


def _recipe(where: Path, run: Path, task: str, layout: str, **more: Any) -> dict[str, Any]:
    _, parallel, optim = LAYOUTS[layout]
    checkpoint = {**SIX["checkpoint"], "folder": str(run)}
    return runs.values(
        where, run, task, **{"parallel": parallel, "optim": optim, **SIX, **more, "checkpoint": checkpoint}
    )


def _numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]


@pytest.mark.parametrize(
    ("layout", "task", "precision"),
    [
        ("one", "pretrain", "fp32"),
        ("one", "sft", "bf16"),
        ("dp2 distributed", "pretrain", "bf16"),
        ("dp2 distributed", "sft", "fp32"),
        ("tp2 pp2 sp", "pretrain", "fp32"),
        ("pp2 vpp2 noop", "sft", "bf16"),
    ],
)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(
    layout: str, task: str, precision: str, where: Path, tmp_path: Path
) -> None:
    world = LAYOUTS[layout][0]
    straight = _recipe(where, tmp_path / "straight", task, layout, precision=precision)
    broken = _recipe(where, tmp_path / "broken", task, layout, precision=precision)
    runs.train(straight, task, world=world)
    runs.stop(broken, task, world=world)
    assert [line["step"] for line in runs.metrics(tmp_path / "broken")] == [1, 2, 3]
    lines = runs.train(broken, task, world=world)
    assert _numbers(lines) == _numbers(runs.metrics(tmp_path / "straight"))
    one, other = (runs.stored(tmp_path / name / "checkpoints" / "step_6") for name in ("straight", "broken"))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tp2", "pp2"),
        ("tp2", "pp2 vpp2 noop"),
        ("pp2 vpp2 noop", "dp2 distributed"),
        ("one", "dp2 distributed"),
        ("dp2 distributed", "tp2 pp2 sp"),
        ("pp2", "one"),
    ],
)
def test_a_run_goes_on_in_another_layout(before: str, after: str, where: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    straight = runs.train(_recipe(where, tmp_path / "straight", "pretrain", "one"))
    runs.stop(_recipe(where, run, "pretrain", before), world=LAYOUTS[before][0])
    lines = runs.train(_recipe(where, run, "pretrain", after), world=LAYOUTS[after][0])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in straight], rel=1e-5), name
    assert [line["samples"] for line in lines] == [line["samples"] for line in straight]


@pytest.mark.parametrize(
    ("world", "where_it_dies"),
    [(1, "write_boxes"), (1, "write_metadata"), (1, "copy_assets"), (1, "_prune"), (2, "write_boxes")],
)
def test_a_run_that_is_killed_while_saving_goes_on(world: int, where_it_dies: str, where: Path, tmp_path: Path) -> None:
    layout = "one" if world == 1 else "tp2"
    straight = _numbers(runs.train(_recipe(where, tmp_path / "straight", "pretrain", layout), world=world))
    recipe = _recipe(where, tmp_path / "run", "pretrain", layout)
    with pytest.raises(RankError, match=r"SIGKILL|peer|Connection"):
        run_ranks(_dies, world, recipe, where_it_dies, timeout=60)
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = "step_6" if where_it_dies == "_prune" else "step_3"
    assert (checkpoints / "latest").read_text() == f"{newest}\n"
    assert _numbers(runs.train(recipe, world=world)) == straight
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_3", "step_6"]
    one, other = (runs.stored(tmp_path / name / "checkpoints" / "step_6") for name in ("straight", "run"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def _dies(recipe: dict[str, Any], at: str) -> None:
    """A rank that is killed within its second checkpoint; of several, the last one."""
    import os

    from mindspeed_core.checkpoint import native

    real, calls = getattr(native, at), []

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls.append(at)
        if len(calls) == 2 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            if at == "write_boxes":  # a part of the file is there
                folder, rank, boxes = args
                real(folder, rank, list(boxes)[:5])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(native, at, deadly)
    runs.trains(recipe, "pretrain")


def test_lines_after_the_checkpoint_are_dropped(where: Path, tmp_path: Path) -> None:
    recipe = _recipe(where, tmp_path, "pretrain", "one")
    runs.stop(recipe)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 4, "loss": 99.0}\n{"step": 4, "valid_loss": 99.0}\n{"step": 5, "lo'
        )  # killed while writing
    lines = runs.train(recipe)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] < 10 for line in lines)


def test_a_finished_run_has_nothing_to_do_and_an_extended_one_goes_on(where: Path, tmp_path: Path) -> None:
    recipe = _recipe(where, tmp_path, "pretrain", "one")
    lines = runs.train(recipe)
    assert runs.train(recipe) == lines
    longer = runs.train({**recipe, "train": {"steps": 8}})
    assert longer[:6] == lines
    assert [line["step"] for line in longer] == list(range(1, 9))


def test_a_run_folder_tells_what_the_run_is(where: Path, tmp_path: Path) -> None:
    from mindspeed_core.recipe import load
    from mindspeed_train.config import Recipe

    recipe = _recipe(where, tmp_path, "pretrain", "one", log={"tensorboard": True})
    runs.train(recipe)
    assert load(Recipe, tmp_path / "recipe.yaml") == Recipe.model_validate(recipe)
    assert {"torch", "megatron-core", "mindspeed-train"} <= json.loads((tmp_path / "versions.json").read_text()).keys()
    step = tmp_path / "checkpoints" / "step_6"
    config = json.loads((step / "hf" / "config.json").read_text())
    assert (config["hidden_size"], config["dtype"]) == (32, "float32")
    assert config["eos_token_id"] == 0
    assert (step / "hf" / "tokenizer.json").exists()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    told = [(event.step, event.value) for event in board.Scalars("loss")]
    assert told == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in runs.metrics(tmp_path)]


def test_another_run_in_the_folder_is_refused(where: Path, tmp_path: Path) -> None:
    recipe = _recipe(where, tmp_path, "pretrain", "one")
    runs.stop(recipe)
    never = {**recipe, "checkpoint": {**recipe["checkpoint"], "resume": "never"}}
    with pytest.raises(RankError, match=r"holds a run already \(step_3\)"):
        runs.train(never)
    wider = {**recipe, "model": {**runs.SIZES, "intermediate_size": 64}}
    with pytest.raises(RankError, match=r"linear_fc1.weight has shape \[96, 32\], the model of the recipe \[128, 32\]"):
        runs.train(wider)
    run_ranks(_two_at_once, 1, recipe)


def _two_at_once(recipe: dict[str, Any]) -> None:
    from mindspeed_core.errors import InputError
    from mindspeed_train import trainer

    lock = trainer._lock(Path(recipe["checkpoint"]["folder"]))
    assert lock
    with pytest.raises(InputError, match="another run is writing there"):
        trainer._lock(Path(recipe["checkpoint"]["folder"]))
