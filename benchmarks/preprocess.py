"""Text into token ids: our command beside the loop of Megatron's script, beside `datasets.map`, beside the bare tokenizer.

    python benchmarks/preprocess.py --tokenizer DIR                  Python's own library sources, rounds of all sides
    python benchmarks/preprocess.py --tokenizer DIR --input a.jsonl  other text: rows of {"text": ...}
    ... --write NAME                                                 also as a section of benchmarks/results/preprocess.md

Every side is a process of its own and gets the same file. "cold" is the whole process, from its start to files on the disk; "warm"
is the same work once more in that process, for which our command loads its tokenizer again and the peers keep theirs. Beside the
seconds of the clock stand those of the processor, of all processes of a side. The ids of all sides are compared. The
Megatron-style loop is that of its `preprocess_data.py`: a document at a time through the tokenizer of transformers, in one
process or in a pool, into `megatron.core`'s IndexedDatasetBuilder.

The bare tokenizer writes nothing: it encodes texts that lie in memory, or reads the rows of the file by itself; its ids can differ
where a text is not in Unicode's normal form. It and "without its start" are timed once everything is loaded; its cache of words is
empty when they are cold, and full when they are warm.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import page

Ids = Iterable[Any]  # of each document


def ours(tokenizer: Path, corpus: Path, folder: Path, workers: int) -> str:
    """What `mindspeed-data pretrain` does."""
    from mindspeed_core.tokenizer import Tokenizer
    from mindspeed_data import formats, preprocess
    from mindspeed_data.sources import find
    from mindspeed_data.tokenize import TextJob

    job = TextJob(
        sources=find([corpus]),
        tokenizer=Tokenizer.load(tokenizer),
        format=formats.TEXT,
        keys=formats.TEXT.keys,
        fast=False,
        dtype=np.dtype(np.int32),
    )
    preprocess.run(job, folder / "ours", workers=workers, overwrite=True)
    return hashlib.sha256((folder / "ours_text_document.bin").read_bytes()).hexdigest()


@functools.cache
def _job(tokenizer: Path, corpus: Path) -> Any:
    from mindspeed_core.tokenizer import Tokenizer
    from mindspeed_data import formats
    from mindspeed_data.sources import find
    from mindspeed_data.tokenize import TextJob

    job = TextJob(
        sources=find([corpus]),
        tokenizer=Tokenizer.load(tokenizer),
        format=formats.TEXT,
        keys=formats.TEXT.keys,
        fast=True,
    )
    return job, job.start()


def without_start(tokenizer: Path, corpus: Path, folder: Path, workers: int) -> str:
    """Once everything is loaded: rows are read, checked, encoded, hashed and on the disk."""
    from mindspeed_data import readers
    from mindspeed_data.indexed import IndexedWriter

    job, work = _job(tokenizer, corpus)
    writer = IndexedWriter(folder / "loop")
    with timed():
        for encoded in work.map(readers.chunks(job.sources)):
            writer.add(encoded.arrays["text"], encoded.lengths)
        writer.finish()
    hashed = hashlib.sha256((folder / "loop.bin.tmp").read_bytes()).hexdigest()
    writer.discard()
    return hashed


@contextmanager
def timed() -> Iterator[None]:
    """Time a part of a side instead of the whole process."""
    start = time.perf_counter(), time.process_time()
    yield
    told.update(seconds=time.perf_counter() - start[0], processor=time.process_time() - start[1])


def megatron(tokenizer: Path, corpus: Path, folder: Path, workers: int) -> str:
    """The loop of Megatron's script."""
    import multiprocessing

    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = folder / "megatron"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)

    def write(documents: Ids) -> None:
        for ids in documents:
            builder.add_item(torch.IntTensor(ids))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")

    with open(corpus, encoding="utf-8") as lines:
        if workers == 1:
            _Encoder.start(tokenizer)
            write(map(_Encoder.encode, lines))
        else:
            with multiprocessing.Pool(workers, initializer=_Encoder.start, initargs=(tokenizer,)) as pool:
                write(pool.imap(_Encoder.encode, lines, 32))
    return hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest()


@functools.cache
def _transformers(folder: Path) -> Any:
    """The tokenizer of transformers, loaded as cheaply as it can be, and once in a process."""
    from mindspeed_core.tokenizer import _load_hf

    return _load_hf(folder)


class _Encoder:
    """One document at a time, with the tokenizer of transformers."""

    tokenizer: Any = None

    @classmethod
    def start(cls, folder: Path) -> None:
        cls.tokenizer = _transformers(folder)

    @classmethod
    def encode(cls, line: str) -> list[int]:
        return cls.tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)


def datasets_map(tokenizer: Path, corpus: Path, folder: Path, workers: int) -> str:
    """`datasets.map` in batches, into the files of `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    hf = _transformers(tokenizer)
    with tempfile.TemporaryDirectory(dir=folder) as cache:  # a result that lies in its cache would be no work
        rows = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=cache)
        mapped = rows.map(
            lambda batch: {"ids": hf(batch["text"], add_special_tokens=False)["input_ids"]},
            batched=True,
            remove_columns=rows.column_names,
            num_proc=workers if workers > 1 else None,
        )
        hashed = hashlib.sha256()
        for chunk in mapped.data.column("ids").chunks:
            hashed.update(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False), np.int32).tobytes())
    return hashed.hexdigest()


@functools.cache
def _gigatoken(tokenizer: Path) -> Any:
    from gigatoken import Tokenizer as Gigatoken

    from mindspeed_core.tokenizer import Tokenizer

    gigatoken = Gigatoken.from_json(Tokenizer.load(tokenizer).json)
    gigatoken.encode_batch([""], parallel=False)  # it imports the library of its result
    return gigatoken


def bare(tokenizer: Path, corpus: Path, _: Path, workers: int) -> str:
    """gigatoken alone, of texts that lie in memory, on one thread."""
    texts = [json.loads(line)["text"] for line in corpus.read_bytes().splitlines()]
    encode = _gigatoken(tokenizer).encode
    with timed():
        ids = [encode(text) for text in texts]
    return hashlib.sha256(np.concatenate(ids).astype(np.int32).tobytes()).hexdigest()


def bare_file(tokenizer: Path, corpus: Path, _: Path, workers: int) -> str:
    """gigatoken reading the rows of the file by itself, on one thread, into memory: the same input as ours, nothing written."""
    from gigatoken import JsonlFileSource

    gigatoken, source = _gigatoken(tokenizer), JsonlFileSource([corpus])
    with timed():
        ids = gigatoken.encode_files(source, parallel=False)
    return hashlib.sha256(ids.layout.content.data.astype(np.int32).tobytes()).hexdigest()


told: dict[str, float] = {}  # what a side timed itself
KINDS = ("cold", "cold cpu", "warm", "warm cpu")
SIDES: dict[str, tuple[Callable[[Path, Path, Path, int], str], int]] = {
    "mindspeed-data, 1 process": (ours, 1),
    "mindspeed-data, 2 workers": (ours, 2),
    "Megatron-style loop, 1 process": (megatron, 1),
    "Megatron-style loop, pool of 2": (megatron, 2),
    "datasets.map, 1 process": (datasets_map, 1),
    "datasets.map, num_proc=2": (datasets_map, 2),
    "mindspeed-data without its start": (without_start, 1),
    "gigatoken reading the file, 1 thread": (bare_file, 1),
    "gigatoken of texts in memory, 1 thread": (bare, 1),
}


def side(name: str, tokenizer: Path, corpus: Path) -> None:
    """Do the work twice; after each time print the seconds of the processor so far, and the hash of the ids."""
    work, workers = SIDES[name]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            hashed = work(tokenizer, corpus, Path(folder), workers)
            print(json.dumps({"cpu": sum(os.times()[:4]), "ids": hashed, **told}), flush=True)


def measure(name: str, tokenizer: Path, corpus: Path) -> dict[str, Any]:
    """Run a side as a process; the seconds until it had done the work once, and again."""
    command = [sys.executable, __file__, "--side", name, "--tokenizer", str(tokenizer), "--input", str(corpus)]
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    surroundings |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    times = [time.perf_counter()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=surroundings)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        times.append(time.perf_counter())
        lines.append(json.loads(line))
    process.wait()
    first, second = lines
    assert first["ids"] == second["ids"]
    if "seconds" in first:
        seconds = [run[name] for run in (first, second) for name in ("seconds", "processor")]
        return {"ids": first["ids"], **dict(zip(KINDS, seconds, strict=True))}
    return {
        "ids": first["ids"],
        "cold": times[1] - times[0],
        "cold cpu": first["cpu"],
        "warm": times[2] - times[1],
        "warm cpu": second["cpu"] - first["cpu"],
    }


def sources(path: Path, megabytes: int) -> None:
    """Python's library, and what is installed beside it, as rows of text."""
    left = megabytes << 20
    with open(path, "w", encoding="utf-8") as file:
        for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
            for source in sorted(Path(folder).rglob("*.py")):
                text = source.read_text(encoding="utf-8", errors="ignore")
                # pieces of a few kilobytes, the size of a web page
                for start in range(0, len(text), 4000):
                    piece = text[start : start + 4000]
                    if piece.strip() and left > 0:
                        left -= file.write(json.dumps({"text": piece}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--input", type=Path, nargs="*", default=[])
    parser.add_argument("--megabytes", type=int, default=32, help="of library sources")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="*", help="only those whose names begin so")
    parser.add_argument("--write", metavar="NAME")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side(arguments.side, arguments.tokenizer, arguments.input[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        if arguments.input:
            corpus.write_bytes(b"".join(path.read_bytes().rstrip(b"\n") + b"\n" for path in arguments.input))
        else:
            sources(corpus, arguments.megabytes)
        report = compare(arguments, corpus)
    print(report)
    if arguments.write:
        page.write_section("preprocess", "Preprocessing", arguments.write, report)


def compare(arguments: argparse.Namespace, corpus: Path) -> str:
    """Rounds in which every side has its turn, as a table of medians."""
    chosen = [n for n in SIDES if not arguments.sides or n.startswith(tuple(arguments.sides))]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as folder:  # what is compiled at its first import is compiled then
        few = Path(folder) / "few.jsonl"
        few.write_bytes(b"".join(corpus.read_bytes().splitlines(keepends=True)[:100]))
        for name in chosen:
            measure(name, arguments.tokenizer, few)
    for number in range(arguments.rounds):
        for name in chosen if number % 2 == 0 else reversed(chosen):
            runs[name].append(measure(name, arguments.tokenizer, corpus))
            print(f"round {number + 1}: {name}: {runs[name][-1]}", file=sys.stderr)
    # gigatoken alone orders some combining marks in another way; ours leaves what is not normalized to `tokenizers`
    ids = {run["ids"] for name, of in runs.items() for run in of if SIDES[name][0] not in (bare, bare_file)}
    assert len(ids) == 1, "the sides do not give the same ids"
    size, documents = corpus.stat().st_size, corpus.read_bytes().count(b"\n")
    reference = next((n for n in chosen if n.startswith("Megatron") and n.endswith("1 process")), chosen[0])
    names = ", ".join(path.name for path in arguments.input) or "Python's library sources in pieces of 4,000 characters"
    lines = [
        f"{names}: {documents:,} documents, {size / 1e6:,.1f} MB; tokenizer {arguments.tokenizer.name}; "
        f"{page.machine()}; medians of "
        f"{arguments.rounds} rounds in which every side had its turn. All sides gave the same ids (gigatoken alone aside).",
        "",
        f"| side | {' | '.join(f'{kind}: documents/s, MB/s' for kind in KINDS)} | {reference} = 1: {', '.join(KINDS)} |",
        f"|---{'|---' * len(KINDS)}|---|",
    ]
    for name in chosen:
        seconds = [statistics.median(run[kind] for run in runs[name]) for kind in KINDS]
        ratios = _ratios(runs[reference], runs[name])
        rates = " | ".join(f"{documents / s:,.0f}, {size / s / 1e6:,.1f}" for s in seconds)
        lines.append(f"| {name} | {rates} | {', '.join(f'{ratio:,.2f}' for ratio in ratios)} |")
    own = "mindspeed-data without its start"
    for name in chosen if own in chosen else []:
        if SIDES[name][0] in (bare, bare_file):
            ratios = zip(KINDS, _ratios(runs[name], runs[own]), strict=True)
            rates = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in ratios)
            lines += ["", f"Rows of the file to hashed files of ids, {name} = 1: {rates}."]
    return "\n".join(lines)


def _ratios(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[float]:
    """How many times as long as we they took, of each kind: medians over the rounds."""
    return [
        statistics.median(their[kind] / our[kind] for their, our in zip(theirs, ours, strict=True)) for kind in KINDS
    ]


if __name__ == "__main__":
    main()
