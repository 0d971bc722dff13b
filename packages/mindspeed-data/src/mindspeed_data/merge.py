"""Data sets of one kind joined to one: the shards of a run, or any that were made alike."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_core.cli import console, progress
from mindspeed_core.errors import InputError, writing
from mindspeed_data import sidecar
from mindspeed_data.indexed import IndexedDataset, IndexedWriter, path_of, rename
from mindspeed_data.journal import GrowingFile, Mark, described
from mindspeed_data.sidecar import LEFT_OUT, ORIGIN, Sidecar

BLOCK = 1 << 16  # documents that are copied at once
ADDED = ("kept", "tokens", "learned", "sequences", "cut", "split")
OWN = {*ADDED, "longest", "left_out", "inputs", "plan", "files", "tokenizer"}  # what may differ between the parts


def shard_prefix(output: Path, shard: tuple[int, int]) -> Path:
    """Return the prefix of one of several shards."""
    number, shards = shard
    return output.with_name(f"{output.name}-{number:05}-of-{shards:05}")


def shards_of(prefix: Path) -> list[Path]:
    """Return the prefixes of all shards of a data set; InputError where one is missing."""
    found = {path.name[len(prefix.name) :][:15] for path in prefix.parent.glob(f"{prefix.name}-?????-of-?????_*.idx")}
    if not found:
        raise InputError(f"{prefix}: no shards of it are in {prefix.parent}; name the data sets to merge, and --output")
    counts = {name[-5:] for name in found}
    if len(counts) > 1:
        raise InputError(f"{prefix}: shards of several runs ({', '.join(sorted(found))}); name those to merge")
    total = int(counts.pop())
    expected = [shard_prefix(prefix, (number, total)) for number in range(1, total + 1)]
    missing = [path.name for path in expected if path.name[len(prefix.name) :] not in found]
    if missing:
        raise InputError(f"{prefix}: of its {total} shards {', '.join(missing)} {_verb(missing)} missing")
    return expected


def merge(prefixes: Sequence[Path], output: Path, *, overwrite: bool) -> int:
    """Write the samples of all data sets, one set after the other; return how many there are."""
    parts = [sidecar.files_of(prefix) for prefix in prefixes]
    known = [_known(prefix) for prefix in prefixes]
    _check_alike(prefixes, known)
    names = {name: str(path).removeprefix(str(_base(parts[0]))) for name, path in parts[0].items()}
    beside = str(sidecar.beside(prefixes[0], "")).removeprefix(str(_base(parts[0])))
    taken = path_of(output, f"{next(iter(names.values()))}.idx")
    if taken.exists() and not overwrite:
        raise InputError(f"{taken}: exists already; choose another --output, or replace it with --overwrite")
    sidecar.check_alone(output, names)
    output.parent.mkdir(parents=True, exist_ok=True)
    inputs, offsets = _inputs(known)
    with ExitStack() as stack:
        bar = stack.enter_context(
            progress(sum(min(k.sequences or k.kept, k.kept) for k in known) * (len(names) + 1), "merging")
        )
        files: dict[str, Mark] = {}
        moves: list[tuple[Path, Path]] = []

        def join(suffix: str, datasets: Sequence[IndexedDataset], shift: Callable[[int, Any], Any]) -> None:
            writer = IndexedWriter(path_of(output, suffix), datasets[0].dtype, grouped=True)
            stack.callback(writer.discard)
            for number, data in enumerate(datasets):
                for lengths, ids, documents in _blocks(data):
                    writer.add(shift(number, ids), lengths, documents)
                    bar.advance(len(documents))
            writer.finish()
            files.update(writer.files)

        for name, suffix in names.items():
            join(suffix, [IndexedDataset(part[name]) for part in parts], lambda _, ids: ids)
        origins = [IndexedDataset(sidecar.beside(prefix, ORIGIN)) for prefix in prefixes]
        join(f"{beside}{ORIGIN}", origins, lambda number, ids: _shifted(ids, offsets[number]))
        left_out = _left_out(prefixes, path_of(output, f"{beside}{LEFT_OUT}.tmp"), stack)
        if left_out.size:
            files[left_out.path.name.removesuffix(".tmp")] = left_out.mark
        description = path_of(output, f"{beside}.meta.json")
        temporary = Path(f"{description}.tmp")
        stack.callback(temporary.unlink, missing_ok=True)
        with writing(temporary):
            temporary.write_text(_together(known, inputs, files).text())
        finals = [description.name, *sorted(files, key=lambda name: name.endswith(".idx"))]
        moves = [(output.parent / f"{final}.tmp", output.parent / final) for final in finals]
        rename(moves)
    kept = sum(k.kept for k in known)
    console.print(f"{len(prefixes)} data sets: {kept:,} samples, {sum(k.tokens for k in known):,} tokens")
    return kept


def _known(prefix: Path) -> Sidecar:
    known = sidecar.read(prefix)
    if known is None:
        raise InputError(f"{prefix}: nothing beside it says how it was made (no .meta.json)")
    return known


def _check_alike(prefixes: Sequence[Path], known: Sequence[Sidecar]) -> None:
    first = dataclasses.asdict(known[0])
    problems = []
    for prefix, other in zip(prefixes[1:], known[1:], strict=True):
        differ = [name for name, value in dataclasses.asdict(other).items() if name not in OWN and value != first[name]]
        differ += ["packing"] if known[0].packed != other.packed else []
        if differ:
            problems.append(
                f"{prefix}: was not made as {prefixes[0]} was: {', '.join(differ)} {_verb(differ)} different"
            )
    if problems:
        raise InputError("\n".join(problems))


def _verb(things: Sequence[str]) -> str:
    return "is" if len(things) == 1 else "are"


def _base(files: dict[str, Path]) -> Path:
    """P of P_text_document and the like."""
    suffixes = (sidecar.TEXT, sidecar.SENTENCE, *sidecar.INSTRUCTION.values(), *sidecar.PAIRWISE.values())
    path = next(iter(files.values()))
    suffix = next((suffix for suffix in suffixes if path.name.endswith(suffix)), "")
    return path.with_name(path.name.removesuffix(suffix))


def _blocks(data: IndexedDataset) -> Iterator[tuple[Any, Any, Any]]:
    """The lengths, the ids, and the number of sequences of some documents at a time."""
    size = data.dtype.itemsize
    for start in range(0, len(data.documents) - 1, BLOCK):
        bounds = np.asarray(data.documents[start : start + BLOCK + 1])
        lengths = np.asarray(data.lengths[bounds[0] : bounds[-1]])
        begin = int(data.offsets[bounds[0]]) // size
        yield lengths, data.ids[begin : begin + int(lengths.sum(dtype=np.int64))], np.diff(bounds)


def _inputs(known: Sequence[Sidecar]) -> tuple[list[dict[str, Any]], list[int]]:
    """All inputs, and where those of each data set begin among them; those of shards are the same."""
    if all(k.inputs == known[0].inputs for k in known):
        return known[0].inputs, [0] * len(known)
    counts = [len(k.inputs) for k in known]
    return [source for k in known for source in k.inputs], [sum(counts[:i]) for i in range(len(counts))]


def _shifted(origins: Any, by: int) -> Any:
    """Pairs of source and line, with other numbers of the sources."""
    pairs = np.array(origins).reshape(-1, 2)
    pairs[:, 0] += by
    return pairs.reshape(-1)


def _left_out(prefixes: Sequence[Path], temporary: Path, stack: ExitStack) -> GrowingFile:
    joined = GrowingFile(temporary)
    stack.callback(temporary.unlink, missing_ok=True)
    for prefix in prefixes:
        path = sidecar.beside(prefix, LEFT_OUT)
        if path.exists():
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    joined.write(block)
    joined.sync()
    return joined


def _together(known: Sequence[Sidecar], inputs: list[dict[str, Any]], files: dict[str, Mark]) -> Sidecar:
    left_out: Counter[str] = Counter()
    for k in known:
        left_out.update(k.left_out)
    changed: dict[str, Any] = {
        **{name: sum(getattr(k, name) or 0 for k in known) for name in ADDED},
        "longest": max(k.longest for k in known),
        "left_out": dict(sorted(left_out.items())),
        "inputs": inputs,
        "plan": {**known[0].plan, "shard": [1, 1]},
        "files": described(files),
    }
    return dataclasses.replace(known[0], **changed)
