"""The second pass over a data set: samples in another order, or several of them in one sequence of fixed length.

The first pass wrote every row in the order of the input. Which sample goes where follows from lengths and a seed alone, so memory
holds a few bytes per sample; the ids are gathered block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mindspeed_data.fitting import dealt
from mindspeed_data.indexed import IndexedWriter, path_of

BLOCK = 1 << 20  # ids that are gathered at once
DRAWN = 1000  # sources that are drawn at once
DRAWS = 100  # times the rows there are: what a mix may draw until every input has been seen

Mix = Literal["concat", "first_exhausted", "all_exhausted"]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Filling:
    """How sequences of one length are filled up, per file, and which file numbers the samples instead."""

    length: int
    pads: Mapping[str, int]
    numbered: str  # from 1 in every sequence; 0 is padding


@dataclass(frozen=True)
class Order:
    """Samples one after the other, and how many of them each sequence takes: one if `counts` is None."""

    samples: Ints
    counts: Ints | None = None

    def __len__(self) -> int:
        return len(self.samples if self.counts is None else self.counts)

    def blocks(self, lengths: NDArray[np.integer[Any]]) -> Iterator[tuple[Ints, Ints]]:
        """Stretches of about BLOCK ids: their samples, and how many of those each sequence takes."""
        counts = np.ones(len(self.samples), np.int64) if self.counts is None else self.counts
        ends = np.concatenate(([0], np.cumsum(counts)))  # of sequences, in samples
        sizes = np.concatenate(([0], np.cumsum(lengths[self.samples], dtype=np.int64)))[ends]  # and in ids
        first = 0
        while first < len(counts):
            last = max(first + 1, int(np.searchsorted(sizes, sizes[first] + BLOCK, "right")) - 1)
            yield self.samples[ends[first] : ends[last]], counts[first:last]
            first = last


class Staged:
    """What the first pass wrote of one file and nobody has published. It is read, not mapped: pages of a map that were looked at
    count as memory of the process, and in the end that would be all of them."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path_of(prefix, ".bin.tmp"), dtype
        self.lengths = np.fromfile(path_of(prefix, ".lengths.tmp"), "<i4")
        self.starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def gather(self, samples: Ints) -> NDArray[Any]:
        """The ids of samples, one after the other."""
        lengths, starts = self.lengths[samples].astype(np.int64), self.starts[samples]
        ends = np.cumsum(lengths)
        ids = np.empty(int(ends[-1]) if len(ends) else 0, self.dtype)
        first = np.flatnonzero(np.append(True, starts[1:] != starts[:-1] + lengths[:-1]))  # of those that lie together
        size, into = self.dtype.itemsize, ids.view(np.uint8).data
        places = ((ends - lengths)[first] * size, np.append(ends[first[1:] - 1], len(ids)) * size, starts[first] * size)
        with open(self.path, "rb", buffering=0) as file:
            for begin, end, start in zip(*(place.tolist() for place in places), strict=True):
                file.seek(start)
                while begin < end and (count := file.readinto(into[begin:end])):
                    begin += count
                assert begin == end, "the first pass wrote as many ids as it noted"
        return ids

    def blocks(self) -> Iterator[NDArray[Any]]:
        """All ids, in their order."""
        return blocks(self.path, self.dtype)


def blocks(path: Path, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """The ids of a file, in their order."""
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, dtype, BLOCK)):
            yield block


def interleave(counts: Sequence[int], weights: Sequence[float] | None, stop: Mix, seed: int) -> Ints:
    """Return the samples of parts of `counts` samples, laid one after the other, in a mixed order.

    The part of each sample is drawn by weight, or in turn without weights. It ends when the first part has been seen whole, or
    when every part has, and those that end before begin anew. Order and ends are those of `datasets.interleave_datasets`.
    """
    if stop == "concat":
        return np.arange(sum(counts))
    starts = np.cumsum([0, *counts[:-1]])
    if weights is None:
        rounds = min(counts) if stop == "first_exhausted" else max(counts)
        return (starts + np.arange(rounds)[:, None] % np.array(counts)).reshape(-1)
    at, seen = [0] * len(counts), [False] * len(counts)
    over = any if stop == "first_exhausted" else all
    found: list[Ints] = []
    for parts in _drawn(weights, seed):
        block = []
        for part in parts:
            if over(seen):
                return np.concatenate([*found, np.array(block, np.int64)])
            block.append(int(starts[part]) + at[part])
            at[part] += 1
            if at[part] == counts[part]:
                at[part], seen[part] = 0, True
        found.append(np.array(block, np.int64))
    raise AssertionError("the draws never end")


def draws(counts: Sequence[int], weights: Sequence[float]) -> tuple[float, int]:
    """Return about how many rows are drawn by weight until every part has been seen whole, and the part that is the last."""
    shares = np.asarray(weights, np.float64)
    with np.errstate(divide="ignore"):
        each = np.asarray(counts) / (shares / shares.sum())
    return float(each.max()), int(each.argmax())


def pack(lengths: NDArray[np.integer[Any]], samples: Ints, capacity: int, window: int | None) -> Order:
    """Return samples in sequences of `capacity` ids: the whole set at once, or so many samples after the other."""
    window = window or max(len(samples), 1)
    ordered, counts = [samples[:0]], [samples[:0]]
    for start in range(0, len(samples), window):
        part = samples[start : start + window]
        placed, sequences = dealt(lengths[part], capacity)
        ordered.append(part[placed[np.argsort(sequences, kind="stable")]])
        counts.append(np.bincount(sequences))
    return Order(np.concatenate(ordered), np.concatenate(counts))


def write(
    order: Order, staged: Mapping[str, Staged], writers: Mapping[str, IndexedWriter], filling: Filling | None
) -> Iterator[int]:
    """Write every file in that order; yield how many sequences are done."""
    first = next(iter(staged.values()))
    for samples, counts in order.blocks(first.lengths):
        lengths = first.lengths[samples].astype(np.int64)
        places = None if filling is None else _places(lengths, counts, filling.length)
        for name, writer in writers.items():
            if filling is None or places is None or name not in (*filling.pads, filling.numbered):
                sizes = np.add.reduceat(staged[name].lengths[samples], np.cumsum(counts) - counts)
                writer.add(staged[name].gather(samples), sizes.astype(np.int32))
                continue
            filled = np.full(len(counts) * filling.length, filling.pads.get(name, 0), writer.dtype)
            if name == filling.numbered:
                numbers = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
                filled[places] = np.repeat(numbers.astype(writer.dtype), lengths)
            else:
                filled[places] = staged[name].gather(samples)
            writer.add(filled, np.full(len(counts), filling.length, np.int32))
        yield len(counts)


def _places(lengths: Ints, counts: Ints, length: int) -> Ints:
    """Where every id of samples goes, among sequences of one length that take so many samples each."""
    sequence = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(lengths) - lengths  # among the ids of the block
    first = (np.cumsum(counts) - counts)[sequence]  # the first sample of the same sequence
    starts = sequence * length + before - before[first]
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _drawn(weights: Sequence[float], seed: int) -> Iterator[Sequence[int]]:
    random = np.random.default_rng(seed)
    shares = np.asarray(weights, np.float64)
    while True:
        yield random.choice(len(shares), size=DRAWN, p=shares / shares.sum()).tolist()
