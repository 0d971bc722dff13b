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

RELATIVE = 1e-5  # fp32 sums in another order
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
        "optim": {"eps": runs.EPS},
    }
    one, split = (runs.values(where, tmp_path / name, **sections) for name in ("one", "split"))
    split |= {"parallel": {"dp": 2}, "optim": {**split["optim"], **optim}}
    expected = runs.train(one)
    run_ranks(_trains, 2, split, timeout=120)
    found = runs.metrics(tmp_path / "split")
    for name in ("loss", "grad_norm", "valid_loss"):
        values = [[line[name] for line in lines if name in line] for lines in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=RELATIVE), name
    for step in (2, 4):
        whole = runs.stored(tmp_path / "one" / "checkpoints" / f"step_{step}")
        for key, tensor in runs.stored(tmp_path / "split" / "checkpoints" / f"step_{step}").items():
            if not key.startswith("random."):
                assert (tensor - whole[key]).abs().max() < RELATIVE * whole[key].abs().max(), f"step {step}: {key}"


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


def _stops(recipe: dict[str, Any]) -> None:
    with _small_buckets():
        runs.stops(recipe, "pretrain")


@pytest.mark.parametrize("layout", [{"dp": 2}, {"tp": 2}], ids=["dp2", "tp2"])
def test_a_run_with_many_buckets_goes_on_in_any_layout(layout: dict[str, int], tmp_path: Path) -> None:
    """Megatron's own checkpoints shift what lies behind the padding of the first bucket, and say nothing."""
    where = runs.material(tmp_path / "material")
    sections: dict[str, Any] = {"train": {"steps": 4}, "checkpoint": {"every": 2}, "parallel": {"dp": 2}}
    sections["optim"] = {**OVERLAP, "eps": runs.EPS}
    straight, broken = (runs.values(where, tmp_path / name, **sections) for name in ("straight", "broken"))
    run_ranks(_trains, 2, straight, timeout=120)
    run_ranks(_stops, 2, broken, timeout=120)
    if "tp" in layout:
        broken |= {"parallel": layout, "optim": {**broken["optim"], **dict.fromkeys(OVERLAP, False)}}
    run_ranks(_trains, 2, broken, timeout=120)
    bound = 0 if "dp" in layout else RELATIVE
    for name in ("loss", "grad_norm"):
        numbers = [[line[name] for line in runs.metrics(tmp_path / run)] for run in ("broken", "straight")]
        assert numbers[0] == pytest.approx(numbers[1], rel=bound, abs=0), name
    expected = runs.stored(tmp_path / "straight" / "checkpoints" / "step_4")
    for key, tensor in runs.stored(tmp_path / "broken" / "checkpoints" / "step_4").items():
        if not key.startswith("random."):
            assert (tensor - expected[key]).abs().max() <= bound * expected[key].abs().max(), key


def _saves(recipe: dict[str, Any]) -> None:
    """A rank that saves and may neither form a group nor gather a tensor for it."""
    import torch.distributed as dist

    from mindspeed_train.config import Recipe
    from mindspeed_train.tasks import TASKS
    from mindspeed_train.trainer import Trainer

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a checkpoint is written without groups of its own, and without gathering")

    trainer = Trainer(Recipe.model_validate(recipe), TASKS["pretrain"])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("new_group", "gather", "all_gather", "scatter", "broadcast"):
            patch.setattr(dist, name, never)
        trainer.save()
    from megatron.core import parallel_state

    assert parallel_state._DATA_PARALLEL_GROUP_GLOO is None
    trainer.close()


def test_a_checkpoint_needs_no_groups_of_its_own(tmp_path: Path) -> None:
    where = runs.material(tmp_path / "material")
    recipe = runs.values(where, tmp_path / "run", parallel={"dp": 2}, optim={"distributed": True})
    run_ranks(_saves, 2, recipe)
