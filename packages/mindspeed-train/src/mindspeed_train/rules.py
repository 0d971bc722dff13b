"""The rules between the keys of a recipe, its model and its data: one table, read by the checks and by the documentation.

A section knows the rules among its own keys; what several sections, the architecture or the length of samples decide
stands here. Rules are held before any rank starts. `docs/parallelism.md` shows which features they let combine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindspeed_core.models import build
from mindspeed_core.models.family import Architecture
from mindspeed_core.models.split import recipe_key
from mindspeed_core.parallel.context import length_problems, ring_problems
from mindspeed_core.parallel.pipeline import micro_batch_group

if TYPE_CHECKING:
    from mindspeed_train.config import Recipe


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a rule looks at."""

    recipe: Recipe
    dp: int | None  # copies of the model; None where only the number of ranks will tell
    arch: Architecture | None = None  # None where the model is not known (yet)
    device: str | None = None  # the type of what the ranks will run on, where that is known
    length: int = 0  # tokens of a sample, known with the model
    varies: bool = False  # True: every micro batch has a length of its own


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of the table."""

    keys: tuple[str, ...]  # what it is about
    says: str  # one sentence for the documentation
    fault: Callable[[Case], str | None]  # what is broken and what would work, a line for each fault; None: it holds
    model: bool = False  # True: it looks at the architecture or the length


def problems(case: Case) -> list[str]:
    """Return a line for every rule that the case breaks; rules about a model wait until it is known."""
    return [line for _rule, line in broken(case)]


def broken(case: Case) -> list[tuple[Rule, str]]:
    """Return every rule that the case breaks, with the line that says so."""
    held = [rule for rule in RULES if case.arch is not None or not rule.model]
    return [(rule, line) for rule in held for line in (rule.fault(case) or "").splitlines()]


def _architecture(case: Case) -> Architecture:
    assert case.arch is not None, "a rule with model=True waits for the model"
    return case.arch


def _sequence_needs_tensor(case: Case) -> str | None:
    if case.recipe.parallel.sp and case.recipe.parallel.tp == 1:
        return "parallel.sp: cuts what tp leaves whole and needs tp of at least 2; set parallel.tp too"
    return None


def _batch_is_dealt(case: Case) -> str | None:
    batch, dp = case.recipe.batch, case.dp
    if dp is None or batch.total % (batch.micro * dp) == 0:
        return None
    share = batch.micro * dp
    near = sorted({max(1, batch.total // share) * share, (batch.total // share + 1) * share})
    return (
        f"batch.global: {batch.total} is not a multiple of batch.micro={batch.micro} times dp={dp}; "
        f"use {' or '.join(map(str, near))}"
    )


def _chunks_take_groups(case: Case) -> str | None:
    batch, parallel, dp = case.recipe.batch, case.recipe.parallel, case.dp
    group = micro_batch_group(parallel.pp, parallel.vpp)
    if dp is None or batch.total % (batch.micro * dp) or batch.total // (batch.micro * dp) % group == 0:
        return None
    share = batch.micro * dp * group
    near = sorted({max(1, batch.total // share) * share, (batch.total // share + 1) * share})
    return (
        f"batch.global: {batch.total} makes {batch.total // (batch.micro * dp)} micro batches, and parallel.vpp takes them in "
        f"groups of pp={parallel.pp}; use {' or '.join(map(str, near))}"
    )


def _evaluation_has_data(case: Case) -> str | None:
    data = case.recipe.data
    if case.recipe.train.eval_every and data.valid is None and data.split is None:
        return "train.eval_every: needs data to evaluate on; give data.valid, or data.split: 95,5"
    return None


def _one_validation_set(case: Case) -> str | None:
    if case.recipe.data.valid is not None and case.recipe.data.split is not None:
        return "data.split: takes the validation data from data.train, but data.valid is given; leave one out"
    return None


def _ranks_divide_the_model(case: Case) -> str | None:
    others = _misplaced(case) + _left_by_the_ring(case)
    lines = build.check(_architecture(case), case.recipe.parallel)
    return "\n".join(line for line in lines if line not in others) or None


def _a_ring_attends_plainly(case: Case) -> str | None:
    return "\n".join(_left_by_the_ring(case)) or None


def _left_by_the_ring(case: Case) -> list[str]:
    arch = _architecture(case)
    return ring_problems(case.recipe.parallel, window=arch.window, alibi=arch.alibi)


def _fused_operators_take_it(case: Case) -> str | None:
    if case.device != "npu":
        return None
    return "\n".join(build.fused_problems(_architecture(case), case.recipe.parallel, case.recipe.precision)) or None


def _layers_have_places(case: Case) -> str | None:
    return "\n".join(_misplaced(case)) or None


def _misplaced(case: Case) -> list[str]:
    return case.recipe.parallel.placement(_architecture(case)).problems(recipe_key)


def _memory_has_layers(case: Case) -> str | None:
    if _misplaced(case):
        return None
    placement = case.recipe.parallel.placement(_architecture(case))
    stages = [[len(placement.layers(stage, chunk)) for chunk in range(placement.vpp)] for stage in range(placement.pp)]
    return "\n".join(case.recipe.memory.problems(stages)) or None


def _positions_are_enough(case: Case) -> str | None:
    most = _architecture(case).max_positions
    if case.length <= most:
        return None
    return (
        f"data.seq_length={case.length} is more than the max_position_embeddings={most} of the model; "
        f"use at most {most}"
    )


def _sequence_is_cut_evenly(case: Case) -> str | None:
    parallel, tp = case.recipe.parallel, case.recipe.parallel.tp
    if case.varies:
        return None
    if parallel.cp > 1:
        return "\n".join(length_problems(parallel, case.length)) or None
    if not parallel.sp or case.length % tp == 0:
        return None
    return (
        f"parallel.sp cuts every sequence over tp={tp} ranks, which does not divide data.seq_length={case.length}; "
        f"use {case.length // tp * tp or tp}"
    )


def _experts_need_sequence(case: Case) -> str | None:
    parallel = case.recipe.parallel
    if _architecture(case).experts is None or parallel.tp == 1 or parallel.sp:
        return None
    return "parallel.sp: each tp rank sends tokens of its own to the experts, which needs sp; set parallel.sp=true too"


def _experts_fit(case: Case) -> str | None:
    return "\n".join(case.recipe.experts.problems(_architecture(case))) or None


def _narrow_optimizer_needs_bf16(case: Case) -> str | None:
    return "\n".join(case.recipe.optim.precision_problems(case.recipe.precision)) or None


def _recompute_over_chunks(case: Case) -> str | None:
    keys = {
        "recompute_per_rank": "counts over the chunks of a stage",
        "recompute_in_advance": "recomputes one chunk of a stage while another one's gradient travels",
    }
    if case.recipe.parallel.vpp > 1:
        return None
    return "\n".join(
        f"memory.{name}: {does}, and vpp=1 makes one; leave it out, or set parallel.vpp"
        for name, does in keys.items()
        if getattr(case.recipe.memory, name)
    )


def _weights_may_wait(case: Case) -> str | None:
    parallel, optim, key = case.recipe.parallel, case.recipe.optim, "parallel.delay_weight_gradients"
    if not parallel.delay_weight_gradients:
        return None
    lines = []
    if parallel.pp == 1:
        lines.append(f"{key}: with pp=1 no stage waits for a gradient; leave it out, or set parallel.pp")
    if parallel.vpp > 1:
        lines.append(f"{key}: is of the order of vpp=1; leave it or parallel.vpp={parallel.vpp} out")
    if optim.overlap_grad_reduce:
        lines.append(f"{key}: a sum of optim.overlap_grad_reduce begins before they are made; leave one of them out")
    if not optim.fused_accumulation:
        lines.append(f"{key}: makes and adds them in one, which is optim.fused_accumulation; leave one of them out")
    kernels = [name for name in ("matmul", "grouped_matmul") if getattr(case.recipe.kernels, name) == "reference"]
    if kernels or case.device == "cuda":
        lines += [
            f"{key}: is of the products of CPUs and NPUs; leave it out, and kernels.{name} at auto"
            for name in kernels or ["matmul"]
        ]
    return "\n".join(lines) or None


def _profile_is_of_this_run(case: Case) -> str | None:
    profile, parallel, steps = case.recipe.profile, case.recipe.parallel, case.recipe.train.steps
    if profile is None:
        return None
    lines = []
    if profile.last > steps:
        lines.append(
            f"profile.start: steps {profile.start} to {profile.last} are to be recorded, and train.steps={steps} ends before; "
            "begin earlier or record fewer"
        )
    if case.dp is not None and profile.ranks != "all":
        last = parallel.model_ranks * case.dp - 1
        lines += [
            f"profile.ranks: there is no rank {rank}, the last one is {last}" for rank in profile.ranks if rank > last
        ]
    return "\n".join(lines) or None


RULES: tuple[Rule, ...] = (
    Rule(
        keys=("parallel.sp", "parallel.tp"),
        says="Sequence parallelism cuts what tensor parallelism leaves whole: it needs `tp` of at least 2.",
        fault=_sequence_needs_tensor,
    ),
    Rule(
        keys=("batch.global", "batch.micro", "parallel.dp"),
        says="`batch.global` is a multiple of `batch.micro` times `dp`.",
        fault=_batch_is_dealt,
    ),
    Rule(
        keys=("parallel.vpp", "batch.global"),
        says="With `vpp` the micro batches of a rank are a multiple of `pp`.",
        fault=_chunks_take_groups,
    ),
    Rule(
        keys=("train.eval_every", "data.valid", "data.split"),
        says="Evaluation needs `data.valid` or `data.split`.",
        fault=_evaluation_has_data,
    ),
    Rule(
        keys=("optim.reuse_fp32_param", "optim.bf16_states", "optim.bf16_grads", "precision"),
        says="`reuse_fp32_param`, `bf16_states` and `bf16_grads` need `precision: bf16`.",
        fault=_narrow_optimizer_needs_bf16,
    ),
    Rule(
        keys=("memory.recompute_per_rank", "memory.recompute_in_advance", "parallel.vpp"),
        says="`recompute_per_rank` and `recompute_in_advance` need `vpp` of at least 2.",
        fault=_recompute_over_chunks,
    ),
    Rule(
        keys=("parallel.delay_weight_gradients", "parallel.pp", "parallel.vpp", "optim"),
        says=(
            "`delay_weight_gradients` needs `pp` of at least 2, `vpp: 1` and `fused_accumulation`, and excludes "
            "`overlap_grad_reduce`."
        ),
        fault=_weights_may_wait,
    ),
    Rule(
        keys=("profile", "train.steps"),
        says="`profile` records steps and ranks that the run has.",
        fault=_profile_is_of_this_run,
    ),
    Rule(
        keys=("data.split", "data.valid"),
        says="`data.split` and `data.valid` exclude each other.",
        fault=_one_validation_set,
    ),
    Rule(
        keys=("parallel.tp", "parallel.cp", "parallel.ulysses"),
        says="`tp` divides heads, key/value heads and feed-forward columns, Ulysses the heads that are left.",
        fault=_ranks_divide_the_model,
        model=True,
    ),
    Rule(
        keys=("parallel.cp", "parallel.cp_algorithm"),
        says="Attention in a sliding window, or with linear biases, is cut by Ulysses alone, not by a ring.",
        fault=_a_ring_attends_plainly,
        model=True,
    ),
    Rule(
        keys=("parallel.collective_matmul", "parallel.tp", "precision"),
        says="On NPUs `mc2` needs `precision: bf16`, a `tp` of 2, 4, 8 or 16, and under `sp` layers that are not narrow.",
        fault=_fused_operators_take_it,
        model=True,
    ),
    Rule(
        keys=("parallel.pp", "parallel.vpp", "parallel.layers_per_stage", "parallel.noop_layers"),
        says=(
            "The chunks of `vpp`, and stages with `noop_layers`, share the layers equally; `layers_per_stage` says it all and "
            "goes with neither; else there are no more stages than layers."
        ),
        fault=_layers_have_places,
        model=True,
    ),
    Rule(
        keys=(
            "memory.recompute_layers",
            "memory.recompute_norm",
            "memory.recompute_activation",
            "memory.swap_attention",
        ),
        says=(
            "`recompute_layers` counts layers that a pipeline chunk has; `recompute_norm`, `recompute_activation` and "
            "`swap_attention` take those that are left."
        ),
        fault=_memory_has_layers,
        model=True,
    ),
    Rule(
        keys=("data.seq_length",),
        says="Samples are no longer than the model's positions.",
        fault=_positions_are_enough,
        model=True,
    ),
    Rule(
        keys=("parallel.sp", "parallel.cp", "data.seq_length"),
        says=(
            "The length of samples is a multiple of 2 `cp` in a ring, of `cp` under Ulysses; sequence parallelism cuts what "
            "is left by `tp`."
        ),
        fault=_sequence_is_cut_evenly,
        model=True,
    ),
    Rule(
        keys=("parallel.tp", "parallel.sp"),
        says="A model with experts takes `tp` together with `sp`.",
        fault=_experts_need_sequence,
        model=True,
    ),
    Rule(
        keys=("experts",),
        says="The section `experts` fits the model: its router, its shared experts, its capacity.",
        fault=_experts_fit,
        model=True,
    ),
)
