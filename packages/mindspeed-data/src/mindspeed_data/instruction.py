"""Samples for fine-tuning: questions are given, answers are learned, and every sample keeps its own length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mindspeed_core.conversation import IGNORED
from mindspeed_core.errors import InputError
from mindspeed_data import sidecar
from mindspeed_data.indexed import IndexedDataset, path_of
from mindspeed_data.shorten import cut
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
            raise InputError(
                f"{self.prefix}: holds the worth of steps, not answers; write answers with mindspeed-data sft"
            )
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
