"""From files to a data set: the whole run of `mindspeed-data pretrain` and `sft`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mindspeed_core.cli import console, progress
from mindspeed_core.conversation import IGNORED
from mindspeed_core.errors import InputError, writing
from mindspeed_data import readers
from mindspeed_data.indexed import IndexedWriter, path_of, publish
from mindspeed_data.pool import Pool
from mindspeed_data.readers import Chunk, Fault, Row, Rows, Source
from mindspeed_data.sidecar import ORIGIN, Sidecar
from mindspeed_data.tokenize import Encoded, EncoderError, Job, TextJob, encoders_agree

NAMED = 10  # rows left out that are named one by one
PROBED = 64  # texts of the run on which the fast encoder must prove itself
# Bytes of input that outweigh the start of one more worker, with gigatoken and without.
FAST_SHARE, SLOW_SHARE = 32 << 20, 4 << 20


@dataclass
class Outcome:
    """What a run has done so far."""

    kept: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)  # the first rows left out, with their places


def run(
    job: Job, output: Path, *, workers: int | None = None, overwrite: bool = False, strict: bool = False
) -> Outcome:
    """Write the data set of a job; nothing carries its name before it is whole. `strict`: the first bad row ends it."""
    _make_room(job, output, overwrite=overwrite)
    started = time.monotonic()
    job = dataclasses.replace(job, fast=_look(job))
    workers = _workers(job, workers)
    try:
        outcome = _write(job, output, workers, strict=strict)
    except EncoderError:
        console.print("the fast encoder disagrees on a text of this run: once more without it")
        outcome = _write(dataclasses.replace(job, fast=False), output, workers, strict=strict)
    _report(job, output, outcome, time.monotonic() - started)
    return outcome


def _make_room(job: Job, output: Path, *, overwrite: bool) -> None:
    if output.name in ("", ".", "..") or output.is_dir():
        raise InputError(f"{output}: --output is the beginning of file names, not a folder; add one: {output / 'data'}")
    names = [*(f"{suffix}.idx" for suffix in job.outputs.values()), f"{job.beside}.meta.json"]
    taken = [path for name in names if (path := path_of(output, name)).exists()]
    if taken and not overwrite:
        raise InputError(f"{taken[0]}: exists already; choose another --output, or replace it with --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{output.parent}: cannot be made a folder, a file is in the way") from error


def _look(job: Job) -> bool:
    """Refuse input whose first row lacks its keys; True when the fast encoder proves itself on the first rows."""
    texts: list[str] = []
    checked = False
    for chunk in readers.chunks(job.sources, columns=job.keys.values()):
        for row in Rows(chunk, job.sources):
            if isinstance(row, Fault):
                continue
            if not checked:
                _check_keys(job, chunk, row)
                checked = True
            texts += [value for value in row.record.values() if isinstance(value, str)]
            if len(texts) >= PROBED:
                break
        if checked:
            break
    return encoders_agree(job.tokenizer, texts[:PROBED])


def _check_keys(job: Job, chunk: Chunk, row: Row) -> None:
    missing = job.format.missing(row.record, job.keys)
    if not missing:
        return
    piece = chunk.pieces[row.piece]
    source = job.sources[piece.source]
    where = f"{source.path}:{piece.line + row.line}" if row.line and piece.line is not None else source.path
    if not isinstance(job, TextJob) and source.kind in ("text", "lines"):
        raise InputError(f"{source.path}: a text holds no questions and answers; use mindspeed-data pretrain")
    has = ", ".join(map(str, list(row.record)[:12])) or "no key"
    ours = next(name for name, key in job.keys.items() if key == missing[0])
    hint = f'; name the right one: --map-keys \'{{"{ours}": "KEY"}}\''
    if not isinstance(job, TextJob) and "text" in row.record:
        hint = "; this looks like text: use mindspeed-data pretrain"
    elif isinstance(job, TextJob) and {"instruction", "output"} <= set(row.record):
        hint = "; this looks like instructions: use mindspeed-data sft"
    raise InputError(f"{where}: no key {missing[0]!r}; the row has {has}{hint}")


def _workers(job: Job, asked: int | None) -> int:
    """As many processes as asked for, else as there are cores and work for; none without a chunk of its own."""
    size = sum(source.size for source in job.sources)
    if asked is not None:
        return max(1, min(asked, -(-size // readers.CHUNK)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, size // (FAST_SHARE if job.fast else SLOW_SHARE)))


def _write(job: Job, output: Path, workers: int, *, strict: bool) -> Outcome:
    outcome = Outcome()
    total = sum(source.size for source in job.sources)
    unit, scale = ("MB", 1_000_000) if total >= 10_000_000 else ("KB", 1_000)
    with ExitStack() as stack:
        writers = {}
        for name, suffix in job.outputs.items():
            writers[name] = IndexedWriter(path_of(output, suffix), job.dtype)
            stack.callback(writers[name].discard)
        origins = IndexedWriter(path_of(output, f"{job.beside}{ORIGIN}"))
        stack.callback(origins.discard)
        pool = stack.enter_context(Pool(job, workers))
        bar = stack.enter_context(progress(round(total / scale), "tokenizing", unit=unit))
        places = _Places(job.sources)
        done = 0
        sent: list[Chunk] = []  # chunks whose results have not come back yet
        for encoded in pool.map(_noted(readers.chunks(job.sources, columns=job.keys.values()), sent)):
            chunk = sent.pop(0)
            origin = places.tell(chunk, encoded, outcome)
            if strict and outcome.named:
                raise InputError(outcome.named[0])
            _count(encoded, outcome)
            origins.add(origin.reshape(-1), np.full(len(origin), 2, np.int32))
            for name, writer in writers.items():
                writer.add(encoded.arrays[name], encoded.lengths_of.get(name, encoded.lengths))
            done += chunk.bytes
            bar.advance(round(done / scale) - bar.done, f"{outcome.kept:,} samples, {outcome.tokens:,} tokens")
        if not outcome.kept:
            raise InputError("\n".join(["nothing is left of the input", *_left_out(outcome)]))
        for writer in (*writers.values(), origins):
            writer.finish()
        beside = _sidecar_path(job, output)
        temporary = Path(f"{beside}.tmp")
        stack.callback(temporary.unlink, missing_ok=True)
        with writing(temporary):
            temporary.write_text(_sidecar(job, outcome).text())
        publish(*writers.values(), origins, beside=beside)
    return outcome


def _noted(chunks: Iterator[Chunk], sent: list[Chunk]) -> Iterator[Chunk]:
    """Pass chunks on, and keep what their results are told with: not the rows."""
    for chunk in chunks:
        pieces = tuple(dataclasses.replace(piece, data=None) for piece in chunk.pieces)
        sent.append(dataclasses.replace(chunk, pieces=pieces))
        yield chunk


class _Places:
    """Where in its file a row of a chunk stands: chunks count their own lines, here they add up."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.before = [0] * len(sources)

    def tell(self, chunk: Chunk, encoded: Encoded, outcome: Outcome) -> NDArray[np.int32]:
        """Name what was left out, and return the number of the source and the line of each sample: [n, 2]."""
        starts = []
        for piece, lines in zip(chunk.pieces, encoded.lines, strict=True):
            starts.append(self.before[piece.source] if piece.line is None else piece.line)
            self.before[piece.source] = starts[-1] + lines
        for fault in encoded.faults:
            source = self.sources[chunk.pieces[fault.piece].source]
            outcome.left_out[fault.reason.split(":")[0]] += 1
            if len(outcome.named) < NAMED:
                line = fault.line + starts[fault.piece]
                outcome.named.append(f"{source.path}{f':{line}' if line else ''}: {fault.reason}")
        origin = [(chunk.pieces[piece].source, starts[piece] + line) for piece, line in encoded.places]
        return np.array(origin, np.int32).reshape(-1, 2)


def _count(encoded: Encoded, outcome: Outcome) -> None:
    outcome.kept += len(encoded.lengths)
    outcome.tokens += int(encoded.lengths.sum(dtype=np.int64))
    outcome.longest = max(outcome.longest, int(encoded.lengths.max(initial=0)))
    labels = [array for name, array in encoded.arrays.items() if name.endswith("labels")]
    outcome.learned += sum(int(np.count_nonzero(array != IGNORED)) for array in labels)


def _sidecar_path(job: Job, output: Path) -> Path:
    return path_of(output, f"{job.beside}.meta.json")


def _sidecar(job: Job, outcome: Outcome) -> Sidecar:
    return Sidecar(
        **job.described(),
        tokenizer=str(job.tokenizer.folder),
        fingerprint=job.tokenizer.fingerprint,
        vocab_size=job.tokenizer.vocab_size,
        dtype=job.dtype.name,
        kept=outcome.kept,
        left_out=dict(sorted(outcome.left_out.items())),
        tokens=outcome.tokens,
        learned=outcome.tokens if isinstance(job, TextJob) else outcome.learned,
        longest=outcome.longest,
        inputs=[{"path": str(source.path), "bytes": source.size} for source in job.sources],
    )


def _report(job: Job, output: Path, outcome: Outcome, seconds: float) -> None:
    size = sum(source.size for source in job.sources) / 1e6
    files = f"{len(job.sources)} file{'s' if len(job.sources) > 1 else ''}"
    console.print(
        f"{files}, {size:,.1f} MB: {outcome.kept:,} samples, {outcome.tokens:,} tokens in {seconds:.1f} s "
        f"({size / seconds:,.1f} MB/s)"
    )
    if not isinstance(job, TextJob):
        share = outcome.learned / outcome.tokens
        console.print(f"learned: {outcome.learned:,} tokens ({share:.0%}); longest sample: {outcome.longest:,}")
    for source in job.sources:
        if source.size == 0:
            console.print(f"{source.path}: empty, nothing read")
    for line in _left_out(outcome):
        console.print(line)
    names = [path_of(output, suffix).name for suffix in job.outputs.values()]
    console.print(f"written to {output.parent}: {', '.join(names)} (.bin and .idx), {_sidecar_path(job, output).name}")


def _left_out(outcome: Outcome) -> list[str]:
    """The rows that were left out: how many of each reason, and the first ones with their places."""
    total = sum(outcome.left_out.values())
    if not total:
        return []
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in outcome.left_out.most_common())
    more = [f"  and {total - NAMED:,} more"] if total > NAMED else []
    return [f"left out {total:,} row{'s' if total > 1 else ''}: {reasons}", *(f"  {n}" for n in outcome.named), *more]
