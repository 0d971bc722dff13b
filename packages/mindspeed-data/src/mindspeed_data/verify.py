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
    faults = list(_faults_of_indexes(files))
    if not faults:
        faults = [fault for data in of_ids for fault in _faults_of_ids(data, known)]
        faults += _faults_of_all_labels(files, known)
    data, tokens = of_ids[0], sum(data.tokens for data in of_ids)
    samples, room, packed = len(data.documents) - 1, tokens, None if faults else sidecar.packed_length(prefix)
    if packed is not None:
        found, samples, tokens = _packed(files["attention_mask"], packed)
        faults += found
    if known is not None and not faults:
        faults += _faults_of_description(prefix, known, samples, tokens, len(data))
    if faults:
        raise InputError("\n".join(faults))
    longest = max(int(data.lengths.max(initial=0)) for data in of_ids)
    if packed is not None:
        share = tokens / max(room, 1)
        return f"{prefix}: sound; {samples:,} samples in {len(data):,} sequences of {packed:,}, {share:.2%} filled"
    sentences = f" in {len(data):,} sentences" if data.grouped else ""
    return f"{prefix}: sound; {samples:,} samples{sentences}, {tokens:,} tokens, longest {longest:,}, {data.dtype.name}"


def sound_files(prefix: Path) -> dict[str, IndexedDataset]:
    """Return the files of a data set for those who look into it; InputError in one line where an index is damaged."""
    files = {name: IndexedDataset(path) for name, path in sidecar.files_of(prefix).items()}
    fault = next(_faults_of_indexes(files), None)
    if fault is not None:
        raise damaged(fault, prefix)
    return files


def damaged(fault: str, prefix: Path) -> InputError:
    """What to say of a data set in which the first fault that was met is this one."""
    return InputError(
        f"{fault}: the data set is damaged; write it again, or see what else is wrong with mindspeed-data verify {prefix}"
    )


def _faults_of_description(prefix: Path, known: Sidecar, samples: int, tokens: int, sequences: int) -> Iterator[str]:
    """Faults of counts and hashes."""
    if (samples, tokens) != (known.kept, known.tokens):
        said = f"{known.kept:,} and {known.tokens:,}"
        yield f"{prefix}: holds {samples:,} samples and {tokens:,} tokens, its description says {said}"
    if known.packed is not None and sequences != known.sequences:
        yield f"{prefix}: holds {sequences:,} sequences, its description says {known.sequences or 0:,}"
    folder = sidecar.beside(prefix, "").parent
    for name, told in known.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path}: missing; write the data again"
        elif HASH not in told:
            yield f"{path}: its description has no {HASH}, an older version wrote it; write the data again"
        elif digest(path) != told[HASH]:
            yield f"{path}: was changed since it was written: its hash is another one"


def _faults_of_indexes(files: dict[str, IndexedDataset]) -> Iterator[str]:
    """Faults of every index, and of those of masks and labels beside that of their ids."""
    faulty = [fault for data in files.values() for fault in faults_of_index(data)]
    yield from faulty
    for name, data in () if faulty else files.items():
        ids = _ids_beside(name, files)
        if ids is not None and not np.array_equal(data.lengths, ids.lengths):
            yield f"{path_of(data.prefix, '.idx')}: its lengths are not those of {ids.prefix.name}"


def _ids_beside(name: str, files: dict[str, IndexedDataset]) -> IndexedDataset | None:
    """The ids that a file of masks or labels belongs to; None for ids themselves."""
    if name.endswith("input_ids"):
        return None
    return files.get("chosen_input_ids" if name.startswith("chosen") else "rejected_input_ids", files.get("input_ids"))


def faults_of_index(data: IndexedDataset) -> Iterator[str]:
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


def _faults_of_all_labels(files: dict[str, IndexedDataset], known: Sidecar | None) -> Iterator[str]:
    for name, data in files.items():
        ids = _ids_beside(name, files)
        if ids is not None and name.endswith("labels"):
            yield from _faults_of_labels(ids, data, known)


def _packed(mask: IndexedDataset, length: int) -> tuple[list[str], int, int]:
    """Faults of packed sequences, whose samples are numbered from 1 with 0 behind them, and how many samples and tokens
    they hold."""
    samples = tokens = 0
    for i in range(len(mask)):
        numbers = mask[i]
        filled = numbers[: int(np.count_nonzero(numbers))]
        if not (len(numbers) == length and len(filled) and filled[0] == 1 and np.isin(np.diff(filled), (0, 1)).all()):
            return [f"{path_of(mask.prefix, '.bin')}: sequence {i} does not number its samples from 1"], samples, tokens
        samples += int(filled[-1])
        tokens += len(filled)
    return [], samples, tokens


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
