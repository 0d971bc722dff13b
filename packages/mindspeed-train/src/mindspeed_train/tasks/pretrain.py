"""Pretraining: every token of a text is learned from those before it."""

from __future__ import annotations

from mindspeed_data.pretrain import Samples, pretrain_datasets
from mindspeed_data.sidecar import text_prefix
from mindspeed_train.config import Recipe
from mindspeed_train.model import Model
from mindspeed_train.tasks.task import Task, token_loss


def _datasets(recipe: Recipe, model: Model) -> tuple[Samples, Samples | None]:
    data, train = recipe.data, recipe.train
    evaluates = train.eval_every > 0
    return pretrain_datasets(
        data.train,
        data.valid if evaluates else None,
        split=data.split,
        seq_length=model.seq_length(recipe),
        train_samples=train.steps * recipe.batch.total,
        # one sample asks for one pass over the data
        valid_samples=max(1, train.eval_steps * recipe.batch.total) if evaluates else 0,
        seed=train.seed,
        cache_folder=data.cache or recipe.checkpoint.folder / "cache",
        pack=data.pack,
    )


PRETRAIN = Task(
    name="pretrain",
    find=text_prefix,
    datasets=_datasets,
    shuffle=False,  # the data set is shuffled by document and by sample already
    collate=lambda recipe, model: None,
    varies=False,
    forward=token_loss,
    check=lambda recipe: None,
)
