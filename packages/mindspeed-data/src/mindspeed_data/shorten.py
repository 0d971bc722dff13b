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
        raise longer_than(size, length)


def longer_than(size: int, length: int) -> ValueError:
    """The reason for which a sample of that many tokens is left out."""
    return ValueError(f"longer than {length} tokens: {size}")


def shorten(labels: NDArray[Any], length: int | None, longer: Longer) -> list[NDArray[np.int64]]:
    """Return the positions of each sample that a row with these labels becomes; ValueError where it becomes none.

    Of a row that is split, stretches in which nothing is learned are no samples. The first token of a sample never is: none
    stands before it.
    """
    size = len(labels)
    positions = np.arange(size)
    fits = length is None or size <= length
    if fits:
        parts = [positions]
    elif longer == "drop":
        raise longer_than(size, length)
    else:
        parts = [cut(labels, length)] if longer == "cut" else np.split(positions, range(length, size, length))
    learned = [part for part in parts if (labels[part[1:]] != IGNORED).any()]
    if not learned:
        of = "it" if fits else f"what fits into {length} tokens"
        raise ValueError(f"nothing is learned of {of}: {size} token{'' if size == 1 else 's'}")
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
