"""Samples that are longer than a sequence: which of their positions stay."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mindspeed_core.conversation import IGNORED

Longer = Literal["drop", "cut", "split"]


def check_length(size: int, length: int | None) -> None:
    """Raise ValueError for a sample of more tokens than a sequence has."""
    if length is not None and size > length:
        raise ValueError(f"longer than {length} tokens: {size}")


def shorten(labels: NDArray[Any], length: int | None, longer: Longer) -> list[NDArray[np.int64]]:
    """Return the positions of each sample that a row with these labels becomes; ValueError where it becomes none.

    Of a row that is split, stretches in which nothing is learned are no samples.
    """
    size = len(labels)
    positions = np.arange(size)
    if length is None or size <= length:
        return [positions]
    if longer == "drop":
        check_length(size, length)
    parts = [cut(labels, length)] if longer == "cut" else np.split(positions, range(length, size, length))
    learned = [part for part in parts if (labels[part] != IGNORED).any()]
    if not learned:
        raise ValueError(f"nothing is learned of what fits into {length} tokens: {size}")
    return learned


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
