"""The `mindspeed-train` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from mindspeed_core.cli import command_line, run

if TYPE_CHECKING:
    from mindspeed_train.config import Recipe

app = command_line("mindspeed-train", "Train language models from a recipe.")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file of the run.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer on Python 3.10)
    typer.Argument(metavar="KEY=VALUE", help="Replace keys of the recipe: parallel.tp=2 optim.lr=1e-4."),
]
OTHERS = ("align",)  # sections of other commands


@app.command()
def pretrain(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Learn every token of a text."""
    _train("pretrain", recipe, overrides or [])


@app.command()
def sft(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Fine-tune: learn the answers of instructions."""
    _train("sft", recipe, overrides or [])


@app.command()
def verify(
    recipe: RecipeFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 3,
    task: Annotated[Optional[str], typer.Option(help="pretrain or sft; by default what the data is for.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the recipe's layout and one process on the same data, and print how far they differ.

    Both run in fp32 unless precision=bf16 is given here, and without what cannot equal one process, which is named. Exit
    code 1 when they differ by more than rounding.
    """
    from mindspeed_core import launch
    from mindspeed_core.device import Device
    from mindspeed_core.errors import InputError
    from mindspeed_core.recipe import load
    from mindspeed_train import verify as certificate
    from mindspeed_train.check import check
    from mindspeed_train.config import Recipe
    from mindspeed_train.exactness import departures
    from mindspeed_train.model import find_model
    from mindspeed_train.rules import Case
    from mindspeed_train.tasks import TASKS, task_for

    if launch.launched():
        raise InputError("mindspeed-train verify starts its own ranks; run it without torchrun")
    wanted = load(Recipe, recipe, overrides or [], ignore=OTHERS)
    if task is not None and task not in TASKS:
        raise InputError(f"--task {task}: no such task; use {' or '.join(TASKS)}")
    name = task or task_for(wanted).name
    device = Device.find(wanted.device)
    ranks = wanted.parallel.world_size(device.count())
    check(wanted, TASKS[name], world_size=ranks, device=device.type)
    told = any(override.startswith("precision=") for override in overrides or [])
    precision = wanted.precision if told else "fp32"
    left_out = departures(
        Case(recipe=wanted, dp=ranks // wanted.parallel.model_ranks, arch=find_model(wanted).arch, device=device.type)
    )
    found = certificate.verify(wanted, name, steps=steps, precision=precision, ranks=ranks, left_out=left_out)
    layout = certificate.layout_name(wanted, ranks, precision, left_out=left_out)
    if as_json:
        print(certificate.as_json(found, layout, precision, steps=steps, left_out=left_out))
    else:
        print(certificate.table(found, layout, precision, left_out=left_out), end="")
    if not certificate.equal(found, precision):
        raise typer.Exit(1)


def _train(name: str, path: Path, overrides: list[str]) -> None:
    from mindspeed_core import launch
    from mindspeed_core.device import Device
    from mindspeed_core.recipe import load
    from mindspeed_train.config import Recipe

    recipe = load(Recipe, path, overrides, ignore=OTHERS)
    device = Device.find(recipe.device)  # the launcher takes no memory of an accelerator
    world_size = launch.world()[1] if launch.launched() else recipe.parallel.world_size(device.count())
    if launch.world()[0] == 0 and not launch.by_us():  # our launcher has checked before it started the ranks
        from mindspeed_train.check import check
        from mindspeed_train.tasks import TASKS

        check(recipe, TASKS[name], world_size=world_size, device=device.type)
    launch.run_ranks(lambda: _run(recipe, name), world_size)


def _run(recipe: Recipe, name: str) -> None:
    from mindspeed_core import megatron
    from mindspeed_core.device import Device

    megatron.load(Device.open(recipe.device))  # before anything imports Megatron
    from mindspeed_train.tasks import TASKS
    from mindspeed_train.trainer import Trainer

    trainer = Trainer(recipe, TASKS[name])
    try:
        trainer.train()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(trainer.how_to_continue()) from None
    trainer.close()


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
