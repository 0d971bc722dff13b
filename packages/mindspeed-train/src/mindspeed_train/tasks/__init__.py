"""The tasks: what a step learns from, and what its loss is. None has a loop of its own."""

from contextlib import suppress

from mindspeed_core.errors import InputError
from mindspeed_train.config import Recipe
from mindspeed_train.tasks.pretrain import PRETRAIN
from mindspeed_train.tasks.sft import SFT
from mindspeed_train.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (PRETRAIN, SFT)}


def task_for(recipe: Recipe) -> Task:
    """Return the task that the recipe's data was made for; where there is none, the first one, which says what is wrong."""
    for task in TASKS.values():
        with suppress(InputError):
            for prefix in task.prefixes(recipe.data.train):
                task.find(prefix)
            return task
    return next(iter(TASKS.values()))


__all__ = ["TASKS", "Task", "task_for"]
