"""Samples that share a sequence: which ones, and what tells them apart."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mindspeed_data.fitting import best_fit
from mindspeed_data.instruction import InstructionSamples
from mindspeed_data.packing import PackedFiles, PackedSamples, marks
from mindspeed_data.pretrain import pretrain_datasets
from mindspeed_data.sidecar import packed_length
from tests.data.command import data
from tests.data.test_pretrain import corpus
from tests.tiny import tiny_tokenizer


class Counted:
    """Samples of given lengths whose tokens count up, the first of each at weight 0."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, size = int(self.lengths[:index].sum()), int(self.lengths[index])
        tokens = torch.arange(start, start + size)
        weights = torch.ones(size)
        weights[0] = 0
        return {"tokens": tokens, "labels": tokens + 1, "weights": weights}


@given(st.lists(st.integers(1, 12), max_size=60), st.integers(12, 20))
def test_every_sample_is_packed_once_and_none_too_tightly(lengths: list[int], capacity: int) -> None:
    packs = best_fit(lengths, capacity)
    assert sorted(sample for pack in packs for sample in pack) == list(range(len(lengths)))
    filled = [sum(lengths[sample] for sample in pack) for pack in packs]
    assert all(0 < total <= capacity for total in filled)
    assert packs == best_fit(np.array(lengths, np.int32), capacity)
    # best fit decreasing: no two sequences could have been one
    assert all(a + b > capacity for i, a in enumerate(filled) for b in filled[:i])
    assert len(packs) <= 11 / 9 * -(-sum(lengths) // capacity) * 2 + 1


@pytest.mark.parametrize(
    ("lengths", "packs"),
    [
        ([7, 5, 4, 3, 2], [[0], [1, 3], [2, 4]]),
        ([8, 8], [[0], [1]]),  # a sample of just the capacity
        ([1] * 8, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ([3, 6, 5, 2], [[1, 3], [2, 0]]),  # each where it leaves the least room
        ([], []),
    ],
)
def test_samples_go_where_the_least_room_is_left(lengths: list[int], packs: list[list[int]]) -> None:
    assert best_fit(lengths, 8) == packs


def test_a_packed_sequence_tells_its_samples_apart() -> None:
    samples = Counted([7, 5, 4, 3, 2])
    packed = PackedSamples(samples, samples.lengths, length=8, pad_id=99)
    assert len(packed) == 3
    assert {name: values.tolist() for name, values in packed[2].items()} == {
        "tokens": [12, 13, 14, 15, 19, 20, 99, 99],
        "labels": [13, 14, 15, 16, 20, 21, 0, 0],
        "weights": [0, 1, 1, 1, 0, 1, 0, 0],
        "positions": [0, 1, 2, 3, 0, 1, 0, 1],
        "segments": [0, 0, 0, 0, 1, 1, 2, 2],  # what is filled is one segment of its own
    }
    assert packed[1]["segments"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert {values.dtype for values in packed[0].values()} == {torch.int64, torch.float32}
    assert sum(float(packed[i]["weights"].sum()) for i in range(3)) == sum(samples.lengths - 1)


def test_documents_of_a_pretraining_sample_are_told_apart_by_the_index(tmp_path: Path) -> None:
    # ids that count up, so that a document shows its own; the value of a token says nothing about an end
    lengths = [3, 5, 0, 4, 6, 1, 1]
    prefix = corpus(tmp_path / "c", lengths)
    ends = np.cumsum(lengths)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    plain, _ = pretrain_datasets(prefix, seq_length=6, train_samples=12, seed=3)
    packed, _ = pretrain_datasets(prefix, seq_length=6, train_samples=12, seed=3, pack=True)
    assert len(plain) == len(packed) >= 12
    for i in range(len(plain)):
        sample, bare = packed[i], plain[i]
        assert torch.equal(sample["tokens"], bare["tokens"])
        assert torch.equal(sample["labels"], bare["labels"])
        tokens, labels = sample["tokens"].numpy(), sample["labels"].numpy()
        last = np.isin(tokens + 1, ends)  # the last token of its document
        # what follows the end of a document is not learned; the end itself is
        assert sample["weights"].tolist() == (~last).astype(float).tolist()
        assert (document_of[tokens] == document_of[labels])[~last].all()
        starts = np.concatenate([[True], last[:-1]])
        assert sample["segments"].tolist() == (np.cumsum(starts) - 1).tolist()
        assert (sample["positions"].numpy()[starts] == 0).all()
        assert (np.diff(sample["positions"].numpy())[~starts[1:]] == 1).all()


def test_a_blend_is_packed_too(megatron: None, tmp_path: Path) -> None:
    a, b = corpus(tmp_path / "a", [4, 5, 6]), corpus(tmp_path / "b", [3, 3, 9], first=100)
    train, valid = pretrain_datasets(
        {str(a): 1.0, str(b): 2.0}, a, seq_length=8, train_samples=9, valid_samples=2, pack=True
    )
    assert valid is not None
    assert all("segments" in samples[0] for samples in (train, valid))


def test_marks_count_within_each_segment() -> None:
    assert {name: values.tolist() for name, values in marks([2, 1, 3]).items()} == {
        "positions": [0, 1, 0, 0, 1, 2],
        "segments": [0, 0, 1, 2, 2, 2],
    }


@pytest.mark.parametrize("described", [True, False])
def test_sequences_packed_on_the_disk_are_those_packed_in_training(tmp_path: Path, described: bool) -> None:
    rows = [{"instruction": "why " * (i % 7 + 1), "output": "because " * (i % 3 + 1)} for i in range(30)]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    command = ["sft", tmp_path / "in.json", "--template", "chatml", "--tokenizer", folder, "--output"]
    assert data(*command, tmp_path / "plain").returncode == 0
    assert data(*command, tmp_path / "packed", "--pack", "--seq-length", 128).returncode == 0
    if not described:
        (tmp_path / "packed_packed.meta.json").unlink()
        (tmp_path / "plain_packed.meta.json").unlink()
    assert (packed_length(tmp_path / "plain"), packed_length(tmp_path / "packed")) == (None, 128)
    samples = InstructionSamples(tmp_path / "plain")
    packs = best_fit([len(samples[i]["tokens"]) + 1 for i in range(len(samples))], 128)
    written = PackedFiles(tmp_path / "packed")
    assert len(written) == len(packs)
    for sequence, pack in zip((written[i] for i in range(len(written))), packs, strict=True):
        ends = np.flatnonzero(np.diff(sequence["segments"].numpy(), append=-1)) + 1
        parts = np.split(np.arange(128), ends[:-1])
        assert len(parts) in (len(pack), len(pack) + 1)  # what is filled is one segment of its own
        for part, sample in zip(parts, pack, strict=False):
            own = samples[sample]  # without the last token, which predicts nothing
            for name in ("tokens", "labels", "weights"):
                assert sequence[name][part[:-1]].tolist() == own[name].tolist()
            assert sequence["weights"][part[-1]] == 0
            assert sequence["positions"][part].tolist() == list(range(len(part)))
        assert float(sequence["weights"].sum()) == sum(float(samples[sample]["weights"].sum()) for sample in pack)


def test_a_million_lengths_are_packed_in_two_seconds_and_nearly_full() -> None:
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(300), 1, 1_000_000).astype(np.int64), 1, 4096)
    start = time.process_time()
    packs = best_fit(lengths, 4096)
    assert time.process_time() - start < 2
    assert lengths.sum() / (4096 * len(packs)) >= 0.995
