"""Checks a recipe against the files it names, before any rank starts; all that is wrong is told at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mindspeed_core.errors import InputError
from mindspeed_core.models.split import dealing_problems, recipe_key
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data import sidecar
from mindspeed_train import rules
from mindspeed_train.config import Recipe
from mindspeed_train.model import Model, find_model
from mindspeed_train.tasks import Task


def check(recipe: Recipe, task: Task, *, world_size: int, device: str | None = None) -> None:
    """Raise one InputError with a line for everything that would stop the run on `device` (npu, cuda, cpu)."""
    problems: list[str] = []

    def hold(rule: Callable[[], object]) -> bool:
        try:
            rule()
        except InputError as error:
            problems.extend(str(error).splitlines())
            return False
        return True

    found: list[Model] = []
    hold(lambda: found.append(find_model(recipe)))
    # As many copies are started as `ep` needs: where the model refuses it, their number says nothing.
    dealt = not found or not dealing_problems(found[0].arch, ep=recipe.parallel.ep, name=recipe_key)
    parallel = recipe.parallel if dealt else recipe.parallel.model_copy(update={"ep": 1})
    formed = hold(lambda: parallel.check(world_size))
    dp = world_size // parallel.model_ranks if dealt and formed else None
    case = rules.Case(recipe=recipe, dp=dp, device=device)
    prefixes = [prefix for name in ("train", "valid") for prefix in task.prefixes(getattr(recipe.data, name))]
    if found:
        model = found[0]
        case = replace(case, arch=model.arch, length=model.seq_length(recipe), varies=task.varies_under(recipe))
    problems += rules.problems(case)
    if found:
        hold(lambda: _check_data(recipe, task, found[0], prefixes))
    else:
        for prefix in prefixes:
            hold(lambda prefix=prefix: task.find(prefix))
    hold(lambda: task.check(recipe))
    folder = recipe.checkpoint.folder
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        problems.append(f"checkpoint.folder={folder}: {file} is a file; name a folder")
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))


def _check_data(recipe: Recipe, task: Task, model: Model, prefixes: list[str]) -> None:
    """Raise where data is missing or of another kind, or where data, tokenizer and vocabulary are not of one piece."""
    problems = []
    tokenizer = None
    try:
        tokenizer = Tokenizer.load(model.tokenizer)
        if tokenizer.vocab_size > model.arch.vocab_size:
            problems.append(
                f"data.tokenizer={model.tokenizer}: has {tokenizer.vocab_size:,} ids, more than the "
                f"vocab_size={model.arch.vocab_size:,} of the model; use its own tokenizer"
                + (f", or set model.vocab_size={tokenizer.vocab_size}" if recipe.model.random else "")
            )
    except InputError as error:
        problems.append(str(error))
    for prefix in prefixes:
        try:
            task.find(prefix)
            if tokenizer is not None:
                sidecar.check_tokenizer(prefix, tokenizer)
            known = sidecar.read(prefix)
            wanted = recipe.data.template
            if wanted is not None and known is not None and known.template not in (None, wanted):
                problems.append(f"data.template={wanted}: {prefix} was made with the template {known.template}")
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
