"""Pairs of answers: the files, and rows that are none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data import readers, sidecar
from mindspeed_data.indexed import IndexedDataset
from tests.data.command import data, written
from tests.tiny import tiny_tokenizer

NAMES = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
QUESTION = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), more=("<start_of_turn>", "<end_of_turn>"))


def turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


def make(tmp_path: Path, tokenizer: Path, rows: list[Any], *options: object) -> Path:
    (tmp_path / "in.json").write_text(json.dumps(rows))
    command = ["pairwise", tmp_path / "in.json", "--tokenizer", tokenizer, "--output", tmp_path / "x", "--overwrite"]
    run = data(*command, *options)
    assert (run.returncode, run.stdout) == (0, f"{tmp_path}/x\n"), run.stderr
    return tmp_path / "x"


def test_both_answers_follow_the_same_question(tokenizer: Path, tmp_path: Path) -> None:
    alpaca = {"instruction": "a", "input": "", "chosen": "b", "rejected": "no"}
    sharegpt = {"conversations": [turn("human", "a")], "chosen": turn("gpt", "b"), "rejected": turn("gpt", "no")}
    loaded = Tokenizer.load(tokenizer)
    for format, row in (("alpaca", alpaca), ("sharegpt", sharegpt)):
        prefix = make(tmp_path, tokenizer, [row], "--format", format, "--template", "chatml")
        assert written(prefix, loaded, "chosen_") == [f"{QUESTION}[[b<|im_end|>]]"]
        assert written(prefix, loaded, "rejected_") == [f"{QUESTION}[[no<|im_end|>]]"]
    files = [IndexedDataset(f"{prefix}_packed_{name}_document") for name in NAMES]
    assert [file.dtype for file in files] == [np.dtype("int32")] * 4
    known = sidecar.read(prefix)
    assert known is not None
    lengths = [int(file.lengths[0]) for file in files]
    assert (known.kind, known.kept, known.tokens) == ("pairwise", 1, lengths[0] + lengths[2])
    assert known.learned == len(loaded.encode("b<|im_end|>")) + len(loaded.encode("no<|im_end|>"))
    assert data("verify", prefix).returncode == 0


def test_only_the_last_answer_is_learned(tokenizer: Path, tmp_path: Path) -> None:
    before = [turn("system", "s"), turn("human", "a"), turn("gpt", "<think>hm</think>b"), turn("human", "c")]
    row = {"conversations": before, "chosen": turn("gpt", "<think>why</think>d"), "rejected": turn("gpt", "e")}
    prefix = make(tmp_path, tokenizer, [row], "--format", "sharegpt", "--template", "qwen3")
    end, start = "<|im_end|>\n", "<|im_start|>"
    asked = f"{start}system\ns{end}{start}user\na{end}{start}assistant\nb{end}{start}user\nc{end}{start}assistant\n"
    loaded = Tokenizer.load(tokenizer)
    assert written(prefix, loaded, "chosen_") == [f"{asked}[[<think>why</think>d{end}]]"]
    assert written(prefix, loaded, "rejected_") == [f"{asked}<think>\n\n</think>\n\n[[e{end}]]"]


def test_the_end_of_earlier_answers_is_not_learned(tokenizer: Path, tmp_path: Path) -> None:
    before = [turn("human", "a"), turn("gpt", "b"), turn("human", "c")]
    row = {"conversations": before, "chosen": turn("gpt", "d"), "rejected": turn("gpt", "e")}
    prefix = make(tmp_path, tokenizer, [row], "--format", "sharegpt", "--template", "gemma")
    (text,) = written(prefix, Tokenizer.load(tokenizer), "chosen_")
    assert text.endswith("<start_of_turn>model\n[[d<|endoftext|>]]")
    assert text.count("[[") == 1
    assert "=" not in text


def test_a_pair_of_which_one_is_too_long_is_left_out_whole(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "chosen": "b", "rejected": "x" * n} for n in (1, 40)]
    prefix = make(tmp_path, tokenizer, rows, "--template", "empty", "--seq-length", 41)
    assert [int(IndexedDataset(f"{prefix}_packed_{name}_document").lengths.sum()) for name in NAMES] == [4, 4, 43, 43]
    prefix = make(tmp_path, tokenizer, rows, "--template", "empty", "--seq-length", 40)
    assert [len(IndexedDataset(f"{prefix}_packed_{name}_document")) for name in NAMES] == [1] * 4


BAD = [
    ("alpaca", {"instruction": "a", "chosen": "b"}, "no key rejected"),
    ("alpaca", {"instruction": "a", "chosen": "b", "rejected": ""}, "empty answer"),
    ("alpaca", {"instruction": "", "chosen": "b", "rejected": "c"}, "empty question"),
    (
        "sharegpt",
        {"conversations": [turn("human", "a")], "chosen": turn("human", "b"), "rejected": turn("gpt", "c")},
        "wrong role: chosen is from human, who asks",
    ),
    (
        "sharegpt",
        {"conversations": [turn("human", "a")], "chosen": "b", "rejected": turn("gpt", "c")},
        "not an object: chosen is a text",
    ),
    (
        "sharegpt",
        {"conversations": [turn("human", "a")], "chosen": turn("gpt", "b"), "rejected": turn("gpt", "")},
        "empty answer: rejected",
    ),
    (
        "sharegpt",
        {
            "conversations": [turn("human", "a"), turn("gpt", "b")],
            "chosen": turn("gpt", "b"),
            "rejected": turn("gpt", "c"),
        },
        "no question at the end: the last message is an answer already",
    ),
]


@pytest.mark.parametrize("mix", [[], ["--mix", "first_exhausted"]])
def test_lengths_are_those_of_an_answer_with_its_question(tokenizer: Path, tmp_path: Path, mix: list[str]) -> None:
    """In what the run says, in `stats`, in `verify`, and for --seq-length."""
    rows = [{"instruction": "a", "chosen": "b" * n, "rejected": "x" * (50 - n)} for n in (1, 10, 40)]
    prefix = make(tmp_path, tokenizer, rows, "--template", "empty", *mix)
    command = ["pairwise", tmp_path / "in.json", "--tokenizer", tokenizer, "--template", "empty", "--output"]
    assert "longest sample: 50" in data(*command, tmp_path / "y", *mix).stderr
    known = sidecar.read(prefix)
    assert known is not None
    assert (known.longest, known.tokens, known.kept) == (50, 156, 3)
    verified = data("verify", prefix)
    assert "3 samples, 156 tokens, longest 50" in verified.stdout, verified.stderr
    told = json.loads(data("stats", prefix, "--json").stdout)
    assert {name: told[name] for name in ("samples", "answers", "tokens", "shortest", "longest", "mean")} == {
        "samples": 3,
        "answers": 6,
        "tokens": 156,
        "shortest": 2,
        "longest": 50,
        "mean": 26,
    }
    assert "3 pairs: 6 answers, each with its question, 156 tokens" in data("stats", prefix).stdout
    fitting = data(*command, tmp_path / "z", "--seq-length", 50)
    assert (fitting.returncode, "left out" in fitting.stderr) == (0, False)
    assert "left out 1 row: 1 longer than 49 tokens" in data(*command, tmp_path / "w", "--seq-length", 49).stderr


GOOD = {
    "alpaca": {"instruction": "a", "chosen": "b", "rejected": "c"},
    "sharegpt": {"conversations": [turn("human", "a")], "chosen": turn("gpt", "b"), "rejected": turn("gpt", "c")},
}


@pytest.mark.parametrize("format", sorted(GOOD))
def test_every_bad_row_is_counted_and_named_with_its_line(tokenizer: Path, tmp_path: Path, format: str) -> None:
    bad = [(record, said) for name, record, said in BAD if name == format]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [GOOD[format], *(record for record, _ in bad)]))
    run = data(
        "pairwise",
        source,
        "--format",
        format,
        "--tokenizer",
        tokenizer,
        "--template",
        "chatml",
        "--output",
        tmp_path / "x",
    )
    assert run.returncode == 0, run.stderr
    known = sidecar.read(tmp_path / "x")
    assert known is not None
    assert (known.kept, sum(known.left_out.values())) == (1, len(bad))
    for number, (_, said) in enumerate(bad, 2):
        assert f"{source}:{number}: {said}\n" in run.stderr
    shown = data("show", tmp_path / "x").stdout
    assert f"--- sample 0 of 1, from {source}:1\n" in shown
    assert (
        shown.index("chosen: ")
        < shown.index("«b<|im_end|>»")
        < shown.index("rejected: ")
        < shown.index("«c<|im_end|>»")
    )


def test_pairs_are_told_apart_from_other_data(tokenizer: Path, tmp_path: Path) -> None:
    prefix = make(tmp_path, tokenizer, [GOOD["alpaca"]], "--template", "chatml")
    for name in ("x", "x_packed", "x_packed_chosen_labels_document", "x_packed_rejected_input_ids_document.idx"):
        assert sidecar.pairwise_prefix(tmp_path / name) == prefix
    with pytest.raises(InputError, match="this is pairs of answers; train on it with pairwise"):
        sidecar.text_prefix(prefix)
    with pytest.raises(InputError, match="this is pairs of answers; make instruction data with sft"):
        sidecar.instruction_prefix(prefix)
    (tmp_path / "sft.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    command = ["sft", tmp_path / "sft.json", "--tokenizer", tokenizer, "--template", "chatml", "--output", prefix]
    run = data(*command, "--overwrite")  # which would leave half of the pairs
    assert "x_packed_chosen_input_ids_document.idx: another kind of data has this prefix" in run.stderr


@pytest.mark.parametrize("task", ["sft", "pairwise", "prm"])
def test_any_number_of_workers_writes_the_same_bytes(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Templates, formats and their marks travel to the workers."""
    rows = [
        {**GOOD["alpaca"], "output": "b", "input": "x@y@" * (i % 5), "value": ["+", "-"] * (i % 5)} for i in range(60)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(readers, "CHUNK", 500)
    options = ["--placeholder", "@"] if task == "prm" else ["--template", "qwen3", "--thinking", "learn"]
    command = [task, tmp_path / "in.jsonl", "--tokenizer", tokenizer, *options]
    found = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        run = data(*command, "--workers", workers, "--output", tmp_path / str(workers) / "x")
        assert run.returncode == 0, run.stderr
        found.append({path.name: path.read_bytes() for path in (tmp_path / str(workers)).iterdir()})
    assert found[0] == found[1]
    assert len(found[0]) > 6
