"""What a run tells of itself: the progress bar, metrics.jsonl, TensorBoard. Only rank 0 has one that speaks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from mindspeed_core.checkpoint.folder import sync
from mindspeed_core.cli import console, progress
from mindspeed_core.errors import writing
from mindspeed_train.config import LogConfig

METRICS = "metrics.jsonl"


class Meter:
    """The numbers of a run, from step `start` on. A line of metrics.jsonl is one JSON object:

    {"step": 0, "valid_loss": 5.9}
    {"step": 7, "loss": 2.31, "grad_norm": 0.8, "lr": 0.001, "tokens_per_s": 5120.3, "samples": 56, "tokens": 28672}
    {"step": 10, "valid_loss": 2.4}
    """

    def __init__(self, folder: Path, config: LogConfig, *, start: int, steps: int) -> None:
        self.config = config
        self.start, self.steps = start, steps
        self._path = folder / METRICS
        keep_until(self._path, start or -1)  # a run from the beginning evaluates at step 0 anew
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._board: Any = None
        if config.tensorboard:
            from mindspeed_train.board import Board

            # what an interrupted run wrote after the step it goes on from is hidden
            self._board = Board(folder / "tensorboard", first=start + 1 if start else 0)
        self._bar = progress(steps - start, f"from step {start}" if start else "train", unit="steps")
        self._shown: Any = None

    def __enter__(self) -> Meter:
        self._shown = self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        with writing(self._path):  # what a full disk has not taken yet
            self._file.close()
        if self._board is not None:
            self._board.close()

    def step(self, numbers: dict[str, Any]) -> None:
        """Tell the numbers of one optimizer step."""
        last = numbers["step"] == self.steps
        if numbers["step"] % self.config.every == 0 or last:
            self._write(numbers)
        words = [f"loss {numbers['loss']:.4f}", f"{numbers['tokens_per_s']:,.0f} tokens/s"]
        if self.start:
            words.insert(0, f"step {numbers['step']}/{self.steps}")
        self._shown.advance(text=", ".join(words))

    def evaluation(self, step: int, loss: float) -> None:
        """Tell the loss on the validation data."""
        self._write({"step": step, "valid_loss": loss})
        self.say(f"step {step}: validation loss {loss:.4f}")

    def say(self, line: str) -> None:
        """Write a line for the reader, above the bar."""
        console.print(line)

    def _write(self, numbers: dict[str, Any]) -> None:
        with writing(self._path):
            self._file.write(json.dumps(numbers) + "\n")
            self._file.flush()
        if self._board is not None:
            step = numbers["step"]
            shown = {name: value for name, value in numbers.items() if name != "step" and math.isfinite(value)}
            self._board.write(step, shown)


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of metrics after `step`, and what a killed run left of its last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    aside = path.with_suffix(".tmp")
    with writing(aside):
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        sync(aside)
        aside.replace(path)
