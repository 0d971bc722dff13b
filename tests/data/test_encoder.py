"""Both encoders, text by text and many texts at once: the same ids, and the same files."""

import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data import formats, preprocess, readers, tokenize
from mindspeed_data.encoder import encoders_agree, framed, gigatoken_encoder, gigatoken_of_many, one_by_one
from mindspeed_data.sources import find
from mindspeed_data.stages import Stages
from mindspeed_data.tokenize import TextJob
from tests.tiny import tiny_tokenizer

# what a normalizer leaves as it is, and marks that it puts in order
TEXTS = [
    "",
    " ",
    "the fox",
    "e\u0301",
    "a\u07f3\u07fd",
    "e\u0323\u0301",
    "e\u0301\u0323",
    "\u1100\u1161",
    "é 中文，。",
    "🙂",
]
FOLDERS = ["tokenizers/qwen3", "tokenizers/gpt2", "tokenizers/mistral_v1", "models/stories260k_hf"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def apart(ids: Any) -> list[list[int]]:
    flat, lengths = ids
    assert len(flat) == lengths.sum()
    return [part.tolist() for part in np.split(flat, np.cumsum(lengths))[:-1]]


def test_the_fast_encoder_is_only_used_where_it_agrees(tiny: Tokenizer) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    assert encoders_agree(tiny, ["the lazy dog", "half \ud800"])  # which is no text, and no reason to be slower
    words = Backend(models.WordLevel({"the": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = Tokenizer(folder=Path("words"), backend=words, bos=None, eos=None, pad=None)
    assert not encoders_agree(other, ["the lazy dog"])


@pytest.mark.real_data
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_way_to_encode_gives_the_same_ids(shared_data: Path, folder: str) -> None:
    tokenizer = Tokenizer.load(shared_data / folder)
    expected = [tokenizer.encode(text) for text in TEXTS]
    one, many = gigatoken_encoder(tokenizer), gigatoken_of_many(tokenizer)
    assert [list(one(text)) for text in TEXTS] == expected
    for encode in (many, one_by_one(one), one_by_one(tokenizer.encode)):
        assert apart(encode(TEXTS)) == expected
        for order in (TEXTS[::-1], TEXTS[4:5], TEXTS[2:3], []):
            assert apart(encode(order)) == [expected[TEXTS.index(text)] for text in order]


def test_ids_of_many_texts_outgrow_any_room(tiny: Tokenizer) -> None:
    texts = ["the fox " * 400_000, "x", "the fox " * 900_000]
    assert apart(one_by_one(tiny.encode)(texts)) == apart(gigatoken_of_many(tiny)(texts))


@pytest.mark.parametrize(("bos", "eod"), [(None, None), (7, None), (None, 9), (7, 9)])
def test_marks_stand_around_every_text(bos: int | None, eod: int | None) -> None:
    flat, lengths = np.array([1, 2, 3, 4, 5, 6], np.uint32), np.array([0, 2, 0, 0, 3, 1, 0], np.int32)
    before, after = ([] if mark is None else [mark] for mark in (bos, eod))
    expected = [before + part + after for part in ([], [1, 2], [], [], [3, 4, 5], [6], [])]
    ids = framed((flat, lengths), bos, eod)
    assert apart(ids) == expected
    assert (ids[0].dtype, ids[1].dtype) == (np.uint32, np.int32)
    assert apart(framed((flat[:0], lengths[:0]), bos, eod)) == []


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Some of them bad, in several chunks of which one holds none that is good."""
    draw = random.Random(3)
    texts = [
        " ".join(draw.choices(["the quick", "jumps é", "e\u0301 中文", "🙂", "dog"], k=draw.randint(1, 60)))
        for _ in range(300)
    ]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[5::40] = ['{"text": "half \\ud800"}'] * len(lines[5::40])
    lines[6::40] = ['{"text": 3}'] * len(lines[6::40])
    lines[100:100] = ['{"text": "\\udfff"}'] * 300
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("bos", "eod"), [(None, None), (1, 0)])
def test_many_at_once_write_the_same_files(
    tiny: Tokenizer, rows: Path, monkeypatch: pytest.MonkeyPatch, workers: int, bos: int | None, eod: int | None
) -> None:
    monkeypatch.setattr(readers, "CHUNK", 4000)

    def written(name: str, workers: int, *, fast: bool) -> dict[str, bytes]:
        monkeypatch.setattr(preprocess, "encoders_agree", lambda *_: fast)
        folder = rows.parent / name
        job = TextJob(
            sources=find([rows]),
            tokenizer=tiny,
            format=formats.TEXT,
            keys=formats.TEXT.keys,
            fast=True,
            bos=bos,
            eod=eod,
        )
        preprocess.run(job, folder / "x", workers=workers)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    expected = written("one by one", 1, fast=False)
    assert expected["x_text_document.left_out.jsonl"].count(b"half of a surrogate pair") == 308
    places = [json.loads(line)["line"] for line in expected["x_text_document.left_out.jsonl"].splitlines()]
    assert places == sorted(places)
    assert written("at once", workers, fast=True) == expected


def test_an_encoder_that_disagrees_later_is_given_up(
    tiny: Tokenizer, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preprocess, "encoders_agree", lambda *_: True)
    monkeypatch.setattr(tokenize, "gigatoken_of_many", lambda _: one_by_one(lambda text: [0]))
    from mindspeed_data.indexed import IndexedDataset

    job = TextJob(sources=find([rows]), tokenizer=tiny, format=formats.TEXT, keys=formats.TEXT.keys, fast=False)
    preprocess.run(job, rows.parent / "x", workers=1)
    assert "the fast encoder disagrees on a text of this run: once more without it" in capsys.readouterr().err
    text = json.loads(rows.read_text().splitlines()[0])["text"]
    assert IndexedDataset(rows.parent / "x_text_document")[0].tolist() == tiny.encode(text)


def test_one_item_is_read_while_another_is_encoded() -> None:
    here, met = threading.get_ident(), threading.Barrier(2, timeout=60)
    read: list[int] = []
    encoded: list[int] = []

    def reading(item: int) -> int:
        assert threading.get_ident() == here
        read.append(item)
        if item:
            met.wait()  # the one before is being encoded
        return item

    def encode(item: int) -> int:
        assert threading.get_ident() != here
        encoded.append(item)
        if item < 4:
            met.wait()
        return item * 10

    for i, result in enumerate(Stages(reading, encode, beside=True).map(range(5))):
        assert result == i * 10
        assert len(read) == min(i + 2, 5)  # no more wait in memory
        assert encoded == list(range(i + 1))  # and what a kill would take is what we have


@pytest.mark.parametrize("beside", [False, True])
def test_what_fails_in_either_step_is_raised(beside: bool) -> None:
    def fail(item: int) -> int:
        if item == 2:
            raise InputError("this one")
        return item

    for stages in (Stages(fail, int, beside=beside), Stages(int, fail, beside=beside)):
        got = []
        with pytest.raises(InputError, match="this one"):
            got.extend(stages.map(range(4)))
        assert got in ([0], [0, 1])
        results = stages.map(range(4))
        assert next(results) == 0
        results.close()  # as a run does that is interrupted
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
