"""Section `memory`, and what it means for the layers of one pipeline chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mindspeed_core.recipe import Section

PARTLY = ("recompute_norm", "recompute_activation", "swap_attention")  # what is done in layers not recomputed whole
Layers = bool | Annotated[int, Field(ge=1)]  # every layer, or so many of them


class MemoryConfig(Section):
    """Section `memory`: what the forward pass does not keep for the backward pass, and how it is had again.

    Nothing here changes a gradient by a bit.
    """

    recompute: Literal["none", "full", "selective"] = "none"  # whole layers, or of each only the core of its attention
    recompute_method: Literal["block", "uniform"] = "block"  # of full: the first layers of a chunk, or groups of layers
    recompute_layers: int | None = Field(
        None, ge=1
    )  # block: how many, by default all; uniform: in a group, by default 1
    recompute_per_rank: bool = False  # block: recompute_layers counts over all chunks of a stage, not in each
    recompute_norm: Layers = False  # drop the outputs of the two norms of a layer; a number: of so many layers
    recompute_activation: Layers = False  # drop the output of SwiGLU; a number: of so many layers
    recompute_in_advance: bool = False  # recompute a chunk's layers before waiting for their gradient
    swap_attention: bool = False  # keep what attention saves on the host until its layer's turn comes

    @model_validator(mode="after")
    def _agrees(self) -> MemoryConfig:
        problems = []
        full = self.recompute == "full"
        for name in ("recompute_layers", "recompute_per_rank", "recompute_in_advance"):
            if getattr(self, name) and not full:
                problems.append(f"{name}: is about whole layers; set recompute: full too, or leave it out")
        if self.recompute_method == "uniform":
            if not full:
                problems.append("recompute_method: is about whole layers; set recompute: full too, or leave it out")
            for name in ("recompute_per_rank", *PARTLY):
                if full and getattr(self, name):
                    problems.append(f"{name}: uniform recomputes every layer whole; use recompute_method: block")
        elif full and self.recompute_layers is None:
            if self.recompute_per_rank:
                problems.append("recompute_per_rank: is how recompute_layers counts; set that too, or leave it out")
            problems += [
                f"{name}: recompute: full takes every layer whole; set recompute_layers too, or leave it out"
                for name in PARTLY
                if getattr(self, name)
            ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def problems(self, stages: Sequence[Sequence[int]]) -> list[str]:
        """Return a line for each key that asks for more layers than any chunk has.

        `stages` holds, of each pipeline stage, how many layers its chunks have.
        """
        most = max(self._turns(layers, place, len(chunks)) for chunks in stages for place, layers in enumerate(chunks))
        where = f"a pipeline {'stage' if self.recompute_per_rank else 'chunk'} has at most {most} layer{'s' if most != 1 else ''}"
        whole = self.recompute_layers or 0
        if whole > most:
            return [f"memory.recompute_layers={whole}: {where}; use at most {most}, or leave it out"]
        left, found = most - whole, []
        for name in PARTLY if self.recompute_method == "block" else ():
            value = getattr(self, name)
            if value and not left:
                found.append(
                    f"memory.{name}: {where}, all recomputed whole; use fewer recompute_layers, or leave it out"
                )
            elif value is not True and value > left:
                behind = f", {left} behind those recomputed whole" if whole else ""
                found.append(f"memory.{name}={value}: {where}{behind}; use at most {left}, or true")
        return found

    def _turns(self, layers: int, chunk: int, chunks: int) -> int:
        """Return how far the count of a chunk's layers goes."""
        return (layers - 1) * chunks + chunk + 1 if self.recompute_per_rank and layers else layers

    def plan(self, layers: int, *, chunk: int = 0, chunks: int = 1) -> Plan:
        """Return what is done with each of the `layers` layers of a chunk, which is one of `chunks` on its stage.

        Layers take their turn in this order: first those recomputed whole, then, as far as there are layers left,
        those whose norms and activations are. With `recompute_per_rank` the turn goes round the chunks of a stage:

            layer 0 of chunk 0, layer 0 of chunk 1, layer 1 of chunk 0, layer 1 of chunk 1 ...
        """
        turn = [self._turns(i + 1, chunk, chunks) - 1 for i in range(layers)]
        full = {"none": 0, "selective": 0, "full": self.recompute_layers}[self.recompute]
        groups: tuple[range, ...]
        if self.recompute_method == "uniform":
            size = self.recompute_layers or 1
            groups = tuple(range(first, min(first + size, layers)) for first in range(0, layers, size))
        else:
            groups = tuple(range(i, i + 1) for i in range(layers) if full is None or turn[i] < full)
        whole = {i for group in groups for i in group}

        def partly(wanted: bool | int) -> frozenset[int]:
            last = float("inf") if wanted is True else (full or 0) + wanted
            return frozenset(i for i in range(layers) if i not in whole and turn[i] < last)

        return Plan(
            groups=groups,
            norm=partly(self.recompute_norm),
            activation=partly(self.recompute_activation),
            attention=partly(self.recompute == "selective"),
            swap=partly(self.swap_attention),
        )


@dataclass(frozen=True)
class Plan:
    """Which layers of a chunk, counted in it from 0, are treated how. A layer recomputed whole needs nothing else."""

    groups: tuple[range, ...] = ()  # recomputed together; of each group only the input is kept
    norm: frozenset[int] = frozenset()
    activation: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    swap: frozenset[int] = frozenset()
