"""Samples of a data set as text, with what is learned marked, and where they came from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindspeed_core.conversation import IGNORED
from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import TextStream, Tokenizer
from mindspeed_data import sidecar
from mindspeed_data.indexed import IndexedDataset, path_of
from mindspeed_data.verify import damaged, faults_of_index, sound_files


def show(prefix: Path, *, tokenizer: Path | None, start: int, count: int, length: int) -> None:
    """Print samples to stdout."""
    known = sidecar.read(prefix)
    loaded = Tokenizer.load(tokenizer or _folder(prefix, known))
    files = sound_files(prefix)
    sidecar.check_tokenizer(prefix, loaded)
    ids = next(iter(files.values()))
    total, packed = len(ids.documents) - 1, sidecar.packed_length(prefix) is not None
    if start >= total:
        held = "sequences" if packed else "samples"
        raise InputError(f"--start {start}: {prefix} holds {total:,} {held}, counted from 0")
    origins = _Origins(prefix, known, total)
    out = _page()
    for i in range(start, min(start + count, total)):
        _check_ids(prefix, files, i, loaded.vocab_size)
        if ids.grouped:
            _show_document(out, loaded, ids, i, origins.of(i, 1)[0], length)
            continue
        samples = _samples(files["attention_mask"][i]) if packed else [slice(0, len(ids[i]))]
        places = origins.of(i, len(samples))
        out.print(
            f"--- sequence {i} of {len(ids):,}" if packed else f"--- sample {i} of {len(ids):,}{places[0]}",
            style="bold",
        )
        for number, (part, place) in enumerate(zip(samples, places, strict=True), 1):
            if packed:
                out.print(f"- sample {number} of {len(samples)}{place}", style="bold")
            for which, texts, labels in _texts(files):
                part = part if which is None else slice(None)
                _show(out, loaded, which, texts[i][part], None if labels is None else labels[i][part], length)
        if filling := len(ids[i]) - samples[-1].stop:
            out.print(f"- {filling:,} tokens of filling", style="bold")
    sys.stdout.flush()


def _folder(prefix: Path, known: sidecar.Sidecar | None) -> Path:
    """The folder of the tokenizer that made a data set."""
    if known is None:
        raise InputError(f"{prefix}: nothing beside it says which tokenizer made it; name it with --tokenizer DIR")
    folder = Path(known.tokenizer)
    if not folder.is_dir():
        raise InputError(f"{prefix}: the tokenizer that made it, {folder}, is not there; name it with --tokenizer DIR")
    return folder


def _page() -> Any:
    """The console on stdout."""
    from rich.console import Console

    class Page(Console):
        def on_broken_pipe(self) -> None:
            """Leave to the command line how a program ends whose reader has left: quietly, with the code of SIGPIPE."""
            raise  # rich calls this where it handles the error

    return Page(highlight=False, soft_wrap=True, markup=False, emoji=False)


def _check_ids(prefix: Path, files: dict[str, IndexedDataset], i: int, vocab_size: int) -> None:
    """Refuse to show what is no id, before it is decoded."""
    for name, data in files.items():
        if name == "attention_mask":
            continue
        values = data.ids[slice(*_bounds(data, i))]
        wrong = (values < 0) | (values >= vocab_size)
        if name.endswith("labels"):
            wrong &= values != IGNORED
        if wrong.any():
            bad = int(values[int(np.argmax(wrong))])
            raise damaged(
                f"{path_of(data.prefix, '.bin')}: sample {i} holds {bad}, not an id of the vocabulary", prefix
            )


def _bounds(data: IndexedDataset, i: int) -> tuple[int, int]:
    """Where the ids of a document, of one sequence or several, begin and end."""
    first, stop = int(data.documents[i]), int(data.documents[i + 1])
    begin = int(data.offsets[first]) // data.dtype.itemsize if first < len(data) else 0
    return begin, begin + int(data.lengths[first:stop].sum(dtype=np.int64))


def _texts(files: dict[str, IndexedDataset]) -> list[tuple[str | None, IndexedDataset, IndexedDataset | None]]:
    """What is to be shown of a sample: which of its answers it is, ids and labels."""
    if "chosen_input_ids" in files:
        return [(which, files[f"{which}_input_ids"], files[f"{which}_labels"]) for which in ("chosen", "rejected")]
    return [(None, files["text" if "text" in files else "input_ids"], files.get("labels"))]


def _samples(mask: NDArray[Any]) -> list[slice]:
    """The samples of a sequence, which the mask numbers from 1; what it calls 0 fills the end."""
    end = int(np.count_nonzero(mask))
    cuts = [0, *(np.flatnonzero(np.diff(mask[:end])) + 1).tolist(), end]
    return [slice(*pair) for pair in pairwise(cuts)]


def _show_document(out: Any, tokenizer: Tokenizer, data: IndexedDataset, i: int, place: str, length: int) -> None:
    """Print a document sentence by sentence."""
    first, stop = int(data.documents[i]), int(data.documents[i + 1])
    out.print(f"--- sample {i} of {len(data.documents) - 1:,}{place}", style="bold")
    for number in range(first, stop):
        out.print(f"- sentence {number - first + 1} of {stop - first}", style="bold")
        _show(out, tokenizer, None, data[number], None, length)


def _show(
    out: Any, tokenizer: Tokenizer, which: str | None, ids: NDArray[Any], labels: NDArray[Any] | None, length: int
) -> None:
    """Print one text below how long it is."""
    from rich.text import Text

    head = f"{f'{which}: ' if which else ''}{len(ids):,} tokens"
    if labels is not None:
        head += f", {int((labels != IGNORED).sum()):,} of them learned"
    out.print(f"{head}{f' (the first {length:,})' if len(ids) > length else ''}", style="dim")
    text = Text()
    for part, is_learned in _parts(
        tokenizer, ids[:length].tolist(), None if labels is None else labels[:length].tolist()
    ):
        if not is_learned:
            text.append(part, "" if labels is None else "dim")
        else:
            text.append(part if out.is_terminal else f"«{part}»", "bold red" if which == "rejected" else "bold green")
    out.print(text)


def _parts(tokenizer: Tokenizer, ids: list[int], labels: list[int] | None) -> Iterator[tuple[str, bool]]:
    """Stretches of text that are all learned or all not; together they are the decoded sample. What is learned in the place
    of another token stands behind it: →token."""
    stream = TextStream(tokenizer, skip_special=False)
    learned = [label != IGNORED for label in labels] if labels is not None else [False] * len(ids)
    replaced = [labels is not None and learned[i] and labels[i] != ids[i] for i in range(len(ids))]
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or learned[i] != learned[start] or replaced[i] or replaced[i - 1]:
            text = "".join(map(stream.push, ids[start:i])) + stream.finish()
            if replaced[i - 1] and labels is not None:
                text += f"→{tokenizer.decode([labels[i - 1]], skip_special=False)}"
            yield text, learned[start]
            start = i


class _Origins:
    """From which file and line samples came, as far as it is known."""

    def __init__(self, prefix: Path, known: sidecar.Sidecar | None, total: int) -> None:
        path = sidecar.beside(prefix, sidecar.ORIGIN)
        self._prefix, self._path = prefix, path_of(path, ".bin")
        self._places = IndexedDataset(path) if known is not None and path_of(path, ".idx").exists() else None
        if self._places is not None and (fault := next(faults_of_index(self._places), None)):
            raise damaged(fault, prefix)
        if self._places is not None and len(self._places) != total:
            raise damaged(f"{path_of(path, '.idx')}: tells of {len(self._places):,} samples, not {total:,}", prefix)
        self._inputs = [] if known is None else [source["path"] for source in known.inputs]
        self._numbers = frozenset(range(len(self._inputs)))

    def of(self, sequence: int, samples: int) -> list[str]:
        """Return ", from FILE:LINE" for each sample of a sequence; nothing where it is not known."""
        if self._places is None:
            return [""] * samples
        pairs = self._places[sequence]
        if len(pairs) != 2 * samples or not set(pairs[::2].tolist()) <= self._numbers:
            raise damaged(f"{self._path}: does not tell where sample {sequence} comes from", self._prefix)
        places = pairs.reshape(-1, 2).tolist()
        return [f", from {self._inputs[file]}{f':{line}' if line else ''}" for file, line in places]
