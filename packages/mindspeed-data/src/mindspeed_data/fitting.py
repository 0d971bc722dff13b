"""Which samples share a sequence: best fit decreasing, on lengths alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

import numpy as np
from numpy.typing import ArrayLike, NDArray


def best_fit(lengths: ArrayLike, capacity: int) -> list[list[int]]:
    """Return the samples of each sequence of `capacity` tokens."""
    samples, sequences = dealt(lengths, capacity)
    packs: list[list[int]] = [[] for _ in range(int(sequences.max(initial=-1)) + 1)]
    for sample, sequence in zip(samples.tolist(), sequences.tolist(), strict=True):
        packs[sequence].append(sample)
    return packs


def dealt(lengths: ArrayLike, capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Deal samples to sequences of `capacity` tokens: the longest first, each where the least room is left that holds it.

    Return the samples in the order in which they were dealt, and the sequence of each. The outcome depends on the lengths alone. It
    needs at most 11/9 of the fewest sequences possible, and one more (best fit decreasing; Johnson 1973).
    """
    sizes: NDArray[np.int64] = np.asarray(lengths, np.int64)
    assert not len(sizes) or (sizes.min() > 0 and sizes.max() <= capacity), "samples are cut before they are packed"
    order = np.argsort(-sizes, kind="stable")
    sequences = np.empty(len(sizes), np.int64)
    packs = 0
    left: list[deque[int]] = [deque() for _ in range(capacity)]  # sequences by what is left in them
    rooms: list[int] = []  # those that exist, ascending
    for n, sample in enumerate(order):
        size = int(sizes[sample])
        place = bisect_left(rooms, size)
        if place == len(rooms):
            room, pack = capacity, packs
            packs += 1
        else:
            room = rooms[place]
            pack = left[room].popleft()
            if not left[room]:
                del rooms[place]
        sequences[n] = pack
        room -= size
        if room:
            if not left[room]:
                insort(rooms, room)
            left[room].append(pack)
    return order, sequences
