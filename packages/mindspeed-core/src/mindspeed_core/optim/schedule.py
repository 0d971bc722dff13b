"""The learning rate of every step: a pure function of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


def _cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _linear(done: float) -> float:
    return 1.0 - done


def _constant(done: float) -> float:
    return 1.0


SHAPES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": _linear, "constant": _constant}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over a run of `steps` optimizer steps: a linear warm-up, then a shape that falls to `min_lr`.

    lr  |    /‾‾\\__            the warm-up ends at the peak; the last step of a run
        |   /      \\___        has a rate just above min_lr, as the step after it
    min |__/___________\\__     would have exactly min_lr
    """

    lr: float
    min_lr: float = 0.0
    shape: str = "cosine"
    warmup: float = 0.0  # below 1: a fraction of the steps, else steps
    steps: int = 1

    @property
    def warmup_steps(self) -> int:
        """The number of steps of the warm-up."""
        return round(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    def lr_at(self, step: int) -> float:
        """Return the rate of the step that follows `step` finished ones (the first step of a run is `lr_at(0)`)."""
        warmup = self.warmup_steps
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        return self.min_lr + (self.lr - self.min_lr) * SHAPES[self.shape](done)
