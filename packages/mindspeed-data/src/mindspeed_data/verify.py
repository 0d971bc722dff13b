"""A data set read from end to end: is every file what its index and its description say?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mindspeed_core.conversation import IGNORED
from mindspeed_core.errors import InputError
from mindspeed_data import sidecar
from mindspeed_data.indexed import IndexedDataset, path_of
from mindspeed_data.journal import HASH, digest
from mindspeed_data.sidecar import Sidecar

BLOCK = 1 << 22  # ids that are looked at together


def verify(prefix: Path) -> str:
    """Return one line about a sound data set; raise InputError with a line per fault."""
    known = sidecar.read(prefix)
    files = {name: IndexedDataset(path) for name, path in sidecar.files_of(prefix).items()}
    of_ids = [data for name, data in files.items() if name == "text" or name.endswith("input_ids")]
    faults = [fault for data in files.values() for fault in _faults_of_index(data)]
    if not faults:
        faults = [fault for data in of_ids for fault in _faults_of_ids(data, known)]
        faults += _faults_beside(files, known)
        faults += _faults_of_packing(files, known)
    data, tokens = of_ids[0], sum(data.tokens for data in of_ids)
    if known is not None and not faults:
        faults += _faults_of_description(prefix, known, data, tokens)
    if faults:
        raise InputError("\n".join(faults))
    longest = max(int(data.lengths.max(initial=0)) for data in of_ids)
    if known is not None and known.packed is not None:
        share = known.tokens / max(tokens, 1)
        return f"{prefix}: sound; {known.kept:,} samples in {len(data):,} sequences of {known.packed:,}, {share:.2%} filled"
    samples, sentences = len(data.documents) - 1, f" in {len(data):,} sentences" if data.grouped else ""
    return f"{prefix}: sound; {samples:,} samples{sentences}, {tokens:,} tokens, longest {longest:,}, {data.dtype.name}"


def _faults_of_description(prefix: Path, known: Sidecar, data: IndexedDataset, tokens: int) -> Iterator[str]:
    """Faults of counts and hashes."""
    expected = (known.kept, known.tokens)
    if known.packed is not None:
        expected = (known.sequences, (known.sequences or 0) * known.packed)
    samples = len(data.documents) - 1
    if (samples, tokens) != expected:
        said = f"{expected[0]:,} and {expected[1]:,}"
        yield f"{prefix}: holds {samples:,} samples and {tokens:,} tokens, its description says {said}"
    folder = sidecar.beside(prefix, "").parent
    for name, told in known.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path}: missing; write the data again"
        elif HASH not in told:
            yield f"{path}: its description has no {HASH}, an older version wrote it; write the data again"
        elif digest(path) != told[HASH]:
            yield f"{path}: was changed since it was written: its hash is another one"


def _faults_of_index(data: IndexedDataset) -> Iterator[str]:
    idx, bin = path_of(data.prefix, ".idx"), path_of(data.prefix, ".bin")
    if len(data) and int(data.lengths.min()) < 0:
        yield f"{idx}: a sequence of negative length"
        return
    ends = np.cumsum(data.lengths, dtype=np.int64) * data.dtype.itemsize
    if not np.array_equal(data.offsets, np.concatenate(([0], ends[:-1])) if len(data) else data.offsets):
        yield f"{idx}: its offsets are not the sums of its lengths"
    documents = data.documents
    if not len(documents) or documents[0] != 0 or documents[-1] != len(data) or (np.diff(documents) < 0).any():
        yield f"{idx}: its documents do not cover its sequences"
    expected = int(ends[-1]) if len(data) else 0
    if bin.stat().st_size != expected:
        yield f"{bin}: {bin.stat().st_size:,} bytes, its index asks for {expected:,}"


def _faults_of_ids(data: IndexedDataset, known: Sidecar | None) -> Iterator[str]:
    limit = known.vocab_size if known is not None else None
    for start in range(0, data.tokens, BLOCK):
        block = data.ids[start : start + BLOCK]
        low, high = int(block.min()), int(block.max())
        if low < 0 or (limit is not None and high >= limit):
            i = start + int(np.argmax((block < 0) | (block >= (limit if limit is not None else high + 1))))
            sample = int(np.searchsorted(data.offsets, i * data.dtype.itemsize, "right")) - 1
            yield f"{path_of(data.prefix, '.bin')}: sample {sample} holds the id {int(data.ids[i])}, not in the vocabulary"
            return


def _faults_beside(files: dict[str, IndexedDataset], known: Sidecar | None) -> Iterator[str]:
    """Faults of masks and labels, each beside its ids."""
    for name, data in files.items():
        ids = files.get(
            "chosen_input_ids" if name.startswith("chosen") else "rejected_input_ids", files.get("input_ids")
        )
        if ids is None or data is ids:
            continue
        if not np.array_equal(data.lengths, ids.lengths):
            yield f"{path_of(data.prefix, '.idx')}: its lengths are not those of {ids.prefix.name}"
        elif name.endswith("labels"):
            yield from _faults_of_labels(ids, data, known)


def _faults_of_packing(files: dict[str, IndexedDataset], known: Sidecar | None) -> Iterator[str]:
    """The samples of a packed sequence are numbered from 1, and what is behind them is 0."""
    if known is None or known.packed is None:
        return
    mask = files["attention_mask"]
    for i in range(len(mask)):
        numbers = mask[i]
        samples = numbers[: int(np.count_nonzero(numbers))]
        if not (
            len(numbers) == known.packed
            and len(samples)
            and samples[0] == 1
            and np.isin(np.diff(samples), (0, 1)).all()
        ):
            yield f"{path_of(mask.prefix, '.bin')}: sequence {i} does not number its samples from 1"
            return


def _faults_of_labels(ids: IndexedDataset, labels: IndexedDataset, known: Sidecar | None) -> Iterator[str]:
    allowed = None if known is None else known.stand_ins
    first = 0 if known is not None and known.kind == "process_reward" else 1  # behind which tokens are predicted
    for i in range(len(ids)):
        learned = labels[i] != IGNORED
        others = set(labels[i][learned & (labels[i] != ids[i])].tolist())
        if allowed is None and len(others) == 1:  # others wrote it: one token may stand for the end of answers
            allowed = others
        if not others <= (allowed or set()):
            yield f"{path_of(labels.prefix, '.bin')}: sample {i} has a label that is not the id beside it"
            return
        if not learned[first:].any():
            yield f"{path_of(labels.prefix, '.bin')}: nothing of sample {i} is learned"
            return
