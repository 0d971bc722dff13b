"""Samples as text: what is learned is coloured or within « », and every sample says where it came from."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data.indexed import HEADER
from tests.data.command import data
from tests.tiny import tiny_tokenizer

QUESTION = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def answers(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three answers from two files, and a row between them that is none."""
    folder = tmp_path_factory.mktemp("answers")
    rows = [json.dumps({"instruction": "a", "output": answer}) for answer in ("b", "", "c")]
    (folder / "1.jsonl").write_text("\n".join(rows))
    (folder / "2.json").write_text(f"[\n\n{rows[2]}]")
    inputs = [folder / "1.jsonl", folder / "2.json"]
    run = data("sft", *inputs, "--tokenizer", tokenizer, "--template", "chatml", "--output", folder / "x")
    assert run.returncode == 0, run.stderr
    return folder


def test_what_is_learned_is_marked_and_every_sample_says_where_it_came_from(answers: Path) -> None:
    size = len(data("show", answers / "x", "-n", 1).stdout)
    run = data("show", answers / "x")
    assert run.stdout.startswith(f"--- sample 0 of 3, from {answers}/1.jsonl:1\n")
    assert f"{QUESTION}«b<|im_end|>»\n--- sample 1 of 3, from {answers}/1.jsonl:3\n" in run.stdout
    assert run.stdout.endswith(f"{QUESTION}«c<|im_end|>»\n")
    assert f"--- sample 2 of 3, from {answers}/2.json:3\n" in run.stdout
    assert 0 < size < len(run.stdout)
    (second,) = [part for part in run.stdout.split("--- ") if part.startswith("sample 1")]
    assert data("show", answers / "x", "--start", 1, "-n", 1).stdout == f"--- {second}"


def test_it_is_coloured_on_a_terminal(tokenizer: Path, answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {"instruction": "a", "chosen": "b", "rejected": "c"}
    (answers / "pairs.json").write_text(json.dumps([pair]))
    command = ["pairwise", answers / "pairs.json", "--tokenizer", tokenizer, "--template", "chatml"]
    assert data(*command, "--output", answers / "pairs").returncode == 0
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;32mb<|im_end|>\x1b[0m" in data("show", answers / "x").stdout
    shown = data("show", answers / "pairs").stdout
    assert "\x1b[1;32mb<|im_end|>\x1b[0m" in shown
    assert "\x1b[1;31mc<|im_end|>\x1b[0m" in shown
    assert "«" not in shown


def test_text_says_its_file_and_its_line(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the fox\nthe dog\n")
    for options, lines in (([], ["a.txt"]), (["--per-line"], ["a.txt:1", "a.txt:2"])):
        command = ["pretrain", tmp_path / "a.txt", "--tokenizer", tokenizer, "--output", tmp_path / "t", "--overwrite"]
        assert data(*command, *options).returncode == 0
        heads = [line for line in data("show", tmp_path / "t").stdout.splitlines() if line.startswith("---")]
        count = len(lines)
        assert heads == [f"--- sample {i} of {count}, from {tmp_path}/{line}" for i, line in enumerate(lines)]


def test_data_of_others_says_nothing_of_where_it_came_from(tokenizer: Path, answers: Path, tmp_path: Path) -> None:
    for path in answers.glob("x_packed_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run = data("show", tmp_path / "x", "--tokenizer", tokenizer, "-n", 1)
    assert run.stdout.splitlines()[0] == "--- sample 0 of 3"
    assert "which tokenizer made it; name it with --tokenizer" in data("show", tmp_path / "x").stderr


def test_the_samples_of_a_packed_sequence_are_shown_one_by_one(tokenizer: Path, answers: Path, tmp_path: Path) -> None:
    size = len(Tokenizer.load(tokenizer).encode(f"{QUESTION}b<|im_end|>"))
    command = ["sft", answers / "1.jsonl", "--tokenizer", tokenizer, "--template", "chatml", "--output", tmp_path / "x"]
    assert data(*command, "--pack", "--seq-length", 2 * size + 3).returncode == 0
    shown = data("show", tmp_path / "x").stdout
    assert shown == (
        "--- sequence 0 of 1\n"
        f"- sample 1 of 2, from {answers}/1.jsonl:1\n{size} tokens, 2 of them learned\n{QUESTION}«b<|im_end|>»\n"
        f"- sample 2 of 2, from {answers}/1.jsonl:3\n{size} tokens, 2 of them learned\n{QUESTION}«c<|im_end|>»\n"
        "- 3 tokens of filling\n"
    )


def test_a_sequence_with_one_sample_is_a_sequence_nonetheless(tokenizer: Path, answers: Path, tmp_path: Path) -> None:
    size = len(Tokenizer.load(tokenizer).encode(f"{QUESTION}b<|im_end|>"))
    command = ["sft", answers / "1.jsonl", "--tokenizer", tokenizer, "--template", "chatml", "--output", tmp_path / "x"]
    assert data(*command, "--pack", "--seq-length", size).returncode == 0
    heads = [line for line in data("show", tmp_path / "x").stdout.splitlines() if line.startswith("-")]
    assert heads == [
        "--- sequence 0 of 2",
        f"- sample 1 of 1, from {answers}/1.jsonl:1",
        "--- sequence 1 of 2",
        f"- sample 1 of 1, from {answers}/1.jsonl:3",
    ]
    assert "holds 2 sequences, counted from 0" in data("show", tmp_path / "x", "--start", 2).stderr


def write(path: Path, at: int, *values: int) -> None:
    """Overwrite 32-bit numbers of a file, the first of them number `at`."""
    content = np.frombuffer(path.read_bytes()[: path.stat().st_size // 4 * 4], "<i4").copy()
    content[at : at + len(values)] = values
    path.write_bytes(content.tobytes())


def lengthen(path: Path, at: int, length: int) -> None:
    """Overwrite a length in an index."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<i", content, HEADER.size + 4 * at, length)
    path.write_bytes(content)


@pytest.mark.parametrize("pack", [False, True])
def test_damaged_files_are_said_in_one_line(tokenizer: Path, answers: Path, tmp_path: Path, pack: bool) -> None:
    inputs = [answers / "1.jsonl", answers / "2.json"]
    command = ["sft", *inputs, "--tokenizer", tokenizer, "--template", "chatml", "--overwrite", "--output"]
    options = ["--pack", "--seq-length", 40] if pack else []
    for name, harm, said in [
        ("input_ids_document.idx", lambda path: lengthen(path, 0, -237), "a sequence of negative length"),
        ("input_ids_document.idx", lambda path: lengthen(path, 0, 1), "its offsets are not the sums of its lengths"),
        ("labels_document.idx", lambda path: lengthen(path, 0, -(2**31) + 5), "a sequence of negative length"),
        ("input_ids_document.bin", lambda path: write(path, 0, 399_999), "sample 0 holds 399999, not an id of the"),
        ("input_ids_document.bin", lambda path: write(path, 0, -5), "sample 0 holds -5, not an id of the vocabulary"),
        ("labels_document.bin", lambda path: write(path, 0, 399_999), "sample 0 holds 399999, not an id of the"),
        ("origin.bin", lambda path: write(path, 0, 7), "does not tell where sample 0 comes from"),
        ("origin.bin", lambda path: write(path, 0, -1), "does not tell where sample 0 comes from"),
        ("origin.idx", lambda path: lengthen(path, 0, 6), "its offsets are not the sums of its lengths"),
    ]:
        assert data(*command, tmp_path / "x", *options).returncode == 0
        path = next(tmp_path.glob(f"x_packed*{name}"))
        harm(path)
        run = data("show", tmp_path / "x")
        assert (run.returncode, len(run.stderr.splitlines())) == (2, 1), run.stderr
        assert f"{path}: {said}" in run.stderr
        assert run.stderr.endswith(f"see what else is wrong with mindspeed-data verify {tmp_path}/x\n")
        assert data("verify", tmp_path / "x").returncode == 2
        if name.endswith("_document.idx"):
            run = data("stats", tmp_path / "x")
            assert (run.returncode, f"{path}: {said}" in run.stderr) == (2, True), run.stderr


def test_a_reader_that_leaves_ends_it_quietly(answers: Path) -> None:
    command = [sys.executable, "-c", "import sys; from mindspeed_data.__main__ import main; main()"]
    process = subprocess.Popen(
        [*command, "show", str(answers / "x")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + 13, b"")


def test_the_tokenizer_is_found_from_any_folder(answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_tokenizer(tmp_path / "made/tokenizer")
    monkeypatch.chdir(tmp_path / "made")
    command = ["sft", answers / "1.jsonl", "--tokenizer", "tokenizer", "--template", "chatml", "--output", "x"]
    assert data(*command).returncode == 0
    monkeypatch.chdir(tmp_path)
    assert data("show", "made/x").returncode == 0
    folder.rename(tmp_path / "moved")
    run = data("show", "made/x")
    said = f"error: made/x: the tokenizer that made it, {folder}, is not there; name it with --tokenizer DIR\n"
    assert (run.returncode, run.stderr) == (2, said)
    assert data("show", "made/x", "--tokenizer", "moved").returncode == 0
