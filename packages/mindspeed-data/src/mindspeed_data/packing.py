"""Packing: several samples share a sequence of one length and never see each other.

    samples of 7, 5, 4, 3, 2 tokens, sequences of 8       positions       0 1 2 3 4 5 6 0    0 1 2 3 4 0 1 2    0 1 2 3 0 1 0 0
      [7 .......][-]   [5 .....][3 ...]   [4 ....][2 ..][--]       segments        0 0 0 0 0 0 0 1    0 0 0 0 0 1 1 1    0 0 0 0 1 1 2 2

Every sample has its own positions from 0 and its own number in `segments`, by which attention and rotary embeddings tell
them apart. What is filled at the end is a segment of its own, of weight 0. The weights of the tokens are those of the
samples, so a mean over tokens is what it is without packing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mindspeed_data.fitting import best_fit

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


def marks(sizes: list[int]) -> dict[str, Tensor]:
    """Return the positions, from 0 in each segment, and the numbers of segments of these sizes, one after the other."""
    return {
        "positions": torch.cat([torch.arange(size) for size in sizes]),
        "segments": torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
    }
