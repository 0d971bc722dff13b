"""What does not equal one process under a split, when, and why: one table, read by `verify` and by the documentation.

Whatever is not named here equals one process, as `docs/parallelism.md` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_train.rules import Case


@dataclass(frozen=True, kw_only=True)
class Departure:
    """One row of the table: a key of section `experts`, the splits under which it departs, and what departs nowhere."""

    key: str
    value: str | None = None  # of that key; None: any that is neither zero nor null
    when: str
    why: str
    apart: Callable[[Case], bool]
    instead: Mapping[str, Any]  # keys of the section as they are compared

    @property
    def name(self) -> str:
        """The key as a recipe writes it, with its value where that matters."""
        return f"experts.{self.key}" + (f": {self.value}" if self.value else "")


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A departure that a recipe asks for."""

    departure: Departure
    value: Any

    def __str__(self) -> str:
        row = self.departure
        when = row.when.replace("`", "")
        return (
            f"experts.{row.key}={self.value} left out of both runs: {when} it is expected to differ from one process, "
            f"since {row.why}"
        )


def departures(case: Case) -> list[LeftOut]:
    """Return what keeps the case from equalling one process; its model and its copies are known."""
    assert case.arch is not None, "the model decides what the section leaves open"
    assert case.dp is not None, "the copies decide what the ranks see"
    if case.arch.experts is None:
        return []
    section, own, found = case.recipe.experts, case.arch.experts, []
    for row in DEPARTURES:
        written = getattr(section, row.key)
        value = getattr(own, row.key, None) if written is None else written
        if value and row.value in (None, value) and row.apart(case):
            found.append(LeftOut(departure=row, value=value))
    return found


def _several_ranks(case: Case) -> bool:
    return case.recipe.parallel.model_ranks * (case.dp or 1) > 1


def _cuts_sequences(case: Case) -> bool:
    return case.recipe.parallel.tp * case.recipe.parallel.cp > 1


DRAWS = "every rank draws random numbers of its own"
SEES = "it looks at the tokens of one rank together, and these cut a sequence"

DEPARTURES: tuple[Departure, ...] = (
    Departure(
        key="jitter",
        when="on more than one rank",
        why=DRAWS,
        apart=_several_ranks,
        instead={"jitter": 0.0},
    ),
    Departure(
        key="router",
        value="sparsemixer",
        when="on more than one rank",
        why=DRAWS,
        apart=_several_ranks,
        instead={"router": "softmax_topk"},
    ),
    Departure(
        key="router",
        value="sinkhorn",
        when="with `tp` or `cp`",
        why=SEES,
        apart=_cuts_sequences,
        instead={"router": "softmax_topk"},
    ),
    Departure(
        key="capacity_factor",
        when="with `tp` or `cp`",
        why=SEES,
        apart=_cuts_sequences,
        instead={"capacity_factor": None, "drop": "probs", "pad_to_capacity": False},
    ),
)
