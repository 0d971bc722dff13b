import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mindspeed_core.errors import InputError
from mindspeed_data.indexed import IndexedWriter, path_of, publish
from mindspeed_data.pretrain import pretrain_datasets


def corpus(prefix: Path, lengths: Sequence[int], *, first: int = 0) -> Path:
    """Documents whose ids count up over the whole corpus."""
    writer = IndexedWriter(f"{prefix}_text_document", np.int32)
    writer.add(np.arange(first, first + sum(lengths), dtype=np.int32), np.array(lengths))
    writer.finish()
    beside = path_of(f"{prefix}_text_document", ".meta.json")
    Path(f"{beside}.tmp").write_text("{}")
    publish(writer, beside=beside)
    beside.unlink()
    return prefix


# Megatron's order of four documents of 3, 5, 4 and 6 tokens, twice, cut every 4 tokens.
GOLDEN = [
    [1, 2, 8, 9],
    [3, 4, 5, 6],
    [7, 12, 13, 14],
    [15, 16, 17, 0],
    [5, 6, 7, 12],
    [10, 11, 3, 4],
    [17, 0, 1, 2],
    [13, 14, 15, 16],
]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    draw = np.random.default_rng(0)
    return tuple(
        corpus(folder / name, draw.integers(low, high, count).tolist(), first=i * 1_000_000)
        for i, (name, low, high, count) in enumerate([("a", 0, 40, 150), ("b", 1, 300, 60), ("c", 5, 9, 90)])
    )  # type: ignore[return-value]


class PlainTokenizer:
    """What Megatron's data sets ask of a tokenizer."""

    eod, vocab_size, unique_identifiers = -5, None, {"class": "plain"}


def theirs(folder: Path, samples: tuple[int, int], seq_length: int, seed: int, **blend: object) -> list:
    """The data sets that Megatron builds, for training and evaluation."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        tokenizer=PlainTokenizer(),  # pyrefly: ignore
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=None,
        **blend,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BlendedMegatronDatasetBuilder(GPTDataset, [*samples, 0], lambda: True, config).build()


def assert_equal(ours: object, theirs: object) -> None:
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        a, b = ours[i], theirs[i]
        assert torch.equal(a["tokens"], b["tokens"]), i
        assert torch.equal(a["labels"], b["labels"]), i
        assert torch.equal(a["weights"], b["loss_mask"]), i


@pytest.mark.parametrize("samples", [1, 20, 43, 44, 60, 80, 90, 200])
@pytest.mark.parametrize("seq_length", [64, 7])
def test_one_corpus_is_cut_and_shuffled_as_megatron_does(
    megatron: None, corpora: tuple[Path, ...], tmp_path: Path, samples: int, seq_length: int
) -> None:
    ours, none = pretrain_datasets(corpora[0], seq_length=seq_length, train_samples=samples, seed=samples)
    assert none is None
    built = theirs(
        tmp_path,
        (samples, 0),
        seq_length,
        samples,
        blend_per_split=[([f"{corpora[0]}_text_document"], None), None, None],
    )
    assert_equal(ours, built[0])
    assert len(ours) >= samples


def test_a_split_takes_megatrons_documents(megatron: None, corpora: tuple[Path, ...], tmp_path: Path) -> None:
    for split in ("90,10", "80,15,5", [80, 20]):
        ours = pretrain_datasets(corpora[1], split=split, seq_length=32, train_samples=300, valid_samples=20, seed=3)
        text = split if isinstance(split, str) else "80,20"
        built = theirs(tmp_path, (300, 20), 32, 3, blend=([f"{corpora[1]}_text_document"], None), split=text)
        assert_equal(ours[0], built[0])
        assert_equal(ours[1], built[1])


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1, 2, 5), (0.1, 0.1, 0.1)])
def test_a_blend_is_interleaved_as_megatron_does(
    megatron: None, corpora: tuple[Path, ...], tmp_path: Path, weights: tuple[float, ...]
) -> None:
    blend = dict(zip(map(str, corpora), weights, strict=False))
    ours, valid = pretrain_datasets(
        blend, blend, seq_length=16, train_samples=333, valid_samples=50, seed=5, cache_folder=tmp_path / "ours"
    )
    names = ([f"{prefix}_text_document" for prefix in blend], list(weights))
    built = theirs(tmp_path, (333, 50), 16, 5, blend_per_split=[names, names, None])
    assert_equal(ours, built[0])
    assert_equal(valid, built[1])


def test_a_blend_with_a_split_is_megatrons(megatron: None, corpora: tuple[Path, ...], tmp_path: Path) -> None:
    blend = {str(corpora[0]): 2.0, str(corpora[1]): 1.0}
    ours = pretrain_datasets(blend, split="9,1", seq_length=16, train_samples=100, valid_samples=10)
    names = ([f"{prefix}_text_document" for prefix in blend], list(blend.values()))
    built = theirs(tmp_path, (100, 10), 16, 1234, blend=names, split="9,1")
    assert_equal(ours[0], built[0])
    assert_equal(ours[1], built[1])


def test_the_cache_gives_the_same_and_follows_the_content(corpora: tuple[Path, ...], tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "x", [10, 20, 30])

    def first(cache: Path | None) -> tuple[list[int], int]:
        data, _ = pretrain_datasets(prefix, seq_length=8, train_samples=20, seed=1, cache_folder=cache)
        return data[0]["tokens"].tolist(), len(data)

    cache = tmp_path / "cache"
    plain = first(None)
    assert not cache.exists()
    assert first(cache) == plain
    assert first(cache) == plain
    assert len(list(cache.iterdir())) == 1
    corpus(tmp_path / "x", [20, 10, 31])  # other lengths under the same name
    assert first(cache) == first(None)
    assert len(list(cache.iterdir())) == 2


def test_unusable_text_is_said(corpora: tuple[Path, ...], tmp_path: Path) -> None:
    options = {"seq_length": 8, "train_samples": 5}
    for arguments, said in [
        ((tmp_path / "none",), "no data set of that prefix"),
        (({str(corpora[0]): 1, str(corpora[1]): 0},), "every weight of a blend must be above 0"),
        (({str(corpora[0]): 1, str(corpora[1]): float("nan")},), "every weight of a blend must be above 0"),
        ((corpus(tmp_path / "empty", [0, 0]),), "hold no tokens"),
    ]:
        with pytest.raises(InputError, match=said):
            pretrain_datasets(*arguments, **options)
    for split in ("90", "a,b", "1,2,3,4", "0,1", [-1, 2]):
        with pytest.raises(InputError, match="weights are expected"):
            pretrain_datasets(corpora[0], split=split, **options)
    with pytest.raises(InputError, match="exclude each other"):
        pretrain_datasets(corpora[0], corpora[1], split="9,1", **options)


def test_the_order_of_a_run_is_golden(tmp_path: Path) -> None:
    data, _ = pretrain_datasets(corpus(tmp_path / "x", [3, 5, 4, 6]), seq_length=4, train_samples=6, seed=42)
    assert [sample["tokens"].tolist() for sample in (data[i] for i in range(len(data)))] == GOLDEN
