"""Packing: several samples share a sequence of one length and never see each other.

    samples of 7, 5, 4, 3, 2 tokens, sequences of 8       positions       0 1 2 3 4 5 6 0    0 1 2 3 4 0 1 2    0 1 2 3 0 1 0 0
      [7 .......][-]   [5 .....][3 ...]   [4 ....][2 ..][--]       segments        0 0 0 0 0 0 0 1    0 0 0 0 0 1 1 1    0 0 0 0 1 1 2 2

Every sample has its own positions from 0 and its own number in `segments`, by which attention and rotary embeddings tell
them apart. What is filled at the end is a segment of its own, of weight 0. The weights of the tokens are those of the
samples, so a mean over tokens is what it is without packing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mindspeed_core.conversation import IGNORED
from mindspeed_data import sidecar
from mindspeed_data.fitting import best_fit
from mindspeed_data.indexed import IndexedDataset

if TYPE_CHECKING:
    from mindspeed_data.pretrain import Samples


class PackedSamples:
    """Sequences of `length` tokens, each of several samples of another data set.

    Sequence i is {"tokens", "labels", "positions", "segments": int64 [s], "weights": fp32 [s]}.
    """

    def __init__(self, samples: Samples, lengths: ArrayLike, *, length: int, pad_id: int) -> None:
        self._samples = samples
        self._length, self._pad_id = length, pad_id
        self.packs = best_fit(lengths, length)  # the samples of each sequence

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        parts = [self._samples[int(sample)] for sample in self.packs[index]]
        sizes = [len(part["tokens"]) for part in parts]
        room = self._length - sum(sizes)
        if room:
            sizes.append(room)
            filling = torch.zeros(room, dtype=torch.int64)
            parts.append({"tokens": filling + self._pad_id, "labels": filling, "weights": filling.float()})
        whole = {name: torch.cat([part[name] for part in parts]) for name in ("tokens", "labels", "weights")}
        return {**whole, **marks(sizes)}


class PackedFiles:
    """Sequences that were packed when they were written, by `mindspeed-data sft --pack` or by the original.

    Samples are told apart by their numbers in the mask, never by the value of a token. Sequence i is {"tokens", "labels",
    "positions", "segments": int64 [s], "weights": fp32 [s]}; the last token of a sample predicts nothing.
    """

    def __init__(self, prefix: str | Path) -> None:
        base = sidecar.instruction_prefix(prefix)
        files = {name: IndexedDataset(f"{base}{suffix}") for name, suffix in sidecar.INSTRUCTION.items()}
        self._ids, self._numbers, self._labels = (files[name] for name in ("input_ids", "attention_mask", "labels"))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, numbers, labels = self._ids[index], self._numbers[index], self._labels[index]
        same = np.append(numbers[1:] == numbers[:-1], False)
        following = np.append(labels[1:], IGNORED)
        learned = same & (numbers != 0) & (following != IGNORED)
        ends = np.flatnonzero(~same) + 1
        return {
            "tokens": torch.from_numpy(ids.astype(np.int64)),
            "labels": torch.from_numpy(np.where(learned, following, 0).astype(np.int64)),
            "weights": torch.from_numpy(learned.astype(np.float32)),
            **marks(np.diff(ends, prepend=0).tolist()),
        }


def marks(sizes: list[int]) -> dict[str, Tensor]:
    """Return the positions, from 0 in each segment, and the numbers of segments of these sizes, one after the other."""
    return {
        "positions": torch.cat([torch.arange(size) for size in sizes]),
        "segments": torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
    }
