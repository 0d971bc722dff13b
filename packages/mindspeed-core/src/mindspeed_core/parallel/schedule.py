"""When each pipeline stage computes what: the schedules of Megatron, drawn from the times of their pieces.

    pp=2, 4 micro batches, a backward twice as long as a forward      F1: micro batch 1 forward, B1: backward

    stage 0   F0 F1 .. .. B0 B0 F2 B1 B1 F3 B2 B2 .. B3 B3
    stage 1   .. F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 .. ..

The bubble is the time in which stages wait, over the time in which they compute. Where all stages take the same time it
is (pp - 1) / micro batches, and with `vpp` chunks per stage (pp - 1) / (micro batches * vpp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mindspeed_core.parallel.pipeline import Placement, micro_batch_group


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One pass of one micro batch through one chunk."""

    stage: int
    chunk: int
    micro_batch: int
    backward: bool


@dataclass(frozen=True, kw_only=True)
class Span:
    """When a piece is computed, in seconds from the start."""

    piece: Piece
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What all stages do in one step."""

    spans: Sequence[Span] = field(repr=False)

    @property
    def length(self) -> float:
        """The time from the first start to the last end."""
        return max(span.end for span in self.spans) - min(span.start for span in self.spans)

    @property
    def bubble(self) -> float:
        """The time in which stages wait over the time in which they compute."""
        stages = len({span.piece.stage for span in self.spans})
        busy = sum(span.end - span.start for span in self.spans)
        return self.length * stages / busy - 1


def pieces(stage: int, *, pp: int, vpp: int = 1, micro_batches: int) -> list[Piece]:
    """Return what a stage computes, in Megatron's order: one forward, one backward, after some forwards ahead.

    With chunks a stage runs a group of pp micro batches through one chunk before it turns to the next chunk.
    """
    group = micro_batch_group(pp, vpp)
    assert micro_batches % group == 0, f"{micro_batches} micro batches in groups of {group}"
    order = [
        (chunk, first + i) for first in range(0, micro_batches, group) for chunk in range(vpp) for i in range(group)
    ]
    ahead = (pp - stage - 1) * 2 + (vpp - 1) * pp if vpp > 1 else pp - stage - 1
    ahead = min(ahead, len(order))
    forwards = [Piece(stage=stage, chunk=chunk, micro_batch=i, backward=False) for chunk, i in order]
    backwards = [Piece(stage=stage, chunk=vpp - 1 - chunk, micro_batch=i, backward=True) for chunk, i in order]
    found = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        found += [forward, backward]
    return found + backwards[len(forwards) - ahead :]


def simulate(
    placement: Placement,
    *,
    micro_batches: int,
    seconds: Callable[[Piece], float],
    transfer: float = 0.0,
    after: Callable[[Piece], float] = lambda piece: 0.0,
) -> Timeline:
    """Return when each piece is computed.

    Args:
        placement: how many stages and chunks there are.
        micro_batches: of one step, on one data-parallel rank.
        seconds: how long a piece takes.
        transfer: seconds from a piece's result until the next stage has it.
        after: how long a piece goes on when its result is there: with gradients of weights that are delayed.
    """
    pp, vpp = placement.pp, placement.vpp
    waiting = [pieces(stage, pp=pp, vpp=vpp, micro_batches=micro_batches) for stage in range(pp)]
    free, spans, ended = [0.0] * pp, [], {}
    while any(waiting):
        before = len(spans)
        for stage, own in enumerate(waiting):
            while own and all(needed in ended for needed in needs(own[0], placement)):
                piece = own.pop(0)
                ready = [
                    ended[needed] + (transfer if needed.stage != stage else 0.0) for needed in needs(piece, placement)
                ]
                start = max([free[stage], *ready])
                ended[piece] = start + seconds(piece)
                free[stage] = ended[piece] + after(piece)
                spans.append(Span(piece=piece, start=start, end=free[stage]))
        assert len(spans) > before, "a piece waits for one that comes after it"
    return Timeline(spans=spans)


def needs(piece: Piece, placement: Placement) -> list[Piece]:
    """Return the pieces whose results a piece works on."""
    way = placement.chunks
    place = way.index((piece.stage, piece.chunk))

    def at(where: int, *, backward: bool) -> Piece:
        stage, chunk = way[where]
        return Piece(stage=stage, chunk=chunk, micro_batch=piece.micro_batch, backward=backward)

    if not piece.backward:
        return [at(place - 1, backward=False)] if place else []
    found = [at(place, backward=False)]
    return [*found, at(place + 1, backward=True)] if place + 1 < len(way) else found
