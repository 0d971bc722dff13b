"""Blends for fine-tuning: the weights hold at every point, and nothing but lengths, weights and seed makes the order."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from mindspeed_core.errors import InputError
from mindspeed_data.batches import batches, pad
from mindspeed_data.blend import blend
from mindspeed_data.pretrain import BlendedSamples, check_weights

pytestmark = pytest.mark.usefixtures("megatron")
SIZES, WEIGHTS = (40, 7, 13), (6.0, 3.0, 1.0)


class Part:
    """Samples whose ids say which part and which sample they are."""

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.lengths = 2 + np.arange(size, dtype=np.int32) % 5

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.full((int(self.lengths[index]),), self.number * 1000 + index)
        return {"tokens": ids, "labels": ids, "weights": torch.ones(len(ids))}


def mixed(samples: int | None, seed: int = 5, **options: bool) -> BlendedSamples:
    parts = [Part(number, size) for number, size in enumerate(SIZES)]
    return blend(parts, WEIGHTS, samples, seed=seed, **options)


def drawn(data: BlendedSamples) -> list[tuple[int, int]]:
    """The part and the number of each sample."""
    return [divmod(int(data[i]["tokens"][0]), 1000) for i in range(len(data))]


def test_weights_hold_at_every_point_and_parts_are_seen_epoch_by_epoch() -> None:
    order = drawn(mixed(300))
    for i in range(1, len(order) + 1):
        counts = np.bincount([part for part, _ in order[:i]], minlength=3)
        assert (np.abs(counts - i * np.array(WEIGHTS) / 10) <= 1).all()
    for number, size in enumerate(SIZES):
        own = [sample for part, sample in order if part == number]
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        if len(epochs) > 1:
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # each in an order of its own


def test_the_order_is_that_of_the_seed_and_a_longer_run_begins_alike() -> None:
    assert drawn(mixed(300))[:120] == drawn(mixed(120))
    assert drawn(mixed(120)) != drawn(mixed(120, seed=6))
    plain = drawn(mixed(120, shuffle=False))
    assert [part for part, _ in plain] == [part for part, _ in drawn(mixed(120))]
    assert [sample for part, sample in plain if part == 1] == [i % 7 for i in range(36)]


def test_without_a_number_every_part_is_seen_whole() -> None:
    order = drawn(mixed(None, shuffle=False))
    assert len(order) == 130  # 13 samples of a weight of a tenth
    assert {each for each in order if each[0] == 2} == {(2, i) for i in range(13)}
    assert {each for each in order if each[0] == 0} == {(0, i) for i in range(40)}


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_how_samples_are_dealt_changes_no_step_and_a_resumed_run_goes_on(dp: int) -> None:
    data = mixed(96)
    assert data.lengths is not None
    assert data.lengths.tolist() == [len(data[i]["tokens"]) for i in range(96)]
    order = drawn(data)

    def steps(start: int) -> list[list[tuple[int, int]]]:
        ranks = [
            batches(data, micro=2, global_batch=8, dp_rank=r, dp_size=dp, start_samples=start, collate=pad(0))
            for r in range(dp)
        ]
        found = []
        for step in islice(zip(*ranks, strict=True), (96 - start) // 8):
            rows = [row for rank in step for batch in rank for row in batch["tokens"][:, 0].tolist()]
            found.append(sorted(divmod(row, 1000) for row in rows))
        return found

    assert steps(0) == [sorted(order[i : i + 8]) for i in range(0, 96, 8)]
    assert steps(40) == steps(0)[5:]


def test_weights_that_are_none_are_refused() -> None:
    for weights in ({}, {"a": 1.0, "b": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}):
        with pytest.raises(InputError, match=r"data\.train: every weight of a blend must be above 0"):
            check_weights("data.train", weights)
