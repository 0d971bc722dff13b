"""Numbers for TensorBoard, in its event files.

`SummaryWriter` writes from a thread of its own: on a full disk that thread dies with a traceback, and the run hears of it
later or never. Here a step's numbers are in the file, or the error is told, when `write` returns.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore  # made at run time by protobuf
from tensorboard.compat.proto.summary_pb2 import Summary  # pyrefly: ignore
from tensorboard.summary.writer.record_writer import RecordWriter

from mindspeed_core.errors import writing


class Board:
    """One event file in `folder`; what earlier files hold from step `first` on is hidden."""

    def __init__(self, folder: Path, *, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(self._path, "ab")  # noqa: SIM115 (open as long as the run)
        self._records = RecordWriter(self._file)
        self._event(file_version="brain.Event:2")
        self._event(step=first, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._event(step=step, summary=Summary(value=values))

    def close(self) -> None:
        """End the file."""
        with writing(self._path):  # what a full disk has not taken yet
            self._file.close()

    def _event(self, **fields: Any) -> None:
        with writing(self._path):
            self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
            self._file.flush()
