"""Pretraining samples: documents are put one after the other, shuffled, and cut every `seq_length` tokens.

    documents, shuffled per run     [ d7 ......|.. d2 ...|...... d5 ....|...
    samples of seq_length + 1       [   s0     ][   s1    ][   s2    ]        the last token of one is the first of the next
    order in which they are used     s2, s0, s1, ...

Order and contents are those of Megatron's `GPTDataset` and `BlendedDataset` to the last sample, so a run moved here from
there sees the same data. Everything follows from lengths and a seed: no rank waits for another, nothing lies beside the
data, and a cache is named by what it was computed from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mindspeed_core.errors import InputError, writing
from mindspeed_data.indexed import IndexedDataset
from mindspeed_data.packing import marks
from mindspeed_data.sidecar import text_prefix

SEPARATE = 0.80  # a last epoch that is used less than this is shuffled on its own
SURPLUS = 0.005  # samples that each part of a blend holds beyond its share
Blend = str | Path | Mapping[str, float]  # a prefix, or prefixes and their weights
Arrays = dict[str, NDArray[Any]]


class Samples(Protocol):
    """A data set for training: sample i is {"tokens": int64 [s], "labels": int64 [s], "weights": fp32 [s]}.

    Where several documents share a sample it also has "positions", from 0 in each, and "segments", the number of each.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


def pretrain_datasets(
    train: Blend,
    valid: Blend | None = None,
    *,
    split: str | Sequence[float] | None = None,
    seq_length: int,
    train_samples: int,
    valid_samples: int = 0,
    seed: int = 1234,
    cache_folder: str | Path | None = None,
    pack: bool = False,
) -> tuple[Samples, Samples | None]:
    """Return the samples of a run and those of its evaluation: from `valid`, or from a share of the documents of `train`
    that `split` keeps for it ("95,5"). Both hold at least as many samples as asked for, with repeats where the data ends.
    With `pack` the documents of a sample do not see each other.
    """
    if valid is not None and split is not None:
        raise InputError("data.valid and data.split exclude each other: the split takes its share from data.train")
    shares = _shares(split)
    make = _Maker(seq_length, seed, None if cache_folder is None else Path(cache_folder), pack=pack)
    training = make.blend(train, shares[0], train_samples)
    if not valid_samples:
        return training, None
    if valid is not None:
        return training, make.blend(valid, (0.0, 1.0), valid_samples)
    return training, make.blend(train, shares[1], valid_samples) if shares[1] is not None else None


class TextSamples:
    """Samples of one prefix. Its arrays are plain or memory-mapped, a few bytes per document and per sample.

    With `pack` each document of a sample has positions of its own and its own number in "segments" (int64 [s]). Its last
    token, the end-of-document token where the data has them, is predicted; that from it the first token of the next document
    should follow is not learned. What ends a document is the data set's index, never the value of a token.
    """

    def __init__(self, data: IndexedDataset, arrays: Arrays, seq_length: int, *, pack: bool = False) -> None:
        self._data, self._pack = data, pack
        self._seq_length = seq_length
        self._documents: NDArray[np.int32] = arrays["documents"]  # in the order they are put one after the other
        self._ends: NDArray[np.int64] = arrays["ends"]  # where each of them ends in that stream
        self._order: NDArray[Any] = arrays["order"]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = int(self._order[index]) * self._seq_length
        stop = start + self._seq_length + 1
        at = int(np.searchsorted(self._ends, start, "right"))
        parts = []
        while start < stop:
            document = int(self._documents[at])
            begin = int(self._ends[at]) - int(self._data.lengths[document])
            parts.append(self._data.part(document, start - begin, stop - begin))
            start = int(self._ends[at])
            at += 1
        ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        sample = {"tokens": ids[:-1], "labels": ids[1:], "weights": torch.ones(self._seq_length)}
        if not self._pack:
            return sample
        own = marks([len(part) for part in parts if len(part)])
        inside = own["segments"][1:] == own["segments"][:-1]
        return {**sample, **{name: values[:-1] for name, values in own.items()}, "weights": inside.float()}


class BlendedSamples:
    """Samples of several prefixes in the order that keeps their weights at every point."""

    def __init__(self, parts: Sequence[Samples], which: NDArray[np.int16], sample: NDArray[np.int64]) -> None:
        self._parts, self._which, self._sample = parts, which, sample
        self._lengths: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._parts[int(self._which[index])][int(self._sample[index])]

    @property
    def lengths(self) -> NDArray[np.int32] | None:
        """Tokens of each sample, where those of all parts are known."""
        of_parts = [known for part in self._parts if (known := getattr(part, "lengths", None)) is not None]
        if self._lengths is None and len(of_parts) == len(self._parts):
            self._lengths = np.empty(len(self), np.int32)
            for number, known in enumerate(of_parts):
                given = self._which == number
                self._lengths[given] = known[self._sample[given]]
        return self._lengths


class _Maker:
    """Builds samples of one length and seed."""

    def __init__(self, seq_length: int, seed: int, cache: Path | None, *, pack: bool) -> None:
        self.seq_length, self.seed, self.cache, self.pack = seq_length, seed, cache, pack

    def blend(self, blend: Blend, share: tuple[float, float], samples: int) -> Samples:
        if not isinstance(blend, Mapping):
            return self.single(blend, share, samples)
        check_weights("data", blend)
        if len(blend) == 1:
            return self.single(next(iter(blend)), share, samples)
        weights = normal(list(blend.values()))
        counts = [math.ceil(samples * weight) for weight in weights]
        parts = [
            self.single(prefix, share, math.ceil(count * (1 + SURPLUS)))
            for prefix, count in zip(blend, counts, strict=True)
        ]
        arrays = self._cached({"weights": weights, "samples": sum(counts)}, lambda: interleave(weights, sum(counts)))
        return BlendedSamples(parts, arrays["which"], arrays["sample"])

    def single(self, prefix: str | Path, share: tuple[float, float], samples: int) -> TextSamples:
        data = IndexedDataset(text_prefix(prefix))
        first, last = (round(end * len(data)) for end in share)
        lengths = np.asarray(data.lengths[first:last])
        if not lengths.sum(dtype=np.int64):
            raise InputError(
                f"{data.prefix}: documents {first} to {last} of {len(data):,} hold no tokens; change data.split"
            )
        key = {"lengths": hashlib.sha256(lengths.tobytes()).hexdigest(), "first": first, "samples": samples}
        arrays = self._cached(
            {**key, "seq_length": self.seq_length, "seed": self.seed},
            lambda: _arrange(lengths, first, self.seq_length, samples, self.seed),
        )
        return TextSamples(data, arrays, self.seq_length, pack=self.pack)

    def _cached(self, key: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
        """The arrays that `build` makes, from the cache where they are. Ranks that find none all write the same."""
        if self.cache is None:
            return build()
        folder = self.cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        if not folder.is_dir():
            temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
            temporary.mkdir(parents=True, exist_ok=True)
            try:
                with writing(temporary):
                    for name, array in build().items():
                        _save(temporary / f"{name}.npy", array)
                    temporary.rename(folder)
            except OSError:
                if not folder.is_dir():  # no other rank was faster: the disk is at fault
                    raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def _save(path: Path, array: NDArray[Any]) -> None:
    """Write a .npy file. `np.save` writes past Python's files, and its error on a full disk does not say so."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def _shares(split: str | Sequence[float] | None) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """The stretches of documents for training and for evaluation, from weights like "95,5" or [969, 30, 1]."""
    if split is None:
        return (0.0, 1.0), None
    try:
        weights = [float(part) for part in (split.split(",") if isinstance(split, str) else split)]
    except ValueError:
        weights = []
    if not 2 <= len(weights) <= 3 or min(weights) < 0 or weights[0] <= 0:
        raise InputError(f"data.split: {split!r}: two or three weights are expected, for training and evaluation: 95,5")
    training, evaluation, *_ = normal([*weights, 0.0][:3])
    return (0.0, training), (training, training + evaluation) if evaluation > 0 else None


def check_weights(key: str, weights: Mapping[Any, float]) -> None:
    """Refuse what is no blend."""
    if not weights or any(not (math.isfinite(weight) and weight > 0) for weight in weights.values()):
        raise InputError(f"{key}: every weight of a blend must be above 0: {dict(weights)}")


def normal(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1, in numpy's precision: the last bits decide who comes first in a blend."""
    array = np.array(weights, np.float64)
    return (array / np.sum(array)).tolist()


def _arrange(lengths: NDArray[np.int32], first: int, seq_length: int, samples: int, seed: int) -> Arrays:
    """The order of documents and samples, drawn as Megatron draws it."""
    per_epoch = int(lengths.sum(dtype=np.int64))
    epochs = max(1, -(-(samples * seq_length + 1) // per_epoch))
    whole = ((epochs - 1) * per_epoch - 1) // seq_length  # samples without the last epoch
    apart = epochs > 1 and samples - whole < int(SEPARATE * ((per_epoch - 1) // seq_length))

    random = np.random.RandomState(seed)
    shuffles = [np.tile(np.arange(len(lengths), dtype=np.int32), e) for e in ((epochs - 1, 1) if apart else (epochs,))]
    for shuffle in shuffles:
        random.shuffle(shuffle)
    documents = np.concatenate(shuffles)

    total = (epochs * per_epoch - 1) // seq_length
    kind = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    orders = (
        [np.arange(whole, dtype=kind), np.arange(whole, total, dtype=kind)] if apart else [np.arange(total, dtype=kind)]
    )
    for order in orders:
        random.shuffle(order)
    return {
        "documents": documents + np.int32(first),
        "ends": np.cumsum(lengths[documents], dtype=np.int64),
        "order": np.concatenate(orders),
    }


def interleave(weights: Sequence[float], size: int) -> Arrays:
    """Which part gives each sample, and which of its samples: the part that lags its weight most, at every step.

    The loop over all samples is Megatron's own, in C++; `mindspeed_core.megatron.load` comes before, as everywhere.
    """
    from megatron.core.datasets import helpers_cpp  # pyrefly: ignore  # a compiled module without a stub

    which, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    # Megatron normalises twice, and the second time moves the last bits of some weights.
    helpers_cpp.build_blending_indices(which, sample, normal(weights), len(weights), size, False)
    return {"which": which, "sample": sample}
