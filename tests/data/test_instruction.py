from pathlib import Path

import numpy as np
import pytest

from mindspeed_core.errors import InputError
from mindspeed_data.indexed import IndexedWriter, path_of, publish
from mindspeed_data.instruction import InstructionSamples, cut
from mindspeed_data.sidecar import INSTRUCTION
from tests.data.command import data

Q = -100  # a question's label


def write(prefix: Path, samples: list[tuple[list[int], list[int]]]) -> Path:
    """Instruction data from ids and labels."""
    writers = []
    for name, suffix in INSTRUCTION.items():
        writer = IndexedWriter(f"{prefix}{suffix}")
        for ids, labels in samples:
            values = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}[name]
            writer.add(np.array(values, np.int32), np.array([len(values)]))
        writer.finish()
        writers.append(writer)
    beside = path_of(prefix, ".meta.json")
    Path(f"{beside}.tmp").write_text("{}")
    publish(*writers, beside=beside)
    return prefix


def test_labels_are_shifted_once(tmp_path: Path) -> None:
    samples = InstructionSamples(write(tmp_path / "x", [([5, 6, 7, 8], [Q, Q, 7, 8]), ([1, 2], [Q, 2])]))
    assert len(samples) == 2
    assert samples.lengths.tolist() == [3, 1]
    assert {name: values.tolist() for name, values in samples[0].items()} == {
        "tokens": [5, 6, 7],
        "labels": [0, 7, 8],
        "weights": [0.0, 1.0, 1.0],
    }
    assert samples[1]["tokens"].tolist() == [1]


def test_two_turns_learn_both_answers(tmp_path: Path) -> None:
    samples = InstructionSamples(write(tmp_path / "x", [([1, 2, 3, 4, 5, 6], [Q, 2, 3, Q, Q, 6])]))
    assert samples[0]["labels"].tolist() == [2, 3, 0, 0, 6]
    assert samples[0]["weights"].tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("turns", "length", "kept"),  # (question, answer) lengths; what stays of each
    [
        ([(3, 3)], 6, [(3, 3)]),
        ([(10, 2)], 6, [(4, 2)]),  # a short answer stays whole
        ([(2, 10)], 6, [(2, 4)]),  # a short question stays whole
        ([(10, 10)], 6, [(3, 3)]),  # both in proportion
        ([(20, 10)], 6, [(4, 2)]),
        ([(2, 2), (5, 5)], 8, [(2, 2), (2, 2)]),
        ([(2, 2), (5, 5)], 4, [(2, 2)]),
        ([(0, 9), (4, 4)], 5, [(0, 5)]),
    ],
)
def test_long_samples_are_cut_turn_by_turn(
    turns: list[tuple[int, int]], length: int, kept: list[tuple[int, int]]
) -> None:
    labels, expected = [], []
    for i, (question, answer) in enumerate(turns):
        start = len(labels)
        labels += [Q] * question + [7] * answer
        if i < len(kept):
            expected += range(start, start + kept[i][0])
            expected += range(start + question, start + question + kept[i][1])
    assert cut(np.array(labels), length).tolist() == expected


def test_every_length_is_kept_to(tmp_path: Path) -> None:
    sample = (list(range(100, 120)), [Q] * 6 + [7] * 5 + [Q] * 4 + [8] * 5)
    prefix = write(tmp_path / "x", [sample])
    for length in range(2, 24):
        samples = InstructionSamples(prefix, seq_length=length)
        assert len(samples[0]["tokens"]) == samples.lengths[0] == min(length, 20) - 1


def test_a_label_of_the_first_token_alone_teaches_nothing(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [([1, 2], [Q, 2]), ([1, 2], [1, Q])])
    assert "nothing of sample 1 is learned" in data("verify", prefix).stderr


def test_unusable_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no instruction data of that prefix"):
        InstructionSamples(tmp_path / "none")
    with pytest.raises(InputError, match="sample 1 holds fewer than two tokens"):
        InstructionSamples(write(tmp_path / "short", [([1, 2], [Q, 2]), ([1], [1])]))
    with pytest.raises(InputError, match="holds no samples"):
        InstructionSamples(write(tmp_path / "empty", []))
    with pytest.raises(InputError, match="its samples are not those"):
        InstructionSamples(write(tmp_path / "uneven", [([1, 2], [Q, 2, 3])]))
