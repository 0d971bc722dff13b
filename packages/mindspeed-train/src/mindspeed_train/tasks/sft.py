"""Supervised fine-tuning: questions are given, answers are learned, samples keep their own length or share sequences."""

from __future__ import annotations

import math
from functools import partial

from mindspeed_core.errors import InputError
from mindspeed_core.parallel.context import length_multiple
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data.batches import Collate, pad
from mindspeed_data.instruction import InstructionSamples
from mindspeed_data.packing import PackedSamples
from mindspeed_data.pretrain import Samples
from mindspeed_data.sidecar import instruction_prefix
from mindspeed_train.config import Recipe
from mindspeed_train.model import Model
from mindspeed_train.tasks.task import Task, token_loss

MULTIPLE = 8  # lengths are rounded up to a multiple of this, so that kernels see few shapes


def _datasets(recipe: Recipe, model: Model) -> tuple[Samples, Samples | None]:
    length = model.seq_length(recipe)
    train, valid = (
        InstructionSamples(Task.prefixes(data)[0], seq_length=length) if data else None
        for data in (recipe.data.train, recipe.data.valid if recipe.train.eval_every else None)
    )
    assert train is not None
    if not recipe.data.pack:
        return train, valid
    pad_id = Tokenizer.load(model.tokenizer).padding
    pack = partial(PackedSamples, length=length, pad_id=pad_id)
    return pack(train, train.lengths), valid and pack(valid, valid.lengths)


def _collate(recipe: Recipe, model: Model) -> Collate | None:
    if recipe.data.pack:
        return None
    multiple = math.lcm(MULTIPLE, length_multiple(recipe.parallel))
    return pad(Tokenizer.load(model.tokenizer).padding, multiple=multiple)


def _check(recipe: Recipe) -> None:
    problems = []
    for name in ("train", "valid"):
        if len(Task.prefixes(getattr(recipe.data, name))) > 1:
            problems.append(
                f"data.{name}: fine-tuning takes one prefix; write all files into one data set with mindspeed-data sft"
            )
    if recipe.data.split is not None:
        problems.append(
            "data.split: is for pretraining text; write a validation set of its own and name it as data.valid"
        )
    if problems:
        raise InputError("\n".join(problems))


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
