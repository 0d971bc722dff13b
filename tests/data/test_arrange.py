"""The second pass and sharding: mixed, packed, cut up over machines and joined again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data import arrange, readers, sidecar
from mindspeed_data.arrange import interleave
from mindspeed_data.fitting import best_fit
from mindspeed_data.indexed import IndexedDataset
from mindspeed_data.instruction import InstructionSamples
from mindspeed_data.packing import PackedFiles
from mindspeed_data.shorten import shorten
from tests.data.command import data
from tests.tiny import tiny_tokenizer

IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts(path: Path, name: str, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"{name} {i} " * (1 + i % 5)}) + "\n" for i in range(count)))
    return path


def decoded(prefix: Path, tokenizer: Path) -> list[str]:
    loaded, written = Tokenizer.load(tokenizer), IndexedDataset(f"{prefix}_text_document")
    return [loaded.decode(written[i].tolist()) for i in range(len(written))]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.sampled_from(["first_exhausted", "all_exhausted"]),
    st.booleans(),
    st.integers(0, 5),
)
def test_mixing_is_that_of_the_datasets_library(
    counts: list[int], stop: arrange.Mix, weighted: bool, seed: int
) -> None:
    datasets = pytest.importorskip("datasets")
    starts = np.cumsum([0, *counts])
    weights = [i + 1 for i in range(len(counts))] if weighted else None
    parts = [datasets.Dataset.from_dict({"i": list(range(starts[n], starts[n + 1]))}) for n in range(len(counts))]
    shares = None if weights is None else (np.array(weights) / sum(weights)).tolist()
    mixed = datasets.interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy=stop)
    assert interleave(counts, weights, stop, seed).tolist() == mixed["i"][:]


def test_inputs_are_mixed_by_weight(tokenizer: Path, tmp_path: Path) -> None:
    a, b = texts(tmp_path / "a.jsonl", "a", 30), texts(tmp_path / "b.jsonl", "b", 60)
    command = ["pretrain", a, b, "--tokenizer", tokenizer, "--output"]
    assert data(*command, tmp_path / "concat").returncode == 0
    plain = decoded(tmp_path / "concat", tokenizer)
    for options, order in (
        (["--mix", "first_exhausted"], interleave([30, 60], None, "first_exhausted", 1234)),
        (
            ["--mix", "all_exhausted", "--weights", "1,3", "--seed", "7"],
            interleave([30, 60], (1, 3), "all_exhausted", 7),
        ),
    ):
        run = data(*command, tmp_path / "mixed", "--overwrite", *options)
        assert run.returncode == 0, run.stderr
        assert decoded(tmp_path / "mixed", tokenizer) == [plain[i] for i in order]
        assert data("verify", tmp_path / "mixed").returncode == 0
        known = sidecar.read(tmp_path / "mixed")
        assert known is not None
        assert (known.kept, known.plan["mix"]) == (len(order), options[1])
        origins = IndexedDataset(tmp_path / "mixed_text_document.origin")
        assert [origins[i].tolist() for i in range(len(order))] == [
            [int(i >= 30), i % 30 + 1 + 30 * (i >= 60)] for i in order
        ]


def test_a_mix_that_cannot_be_is_said(tokenizer: Path, tmp_path: Path) -> None:
    a, b = texts(tmp_path / "a.jsonl", "a", 3), tmp_path / "b.jsonl"
    b.write_text('{"text": ""}\n')
    command = ["pretrain", a, b, "--tokenizer", tokenizer, "--output", tmp_path / "x"]
    for options, said in [
        (["--weights", "1,2"], "--weights: inputs are drawn by weight when they are mixed"),
        (["--mix", "first_exhausted", "--weights", "1"], "a number above 0 for each of the 2 inputs"),
        (["--mix", "first_exhausted", "--weights", "1,x"], "a number above 0 for each of the 2 inputs"),
        (["--mix", "first_exhausted", "--weights", "nan,1"], "a number above 0 for each of the 2 inputs"),
        (["--mix", "first_exhausted", "--weights", "inf,1"], "a number above 0 for each of the 2 inputs"),
        (["--mix", "first_exhausted", "--weights", "1e308,1e308"], "a number above 0 for each of the 2 inputs"),
        (["--seed", "3"], "--seed: is of the draws of --mix alone"),
        (["--mix", "first_exhausted", "--shard", "1/2"], "shares of inputs cannot be mixed"),
        (["--mix", "all_exhausted"], "b.jsonl: nothing is left of it to mix with the others; leave it out"),
        (["--shard", "3/2"], "--shard 3/2: i/n is expected"),
        (["--shard", "a"], "--shard a: i/n is expected"),
    ]:
        run = data(*command, *options)
        assert (run.returncode, said in run.stderr) == (2, True), run.stderr
    b = texts(tmp_path / "b.jsonl", "b", 3)
    for weights, drawn in (("1,1e-300", "3e+300"), ("1e300,1e-300", "inf"), ("1,1e-3", "3,003")):
        run = data(*command, "--mix", "all_exhausted", "--weights", weights)
        said = f"error: --weights: until {b} has been seen whole, about {drawn} rows would be drawn, of 6 there are; "
        assert (run.returncode, run.stderr.splitlines()[-1].startswith(said)) == (2, True), run.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    assert data(*command, "--mix", "all_exhausted", "--weights", "1,0.1").returncode == 0


ROWS = [{"instruction": f"say {'very ' * (i % 9)}well {i}", "output": f"well {i} " * (1 + i % 7)} for i in range(80)]


def packed(tokenizer: Path, folder: Path, *options: object) -> tuple[Path, str]:
    folder.mkdir(exist_ok=True)
    (folder / "in.json").write_text(json.dumps(ROWS))
    command = ["sft", folder / "in.json", "--template", "chatml", "--tokenizer", tokenizer, "--output"]
    run = data(*command, folder / "x", "--overwrite", *options)
    assert run.returncode == 0, run.stderr
    return folder / "x", run.stderr


def samples_of(prefix: Path) -> list[tuple[list[int], list[int]]]:
    """The ids and labels of every sample, told apart by the numbers in the mask."""
    ids, mask, labels = (
        IndexedDataset(f"{prefix}{suffix}")
        for suffix in (
            sidecar.INSTRUCTION["input_ids"],
            sidecar.INSTRUCTION["attention_mask"],
            sidecar.INSTRUCTION["labels"],
        )
    )
    found = []
    for i in range(len(ids)):
        numbers = mask[i]
        for number in range(1, int(numbers.max()) + 1):
            found.append((ids[i][numbers == number].tolist(), labels[i][numbers == number].tolist()))
        padding = numbers == 0
        assert (labels[i][padding] == IGNORED).all()
        assert not padding[: len(numbers) - int(padding.sum())].any()  # at the end
        assert (np.diff(numbers[~padding]) >= 0).all()
    return found


@pytest.mark.parametrize("options", [[], ["--pack-window", 25], ["--mix", "all_exhausted"], ["--workers", 2]])
def test_packed_sequences_hold_every_sample_whole(
    tokenizer: Path, tmp_path: Path, options: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrange, "BLOCK", 1000)
    plain, _ = packed(tokenizer, tmp_path / "plain")
    prefix, said = packed(tokenizer, tmp_path / "packed", "--pack", "--seq-length", 160, *options)
    unpacked = samples_of(plain)
    assert sorted(samples_of(prefix)) == sorted(unpacked)
    ids = IndexedDataset(f"{prefix}_packed_input_ids_document")
    assert set(ids.lengths.tolist()) == {160}
    if not options:
        packs = best_fit([len(sample) for sample, _ in unpacked], 160)
        assert samples_of(prefix) == [unpacked[i] for pack in packs for i in pack]
        assert len(ids) == len(packs)
        places = IndexedDataset(f"{prefix}_packed.origin")
        lines = [i for i, row in enumerate(json.dumps(ROWS), 1)] and [row for pack in packs for row in pack]
        assert [line for i in range(len(places)) for line in places[i].reshape(-1, 2)[:, 0].tolist()] == [0] * len(
            lines
        )
        assert [len(places[i]) // 2 for i in range(len(places))] == list(map(len, packs))
    known = sidecar.read(prefix)
    assert known is not None
    assert (known.packed, known.sequences, known.kept) == (160, len(ids), 80)
    assert known.learned == sum(label != IGNORED for _, labels in unpacked for label in labels)
    assert known.tokens == sum(len(sample) for sample, _ in unpacked)
    assert f"packed: {len(ids)} sequences of 160" in said
    verified = data("verify", prefix)
    assert verified.returncode == 0, verified.stderr


def test_lengths_at_the_edge_of_a_sequence(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "a" * n, "output": "b"} for n in (6, 7, 8)]  # 7, 8 and 9 tokens: S-1, S, S+1
    (tmp_path / "in.json").write_text(json.dumps(rows))
    command = ["sft", tmp_path / "in.json", "--template", "empty", "--tokenizer", tokenizer, "--output", tmp_path / "x"]
    for longer, lengths, said in [
        ("drop", [8, 7], "1 longer than 8 tokens"),
        ("cut", [8, 8, 7], "cut to the sequence length: 1 samples"),
        ("split", [8, 7], "1 nothing is learned of what fits into 8 tokens"),  # its b would be a sample of one token
    ]:
        run = data(*command, "--overwrite", "--pack", "--seq-length", 8, "--longer", longer)
        assert run.returncode == 0, run.stderr
        assert said in run.stderr
        assert sorted((len(ids) for ids, _ in samples_of(tmp_path / "x")), reverse=True) == lengths
        known = sidecar.read(tmp_path / "x")
        assert known is not None
        assert (known.cut, known.split, sum(known.left_out.values())) == (
            longer == "cut",
            0,
            longer != "cut",
        )


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), st.integers(2, 12))
def test_what_is_split_is_whole_but_for_what_teaches_nothing(turns: list[tuple[int, int]], length: int) -> None:
    labels = np.concatenate([[IGNORED] * asked + [1] * answered for asked, answered in turns])
    behind = np.arange(len(labels)) % length != 0 if len(labels) > length else np.arange(len(labels)) > 0
    learned = set(np.flatnonzero((labels != IGNORED) & behind).tolist())
    if not learned:  # the first token of a part is never learned
        with pytest.raises(ValueError, match="nothing is learned of what fits into"):
            shorten(labels, length, "split")
        return
    parts = shorten(labels, length, "split")
    assert all(1 < len(part) <= length for part in parts)
    assert all(learned & set(part.tolist()) for part in parts)
    kept = np.concatenate(parts)
    assert (np.diff(kept) > 0).all()
    assert learned <= set(kept.tolist())  # nothing else that is learned is lost
    (part,) = shorten(labels, max(length, len(labels)), "drop")
    assert part.tolist() == list(range(len(labels)))
    if len(labels) > length:
        with pytest.raises(ValueError, match=f"longer than {length} tokens: {len(labels)}"):
            shorten(labels, length, "drop")


@pytest.mark.parametrize("learn", ["answers", "all"])
@pytest.mark.parametrize("longer", ["cut", "split"])
@pytest.mark.parametrize("pack", [False, True])
def test_what_is_counted_as_learned_is_what_training_learns(
    tokenizer: Path, tmp_path: Path, learn: str, longer: str, pack: bool
) -> None:
    rows = [{"instruction": "a" * (i % 11 + 1), "output": "b" * (i * 7 % 40 + 1)} for i in range(60)]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    command = ["sft", tmp_path / "in.json", "--template", "empty", "--tokenizer", tokenizer, "--output", tmp_path / "x"]
    options = ["--seq-length", 8, "--longer", longer, "--learn", learn, *(["--pack"] if pack else [])]
    run = data(*command, *options)
    assert run.returncode == 0, run.stderr
    known = sidecar.read(tmp_path / "x")
    assert known is not None
    samples = PackedFiles(tmp_path / "x") if pack else InstructionSamples(tmp_path / "x", seq_length=8)
    weights = [samples[i]["weights"].sum().item() for i in range(len(samples))]
    assert min(weights) > 0
    assert sum(weights) == known.learned
    assert data("verify", tmp_path / "x").returncode == 0


def test_packing_without_a_length_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(ROWS))
    command = [
        "sft",
        tmp_path / "in.json",
        "--template",
        "chatml",
        "--tokenizer",
        tokenizer,
        "--output",
        tmp_path / "x",
    ]
    assert "add --seq-length" in data(*command, "--pack").stderr
    assert "--pack-window: is of --pack alone" in data(*command, "--pack-window", 5).stderr


@pytest.mark.parametrize("command", ["pretrain", "sft"])
def test_shards_joined_are_the_whole(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(readers, "CHUNK", 900)
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"text": "t" * (i % 40), **row}) for i, row in enumerate(ROWS)]
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines[:50]))
    (tmp_path / "in/b.json").write_text("[" + ",\n".join(lines[50:]) + "]")
    options = ["--tokenizer", tokenizer, *(["--template", "chatml"] if command == "sft" else []), "--output"]
    assert data(command, tmp_path / "in", *options, tmp_path / "whole/x").returncode == 0
    for number in (1, 2, 3):
        run = data(command, tmp_path / "in", *options, tmp_path / "parts/x", "--shard", f"{number}/3")
        assert (run.returncode, run.stdout) == (0, f"{tmp_path}/parts/x-{number:05}-of-00003\n"), run.stderr
    run = data("merge", tmp_path / "parts/x")
    assert (run.returncode, run.stdout) == (0, f"{tmp_path}/parts/x\n"), run.stderr
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    joined = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir() if "-of-" not in path.name}
    assert joined == whole
    assert data("verify", tmp_path / "parts/x").returncode == 0


def test_data_sets_are_joined(tokenizer: Path, tmp_path: Path) -> None:
    command = ["pretrain", "--tokenizer", tokenizer, "--output"]
    for name, count in (("a", 3), ("b", 5)):
        assert data(*command, tmp_path / name, texts(tmp_path / f"{name}.jsonl", name, count)).returncode == 0
    run = data("merge", tmp_path / "a", tmp_path / "b", tmp_path / "a", "--output", tmp_path / "x")
    assert run.returncode == 0, run.stderr
    parts = [decoded(tmp_path / name, tokenizer) for name in ("a", "b", "a")]
    assert decoded(tmp_path / "x", tokenizer) == [text for part in parts for text in part]
    known = sidecar.read(tmp_path / "x")
    assert known is not None
    assert [Path(source["path"]).name for source in known.inputs] == ["a.jsonl", "b.jsonl", "a.jsonl"]
    origins = IndexedDataset(tmp_path / "x_text_document.origin")
    assert [origins[i].tolist() for i in (0, 2, 3, 7, 8)] == [[0, 1], [0, 3], [1, 1], [1, 5], [2, 1]]
    assert data(*command, tmp_path / "c", tmp_path / "a.jsonl", "--append-eod").returncode == 0
    other = tiny_tokenizer(tmp_path / "other", size=300)
    assert data("pretrain", "--tokenizer", other, "--output", tmp_path / "d", tmp_path / "a.jsonl").returncode == 0
    for arguments, said in [
        ([tmp_path / "a", tmp_path / "c", "--output", tmp_path / "y"], "c: was not made as"),
        ([tmp_path / "a", tmp_path / "c", "--output", tmp_path / "y"], "eod is different"),
        ([tmp_path / "a", tmp_path / "d", "--output", tmp_path / "y"], "fingerprint, vocab_size are different"),
        ([tmp_path / "a", tmp_path / "b"], "--output: how the whole is to be called is missing"),
        ([tmp_path / "a", tmp_path / "b", "--output", tmp_path / "x"], "x_text_document.idx: exists already"),
        ([tmp_path / "a"], "no shards of it are in"),
        ([tmp_path / "a", tmp_path / "none", "--output", tmp_path / "y"], "no data set of that prefix"),
    ]:
        run = data("merge", *arguments)
        assert (run.returncode, said in run.stderr, "Traceback" in run.stderr) == (2, True, False), run.stderr
    (tmp_path / "in.json").write_text(json.dumps(ROWS[:2]))
    answers = ["sft", tmp_path / "in.json", "--template", "chatml", "--tokenizer", tokenizer, "--output"]
    assert data(*answers, tmp_path / "f").returncode == 0
    run = data("merge", tmp_path / "f", tmp_path / "f", "--output", tmp_path / "x")
    assert (run.returncode, "another kind of data has this prefix" in run.stderr) == (2, True), run.stderr
    texts(tmp_path / "e.jsonl", "e", 9)
    assert data(*command, tmp_path / "e", tmp_path / "e.jsonl", "--shard", "2/3").returncode == 0
    assert "of its 3 shards e-00001-of-00003, e-00003-of-00003 are missing" in data("merge", tmp_path / "e").stderr
