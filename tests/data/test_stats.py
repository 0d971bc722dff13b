import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mindspeed_core.tokenizer import Tokenizer
from tests.data.command import data
from tests.tiny import tiny_tokenizer

ROWS = [{"instruction": "a" * (i * i % 37), "output": "b" * (1 + i % 11)} for i in range(1, 60)]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations: plain, and packed."""
    folder = tmp_path_factory.mktemp("stats")
    tiny_tokenizer(folder / "tokenizer")
    (folder / "in.json").write_text(json.dumps(ROWS))
    command = ["sft", folder / "in.json", "--template", "empty", "--tokenizer", folder / "tokenizer", "--output"]
    assert data(*command, folder / "x").returncode == 0
    assert data(*command, folder / "packed", "--pack", "--seq-length", 64).returncode == 0
    return folder / "x"


def told(*arguments: object) -> dict:
    run = data("stats", *arguments, "--json")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_numbers_are_those_of_the_rows(prefix: Path) -> None:
    tokenizer = Tokenizer.load(prefix.parent / "tokenizer")
    rows = [row for row in ROWS if row["instruction"]]
    answers = [len(tokenizer.encode(row["output"])) for row in rows]
    lengths = [len(tokenizer.encode(row["instruction"])) + n for row, n in zip(rows, answers, strict=True)]
    found = told(prefix)
    assert (found["samples"], found["tokens"], found["learned"]) == (len(rows), sum(lengths), sum(answers))
    assert (found["shortest"], found["longest"], found["mean"]) == (
        min(lengths),
        max(lengths),
        pytest.approx(np.mean(lengths)),
    )
    assert (found["median"], found["p90"]) == (int(np.median(lengths)), int(np.percentile(lengths, 90)))
    assert found["left_out"] == {"empty question": len(ROWS) - len(rows)}
    by_bits = Counter(length.bit_length() for length in lengths)
    assert found["histogram"] == [
        [2 ** (bits - 1), 2**bits - 1, by_bits[bits]] for bits in range(min(by_bits), max(by_bits) + 1)
    ]


def test_packed_samples_are_counted_one_by_one(prefix: Path) -> None:
    plain, packed = told(prefix), told(prefix.with_name("packed"))
    for name in ("samples", "tokens", "learned", "histogram", "mean"):
        assert packed[name] == plain[name]
    (expected,) = told(prefix, "--seq-length", 64)["packing"]
    assert packed["packed"] == {"seq_length": 64, "sequences": expected["sequences"], "filled": expected["packed"]}
    assert 0.9 < expected["packed"] <= 1
    assert expected["padded"] == pytest.approx(plain["tokens"] / (64 * plain["samples"]))


def test_packed_samples_that_nothing_describes_are_counted_and_a_changed_count_is_found(
    prefix: Path, tmp_path: Path
) -> None:
    described = told(prefix.with_name("packed"))
    for path in prefix.parent.glob("packed_packed*"):
        (tmp_path / path.name.replace("packed", "p", 1)).write_bytes(path.read_bytes())
    meta = tmp_path / "p_packed.meta.json"
    description = json.loads(meta.read_text().replace('"packed_packed', '"p_packed'))
    for changes, said in [
        ({}, None),
        ({"kept": description["kept"] + 1}, "its description says"),
        ({"tokens": description["tokens"] - 1}, "its description says"),
        ({"sequences": 3}, "its description says 3"),
    ]:
        meta.write_text(json.dumps({**description, **changes}))
        run = data("verify", tmp_path / "p")
        assert run.returncode == (0 if said is None else 2), run.stderr
        assert (said or "") in run.stderr
    meta.write_text(json.dumps(description))
    sound = data("verify", tmp_path / "p").stdout
    assert f"sound; {described['samples']} samples in {described['packed']['sequences']} sequences of 64, " in sound
    meta.unlink()
    assert data("verify", tmp_path / "p").stdout == sound
    found = told(tmp_path / "p")
    assert found == {name: described[name] for name in found}
    assert found["samples"] == description["kept"]


def test_the_terminal_shows_bars_and_packing(prefix: Path) -> None:
    run = data("stats", prefix, "--seq-length", 32, "--seq-length", 64)
    lines = run.stdout.splitlines()
    counts = {line.split("  ")[0]: line.count("█") for line in lines if "█" in line}
    assert max(counts.values()) == 40
    assert [line.split()[0] for line in lines if "%" in line][1:] == ["32", "64"]
    assert lines[-1].startswith("left out when it was written: ")
    assert "packed: " in data("stats", prefix.with_name("packed")).stdout
    assert data("stats", prefix.with_name("none")).returncode == 2


def test_text_has_lengths_alone(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": "one two three"}\n')
    command = ["pretrain", tmp_path / "x.jsonl", "--tokenizer", prefix.parent / "tokenizer", "--output", tmp_path / "x"]
    assert data(*command).returncode == 0
    found = told(tmp_path / "x")
    assert (found["samples"], found["learned"], "packing" in found) == (2, found["tokens"], False)
