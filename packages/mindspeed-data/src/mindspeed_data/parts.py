"""Chunks that workers have finished, as files, until it is their turn: nothing finished is lost with a killed run.

A part carries its name when it is whole, and a checksum: one that a loss of power has cut is made again.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindspeed_core.errors import writing
from mindspeed_data.readers import Chunk, Fault
from mindspeed_data.tokenize import Encoded, Job

Numbered = tuple[int, Chunk]


@dataclass(frozen=True)
class PartsJob:
    """A job whose workers leave their results in a folder and send nothing back."""

    job: Job
    folder: Path

    def start(self) -> Callable[[Numbered], None]:
        work = self.job.start()

        def make(item: Numbered) -> None:
            number, chunk = item
            if read(self.folder, number) is None:
                _write(self.folder, number, work(chunk))

        return make


def read(folder: Path, number: int) -> Encoded | None:
    """Return a part; None for one that is missing or damaged."""
    try:
        with np.load(_path(folder, number), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        told = json.loads(arrays.pop("told").tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    of_files = {name.removeprefix("lengths of "): arrays.pop(name) for name in list(arrays) if " of " in name}
    return Encoded(
        lengths=arrays.pop("lengths"),
        places=arrays.pop("places"),
        lengths_of=of_files,
        documents=arrays.pop("documents", None),
        arrays=arrays,
        faults=[Fault(*fault) for fault in told["faults"]],
        lines=told["lines"],
        cut=told["cut"],
        split=told["split"],
    )


def remove(folder: Path, number: int) -> None:
    """Remove a part that has been written to the files of the run, where it is one."""
    _path(folder, number).unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove all parts."""
    shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, number: int, encoded: Encoded) -> None:
    told = {"faults": encoded.faults, "lines": encoded.lines, "cut": encoded.cut, "split": encoded.split}
    path = _path(folder, number)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # a worker may outlive its killed run by this chunk
    with writing(path), open(temporary, "wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            lengths=encoded.lengths,
            places=np.array(encoded.places, np.int64).reshape(-1, 2),
            told=np.frombuffer(json.dumps(told).encode(), np.uint8),
            **({} if encoded.documents is None else {"documents": encoded.documents}),
            **{f"lengths of {name}": lengths for name, lengths in encoded.lengths_of.items()},
            **encoded.arrays,
        )
    temporary.rename(path)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number}.npz"
