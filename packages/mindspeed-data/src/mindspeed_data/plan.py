"""What a run is to make of its rows beyond their ids: which share of them, in which order, and how they fill sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindspeed_core.conversation import IGNORED
from mindspeed_core.errors import InputError
from mindspeed_data.arrange import DRAWS, Filling, Mix, Order, draws, interleave, pack
from mindspeed_data.sources import Source


@dataclass(frozen=True, kw_only=True)
class Plan:
    """By default every row, in the order of the input, each a sequence of its own."""

    shard: tuple[int, int] = (1, 1)  # number i of n
    mix: Mix = "concat"
    weights: tuple[float, ...] | None = None  # of the inputs
    seed: int = 1234
    pack: int | None = None  # length of packed sequences
    window: int | None = None  # samples that are packed together; all if None

    @property
    def arranges(self) -> bool:
        """True where a second pass is needed."""
        return self.mix != "concat" or self.pack is not None

    def described(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def order(
        self, lengths: NDArray[np.integer[Any]], sources: Sequence[Source], source_of: NDArray[np.int32]
    ) -> Order:
        """Return where samples of these lengths go, of which each came from a source."""
        samples = np.arange(len(lengths))
        if self.mix != "concat":
            names: dict[int, str] = {}
            for source in sources:
                names.setdefault(source.part, str(source.path))
            part_of = np.array([source.part for source in sources])[source_of]
            counts = np.bincount(part_of, minlength=max(names) + 1).tolist()
            for part, name in names.items():
                if not counts[part]:
                    raise InputError(f"{name}: nothing is left of it to mix with the others; leave it out")
            if self.weights is not None and self.mix == "all_exhausted":
                drawn, last = draws(counts, self.weights)
                if drawn > DRAWS * sum(counts):
                    raise InputError(
                        f"--weights: until {names[last]} has been seen whole, about {drawn:,.4g} rows would be drawn, "
                        f"of {sum(counts):,} there are; give it more weight, or use --mix first_exhausted"
                    )
            samples = interleave(counts, self.weights, self.mix, self.seed)
        return Order(samples) if self.pack is None else pack(lengths, samples, self.pack, self.window)

    def filling(self, pad_id: int) -> Filling | None:
        """Return how packed sequences of instruction data are filled up."""
        if self.pack is None:
            return None
        return Filling(self.pack, {"input_ids": pad_id, "labels": IGNORED}, "attention_mask")
