"""The layouts that are compared with one process: every option alone, and combinations in which every pair of options meets.

An axis is a choice that a run makes once; "-" is what one process does. The rules of a recipe decide which choices go
together, and an option whose key is still refused is not drawn. Drawing is deterministic: the same rules give the same rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import ValidationError

from mindspeed_core.errors import InputError
from mindspeed_core.models.families import family_of
from mindspeed_train import rules
from mindspeed_train.config import Recipe
from mindspeed_train.tasks import TASKS
from tests.train.models import EXPERTS, LATENT, LLAMA

WORLD = 4  # the most ranks that a test starts
LENGTH = 48  # what 2 x cp divides for cp of 2, 3 and 4
Sections = dict[str, dict[str, Any]]
Choice = tuple[str, ...]  # an option of every axis, in their order
Pair = tuple[tuple[str, str], tuple[str, str]]  # (axis, option) twice, in the order of the axes

AXES: dict[str, dict[str, Sections]] = {
    "model": {
        "-": {"model": LLAMA},
        "tied": {"model": {**LLAMA, "tie_word_embeddings": True}},
        # query and key norms: replicated weights whose gradients come from split heads
        "qwen3": {"model": {**LLAMA, "preset": "qwen3-0.6b", "tie_word_embeddings": False}},
        "mixtral": {"model": EXPERTS},
        "deepseek2": {"model": LATENT},
    },
    "data": {
        "-": {},
        "documents": {"data": {"pack": True}},
        # samples of very different lengths: a mean over micro batches or ranks would weigh their tokens differently
        "chat": {},
        "packed-chat": {"data": {"pack": True}},
    },
    "tensor": {
        "-": {},
        "tp2": {"parallel": {"tp": 2}},
        "sp2": {"parallel": {"tp": 2, "sp": True}},
        "coc2": {"parallel": {"tp": 2, "sp": True, "collective_matmul": "coc", "coc_chunks": 2}},
        "mc2": {"parallel": {"tp": 2, "sp": True, "collective_matmul": "mc2"}},
    },
    "pipeline": {
        "-": {},
        "pp2": {"parallel": {"pp": 2}},
        "delayed": {"parallel": {"pp": 2, "delay_weight_gradients": True}},
        "vpp2": {"parallel": {"pp": 2, "vpp": 2}},
        "stages-1-3": {"parallel": {"pp": 2, "layers_per_stage": [1, 3]}},
        "noop": {"parallel": {"pp": 2, "vpp": 2, "noop_layers": [1, 2, 3, 6]}},  # one chunk has nothing else
        "pp4": {"parallel": {"pp": 4}},
    },
    "context": {
        "-": {},
        "ring2": {"parallel": {"cp": 2}},
        "ulysses2": {"parallel": {"cp": 2, "cp_algorithm": "ulysses"}},
        "ring3": {"parallel": {"cp": 3}},
        "rings4": {"parallel": {"cp": 4, "cp_window": 2, "cp_overlap": True}},
        "hybrid4": {"parallel": {"cp": 4, "cp_algorithm": "hybrid", "ulysses": 2}},
    },
    "experts": {
        "-": {},
        "ep2": {"parallel": {"ep": 2}},
        "ep2-allgather": {"parallel": {"ep": 2}, "experts": {"dispatcher": "allgather", "grouped": False}},
        "ep2-overlap": {"parallel": {"ep": 2}, "experts": {"overlap": True}},
        "etp1": {"parallel": {"etp": 1, "ep": 2}},
    },
    "copies": {"-": {}, "dp2": {"parallel": {"dp": 2}}},
    "optimizer": {
        "-": {},
        "distributed": {"optim": {"distributed": True}},
        "reduce": {"optim": {"overlap_grad_reduce": True}},
        "overlap": {"optim": {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}},
    },
    "memory": {
        "-": {},
        "full": {"memory": {"recompute": "full", "recompute_layers": 1}},
        "uniform": {"memory": {"recompute": "full", "recompute_method": "uniform", "recompute_layers": 2}},
        "uniform-each": {"memory": {"recompute": "full", "recompute_method": "uniform"}},
        "selective": {"memory": {"recompute": "selective"}},
        "norm-act": {"memory": {"recompute_norm": True, "recompute_activation": True}},
        "swap": {"memory": {"swap_attention": True}},
        "per-rank": {"memory": {"recompute": "full", "recompute_layers": 1, "recompute_per_rank": True}},
        "in-advance": {"memory": {"recompute": "full", "recompute_layers": 1, "recompute_in_advance": True}},
    },
}
PLAIN: Choice = ("-",) * len(AXES)
SPLITS = ("tensor", "pipeline", "context", "experts", "copies")  # the axes that decide how many ranks there are


def name_of(choice: Choice) -> str:
    """Return the options of a choice that are not those of one process."""
    return "+".join(option for option in choice if option != "-") or "one"


def task_of(choice: Choice) -> str:
    """Return the task that a choice runs."""
    return "sft" if "chat" in _option(choice, "data") else "pretrain"


def sections_of(choice: Choice) -> Sections:
    """Return what a choice says in a recipe."""
    joined: Sections = {}
    for axis, option in zip(AXES, choice, strict=True):
        for section, values in AXES[axis][option].items():
            joined[section] = {**joined.get(section, {}), **values}
    return joined


def baseline_of(choice: Choice) -> Choice:
    """Return the run of one process that a choice is compared with: the same model on the same data."""
    return tuple(option if axis in ("model", "data") else "-" for axis, option in zip(AXES, choice, strict=True))


@cache
def ranks_of(choice: Choice) -> int | None:
    """Return how many ranks a choice needs; None where the rules refuse it, or where it needs more than a test starts."""
    sections = sections_of(choice)
    sections["data"] = {"train": "text", "tokenizer": "tokenizer", "seq_length": LENGTH} | sections.get("data", {})
    batch, run = {"micro": 2, "global": 8}, {"folder": "run"}
    try:
        recipe = Recipe.model_validate({"batch": batch, "train": {"steps": 3}, "checkpoint": run, **sections})
        ranks = recipe.parallel.world_size()
        recipe.parallel.check(ranks)
    except (ValidationError, InputError):
        return None
    config = recipe.model.config()
    case = rules.Case(
        recipe=recipe,
        dp=ranks // recipe.parallel.model_ranks,
        arch=family_of(config, where="model").architecture(config),
        length=LENGTH,
        varies=TASKS[task_of(choice)].varies_under(recipe),
    )
    copies = case.dp is not None and case.dp > 1
    if rules.problems(case) or ranks > WORLD or (_option(choice, "optimizer") != "-" and not copies):
        return None
    return ranks


def alone() -> Iterator[Choice]:
    """Yield every option with as little beside it as the rules allow."""
    for place, axis in enumerate(AXES):
        for option in list(AXES[axis])[1:]:
            found = next((choice for choice in _simplest(place, option) if ranks_of(choice) is not None), None)
            if found is not None:
                yield found


def pairwise() -> Iterator[Choice]:
    """Yield combinations in which any two options that the rules let meet do meet at least once."""
    missing = dict.fromkeys(all_pairs())
    for choice in alone():
        for pair in pairs(choice):
            missing.pop(pair, None)
    bases = [base for base in _bases() if ranks_of(base) is not None]
    while missing:
        pair = next(iter(missing))
        choice = _draw(dict(pair), bases, missing)
        if choice is None:
            del missing[pair]  # the two never meet
            continue
        for met in pairs(choice):
            missing.pop(met, None)
        yield choice


def all_pairs() -> Iterator[Pair]:
    for one, other in itertools.combinations(AXES, 2):
        for a, b in itertools.product(list(AXES[one])[1:], list(AXES[other])[1:]):
            yield (one, a), (other, b)


def pairs(choice: Choice) -> Iterator[Pair]:
    """Yield every two options that meet in a choice."""
    chosen = [(axis, option) for axis, option in zip(AXES, choice, strict=True) if option != "-"]
    yield from itertools.combinations(chosen, 2)


def _option(choice: Choice, axis: str) -> str:
    return choice[list(AXES).index(axis)]


def _simplest(place: int, option: str) -> Iterator[Choice]:
    """Yield choices with that option, those with the fewest others first."""
    axes = list(AXES.values())
    rest = [i for i in range(len(axes)) if i != place]
    for others in range(4):
        for where in itertools.combinations(rest, others):
            for options in itertools.product(*(list(axes[i])[1:] for i in where)):
                chosen = {place: option, **dict(zip(where, options, strict=True))}
                yield tuple(chosen.get(i, "-") for i in range(len(axes)))


def _bases() -> Iterator[Choice]:
    """Yield every choice of a model and of a way to split it."""
    yield from itertools.product(*(AXES[axis] if axis in ("model", *SPLITS) else ("-",) for axis in AXES))


def _draw(wanted: dict[str, str], bases: list[Choice], missing: dict[Pair, None]) -> Choice | None:
    """Return a choice with the wanted options in which the most missing pairs meet, as far as one step ahead shows."""

    def gain(choice: Choice) -> int:
        return sum(pair in missing for pair in pairs(choice))

    axes = list(AXES)
    split = {axis: option for axis, option in wanted.items() if axis in ("model", *SPLITS)}
    fitting = [base for base in bases if all(base[axes.index(axis)] == option for axis, option in split.items())]
    for base in sorted(fitting, key=gain, reverse=True):  # sorting is stable: of equals the first one
        choice = tuple(wanted.get(axis, option) for axis, option in zip(axes, base, strict=True))
        for axis in ("data", "optimizer", "memory"):
            if axis not in wanted:
                place = axes.index(axis)
                grown = [(*choice[:place], option, *choice[place + 1 :]) for option in AXES[axis]]
                choice = max([one for one in grown if ranks_of(one) is not None] or [choice], key=gain)
        if ranks_of(choice) is not None:
            return choice
    return None
