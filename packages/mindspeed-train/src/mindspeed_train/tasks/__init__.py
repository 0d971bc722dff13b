"""The tasks: what a step learns from, and what its loss is. None has a loop of its own."""

from mindspeed_train.tasks.pretrain import PRETRAIN
from mindspeed_train.tasks.sft import SFT
from mindspeed_train.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (PRETRAIN, SFT)}

__all__ = ["TASKS", "Task"]
