"""Which samples share a sequence: best fit decreasing, on lengths alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

import numpy as np
from numpy.typing import ArrayLike, NDArray


def best_fit(lengths: ArrayLike, capacity: int) -> list[list[int]]:
    """Deal samples to sequences of `capacity` tokens: the longest first, each where the least room is left that holds it.

    The outcome depends on the lengths alone. It needs at most 11/9 of the fewest sequences possible, and one more (best fit
    decreasing; Johnson 1973).
    """
    sizes: NDArray[np.int64] = np.asarray(lengths, np.int64)
    assert not len(sizes) or (sizes.min() > 0 and sizes.max() <= capacity), "samples are cut before they are packed"
    packs: list[list[int]] = []
    left: list[deque[int]] = [deque() for _ in range(capacity)]  # sequences by what is left in them
    rooms: list[int] = []  # those that exist, ascending
    for sample in np.argsort(-sizes, kind="stable"):
        size = int(sizes[sample])
        place = bisect_left(rooms, size)
        if place == len(rooms):
            room, pack = capacity, len(packs)
            packs.append([])
        else:
            room = rooms[place]
            pack = left[room].popleft()
            if not left[room]:
                del rooms[place]
        packs[pack].append(int(sample))
        room -= size
        if room:
            if not left[room]:
                insort(rooms, room)
            left[room].append(pack)
    return packs
