"""Runs that are ended anywhere: the next one goes on, and what it writes is what a run in one go writes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data import formats, preprocess, readers
from mindspeed_data.arrange import Mix
from mindspeed_data.journal import GrowingFile, Journal
from mindspeed_data.plan import Plan
from mindspeed_data.sources import find
from mindspeed_data.tokenize import TextJob
from tests.tiny import tiny_tokenizer

# A run with small chunks, as slow as it is told: the place where it is killed is then anywhere.
PROGRAM = """
import sys, time
from pathlib import Path
from mindspeed_data import journal, readers, tokenize
from tests.data import test_resume
readers.CHUNK = test_resume.CHUNK
add = journal.Journal.add
def slow(*arguments):
    add(*arguments)
    time.sleep(float(sys.argv[4]))
journal.Journal.add = slow
def noted(chunk):
    with open(sys.argv[6], "ab", buffering=0) as file:
        file.write(test_resume.told_apart(chunk))
texts, rows = tokenize.TextJob._encoded_texts, tokenize.InstructionJob._encode
tokenize.TextJob._encoded_texts = lambda job, encode, read: noted(read.texts) or texts(job, encode, read)
tokenize.InstructionJob._encode = lambda job, chunk, tokenizer: noted(chunk.pieces[0]) or rows(job, chunk, tokenizer)
test_resume.start(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), seq_length=32 if sys.argv[5] else None)
"""
CHUNK = 4000
CHUNKS = 60  # and more than there are


def told_apart(chunk: Any) -> bytes:
    """A line that no other chunk has."""
    return hashlib.sha256(repr(chunk).encode()).hexdigest().encode() + b"\n"


def start(
    folder: Path,
    output: Path,
    workers: int,
    *,
    seq_length: int | None = None,
    mix: Mix = "concat",
    strict: bool = False,
) -> preprocess.Outcome:
    """Write a data set of the rows in the folder: of text, perhaps with its files mixed, or packed."""
    inputs = [folder / "rows"] if mix == "concat" else sorted((folder / "rows").iterdir())
    common: dict[str, Any] = {
        "sources": find(inputs),
        "tokenizer": Tokenizer.load(folder / "tokenizer"),
        "fast": False,
    }
    if seq_length is None:
        job: Any = TextJob(**common, format=formats.TEXT, keys=formats.TEXT.keys, eod=0)
        return preprocess.run(job, output, workers=workers, strict=strict, plan=Plan(mix=mix))
    from mindspeed_core.templates import TEMPLATES
    from mindspeed_data.conversations import CONVERSATIONS
    from mindspeed_data.tokenize import InstructionJob

    format = CONVERSATIONS["alpaca"]
    keys = format.mapped({"prompt": "text", "response": "answer"})
    job = InstructionJob(
        **common, format=format, keys=keys, template=TEMPLATES["empty"], seq_length=seq_length, longer="cut"
    )
    return preprocess.run(job, output, workers=workers, plan=Plan(pack=seq_length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in files of several kinds, some of them bad, of less than CHUNKS chunks, and a tokenizer."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_tokenizer(folder / "tokenizer")
    (folder / "rows").mkdir()
    draw = random.Random(1)
    words = ["the quick", "brown fox", "jumps é", "over 中文", "lazy\tdog", "🙂"]

    def row() -> dict[str, str]:
        return {"text": " ".join(draw.choices(words, k=draw.randint(1, 60))), "answer": draw.choice(words)}

    lines = [json.dumps(row()) if i % 17 else ("{", '{"text": ""}', "[1]")[i // 17 % 3] for i in range(200)]
    (folder / "rows/a.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "rows/b.json").write_text(json.dumps([row() if i % 13 else {"text": 3} for i in range(60)], indent=1))
    import pyarrow

    with pyarrow.CompressedOutputStream(str(folder / "rows/c.jsonl.gz"), "gzip") as file:
        file.write("".join(json.dumps(row()) + "\n" for _ in range(100)).encode())
    return folder


def written(output: Path) -> dict[str, bytes]:
    """All files of a run; nothing else may be left."""
    return {path.name: path.read_bytes() for path in output.parent.iterdir()}


@pytest.fixture(scope="module")
def straight(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, bytes]]:
    """What runs in one go write: text, and packed."""
    found = {}
    for packed in (False, True):
        output = tmp_path_factory.mktemp("straight") / "x"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readers, "CHUNK", CHUNK)
            start(folder, output, 1, seq_length=32 if packed else None)
        found[packed] = written(output)
    return found


def kill_and_go_on(folder: Path, output: Path, seed: int, *, packed: bool) -> int:
    """Kill runs at random places until one ends by itself; return how many were killed. None loses more than a chunk per worker."""
    draw = random.Random(seed)
    noted = output.parent.with_suffix(".encoded")  # every chunk that a run begins to encode
    seen, begun = 0, {}  # chunk -> the run that was the last to begin it
    crews: list[int] = []  # the workers of each run
    lost: Counter[int] = Counter()  # chunks of a run that a later one began again
    journal = output.parent / ("x_packed.journal.tmp" if packed else "x_text_document.journal.tmp")
    done = -1
    for kills in count():
        workers = draw.choice([1, 2])
        told = [str(workers), "0.02", "packed" if packed else "", noted]
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, folder, output, *told],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        stop = time.monotonic() + 60
        # from before the first chunk until after the last one, whatever the speed of the machine
        wanted = done + draw.randint(3, 20)
        while process.poll() is None and time.monotonic() < stop and _last(journal) < wanted:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        process.kill()
        _, said = process.communicate()
        chunks = noted.read_bytes().splitlines() if noted.exists() else []
        for chunk in chunks[seen:]:
            lost.update([begun[chunk]] if chunk in begun else [])
            begun[chunk] = kills
        seen = len(chunks)
        crews.append(workers)
        assert all(count <= crews[run] for run, count in lost.items()), (lost, crews)
        if process.returncode == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, said
        if not journal.exists() and done >= 0:
            return kills + 1  # killed when all was done
        now = _last(journal)
        assert now >= done  # nothing that was noted is lost
        done = now
    raise AssertionError("it never ended")


def _last(journal: Path) -> int:
    """The number of the last chunk in a journal."""
    try:
        whole = journal.read_bytes().split(b"\n")[1:-1]
    except FileNotFoundError:
        return -1
    chunks = [json.loads(line).get("chunk", CHUNKS) for line in whole]
    assert chunks == sorted(set(chunks))  # each is written once
    return chunks[-1] if chunks else -1


@pytest.mark.parametrize(("seed", "packed"), [(0, False), (1, True)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    folder: Path, straight: dict[bool, dict[str, bytes]], tmp_path: Path, seed: int, packed: bool
) -> None:
    (tmp_path / "new").mkdir()
    kill_and_go_on(folder, tmp_path / "new/x", seed, packed=packed)
    assert written(tmp_path / "new/x") == straight[packed]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_random_kills_leave_the_same_bytes(
    folder: Path, straight: dict[bool, dict[str, bytes]], tmp_path: Path
) -> None:
    kills = seed = 0
    while kills < 50:
        output = tmp_path / f"{seed}/x"
        output.parent.mkdir()
        kills += kill_and_go_on(folder, output, 100 + seed, packed=bool(seed % 2))
        assert written(output) == straight[bool(seed % 2)], seed
        seed += 1


class Counting:
    """How often each chunk was encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chunks: list[bytes] = []
        encode = TextJob._encoded_texts

        def counted(job: TextJob, many: Any, read: Any) -> Any:
            self.chunks.append(told_apart(read.texts))
            return encode(job, many, read)

        monkeypatch.setattr(TextJob, "_encoded_texts", counted)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("after", [0, 1, 7, 10**6])
def test_at_most_one_chunk_is_encoded_again(
    folder: Path,
    straight: dict[bool, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    fast: bool,
) -> None:
    monkeypatch.setattr(readers, "CHUNK", CHUNK)
    monkeypatch.setattr(preprocess, "encoders_agree", lambda *_: fast)
    counting = Counting(monkeypatch)
    add = Journal.add

    class Killed(BaseException):
        pass

    def dies(journal: Journal, line: dict[str, Any], files: Any) -> None:
        # after the files were appended to and before the journal says so: the worst place
        if line.get("chunk") == after or ("moves" in line and after > CHUNKS):
            raise Killed
        add(journal, line, files)

    monkeypatch.setattr(Journal, "add", dies)
    monkeypatch.setattr(preprocess._Run, "end", lambda run: run.journal.close() or 0)  # nobody tidies up after a kill
    with pytest.raises(Killed):
        start(folder, tmp_path / "new/x", 1)
    monkeypatch.setattr(Journal, "add", add)
    start(folder, tmp_path / "new/x", 1)
    assert written(tmp_path / "new/x") == straight[False]
    repeated = [chunk for chunk in set(counting.chunks) if counting.chunks.count(chunk) > 1]
    assert len(repeated) == (after < CHUNKS)
    assert len(set(counting.chunks)) > 10


def test_a_run_killed_while_files_get_their_names_is_finished(
    folder: Path, straight: dict[bool, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK", CHUNK)
    counting = Counting(monkeypatch)
    replace, renamed = os.replace, []

    def dies(source: Any, target: Any) -> None:
        if len(renamed) == 2:
            raise KeyboardInterrupt
        renamed.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        start(folder, tmp_path / "new/x", 1)
    encoded = len(counting.chunks)
    monkeypatch.setattr(os, "replace", replace)
    start(folder, tmp_path / "new/x", 1)
    assert written(tmp_path / "new/x") == straight[False]
    assert len(counting.chunks) == encoded


@pytest.mark.parametrize("packed", [False, True])
def test_any_number_of_workers_writes_the_same_bytes(
    folder: Path,
    straight: dict[bool, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packed: bool,
) -> None:
    monkeypatch.setattr(readers, "CHUNK", CHUNK)
    for workers in (2, 4):
        start(folder, tmp_path / f"{workers}/x", workers, seq_length=32 if packed else None)
        assert written(tmp_path / f"{workers}/x") == straight[packed]


def test_another_job_begins_anew(
    folder: Path, straight: dict[bool, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK", CHUNK)
    (tmp_path / "new").mkdir()
    rows = folder / "rows/a.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder, tmp_path / "new/x", "1", "0.05", "", tmp_path / "encoded"],
        cwd=Path(__file__).parents[2],
    )
    while _last(tmp_path / "new/x_text_document.journal.tmp") < 2:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    before = rows.stat()
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # it may be another file now
    start(folder, tmp_path / "new/x", 1)
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert written(tmp_path / "new/x") == straight[False]


def test_strict_holds_for_what_an_earlier_run_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK", CHUNK)
    add = Journal.add

    def dies(journal: Journal, line: dict[str, Any], files: Any) -> None:
        add(journal, line, files)
        if line.get("chunk") == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", dies)
        with pytest.raises(KeyboardInterrupt, match="after"):
            start(folder, tmp_path / "x", 1)
    with pytest.raises(InputError, match=r"a.jsonl:1: not valid JSON"):
        start(folder, tmp_path / "x", 1, strict=True)
    start(folder, tmp_path / "x", 1)  # without it nothing of what was done is lost


def test_a_run_killed_before_its_first_line_loses_a_chunk_per_worker(
    folder: Path, straight: dict[bool, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK", CHUNK)

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", lambda *_: (_ for _ in ()).throw(Killed))
        patch.setattr(preprocess._Run, "end", lambda run: run.journal.close() or 0)
        with pytest.raises(Killed):
            start(folder, tmp_path / "new/x", 2)
    made = {int(path.stem) for path in (tmp_path / "new").rglob("*.npz")}
    assert 0 in made
    counting = Counting(monkeypatch)
    start(folder, tmp_path / "new/x", 1)
    assert written(tmp_path / "new/x") == straight[False]
    every = list(readers.chunks(find([folder / "rows"]), columns=["text"]))
    assert len(counting.chunks) == len(every) - len(made)


def test_a_command_that_cannot_work_leaves_what_another_began(
    folder: Path, straight: dict[bool, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK", CHUNK)
    counting = Counting(monkeypatch)
    add = Journal.add

    def dies(journal: Journal, line: dict[str, Any], files: Any) -> None:
        add(journal, line, files)
        if line.get("chunk") == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            start(folder, tmp_path / "new/x", 1)
    with monkeypatch.context() as patch:
        patch.setattr(formats, "TEXT", dataclasses.replace(formats.TEXT, keys={"text": "body"}))
        with pytest.raises(InputError, match="no key 'body'"):
            start(folder, tmp_path / "new/x", 1)
    start(folder, tmp_path / "new/x", 1)
    assert written(tmp_path / "new/x") == straight[False]
    assert len(counting.chunks) == len(set(counting.chunks))


def test_two_runs_do_not_write_the_same_data_set(folder: Path, tmp_path: Path) -> None:
    held = Journal(tmp_path / "x_text_document.journal.tmp", {})
    with pytest.raises(InputError, match="another run is writing this data set"):
        start(folder, tmp_path / "x", 1)
    held.close()


def test_what_a_loss_of_power_took_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"

    def opened() -> Journal:
        return Journal(path, {"job": 1})

    journal, file = opened(), GrowingFile(tmp_path / "ids")
    assert journal.resume() is None
    for number in range(5):
        file.write(bytes([number]) * 10)
        journal.add({"chunk": number}, [file])
    journal.close()
    whole = (tmp_path / "ids").read_bytes()
    for damage, last in ((whole, 4), (whole[:-1], 3), (whole[:25] + b"\0" * 25, 1), (b"", None)):
        (tmp_path / "ids").write_bytes(damage)
        kept = path.read_bytes()
        journal = opened()
        line = journal.resume()
        journal.close()
        path.write_bytes(kept)
        assert (line and line["chunk"]) == last
    path.write_bytes(path.read_bytes()[:-5])  # the last line is cut
    (tmp_path / "ids").write_bytes(whole)
    journal = opened()
    assert (journal.resume() or {})["chunk"] == 3
    journal.close()
    journal = Journal(path, {"job": 2})
    assert (journal.other, journal.resume()) == (True, None)
    journal.close()


MEASURED = """
import sys
from pathlib import Path
from mindspeed_data import arrange, preprocess, readers
from tests.data import test_resume
readers.CHUNK = 1 << 20
arrange.BLOCK = 1 << 16
preprocess.encoders_agree = lambda *_: sys.argv[3] != "one by one"
test_resume.start(Path(sys.argv[1]), Path(sys.argv[2]), 1, **test_resume.MEASURED_RUNS[sys.argv[3]])
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])  # ru_maxrss would begin with our own
"""
MEASURED_RUNS: dict[str, dict[str, Any]] = {
    "jsonl": {},
    "one by one": {},
    "json": {},
    "arrow": {},
    "file.arrow": {},
    "pack": {"seq_length": 1024},
    "mix": {"mix": "all_exhausted"},
}


@pytest.mark.parametrize("kind", MEASURED_RUNS)
def test_memory_does_not_grow_with_the_input(folder: Path, tmp_path: Path, kind: str) -> None:
    peaks = []
    for times in (1, 10):
        place = tmp_path / str(times)
        (place / "rows").mkdir(parents=True)
        (place / "tokenizer").symlink_to(folder / "tokenizer")
        _measured_rows(place / "rows", kind, times * 2_500)  # 2 MB: more than a chunk
        run = subprocess.run(
            [sys.executable, "-c", MEASURED, place, place / "x", kind],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert run.returncode == 0, run.stderr
        peaks.append(int(run.stdout))
    assert peaks[1] < 1.1 * peaks[0]


def _measured_rows(folder: Path, kind: str, count: int) -> None:
    record = {"text": "the quick brown fox " * 40, "answer": "jumps"}
    row = json.dumps(record)
    if kind == "json":
        (folder / "x.json").write_text("[" + ",\n".join([row] * count) + "]")
    elif kind.endswith("arrow"):
        import pyarrow

        batch = pyarrow.RecordBatch.from_pylist([record] * count)  # all of them in one
        make = pyarrow.ipc.new_file if kind == "file.arrow" else pyarrow.ipc.new_stream
        with make(str(folder / "x.arrow"), batch.schema) as writer:
            writer.write_batch(batch)
    else:
        for name in "ab":
            (folder / f"{name}.jsonl").write_text(f"{row}\n" * (count // 2))
