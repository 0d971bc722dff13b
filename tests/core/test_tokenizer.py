import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import TextStream, Tokenizer
from tests.tiny import tiny_tokenizer

REAL = (
    "models/stories260k_hf",
    "tokenizers/qwen3",
    "tokenizers/gpt2",
    "tokenizers/mistral_v1",
    "tokenizers/mistral_v3",
)
SPECIAL_IDS = {  # vocabulary, BOS, EOS, PAD
    "models/stories260k_hf": (512, 1, 2, None),
    "tokenizers/qwen3": (151669, None, 151645, 151643),
    "tokenizers/gpt2": (50257, 50256, 50256, None),
    "tokenizers/mistral_v1": (32000, 1, 2, None),
    "tokenizers/mistral_v3": (32768, 1, 2, None),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module", params=REAL)
def real(request: pytest.FixtureRequest, shared_data: Path) -> Tokenizer:
    return Tokenizer.load(shared_data / request.param)


def sentencepiece_folder(folder: Path, **options: object) -> Path:
    """A small SentencePiece model trained here."""
    import sentencepiece

    text = folder / "text.txt"
    text.write_text("\n".join(["the quick brown fox", "a lazy dog  sleeps", "Hello world, 12345 times", "don't"] * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), minloglevel=2, byte_fallback=True, **options
    )
    return folder


def streamed(tokenizer: Tokenizer, ids: list[int], **options: object) -> str:
    stream = TextStream(tokenizer, **options)
    return "".join([*map(stream.push, ids), stream.finish()])


@pytest.mark.real_data
def test_real_tokenizers_load_with_their_special_ids(real: Tokenizer, shared_data: Path) -> None:
    expected = SPECIAL_IDS[str(real.folder.relative_to(shared_data))]
    assert (real.vocab_size, real.bos, real.eos, real.pad) == expected


@pytest.mark.real_data
@pytest.mark.parametrize("folder", ["models/stories260k_hf", "tokenizers/qwen3"])
def test_ids_are_those_of_transformers(shared_data: Path, folder: str) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(shared_data / folder), AutoTokenizer.from_pretrained(shared_data / folder)
    text = (shared_data / "pretrain/tinyshakespeare.txt").read_text()[:20000]
    for part in [*text.split("\n\n"), "", " lead", "a  b\t\n", "é中文🙂"]:
        assert ours.encode(part) == theirs(part, add_special_tokens=False).input_ids


@pytest.mark.real_data
@pytest.mark.parametrize("folder", ["tokenizers/mistral_v1", "tokenizers/mistral_v3"])
def test_a_sentencepiece_model_gives_the_ids_of_its_library(shared_data: Path, folder: str) -> None:
    import sentencepiece

    ours = Tokenizer.load(shared_data / folder)
    theirs = sentencepiece.SentencePieceProcessor(str(shared_data / folder / "tokenizer.model"))
    lines = (shared_data / "pretrain/zh_tang_poetry.jsonl").read_text()[:20000].splitlines()
    text = (shared_data / "pretrain/tinyshakespeare.txt").read_text()[:20000]
    for part in [*text.split("\n\n"), *lines, "", " lead", "a  b\t\n", "é中文🙂"]:
        assert ours.encode(part) == theirs.encode(part)
        assert ours.decode(ours.encode(part)) == theirs.decode(theirs.encode(part))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"remove_extra_whitespaces": False}])
def test_a_trained_sentencepiece_model_gives_the_ids_of_its_library(
    tmp_path: Path, kind: str, options: dict[str, bool]
) -> None:
    import sentencepiece

    folder = sentencepiece_folder(tmp_path, model_type=kind, vocab_size=330, hard_vocab_limit=False, **options)
    theirs = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    ours = Tokenizer.load(folder)
    for text in ("the lazy fox", " a  dog", "wörld ① 中", "don't"):
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.real_data
def test_a_stream_of_real_ids_joins_to_the_decoded_text(real: Tokenizer) -> None:
    draw = random.Random(0)
    for limit in [real.vocab_size] * 150 + [min(300, real.vocab_size)] * 150:
        ids = [draw.randrange(limit) for _ in range(draw.randrange(1, 25))]
        assert streamed(real, ids) == real.decode(ids)
        assert streamed(real, ids, skip_special=False) == real.decode(ids, skip_special=False)


@pytest.mark.real_data
def test_a_stream_after_a_prompt_continues_its_text(real: Tokenizer) -> None:
    text = "Once upon a time, there was a 小さな girl. She said: “🙂 hi”"
    ids = real.encode(text)
    for cut in range(1, len(ids)):
        head = real.decode(ids[:cut])
        if "\ufffd" not in head:
            assert head + streamed(real, ids[cut:], context=ids[:cut]) == real.decode(ids)


@given(ids=st.lists(st.integers(0, 300), max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_stream_joins_to_the_decoded_text(tiny: Tokenizer, ids: list[int]) -> None:
    ids = [i % tiny.vocab_size for i in ids]
    assert streamed(tiny, ids) == tiny.decode(ids)


def test_a_stream_never_gives_half_a_character(tiny: Tokenizer) -> None:
    ids = tiny.encode("🙂é")
    stream = TextStream(tiny)
    parts = [stream.push(i) for i in ids]
    assert len(ids) == 6
    assert parts == ["", "", "", "🙂", "", "é"]


def test_truncation_and_padding_written_in_the_file_are_ignored(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    folder = tiny_tokenizer(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("zyx wvu tsr")) == "zyx wvu tsr"
    assert len(tokenizer.encode("z")) == 1


def test_a_folder_with_only_tokenizer_json_finds_the_end_of_text(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.bos is None
    assert tokenizer.padding == tokenizer.eos


PLAIN = {"eos_token": "<|endoftext|>"}
NEW = {"content": "<new>", "lstrip": False, "rstrip": True, "single_word": False, "normalized": False, "special": True}
KNOWN = {**NEW, "content": "<|im_end|>", "rstrip": False}


@pytest.mark.parametrize(
    ("files", "alone"),
    [
        ({}, True),
        ({"tokenizer_config.json": {}}, True),
        ({"tokenizer_config.json": {**PLAIN, "pad_token": {**KNOWN, "__type": "AddedToken"}}}, True),
        ({"tokenizer_config.json": {**PLAIN, "add_bos_token": True, "unk_token": None}}, True),
        ({"tokenizer_config.json": {**PLAIN, "added_tokens_decoder": {"2": KNOWN}}}, True),
        ({"tokenizer_config.json": PLAIN, "special_tokens_map.json": {"eos_token": "<|im_end|>"}}, True),
        ({"tokenizer_config.json": PLAIN, "special_tokens_map.json": {"pad_token": "<new>"}}, False),
        (
            {
                "tokenizer_config.json": {**PLAIN, "added_tokens_decoder": {"2": KNOWN}},
                "special_tokens_map.json": {"eos_token": "<new>"},
            },
            True,
        ),
        ({"tokenizer_config.json": {"eos_token": "the"}}, False),
        ({"tokenizer_config.json": {"eos_token": "<new>"}}, False),
        ({"tokenizer_config.json": {**PLAIN, "image_token": "<new>"}}, False),
        ({"tokenizer_config.json": {**PLAIN, "additional_special_tokens": ["<|im_end|>"]}}, True),
        ({"tokenizer_config.json": {**PLAIN, "additional_special_tokens": ["<|im_end|>", "<new>"]}}, False),
        ({"tokenizer_config.json": {**PLAIN, "extra_special_tokens": {"image_token": "<new>"}}}, False),
        ({"tokenizer_config.json": {**PLAIN, "added_tokens_decoder": {"400": NEW}}}, False),
        ({"tokenizer_config.json": {**PLAIN, "added_tokens_decoder": {"2": {**KNOWN, "rstrip": True}}}}, False),
        ({"tokenizer_config.json": {**PLAIN, "split_special_tokens": True}}, False),
        ({"tokenizer_config.json": PLAIN, "added_tokens.json": {"<new>": 400}}, False),
    ],
)
def test_a_tokenizer_json_is_what_transformers_makes_of_it(
    tmp_path: Path, files: dict[str, dict[str, object]], alone: bool
) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = tiny_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    ours, theirs = Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ("hf" not in vars(ours), ours.file is not None) == (alone, alone)
    assert ours.backend.get_vocab() == theirs.get_vocab()
    assert ours.eos_token == (theirs.eos_token or "<|endoftext|>")
    assert (ours.bos_token, ours.pad_token) == (theirs.bos_token, theirs.pad_token)
    assert ours.special_ids == set(theirs.all_special_ids) | {
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    }
    for text in ("the quick <|im_end|> fox", "<new> the dog <new>  x", "<|im_start|>the", " a"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_a_tokenizer_json_is_read_without_transformers(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    code = (
        "import sys; from mindspeed_core.tokenizer import Tokenizer; "
        "Tokenizer.load(sys.argv[1]).fingerprint; assert not {'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_the_fingerprint_is_that_of_data_written_before(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    backend = Backend(models.WordLevel({"é": 1, "'": 7, "a\n": 0, "<s>": 3}, unk_token="<s>"))
    backend.add_special_tokens(["<new>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.vocab_size, loaded.fingerprint) == (8, "8fa61a53d9530473817632955facb1ab")


def test_bos_is_added_only_when_asked_for(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("a", bos=True) == [tokenizer.bos, *tokenizer.encode("a")]


def test_a_tokenizer_pickles_without_transformers(tiny: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pickle"
    path.write_bytes(pickle.dumps(tiny))
    code = (
        "import pickle, sys; t = pickle.load(open(sys.argv[1], 'rb')); print(t.encode('the dog'), t.eos); "
        "assert not {'transformers', 'torch'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[0] == f"{tiny.encode('the dog')} {tiny.eos}"


def test_the_fingerprint_tells_vocabularies_apart_and_survives_a_resave(tiny: Tokenizer, tmp_path: Path) -> None:
    tiny.hf.save_pretrained(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").fingerprint == tiny.fingerprint
    assert Tokenizer.load(tiny_tokenizer(tmp_path / "other", size=300)).fingerprint != tiny.fingerprint


def test_what_is_no_tokenizer_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/tokenizer.model").write_bytes(b"\x0a\x0bnot a model")
    for name, said in {
        "missing": "no such folder",
        "file": "is a file",
        "empty": "holds no tokenizer",
        "broken": "cannot be read",
        "cut": "not a SentencePiece model",
    }.items():
        with pytest.raises(InputError, match=said) as caught:
            Tokenizer.load(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
