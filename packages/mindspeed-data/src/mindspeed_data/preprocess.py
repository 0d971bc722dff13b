"""From files to a data set: the whole run of the commands that write one.

    first pass     chunks of rows -> ids, appended in the order of the input, a line of the journal after each chunk
    second pass    where samples are mixed or packed: into another order
    publishing     hashes and counts into the description, then the files get their names, all of them or none

Whatever ends a run in between, the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mindspeed_core.cli import console, progress
from mindspeed_core.conversation import IGNORED
from mindspeed_core.errors import InputError, writing
from mindspeed_data import __version__, arrange, parts, readers
from mindspeed_data.encoder import EncoderError, encoders_agree
from mindspeed_data.indexed import IndexedWriter, path_of, rename
from mindspeed_data.journal import GrowingFile, Journal, Line, Mark, described
from mindspeed_data.plan import Plan
from mindspeed_data.pool import Pool
from mindspeed_data.readers import Chunk, Fault, Row, Rows
from mindspeed_data.sentences import SentenceJob
from mindspeed_data.sidecar import LEFT_OUT, ORIGIN, Sidecar
from mindspeed_data.sources import Source, changed, check_name, stamps
from mindspeed_data.stages import Stages
from mindspeed_data.tokenize import Encoded, Job, TextJob

NAMED = 10  # rows left out that are named one by one on the terminal
PROBED = 64  # texts of the run on which the fast encoder must prove itself
# Bytes of input that outweigh the start of one more worker, with gigatoken and without.
FAST_SHARE, SLOW_SHARE = 64 << 20, 4 << 20
STAGE = ".rows"  # what the files of the first pass are called where a second one follows


@dataclass
class Outcome:
    """What a run has done so far."""

    kept: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    cut: int = 0  # rows that were cut to the sequence length, and that became several samples
    split: int = 0
    sequences: int = 0  # where samples share them, or are several
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)  # the first rows left out, with their places
    unused: list[str] = field(default_factory=list)  # files of which nothing was kept, and why

    def told(self) -> dict[str, Any]:
        """For the journal."""
        return {**vars(self), "left_out": dict(self.left_out)}

    @classmethod
    def of(cls, line: Line | None) -> Outcome:
        """What the journal says."""
        if line is None:
            return cls()
        known = cls(**line["outcome"])
        known.left_out = Counter(known.left_out)  # a plain mapping until here
        return known


def run(
    job: Job,
    output: Path,
    *,
    plan: Plan | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    strict: bool = False,
) -> Outcome:
    """Write the data set of a job; nothing carries its name before it is whole. `strict`: the first bad row ends it."""
    plan = plan or Plan()
    for path in (output, job.tokenizer.folder):
        check_name(path)
    _make_room(output)
    started = time.monotonic()
    current = _Run(job, output, plan, overwrite=overwrite, strict=strict)
    try:
        outcome = current.finish(workers)
    except BaseException as error:
        kept = current.end()
        if kept and isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"after {kept:,} samples; the same command goes on from there") from None
        raise
    _report(job, output, plan, outcome, time.monotonic() - started, current)
    return outcome


def _make_room(output: Path) -> None:
    if output.name in ("", ".", "..") or output.is_dir():
        raise InputError(f"{output}: --output is the beginning of file names, not a folder; add one: {output / 'data'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{output.parent}: cannot be made a folder, a file is in the way") from error


class _Run:
    """One run and the files it has under way, all of them beside those they will become."""

    def __init__(self, job: Job, output: Path, plan: Plan, *, overwrite: bool, strict: bool) -> None:
        self.job, self.output, self.plan = job, output, plan
        self.overwrite, self.strict = overwrite, strict
        if not self._beside(".journal.tmp").exists():
            self._check_taken()
        self.stamps = stamps(job.sources)
        self.journal = Journal(self._beside(".journal.tmp"), _identity(job, plan, self.stamps))
        self.parts = self._beside(".parts.tmp")
        self.writers: dict[str, IndexedWriter] = {}
        self.left_out: GrowingFile | None = None
        self.arranged: dict[str, IndexedWriter] = {}
        self.outcome = Outcome()
        self.kept = 0  # samples that the journal knows of
        self.workers = 1
        self.read = 0  # bytes of the input that this run has read

    def finish(self, workers: int | None) -> Outcome:
        """Do what is left of it."""
        fast = None
        if not self.journal.known:
            self._check_taken()
            fast = _look(self.job)  # what another command left is lost only where this one can do its work
            if self.journal.other:
                console.print(f"{self.journal.path}: what another command left unfinished is replaced")
            parts.clear(self.parts)
        line = self.journal.resume()
        if line is not None:
            self.kept = line["outcome"]["kept"]
            if self.strict and line["outcome"]["named"]:
                raise InputError(line["outcome"]["named"][0])
        if line is not None and "moves" in line:  # it ended while files got their names
            self._publish(line["moves"])
            return Outcome.of(line)
        self._check_taken()
        if line is None:
            self.job = dataclasses.replace(self.job, fast=_look(self.job) if fast is None else fast)
        else:
            self.job = dataclasses.replace(self.job, fast=line["fast"])
            console.print(f"going on behind the {line['outcome']['kept']:,} samples of an earlier run")
        try:
            self._encode(line, workers)
        except EncoderError:
            console.print("the fast encoder disagrees on a text of this run: once more without it")
            self.job = dataclasses.replace(self.job, fast=False)
            parts.clear(self.parts)
            self.journal.clear()
            self._encode(None, workers)
        writers = self._arrange() if self.plan.arranges else list(self.writers.values())
        for writer in writers:
            writer.finish()
        moves = self._described(writers)
        if (other := self._changed()) is not None:
            raise changed(other)
        self.journal.add({"moves": moves, "outcome": self.outcome.told()}, [])
        self._publish(moves)
        return self.outcome

    def end(self) -> int:
        """Close everything; keep it where another run can go on from it. Return the samples that are kept."""
        for writer in (*self.writers.values(), *self.arranged.values()):
            writer.close()
        if self.left_out is not None:
            self.left_out.close()
        with suppress(OSError):  # a file that vanished may come back as it was
            self.kept = 0 if self._changed() else self.kept
        if self.kept or self.journal.other:
            self.journal.close()
        else:
            self._clear()
        return self.kept

    def _check_taken(self) -> None:
        names = [*(f"{suffix}.idx" for suffix in self.job.outputs.values()), f"{self.job.beside}.meta.json"]
        taken = [path for name in names if (path := path_of(self.output, name)).exists()]
        if taken and not self.overwrite:
            raise InputError(f"{taken[0]}: exists already; choose another --output, or replace it with --overwrite")

    def _changed(self) -> Source | None:
        """The first file of the input that is no longer what it was when the run began."""
        now = stamps(self.job.sources)
        known = zip(self.job.sources, self.stamps, now, strict=True)
        return next((source for source, *found in known if found[0] != found[1] or found[1][0] != source.size), None)

    def _beside(self, suffix: str) -> Path:
        return path_of(self.output, f"{self.job.beside}{suffix}")

    def _files(self) -> list[tuple[str, str, DTypeLike]]:
        """The files to write: name, suffix and dtype."""
        of_ids = [(name, suffix, self.job.dtype) for name, suffix in self.job.outputs.items()]
        return [*of_ids, (ORIGIN, f"{self.job.beside}{ORIGIN}", np.int32)]

    # ------------------------------------------------------------------------------------------------ first pass

    def _encode(self, line: Line | None, workers: int | None) -> None:
        sizes = {} if line is None else {name: size for name, (size, _) in line["files"].items()}
        self.outcome = Outcome.of(line)
        for name, suffix, dtype in self._files():
            path = path_of(self.output, f"{suffix}{STAGE if self.plan.arranges else ''}")
            grouped = isinstance(self.job, SentenceJob) and name != ORIGIN
            self.writers[name] = IndexedWriter(path, dtype, sizes=sizes, grouped=grouped)
        path = self._beside(f"{LEFT_OUT}.tmp")
        self.left_out = GrowingFile(path, size=sizes.get(path.name, 0))
        growing = [file for writer in self.writers.values() for file in writer.growing] + [self.left_out]

        job, done = self.job, 0 if line is None else line["read"]
        self.read = total = max(0, readers.share(job.sources, self.plan.shard) - done)
        self.workers = _workers(job, workers)
        unit, scale = ("MB", 1_000_000) if total >= 10_000_000 else ("KB", 1_000)
        before = done
        places = _Places(job.sources, line)
        with (
            progress(round(total / scale), "tokenizing", unit=unit) as bar,
            closing(self._results(line, self.workers)) as results,
        ):
            for number, chunk, encoded in results:
                origin = places.tell(chunk, encoded, self.outcome, self.left_out)
                if self.strict and encoded.faults:
                    raise InputError(self.outcome.named[0])
                _count(encoded, self.outcome)
                self.writers[ORIGIN].add(origin.reshape(-1), np.full(len(origin), 2, np.int32))
                for name in job.outputs:
                    lengths = encoded.lengths_of.get(name, encoded.lengths)
                    self.writers[name].add(encoded.arrays[name], lengths, encoded.documents)
                done += chunk.bytes
                last = chunk.pieces[-1]
                told = {
                    "chunk": number,
                    "after": [last.source, last.stop],
                    "lines": places.before[last.source],
                    "read": done,
                    "fast": job.fast,
                    "outcome": self.outcome.told(),
                }
                self.journal.add(told, growing)
                self.kept = self.outcome.kept
                parts.remove(self.parts, number)
                text = f"{self.outcome.kept:,} samples, {self.outcome.tokens:,} tokens"
                bar.advance(min(round((done - before) / scale), round(total / scale)) - bar.done, text)
            bar.advance(round(total / scale) - bar.done)  # how far reading is ahead in what is compressed varies
        self.outcome.unused = self._unused()
        if not self.outcome.kept and self.plan.shard == (1, 1):  # a shard may be empty, and the whole is not
            raise InputError(
                "\n".join(["nothing is left of the input", *_left_out(self.outcome), *self.outcome.unused])
            )

    def _unused(self) -> list[str]:
        """The files of rows of which nothing was kept, and why: the keys were looked for in the first row alone."""
        assert self.left_out is not None
        kept: set[int] = set()
        for block in arrange.blocks(path_of(self.writers[ORIGIN].prefix, ".bin.tmp"), self.writers[ORIGIN].dtype):
            kept.update(np.unique(block[::2]).tolist())
        files = [s for i, s in enumerate(self.job.sources) if i not in kept and s.size and s.kind != "text"]
        reasons = {str(source.path): Counter[str]() for source in files}
        if reasons:
            with open(self.left_out.path, encoding="utf-8") as file:
                for row in map(json.loads, file):
                    if row["file"] in reasons:
                        reasons[row["file"]][_kind(row["reason"])] += 1
        told = [
            f"{path}: nothing of it was kept: {_counted(found)}" if found else f"{path}: holds no rows; leave it out"
            for path, found in reasons.items()
            if found or self.plan.shard == (1, 1)  # of another shard otherwise
        ]
        more = len(told) - NAMED
        return [*told[:NAMED], *([f"and nothing of {more:,} more files"] if more > 0 else [])]

    def _results(self, line: Line | None, workers: int) -> Generator[tuple[int, Chunk, Encoded], None, None]:
        """The chunks behind a line of the journal, without their data, and what became of each."""
        first, after = (0, (0, 0)) if line is None else (line["chunk"] + 1, tuple(line["after"]))
        columns = self.job.keys.values()
        chunks = readers.chunks(self.job.sources, columns=columns, after=after, shard=self.plan.shard)
        sent: deque[tuple[int, Chunk]] = deque()  # those whose results have not come back yet
        if workers == 1:
            for encoded in self._resumed(self.job.start()).map(_noted(enumerate(chunks, first), sent)):
                yield *sent.popleft(), encoded
            return
        self.parts.mkdir(exist_ok=True)
        with Pool(parts.PartsJob(self.job, self.parts), workers) as pool:
            for _ in pool.map(_noted(enumerate(chunks, first), sent)):
                number, chunk = sent.popleft()
                encoded = parts.read(self.parts, number)
                if encoded is None:  # a worker has just written it
                    raise InputError(f"{self.parts}: what a worker has left there is gone or damaged; run again")
                yield number, chunk, encoded

    def _resumed(self, work: Stages[Chunk, Encoded]) -> Stages[tuple[int, Chunk], Encoded]:
        """The work on numbered chunks, of which an earlier run may have left results."""
        return Stages(
            read=lambda numbered: parts.read(self.parts, numbered[0]) or work.read(numbered[1]),
            encode=lambda read: read if isinstance(read, Encoded) else work.encode(read),
            beside=work.beside,
        )

    # ----------------------------------------------------------------------------------------------- second pass

    def _arrange(self) -> list[IndexedWriter]:
        staged = {}
        for name, writer in self.writers.items():
            writer.close()
            staged[name] = arrange.Staged(writer.prefix, writer.dtype)
        first = staged[next(iter(self.job.outputs))]
        source_of = np.concatenate([np.empty(0, np.int32), *(block[::2] for block in staged[ORIGIN].blocks())])
        try:
            order = self.plan.order(first.lengths, self.job.sources, source_of)
        except InputError:
            self.kept = 0  # a command that could succeed goes on with nothing of this one
            raise
        filling = self.plan.filling(self.job.tokenizer.padding)
        self.arranged = {
            name: IndexedWriter(path_of(self.output, suffix), dtype) for name, suffix, dtype in self._files()
        }
        with progress(len(order), "arranging", unit="samples") as bar:
            for count in arrange.write(order, staged, self.arranged, filling):
                bar.advance(count)
        lengths = first.lengths[order.samples]
        self.outcome.kept, self.outcome.sequences = len(lengths), len(order)
        sizes = [data.lengths[order.samples] for name, data in staged.items() if name.endswith(("text", "input_ids"))]
        self.outcome.tokens = sum(int(each.sum(dtype=np.int64)) for each in sizes)
        self.outcome.longest = max(int(each.max(initial=0)) for each in sizes)
        self.outcome.learned = sum(
            _learned(block)
            for name, writer in self.arranged.items()
            if name.endswith("labels")
            for block in arrange.Staged(writer.prefix, writer.dtype).blocks()
        )
        return list(self.arranged.values())

    # ------------------------------------------------------------------------------------------------ publishing

    def _described(self, writers: Sequence[IndexedWriter]) -> list[tuple[str, str]]:
        """Write the description; return which names the finished files get, in the order in which they get them."""
        files = {name: mark for writer in writers for name, mark in writer.files.items()}
        assert self.left_out is not None
        self.left_out.sync()
        if self.left_out.size:
            files[self._beside(LEFT_OUT).name] = self.left_out.mark
        temporary = self._beside(".meta.json.tmp")
        with writing(temporary), open(temporary, "w", encoding="utf-8", errors="replace") as file:
            file.write(_sidecar(self.job, self.plan, self.outcome, files).text())
            file.flush()
            os.fsync(file.fileno())
        finals = [self._beside(".meta.json").name, *sorted(files, key=lambda name: name.endswith(".idx"))]
        return [(f"{final}.tmp", final) for final in finals]

    def _publish(self, moves: Sequence[Sequence[str]]) -> None:
        """Give the files their names and remove all that was under way."""
        folder = self.output.parent
        if not any(final.endswith(LEFT_OUT) for _, final in moves):
            self._beside(LEFT_OUT).unlink(missing_ok=True)
        rename([(folder / temporary, folder / final) for temporary, final in moves])
        self._clear()

    def _clear(self) -> None:
        parts.clear(self.parts)
        for _, suffix, _ in self._files():
            for stage in ("", STAGE):
                for kind in (".bin", ".idx", ".lengths", ".documents"):
                    path_of(self.output, f"{suffix}{stage}{kind}.tmp").unlink(missing_ok=True)
        for suffix in (f"{LEFT_OUT}.tmp", ".meta.json.tmp"):
            self._beside(suffix).unlink(missing_ok=True)
        self.journal.remove()


def _files_of(folder: Path) -> list[tuple[str, int, int]]:
    """What tells that a tokenizer has changed although its ids mean the same: merges, rules, chat template."""
    names = ("tokenizer*", "chat_template*", "merges*")
    found = sorted(path for name in names for path in folder.glob(name))
    return [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in found]


def _identity(job: Job, plan: Plan, stamped: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What two runs must have in common for one to go on with what the other has done."""
    sources = [
        (str(s.path.absolute()), s.kind, size, written, s.part)
        for s, (size, written) in zip(job.sources, stamped, strict=True)
    ]
    return {
        "version": __version__,
        "job": type(job).__name__,
        **job.described(),
        "format": job.format.name,
        "keys": dict(job.keys),
        "tokenizer": [job.tokenizer.fingerprint, *_files_of(job.tokenizer.folder)],
        "dtype": job.dtype.name,
        "plan": plan.described(),
        "chunk": readers.CHUNK,
        "sources": hashlib.sha256(json.dumps(sources).encode()).hexdigest(),
    }


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
    from mindspeed_data import recognition  # it knows all templates and formats, and text needs none of them

    hint = recognition.hint(row.record, job.described()["kind"], job.format.name)
    if hint is None and not isinstance(job, TextJob) and "text" in row.record:
        hint = "this looks like text: use mindspeed-data pretrain"
    hint = hint or f'name the right one: --map-keys \'{{"{ours}": "KEY"}}\''
    raise InputError(f"{where}: no key {missing[0]!r}; the row has {has}; {hint}")


def _workers(job: Job, asked: int | None) -> int:
    """As many processes as asked for, else as there are cores and work for; none without a chunk of its own."""
    size = sum(source.size for source in job.sources)
    if asked is not None:
        return max(1, min(asked, -(-size // readers.CHUNK)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if job.at_once:
        cores -= 1  # for the process that writes, or, where that encodes too, for its thread
    return max(1, min(cores, size // (FAST_SHARE if job.fast else SLOW_SHARE)))


def _noted(chunks: Iterator[tuple[int, Chunk]], sent: deque[tuple[int, Chunk]]) -> Iterator[tuple[int, Chunk]]:
    """Pass chunks on, and keep what their results are told with: not the rows."""
    for number, chunk in chunks:
        pieces = tuple(dataclasses.replace(piece, data=None) for piece in chunk.pieces)
        sent.append((number, dataclasses.replace(chunk, pieces=pieces)))
        yield number, chunk


class _Places:
    """Where in its file a row of a chunk stands: chunks count their own lines, here they add up."""

    def __init__(self, sources: Sequence[Source], line: Line | None) -> None:
        self.sources = sources
        self.before = [0] * len(sources)
        if line is not None:
            self.before[line["after"][0]] = line["lines"]

    def tell(self, chunk: Chunk, encoded: Encoded, outcome: Outcome, left_out: GrowingFile) -> NDArray[np.int32]:
        """Name what was left out, and return the number of the source and the line of each sample: [n, 2]."""
        starts = []
        for piece, lines in zip(chunk.pieces, encoded.lines, strict=True):
            starts.append(self.before[piece.source] if piece.line is None else piece.line)
            self.before[piece.source] = starts[-1] + lines
        told = []
        for fault in encoded.faults:
            path = str(self.sources[chunk.pieces[fault.piece].source].path)
            line = fault.line + starts[fault.piece]
            outcome.left_out[_kind(fault.reason)] += 1
            told.append(json.dumps({"file": path, "line": line, "reason": fault.reason}, ensure_ascii=False) + "\n")
            if len(outcome.named) < NAMED:
                outcome.named.append(f"{path}{f':{line}' if line else ''}: {fault.reason}")
        left_out.write("".join(told).encode(errors="replace"))
        pieces = np.array([(piece.source, start) for piece, start in zip(chunk.pieces, starts, strict=True)])
        at = np.asarray(encoded.places, np.int64).reshape(-1, 2)
        source, start = pieces[at[:, 0]].T
        return np.stack((source, start + at[:, 1]), axis=1).astype(np.int32)


def _count(encoded: Encoded, outcome: Outcome) -> None:
    outcome.kept += len(encoded.lengths)
    outcome.tokens += int(encoded.lengths.sum(dtype=np.int64))
    if encoded.documents is not None:
        outcome.sequences += int(encoded.documents.sum(dtype=np.int64))
    of_ids = [lengths for name, lengths in encoded.lengths_of.items() if name.endswith("input_ids")]  # of a pair
    outcome.longest = max(outcome.longest, *(int(each.max(initial=0)) for each in of_ids or [encoded.lengths]))
    outcome.cut += encoded.cut
    outcome.split += encoded.split
    outcome.learned += sum(_learned(array) for name, array in encoded.arrays.items() if name.endswith("labels"))


def _learned(labels: NDArray[Any]) -> int:
    blocks = (labels[start : start + readers.BLOCK] for start in range(0, len(labels), readers.BLOCK))
    return sum(int(np.count_nonzero(block != IGNORED)) for block in blocks)


def _sidecar(job: Job, plan: Plan, outcome: Outcome, files: dict[str, Mark]) -> Sidecar:
    return Sidecar(
        **job.described(),
        tokenizer=str(job.tokenizer.folder.absolute()),  # to be found from any folder
        fingerprint=job.tokenizer.fingerprint,
        vocab_size=job.tokenizer.vocab_size,
        dtype=job.dtype.name,
        kept=outcome.kept,
        sequences=outcome.sequences or outcome.kept,
        cut=outcome.cut,
        split=outcome.split,
        left_out=dict(sorted(outcome.left_out.items())),
        tokens=outcome.tokens,
        learned=outcome.tokens if isinstance(job, TextJob) else outcome.learned,
        longest=outcome.longest,
        inputs=[{"path": str(source.path), "bytes": source.size} for source in job.sources],
        plan=plan.described(),
        files=described(files),
    )


def _report(job: Job, output: Path, plan: Plan, outcome: Outcome, seconds: float, run: _Run) -> None:
    size, read = sum(source.size for source in job.sources) / 1e6, run.read / 1e6
    part = f"{read:,.1f} of " if run.read < sum(source.size for source in job.sources) else ""
    files = f"{len(job.sources)} file{'s' if len(job.sources) > 1 else ''}"
    console.print(
        f"{files}, {part}{size:,.1f} MB: {outcome.kept:,} samples, {outcome.tokens:,} tokens in {seconds:.1f} s "
        f"({read / seconds:,.1f} MB/s{f', {run.workers} workers' if run.workers > 1 else ''})"
    )
    if not isinstance(job, TextJob):
        share = outcome.learned / max(outcome.tokens, 1)
        console.print(f"learned: {outcome.learned:,} tokens ({share:.0%}); longest sample: {outcome.longest:,}")
    for count, what in ((outcome.cut, "cut to"), (outcome.split, "split at")):
        if count:
            console.print(f"{what} the sequence length: {count:,} samples")
    for source in job.sources:
        if source.size == 0:
            console.print(f"{source.path}: empty, nothing read")
    for line in _left_out(outcome):
        console.print(line)
    if sum(outcome.left_out.values()) > NAMED:
        console.print(f"  all of them: {path_of(output, f'{job.beside}{LEFT_OUT}')}")
    for line in outcome.unused:
        console.print(line)
    if plan.pack is not None:
        share = outcome.tokens / max(outcome.sequences * plan.pack, 1)
        console.print(f"packed: {outcome.sequences:,} sequences of {plan.pack:,}, {share:.2%} of them filled")
    names = [path_of(output, suffix).name for suffix in job.outputs.values()]
    beside = path_of(output, f"{job.beside}.meta.json").name
    console.print(f"written to {output.parent}: {', '.join(names)} (.bin and .idx), {beside}")


def _left_out(outcome: Outcome) -> list[str]:
    """The rows that were left out: how many of each reason, and the first ones with their places."""
    told, total = [], sum(outcome.left_out.values())
    if total:
        told += [f"left out {total:,} row{'s' if total > 1 else ''}: {_counted(outcome.left_out)}"]
        told += [f"  {name}" for name in outcome.named]
    if total > NAMED:
        told.append(f"  and {total - NAMED:,} more")
    return told


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def _kind(reason: str) -> str:
    """A reason without its details, which stand behind a colon."""
    return reason.split(":")[0]
