"""Which layers of the model each pipeline stage holds: the one rule that training and conversion share.

A stage holds `vpp` chunks; the model runs through chunk 0 of every stage, then through chunk 1 of every stage:

    num_layers=8 pp=2 vpp=2                     num_layers=5 pp=2                 num_layers=3 pp=2 noop_layers=2
                chunk 0   chunk 1                           chunk 0                           chunk 0
    stage 0     0 1       4 5                   stage 0     0 1 2                 stage 0     0 1
    stage 1     2 3       6 7                   stage 1     3 4                   stage 1     - 2

A noop layer takes a place and computes nothing: it makes room on a stage that has the embedding or the output layer
besides, or fills up a number of layers that the chunks do not divide. Nothing is built for it and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

# How a setting and its value are named to the user: `parallel.vpp=2` in a recipe, `--vpp 2` on a command line.
Name = Callable[[str, object], str]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layer lies: in which chunk of which stage, and at which place of it, noop layers counted too."""

    stage: int
    chunk: int
    local: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where every layer of a model lies. Layers are counted from 0 over the whole model, without noop layers.

    Without `vpp`, `layers_per_stage` and `noop_layers` the stages share the layers as equally as they can, and the first
    ones hold one more: the last one has the output layer besides.
    """

    num_layers: int
    pp: int = 1
    vpp: int = 1  # chunks per stage
    layers_per_stage: tuple[int, ...] | None = None
    noop_layers: tuple[int, ...] = ()  # their numbers, counted with the layers

    @property
    def slots(self) -> int:
        """The number of layers and noop layers together."""
        return self.num_layers + len(self.noop_layers)

    @property
    def even(self) -> bool:
        """True where every chunk has the same number of slots."""
        return len({len(self.chunk_slots(stage, 0)) for stage in range(self.pp)}) == 1

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Every (stage, chunk), in the order in which the model runs through them."""
        return [(stage, chunk) for chunk in range(self.vpp) for stage in range(self.pp)]

    def chunk_slots(self, stage: int, chunk: int = 0) -> range:
        """Return the slots of a chunk, counted over the whole model with noop layers."""
        assert 0 <= stage < self.pp, f"stage {stage} of {self.pp}"
        assert 0 <= chunk < self.vpp, f"chunk {chunk} of {self.vpp}"
        if self.layers_per_stage is not None:
            start, count = sum(self.layers_per_stage[:stage]), self.layers_per_stage[stage]
        elif self.vpp == 1:
            each, more = divmod(self.slots, self.pp)
            start, count = stage * each + min(stage, more), each + (stage < more)
        else:
            count = self.slots // (self.pp * self.vpp)
            start = (chunk * self.pp + stage) * count
        return range(start, start + count)

    def held(self, stage: int, chunk: int = 0) -> tuple[int | None, ...]:
        """Return what lies at each place of a chunk: a layer of the model, or None for a noop layer."""
        noops = set(self.noop_layers)
        return tuple(
            None if slot in noops else slot - sum(noop < slot for noop in noops)
            for slot in self.chunk_slots(stage, chunk)
        )

    def layers(self, stage: int, chunk: int = 0) -> range:
        """Return the layers of a chunk: they follow one another."""
        slots = self.chunk_slots(stage, chunk)
        first, last = (edge - sum(noop < edge for noop in self.noop_layers) for edge in (slots.start, slots.stop))
        return range(first, last)

    def place(self, layer: int) -> Place:
        """Return where a layer lies."""
        for stage, chunk in self.chunks:
            if layer in self.layers(stage, chunk):
                return Place(stage=stage, chunk=chunk, local=self.held(stage, chunk).index(layer))
        raise AssertionError(f"layer {layer} of {self.num_layers}")

    def is_first(self, stage: int, chunk: int = 0) -> bool:
        """True for the chunk that has the embedding."""
        return stage == 0 and chunk == 0

    def is_last(self, stage: int, chunk: int = 0) -> bool:
        """True for the chunk that has the output layer."""
        return stage == self.pp - 1 and chunk == self.vpp - 1

    def problems(self, name: Name) -> list[str]:
        """Return why layers cannot be placed so, one line for each rule that is broken."""
        if self.layers_per_stage is not None:
            return self._stage_problems(self.layers_per_stage, name)
        found = []
        if self.vpp > 1 and self.pp == 1:
            found.append(f"{name('vpp', self.vpp)}: cuts pipeline stages into chunks and needs pp of at least 2")
        wrong = [noop for noop in self.noop_layers if not 0 <= noop < self.slots]
        if wrong or len(set(self.noop_layers)) < len(self.noop_layers):
            found.append(
                f"{name('noop_layers', _listed(self.noop_layers))}: counts the {self.num_layers} layers of the model and the "
                f"noop layers together; use each number once, from 0 to {self.slots - 1}"
            )
        if found:
            return found
        whole = self.pp * self.vpp
        if self.vpp == 1 and not self.noop_layers:
            if self.pp > self.num_layers:
                found.append(
                    f"{name('pp', self.pp)} is more stages than num_hidden_layers={self.num_layers}; "
                    f"use at most {self.num_layers}"
                )
        elif self.slots % whole:
            have = f"{self.slots} layers" + (f" ({len(self.noop_layers)} of them noop)" if self.noop_layers else "")
            what = f"pp={self.pp} x vpp={self.vpp} = {whole} chunks" if self.vpp > 1 else f"pp={self.pp} stages"
            key, value = ("vpp", self.vpp) if self.vpp > 1 else ("noop_layers", _listed(self.noop_layers))
            fitting = [n for n in range(1, self.slots // self.pp + 1) if self.slots % (self.pp * n) == 0]
            mend = f"use vpp={_either(fitting)}, or " if self.vpp > 1 and fitting else ""
            found.append(
                f"{name(key, value)}: {what} cannot share {have} equally; {mend}"
                f"add {-self.slots % whole} more to noop_layers"
            )
        return found

    def _stage_problems(self, counts: tuple[int, ...], name: Name) -> list[str]:
        told = name("layers_per_stage", _listed(counts))
        noops = _listed(self.noop_layers)
        for key, value, given in (("vpp", self.vpp, self.vpp > 1), ("noop_layers", noops, noops != "")):
            if given:
                return [f"{told}: says all that {name(key, value)} says otherwise; leave one of them out"]
        if len(counts) == self.pp and sum(counts) == self.num_layers and min(counts) > 0:
            return []
        each, more = divmod(self.num_layers, self.pp)
        such = _listed([each + (stage < more) for stage in range(self.pp)])
        return [
            f"{told}: needs a number of at least 1 for each of the pp={self.pp} stages, "
            f"{self.num_layers} together (num_hidden_layers)" + (f", as in {such}" if each else "; use fewer stages")
        ]


def balanced(layers: Sequence[float], last: float, pp: int) -> tuple[int, ...]:
    """Return how many layers each of `pp` stages holds so that the one with the most work has as little as can be.

    Args:
        layers: the work of each layer, in their order.
        last: the work that the last stage has besides, of the output layer.
    """
    ends = [0.0, *accumulate(layers)]
    best: dict[int, _Cut] = {0: (0.0, 0.0, ())}  # of the first layers: for how many of them, the best cut so far
    for stage in range(pp):
        more = last if stage == pp - 1 else 0.0
        best = {
            stop: min(
                _grown(cut, stop - start, ends[stop] - ends[start] + more)
                for start, cut in best.items()
                if start < stop
            )
            for stop in range(stage + 1, len(ends))
        }
    return best[len(layers)][2]


# the work of the busiest stage; the sum of squares, which is least where stages are even; the layers of each stage
_Cut = tuple[float, float, tuple[int, ...]]


def _grown(cut: _Cut, count: int, work: float) -> _Cut:
    """Return a cut with one more stage of so many layers and so much work."""
    busiest, squares, counts = cut
    return max(busiest, work), squares + work * work, (*counts, count)


def micro_batch_group(pp: int, vpp: int) -> int:
    """Return what the number of micro batches must be a multiple of.

    With chunks, a stage runs one chunk on `pp` micro batches before it turns to the next chunk.
    """
    return pp if vpp > 1 else 1


def _listed(numbers: tuple[int, ...] | list[int]) -> str:
    return ",".join(map(str, numbers))


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers[:6]))
