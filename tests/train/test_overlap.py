"""Collectives of data parallelism beside the computation: nothing is trained, evaluated or saved with old weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.train import runs

OVERLAP = {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@contextmanager
def _small_buckets() -> Iterator[None]:
    """Gradients in many buckets, as a large model has them."""
    from mindspeed_core import megatron
    from mindspeed_core.device import Device

    megatron.load(Device.open("cpu"))
    from megatron.core import distributed

    small = partial(distributed.DistributedDataParallelConfig, bucket_size=2000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "DistributedDataParallelConfig", small)
        yield


def _trains(recipe: dict[str, Any]) -> None:
    with _small_buckets():
        runs.trains(recipe, "pretrain")


@pytest.mark.parametrize("optim", [OVERLAP, {"overlap_grad_reduce": True}, {}], ids=["both", "sum", "none"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_many_buckets_give_the_run_of_one_process(optim: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    where = runs.material(tmp_path / "material")
    sections: dict[str, Any] = {
        "model": {**runs.SIZES, "tie_word_embeddings": tied},
        "train": {"steps": 4, "eval_every": 3, "eval_steps": 1},  # what is saved after step 2 was not evaluated before
        "checkpoint": {"every": 2},
    }
    one, split = (runs.values(where, tmp_path / name, **sections) for name in ("one", "split"))
    split |= {"parallel": {"dp": 2}, "optim": {**split["optim"], **optim}}
    expected = runs.train(one)
    run_ranks(_trains, 2, split, timeout=120)
    found = runs.metrics(tmp_path / "split")
    for name in ("loss", "grad_norm", "valid_loss"):
        values = [[line[name] for line in lines if name in line] for lines in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), name
    for step in (2, 4):
        whole = runs.stored(tmp_path / "one" / "checkpoints" / f"step_{step}")
        for key, tensor in runs.stored(tmp_path / "split" / "checkpoints" / f"step_{step}").items():
            if not key.startswith("random."):
                assert (tensor - whole[key]).abs().max() < 1e-3 * whole[key].abs().max(), f"step {step}: {key}"


def test_a_forward_waits_for_every_parameter(tmp_path: Path) -> None:
    """The loss reads the output layer without calling it: Megatron's own hooks would leave its bucket on its way."""
    where = runs.material(tmp_path / "material")
    recipe = runs.values(where, tmp_path / "run", parallel={"dp": 2}, train={"steps": 1, "eval_every": 1})
    run_ranks(_all_have_come, 2, {**recipe, "optim": {**recipe["optim"], **OVERLAP}})


def _all_have_come(recipe: dict[str, Any]) -> None:
    from mindspeed_train.config import Recipe
    from mindspeed_train.tasks import TASKS
    from mindspeed_train.trainer import Trainer

    with _small_buckets():
        trainer = Trainer(Recipe.model_validate(recipe), TASKS["pretrain"])
    trainer.train()
    trainer.evaluate()
    groups = trainer.chunks[0].bucket_groups
    assert len(groups) > 5
    assert all(group.param_gather_dispatched and group.param_gather_handle is None for group in groups)
    trainer.close()
