"""Supervised fine-tuning: questions are given, answers are learned, samples keep their own length or share sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from mindspeed_core.errors import InputError
from mindspeed_core.parallel.context import length_multiple
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data.batches import Collate, pad
from mindspeed_data.blend import blend
from mindspeed_data.instruction import InstructionSamples
from mindspeed_data.packing import PackedFiles, PackedSamples
from mindspeed_data.pretrain import Samples, check_weights
from mindspeed_data.sidecar import instruction_prefix, packed_length
from mindspeed_train.config import Recipe
from mindspeed_train.model import Model
from mindspeed_train.tasks.task import Task, token_loss

MULTIPLE = 8  # lengths are rounded up to a multiple of this, so that kernels see few shapes


def _datasets(recipe: Recipe, model: Model) -> tuple[Samples, Samples | None]:
    train, total = recipe.train, recipe.batch.total
    training = _blend(recipe.data.train, recipe, model, samples=train.steps * total, shuffle=True)
    valid = recipe.data.valid if train.eval_every else None
    if valid is None:
        return training, None
    return training, _blend(valid, recipe, model, samples=train.eval_steps * total or None, shuffle=False)


def _blend(
    data: str | Mapping[str, float], recipe: Recipe, model: Model, *, samples: int | None, shuffle: bool
) -> Samples:
    """The samples of one prefix, which the trainer shuffles, or of several in an order of their own."""
    parts = [_samples(prefix, recipe, model) for prefix in Task.prefixes(data)]
    if isinstance(data, str) or len(parts) == 1:
        return parts[0]
    return blend(parts, list(data.values()), samples, seed=recipe.train.seed, shuffle=shuffle)


def _samples(prefix: str, recipe: Recipe, model: Model) -> Samples:
    length = model.seq_length(recipe)
    if packed_length(prefix) is not None:
        return PackedFiles(prefix)
    samples = InstructionSamples(prefix, seq_length=length)
    if not recipe.data.pack:
        return samples
    return PackedSamples(samples, samples.lengths, length=length, pad_id=Tokenizer.load(model.tokenizer).padding)


def _collate(recipe: Recipe, model: Model) -> Collate | None:
    if recipe.data.pack:
        return None
    multiple = math.lcm(MULTIPLE, length_multiple(recipe.parallel))
    return pad(Tokenizer.load(model.tokenizer).padding, multiple=multiple)


def _check(recipe: Recipe) -> None:
    problems = []
    for name in ("train", "valid"):
        data = getattr(recipe.data, name)
        if isinstance(data, Mapping):
            try:
                check_weights(f"data.{name}", data)
            except InputError as error:
                problems.append(str(error))
        problems += [line for prefix in Task.prefixes(data) for line in _packed(prefix, recipe)]
    if recipe.data.split is not None:
        problems.append(
            "data.split: is for pretraining text; write a validation set of its own and name it as data.valid"
        )
    if problems:
        raise InputError("\n".join(problems))


def _packed(prefix: str, recipe: Recipe) -> Iterator[str]:
    """What a recipe lacks for data that is packed on the disk; where there is no data, that is said elsewhere."""
    try:
        length = packed_length(prefix)
    except InputError:
        return
    if length is not None and not recipe.data.pack:
        yield f"data.pack: {prefix} holds packed sequences; set data.pack: true, or write it without --pack"
    if length is not None and recipe.data.seq_length != length:
        yield f"data.seq_length: {prefix} holds packed sequences of {length:,} tokens; set data.seq_length: {length}"


SFT = Task(
    name="sft",
    find=instruction_prefix,
    datasets=_datasets,
    shuffle=True,
    collate=_collate,
    varies=True,
    forward=token_loss,
    check=_check,
)
