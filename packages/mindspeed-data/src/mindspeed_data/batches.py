"""Which samples make a step, and how they become tensors.

The order of samples is one endless stream, epoch after epoch, that depends on the number of samples and the seed alone.
A step takes the next `global_batch` of it. How they are dealt to data-parallel ranks and micro batches changes neither
which samples a step has nor how often a sample is seen; the state of a run is the number of samples it has used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mindspeed_core.errors import InputError
from mindspeed_data.pretrain import Samples

Batch = dict[str, Tensor]  # "tokens", "labels", "weights", and when packed "positions" and "segments", each [b, s]
Collate = Callable[[Sequence[dict[str, Tensor]]], Batch]


def batches(
    dataset: Samples,
    *,
    micro: int,
    global_batch: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    start_samples: int = 0,
    seed: int = 0,
    shuffle: bool = False,
    epochs: int | None = None,
    collate: Collate | None = None,
) -> Iterator[list[Batch]]:
    """Yield this rank's micro batches of every step, without end or for some epochs.

    After n steps the run has used `start_samples + n * global_batch` samples; given as `start_samples`, they are skipped
    at no cost. With `epochs` the last step may have fewer micro batches, and samples of weight 0, equally on all ranks.
    Samples that know their lengths are dealt by length within a step, the longest first, so that little is padded.
    """
    if global_batch % (micro * dp_size):
        raise InputError(
            f"batch.global={global_batch} is not a multiple of batch.micro={micro} times {dp_size} data-parallel ranks"
        )
    if not len(dataset):
        raise InputError("the data set holds no samples")
    stream = Stream(len(dataset), seed, shuffle=shuffle)
    lengths = getattr(dataset, "lengths", None)
    position, end = start_samples, None if epochs is None else epochs * len(dataset)
    while end is None or position < end:
        count = global_batch if end is None else min(global_batch, end - position)
        step = stream.take(position, count)
        if lengths is not None:
            step = step[np.argsort(-lengths[step], kind="stable")]
        first = dp_rank * micro  # neighbours go to the ranks side by side, which keeps their lengths alike
        yield [
            (collate or stack)([_sample(dataset, step, i) for i in range(start + first, start + first + micro)])
            for start in range(0, len(step), micro * dp_size)
        ]
        position += count


def stack(samples: Sequence[dict[str, Tensor]]) -> Batch:
    """Put samples of equal length together."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def pad(pad_id: int, *, multiple: int = 1, length: int | None = None) -> Collate:
    """Return a collate that fills samples up to the longest of the micro batch, rounded up to a multiple, or to a length.

    What is filled has weight 0. Samples begin at position 0, so a causal mask hides the filling from them.
    """

    def collate(samples: Sequence[dict[str, Tensor]]) -> Batch:
        longest = length or max(len(sample["tokens"]) for sample in samples)
        longest = -(-longest // multiple) * multiple
        batch = {
            "tokens": torch.full((len(samples), longest), pad_id),
            "labels": torch.zeros((len(samples), longest), dtype=torch.int64),
            "weights": torch.zeros((len(samples), longest)),
        }
        for row, sample in enumerate(samples):
            for name, values in batch.items():
                values[row, : len(sample[name])] = sample[name]
        return batch

    return collate


class Stream:
    """The endless order of samples; it holds the permutation of one epoch."""

    def __init__(self, length: int, seed: int, *, shuffle: bool) -> None:
        self._length, self._seed, self._shuffle = length, seed, shuffle
        self._epoch = -1
        self._permutation = np.arange(length)

    def take(self, position: int, count: int) -> NDArray[np.int64]:
        """The samples at [position, position + count)."""
        parts = []
        while count > 0:
            epoch, start = divmod(position, self._length)
            part = self._order(epoch)[start : start + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._shuffle and epoch != self._epoch:
            # RandomState: numpy promises its draws for ever, unlike those of default_rng.
            self._permutation = np.random.RandomState([self._seed, epoch]).permutation(self._length)
            self._epoch = epoch
        return self._permutation


def _sample(dataset: Samples, step: NDArray[np.int64], i: int) -> dict[str, Tensor]:
    """Sample i of a step; beyond its end the last one again, with weight 0."""
    if i < len(step):
        return dataset[int(step[i])]
    sample = dataset[int(step[-1])]
    return {**sample, "weights": torch.zeros_like(sample["weights"])}
