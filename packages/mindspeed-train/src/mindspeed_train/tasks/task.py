"""What a task is: its data, and its loss as a function of a model and a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mindspeed_data.batches import Batch, Collate
from mindspeed_data.pretrain import Samples
from mindspeed_train.config import Recipe
from mindspeed_train.model import Model


@dataclass(frozen=True, kw_only=True)
class Task:
    """A way to train. The trainer calls these and knows nothing else of it."""

    name: str
    find: Callable[[str], Path]  # a prefix as the recipe names it -> the files; InputError where there are none
    datasets: Callable[[Recipe, Model], tuple[Samples, Samples | None]]  # to learn from, and to evaluate on
    shuffle: bool  # True: the trainer draws the order of samples, but for a blend's; False: the data set has one
    collate: Callable[[Recipe, Model], Collate | None]  # samples -> a batch; None stacks samples of one length
    varies: bool  # True: micro batches differ in length, unless samples are packed
    forward: Callable[[Any, Batch], Tensor]  # on the last stage the sum over tokens of weight * loss
    check: Callable[[Recipe], None]  # raises an InputError for rules of its own

    def varies_under(self, recipe: Recipe) -> bool:
        """Return whether micro batches differ in length under this recipe."""
        return self.varies and not recipe.data.pack

    @staticmethod
    def prefixes(data: str | Mapping[str, float] | None) -> list[str]:
        """Return the prefixes that a key of the recipe names."""
        return [] if data is None else [data] if isinstance(data, str) else list(data)


def token_loss(model: Any, batch: Batch) -> Tensor:
    """Run one stage; the last one returns the fp32 sum of weight * cross entropy over the tokens of the batch."""
    return model(
        batch["tokens"],
        labels=batch["labels"],
        weights=batch["weights"],
        positions=batch.get("positions"),  # both only where several documents share a row
        segments=batch.get("segments"),
    )
