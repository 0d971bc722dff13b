"""How long the samples of a data set are, and how full sequences become: on the terminal or as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindspeed_core.conversation import IGNORED
from mindspeed_data import sidecar
from mindspeed_data.fitting import best_fit
from mindspeed_data.indexed import IndexedDataset
from mindspeed_data.verify import sound_files

BLOCK = 1 << 22  # ids that are looked at together
LENGTHS = (2048, 4096, 8192, 32768)  # of sequences, where none is asked for
WIDTH = 40  # characters of the longest bar
SHARES = {"median": 50, "p90": 90, "p99": 99}


def stats(prefix: Path, *, seq_lengths: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return the numbers of a data set."""
    known = sidecar.read(prefix)
    files, packed = sound_files(prefix), sidecar.packed_length(prefix)
    lengths = _lengths(files, packed)
    answers = len(lengths) if "chosen_input_ids" in files else None
    labels = [data.ids for name, data in files.items() if name.endswith("labels")]
    told: dict[str, Any] = {
        "samples": len(lengths) if answers is None else answers // 2,
        **({"answers": answers} if answers is not None else {}),
        **({"documents": len(data.documents) - 1} if (data := next(iter(files.values()))).grouped else {}),
        "tokens": int(lengths.sum()),
        "learned": sum(map(_learned, labels)) if labels else int(lengths.sum()),
        "shortest": int(lengths.min()) if len(lengths) else 0,
        "longest": int(lengths.max(initial=0)),
        "mean": float(lengths.mean()) if len(lengths) else 0.0,
        **{name: int(np.percentile(lengths, share)) if len(lengths) else 0 for name, share in SHARES.items()},
        "histogram": list(_histogram(lengths)),
    }
    if known is not None:
        told |= {"cut": known.cut, "split": known.split, "left_out": known.left_out}
    if packed is not None:
        filled = told["tokens"] / max(len(files["input_ids"]) * packed, 1)
        told["packed"] = {"seq_length": packed, "sequences": len(files["input_ids"]), "filled": filled}
    elif "input_ids" in files:
        given = seq_lengths or ((known.seq_length,) if known is not None and known.seq_length else LENGTHS)
        told["packing"] = [_packing(lengths, length) for length in given]
    return told


def table(prefix: Path, told: dict[str, Any]) -> str:
    """Return the numbers as text."""
    share = told["learned"] / max(told["tokens"], 1)
    samples = f"{told['samples']:,} samples"
    if "documents" in told:
        samples = f"{told['samples']:,} sentences of {told['documents']:,} documents"
    if "answers" in told:  # what --seq-length limits and training cuts is one answer with its question
        samples = f"{told['samples']:,} pairs: {told['answers']:,} answers, each with its question"
    lines = [
        f"{prefix}: {samples}, {told['tokens']:,} tokens, {share:.0%} of them learned",
        f"lengths: {told['shortest']:,} to {told['longest']:,}, mean {told['mean']:,.1f}, "
        + ", ".join(f"{name} {told[name]:,}" for name in SHARES),
        "",
    ]
    most = max((count for _, _, count in told["histogram"]), default=1)
    wide = max((len(f"{high:,}") for _, high, _ in told["histogram"]), default=1)
    for low, high, count in told["histogram"]:
        bar = "█" * round(WIDTH * count / most) or ("▏" if count else "")
        lines.append(f"{low:>{wide},} to {high:>{wide},}  {bar:<{WIDTH}} {count:,}")
    if "packed" in told:
        packed = told["packed"]
        lines += [
            "",
            f"packed: {packed['sequences']:,} sequences of {packed['seq_length']:,}, {packed['filled']:.2%} filled",
        ]
    if "packing" in told:
        lines += ["", "seq_length   sequences   filled when packed   when each is padded   longer"]
        lines += [
            f"{p['seq_length']:>10,} {p['sequences']:>11,} {p['packed']:>20.2%} {p['padded']:>21.2%} {p['longer']:>8,}"
            for p in told["packing"]
        ]
    left_out = sum(told.get("left_out", {}).values())
    if left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in told["left_out"].items())
        lines += ["", f"left out when it was written: {left_out:,} rows: {reasons}"]
    lines += [f"{name}: {told[name]:,} rows" for name in ("cut", "split") if told.get(name)]
    return "\n".join(lines)


def _lengths(files: dict[str, IndexedDataset], packed: int | None) -> NDArray[np.int64]:
    """The tokens of every sample; of pairs, of every answer with its question."""
    if packed is not None:
        return np.concatenate([np.empty(0, np.int64), *_packed_lengths(files["attention_mask"])])
    of_ids = [data for name, data in files.items() if name == "text" or name.endswith("input_ids")]
    return np.concatenate([np.asarray(data.lengths, np.int64) for data in of_ids])


def _packed_lengths(mask: IndexedDataset) -> Iterator[NDArray[np.int64]]:
    """The lengths of the samples that share sequences: stretches of one number, 0 being none."""
    for i in range(len(mask)):
        numbers = mask[i]
        starts = np.concatenate(([0], np.flatnonzero(np.diff(numbers)) + 1))
        yield np.diff(starts, append=len(numbers))[numbers[starts] > 0]


def _learned(labels: NDArray[Any]) -> int:
    blocks = (labels[start : start + BLOCK] for start in range(0, len(labels), BLOCK))
    return sum(int(np.count_nonzero(block != IGNORED)) for block in blocks)


def _histogram(lengths: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """How many lengths lie between powers of two, both ends counted."""
    if not len(lengths):
        return
    first, last = (int(length).bit_length() for length in (lengths.min(), lengths.max()))
    counts = np.bincount(np.searchsorted(2 ** np.arange(64, dtype=np.uint64), lengths.astype(np.uint64), "right"))
    for bits in range(first, last + 1):
        yield (1 << bits) // 2, max((1 << bits) - 1, 0), int(counts[bits])


def _packing(lengths: NDArray[np.int64], seq_length: int) -> dict[str, Any]:
    """How full sequences become, with what is longer cut."""
    cut = np.minimum(lengths[lengths > 0], seq_length)
    sequences = len(best_fit(cut, seq_length))
    return {
        "seq_length": seq_length,
        "sequences": sequences,
        "packed": float(cut.sum() / max(sequences * seq_length, 1)),
        "padded": float(cut.sum() / max(len(cut) * seq_length, 1)),
        "longer": int((lengths > seq_length).sum()),
    }
