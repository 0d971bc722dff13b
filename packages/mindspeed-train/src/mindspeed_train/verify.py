"""The certificate of a layout: the same steps on the recipe's ranks and in one process, and how far the two differ.

    recipe ---- as it is, fp32 ------> layout.yaml ---> mindspeed-train ---> numbers and checkpoint \\
           \\--- nothing split, fp32 -> one.yaml ------> mindspeed-train ---> numbers and checkpoint --> differences

Both runs are the real command on the real data. What is compared is what a split could spoil: the loss and the norm of
the gradient of every step, and in the end the mean gradient (Adam's first moment) and the weights, tensor by tensor.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindspeed_core import launch, recipe
from mindspeed_core.cli import progress
from mindspeed_core.device import Device
from mindspeed_core.errors import InputError
from mindspeed_train.config import Recipe
from mindspeed_train.exactness import LeftOut
from mindspeed_train.meter import METRICS
from mindspeed_train.model import Model, find_model

# The largest relative difference that counts as equal. fp32 sums in another order differ by 1e-6. bf16 keeps 8 bits of each
# number, and a gradient is a sum of many that cancel.
BOUNDS = {
    "fp32": {"loss": 1e-5, "gradient norm": 1e-5, "mean gradient": 1e-5, "weights": 1e-5},
    "bf16": {"loss": 5e-3, "gradient norm": 2e-2, "mean gradient": 1e-1, "weights": 2e-2},
}
# Adam divides a gradient by its own size, so that the rounding of one that is nearly zero would move its weight as far as
# any other. With an eps of this size a weight moves by what its gradient is worth.
EPS = 1e-3
OPTIMIZER = ("lr", "weight_decay", "beta1", "beta2", "clip_grad")  # what one process takes over from the recipe
ROUNDS = ("reuse_fp32_param", "bf16_states", "bf16_grads")  # what only bf16 has
MOVES = ("dispatcher", "overlap", "grouped", "pad_to_capacity")  # keys of `experts` that change nothing but the way
MOMENT = "optimizer.state.exp_avg."
BYTES = 16  # per parameter in fp32: weight, gradient, two moments
FLOOR = 1e-3  # a tensor that is smaller than this part of the model's mean is measured against that


@dataclass(frozen=True)
class Difference:
    """How far one quantity of the layout is from that of one process, and where."""

    quantity: str
    largest: float  # relative
    where: str


def verify(
    wanted: Recipe,
    task: str,
    *,
    steps: int,
    precision: str,
    ranks: int,
    left_out: Sequence[LeftOut] = (),
    folder: Path | None = None,
) -> list[Difference]:
    """Run the recipe's layout and one process for some steps each, and return the differences.

    What cannot equal one process is `left_out` of both, so that the rest can be compared.
    Nothing of the recipe's own run folder is touched; what the runs write lies under `folder`, or in a temporary folder
    that is removed.
    """
    aside = Path(tempfile.mkdtemp(prefix="mindspeed-verify-")) if folder is None else folder
    try:
        layout, one = both(wanted, aside, steps=steps, precision=precision, left_out=left_out)
        if ranks == 1 and _splits(layout) == _splits(one):
            raise InputError(
                "the recipe splits nothing, so there is nothing to verify; add a layout, such as parallel.tp=2"
            )
        hint = _needs(one)
        with progress(2, "verify", unit="runs") as shown:
            for name, run in (("layout", layout), ("one", one)):
                _run(run, task, aside / f"{name}.yaml", hint if name == "one" else "")
                shown.advance()
        return compare(layout.checkpoint.folder, one.checkpoint.folder)
    finally:
        if folder is None:
            shutil.rmtree(aside, ignore_errors=True)


def both(
    wanted: Recipe, folder: Path, *, steps: int, precision: str, left_out: Sequence[LeftOut] = ()
) -> tuple[Recipe, Recipe]:
    """Return the recipe of the layout and that of one process, alike in all that decides the numbers."""
    plain = wanted.model_dump(mode="json")
    plain["precision"] = precision
    plain["train"] |= {"steps": steps, "eval_every": 0}
    # A constant rate, so that the weights move from the first step on.
    plain["optim"] |= {"schedule": "constant", "warmup": 0, "min_lr": 0.0, "eps": EPS}
    plain["optim"]["clip_grad"] = plain["optim"]["clip_grad"] or 1.0  # without it no norm is computed
    if precision == "fp32":
        plain["optim"] |= {name: False for name in ROUNDS if name in plain["optim"]}
    plain["experts"] |= _instead(left_out)
    plain["data"] |= {"valid": None, "cache": str(folder / "cache")}
    plain |= {"log": {"every": 1, "tensorboard": False}, "profile": None}
    runs = []
    for name in ("layout", "one"):
        values = {**plain, "checkpoint": {"folder": str(folder / name), "resume": "never"}}
        if name == "one":
            optim = {key: plain["optim"][key] for key in (*OPTIMIZER, "schedule", "min_lr", "eps")}
            experts = {key: value for key, value in plain["experts"].items() if key not in MOVES}
            values |= {"parallel": {"dp": 1}, "memory": {}, "kernels": {}, "optim": optim, "experts": experts}
        runs.append(Recipe.model_validate(values))
    return runs[0], runs[1]


def _instead(left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """What both runs have in section `experts` for what was left out."""
    return {key: value for found in left_out for key, value in found.departure.instead.items()}


def compare(layout: Path, one: Path) -> list[Difference]:
    """Return how far the run in one folder is from the run in another."""
    lines, expected = (_lines(folder) for folder in (layout, one))
    assert len(lines) == len(expected), f"{layout} made {len(lines)} steps, {one} {len(expected)}"
    found = []
    for quantity, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
        far = [(_relative(a[key], b[key]), f"step {b['step']}") for a, b in zip(lines, expected, strict=True)]
        found.append(Difference(quantity, *max(far, key=lambda pair: pair[0])))
    step = f"checkpoints/step_{expected[-1]['step']}"
    return [*found, *_tensors(layout / step, one / step)]


def _tensors(layout: Path, one: Path) -> Iterator[Difference]:
    """Yield the difference of gradients and of weights, each the largest of any tensor."""
    from mindspeed_core.checkpoint.torch_dist import read_metadata

    stored, expected = read_metadata(layout), read_metadata(one)
    for quantity, names in (
        ("mean gradient", [key for key in expected if key.startswith(MOMENT)]),
        ("weights", [key for key in expected if not key.startswith(("optimizer.", "random."))]),
    ):
        missing = [key for key in names if key not in stored]
        if missing:
            yield Difference(quantity, math.inf, f"{missing[0]}, which the layout has not")
            continue
        sizes = [_norms(key, layout, stored[key], one, expected[key]) for key in names]
        elements = sum(math.prod(expected[key].shape) for key in names)
        mean = math.sqrt(sum(size**2 for _, size in sizes) / elements)
        far = []
        for key, (apart, size) in zip(names, sizes, strict=True):
            least = FLOOR * mean * math.sqrt(math.prod(expected[key].shape))
            far.append((_ratio(apart, max(size, least)), key.removeprefix(MOMENT)))
        yield Difference(quantity, *max(far, key=lambda pair: pair[0]))


def _norms(key: str, layout: Path, stored: Any, one: Path, expected: Any) -> tuple[float, float]:
    """Return |a - b| and |b| of a tensor; a shape of its own is infinitely far."""
    if stored.shape != expected.shape:
        return math.inf, 1.0
    a, b = _whole(layout, stored), _whole(one, expected)
    return (a - b).norm().item(), b.norm().item()


def _whole(folder: Path, stored: Any) -> Any:
    import torch

    from mindspeed_core.checkpoint.torch_dist import read_box

    whole = torch.empty(stored.shape, dtype=torch.float32)
    for box in stored.boxes:
        place = tuple(slice(start, start + size) for start, size in zip(box.offset, box.sizes, strict=True))
        whole[place] = read_box(folder, box).float()
    return whole


def _relative(value: float, expected: float) -> float:
    return _ratio(abs(value - expected), abs(expected))


def _ratio(apart: float, size: float) -> float:
    if math.isnan(apart) or math.isnan(size):
        return math.inf
    return 0.0 if apart == 0 else apart / size if size else math.inf


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def _run(run: Recipe, task: str, file: Path, hint: str) -> None:
    """Run `mindspeed-train TASK FILE` as a user would; what stops it stops the verification."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe.dump(run))
    code, told = launch.run_again([task, str(file)])
    if code == 0:
        return
    if hint and (code < 0 or "out of memory" in told):
        raise InputError(f"one process cannot hold this model; {hint}")
    sys.stderr.write(told)
    raise SystemExit(code if code > 0 else 2)


def _splits(run: Recipe) -> dict[str, Any]:
    """What a recipe does to split a model or to move its work; `dp` is told by the number of ranks."""
    plain = run.model_dump(mode="json")
    experts = {key: plain["experts"][key] for key in MOVES}
    return {
        "parallel": {**plain["parallel"], "dp": None},
        "experts": experts,
        **{name: plain[name] for name in ("optim", "memory", "kernels")},
    }


def _needs(one: Recipe) -> str:
    """Raise where one process has not the memory for the model; return how to shrink it."""
    model = find_model(one)
    parameters, free = _parameters(model), Device.open(one.device).free_memory()
    needed, layers = parameters * BYTES, model.arch.num_layers
    fit = max(1, min(layers - 1, int(layers * free / needed / 2)))
    random = "" if one.model.random else " model.init=random"
    hint = f"verify a smaller one of the same kind: model.num_hidden_layers={fit}{random}"
    if needed > free:
        raise InputError(
            f"one process cannot hold this model: {parameters / 1e9:.1f} billion parameters need {needed / 2**30:.0f} GiB "
            f"in fp32 with their gradients and moments, {free / 2**30:.0f} GiB are free; {hint}"
        )
    return hint


def _parameters(model: Model) -> int:
    rows = model.family.placed(model.arch)
    return sum(math.prod(shape) for placed in rows for shape in placed.row.hf_shapes(model.arch))


def table(found: list[Difference], layout: str, precision: str, *, left_out: Sequence[LeftOut] = ()) -> str:
    """Return what a person reads."""
    bounds = BOUNDS[precision]
    rows = [(one.quantity, f"{one.largest:.1e}", f"{bounds[one.quantity]:g}", one.where) for one in found]
    rows = [("", "difference", "bound", "where it is largest"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join((row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3])) for row in rows
    ]
    verdict = (
        "equals one process"
        if equal(found, precision)
        else "DIFFERS from one process by more than rounding: do not train on it, and report this"
    )
    return "\n".join([*lines, *map(str, left_out), f"{layout}, {precision}: {verdict}"]) + "\n"


def as_json(
    found: list[Difference], layout: str, precision: str, *, steps: int, left_out: Sequence[LeftOut] = ()
) -> str:
    """Return what a program reads."""
    differences = [
        # JSON has no infinity
        {**asdict(one), "largest": one.largest if math.isfinite(one.largest) else None, "bound": bound}
        for one in found
        for bound in (BOUNDS[precision][one.quantity],)
    ]
    whole = {"equal": equal(found, precision), "layout": layout, "steps": steps, "precision": precision}
    without = [
        {"key": f"experts.{row.key}", "value": one.value, "when": row.when, "why": row.why}
        for one in left_out
        for row in (one.departure,)
    ]
    return json.dumps({**whole, "differences": differences, "left_out": without}, indent=2)


def equal(found: list[Difference], precision: str) -> bool:
    """True where no quantity is farther from one process than its bound."""
    return all(one.largest <= BOUNDS[precision][one.quantity] for one in found)


def layout_name(wanted: Recipe, ranks: int, precision: str, *, left_out: Sequence[LeftOut] = ()) -> str:
    """Return the layout that was run as its keys: `tp=2 sp=true pp=2 (4 ranks)`."""
    split = (
        *(("parallel", key, key) for key in type(wanted.parallel).model_fields),
        *(("optim", key, key) for key in type(wanted.optim).model_fields if precision == "bf16" or key not in ROUNDS),
        *(("memory", key, key) for key in type(wanted.memory).model_fields),
        *(("experts", key, f"experts.{key}") for key in MOVES),
        *(("kernels", key, f"kernels.{key}") for key in type(wanted.kernels).model_fields),
    )
    plain, parts = wanted.model_dump(mode="json"), []
    plain["experts"] |= _instead(left_out)
    for section, key, name in split:
        value, default = plain[section][key], type(getattr(wanted, section))().model_dump(mode="json")[key]
        if value != default and (section != "optim" or isinstance(value, bool)):
            parts.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    return f"{' '.join(parts) or 'dp=' + str(ranks)} ({ranks} rank{'s' if ranks != 1 else ''})"
