"""Samples for fine-tuning: questions are given, answers are learned, and every sample keeps its own length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mindspeed_core.conversation import IGNORED
from mindspeed_core.errors import InputError
from mindspeed_data import sidecar
from mindspeed_data.indexed import IndexedDataset, path_of
from mindspeed_data.sidecar import INSTRUCTION, instruction_prefix


class InstructionSamples:
    """The samples of `P_packed_*_document`. Sample i is {"tokens": int64 [s], "labels": int64 [s], "weights": fp32 [s]}.

    Labels lie unshifted on the disk and are shifted here, once, before anything cuts a sequence into pieces. A sample of
    more than `seq_length` ids is cut as the original cuts it: turn by turn, question and answer in proportion.
    """

    def __init__(self, prefix: str | Path, *, seq_length: int | None = None) -> None:
        self.prefix = instruction_prefix(prefix)
        known = sidecar.read(prefix)
        if known is not None and known.kind != "instruction":
            raise InputError(f"{self.prefix}: holds the worth of steps, not answers; write answers with mindspeed-data sft")
        self._ids = IndexedDataset(f"{self.prefix}{INSTRUCTION['input_ids']}")
        self._labels = IndexedDataset(f"{self.prefix}{INSTRUCTION['labels']}")
        self._seq_length = seq_length
        if not np.array_equal(self._ids.lengths, self._labels.lengths):
            raise InputError(
                f"{path_of(self._labels.prefix, '.idx')}: its samples are not those of {self._ids.prefix.name}"
            )
        if not len(self._ids):
            raise InputError(f"{self.prefix}: holds no samples")
        if int(self._ids.lengths.min()) < 2:
            raise InputError(f"{self.prefix}: sample {int(self._ids.lengths.argmin())} holds fewer than two tokens")

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample, as they come out of here."""
        lengths = np.asarray(self._ids.lengths)
        return (lengths if self._seq_length is None else np.minimum(lengths, self._seq_length)) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, labels = self._ids[index], self._labels[index]
        if self._seq_length is not None and len(ids) > self._seq_length:
            kept = cut(labels, self._seq_length)
            ids, labels = ids[kept], labels[kept]
        target = labels[1:]
        learned = target != IGNORED
        return {
            "tokens": torch.from_numpy(ids[:-1].astype(np.int64)),
            "labels": torch.from_numpy(np.where(learned, target, 0).astype(np.int64)),
            "weights": torch.from_numpy(learned.astype(np.float32)),
        }


def cut(labels: NDArray[Any], length: int) -> NDArray[np.int64]:
    """Return which of a sample's positions stay so that `length` are left.

    Turns are taken from the front while there is room; of the one that does not fit, the question or the answer is cut if
    the other is less than half of the room, else both in proportion.
    """
    kept: list[NDArray[np.int64]] = []
    room = length
    for source, target in _turns(labels):
        if room <= 0:
            break
        questions, answers = _shares(len(source), len(target), room)
        kept += [source[:questions], target[:answers]]
        room -= questions + answers
    return np.concatenate(kept)


def _turns(labels: NDArray[Any]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The positions of each question and its answer."""
    positions = np.arange(len(labels))
    runs = np.split(positions, np.flatnonzero(np.diff(labels == IGNORED)) + 1)
    if labels[0] != IGNORED:
        runs.insert(0, positions[:0])
    if len(runs) % 2:
        runs.append(positions[:0])
    return list(zip(runs[::2], runs[1::2], strict=True))


def _shares(source: int, target: int, room: int) -> tuple[int, int]:
    """How many positions of a question and of its answer fit into the room."""
    if target * 2 < room:
        most = room
    elif source * 2 < room:
        most = room - source
    else:
        most = int(room * (target / (source + target)))
    answers = min(most, target)
    return min(max(room - answers, 0), source), answers
