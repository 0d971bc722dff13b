"""`mindspeed-data` run within the test's process: its start would take longer than its work."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from mindspeed_core.conversation import IGNORED
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data import sidecar
from mindspeed_data.__main__ import main
from mindspeed_data.indexed import IndexedDataset


@dataclass
class Run:
    returncode: int
    stdout: str
    stderr: str


def data(*arguments: object) -> Run:
    """Run the command."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["mindspeed-data", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return Run(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def written(prefix: Path, tokenizer: Tokenizer, which: str = "") -> list[str]:
    """The samples of a data set as text, with [[what is learned]]; (a=b): b is learned in the place of a."""
    files = {name: IndexedDataset(path) for name, path in sidecar.files_of(prefix).items()}
    ids, labels = files[f"{which}input_ids"], files[f"{which}labels"]
    return [marked(tokenizer, ids[i].tolist(), labels[i].tolist()) for i in range(len(ids))]


def marked(tokenizer: Tokenizer, ids: list[int], labels: list[int]) -> str:
    """One sample in that notation."""
    text, start = "", 0
    kinds = [
        0 if label == IGNORED else 1 if label == id else 2 + i
        for i, (id, label) in enumerate(zip(ids, labels, strict=False))
    ]
    for i in range(1, len(ids) + 1):
        if i == len(ids) or kinds[i] != kinds[start]:
            part = tokenizer.decode(ids[start:i], skip_special=False)
            label = tokenizer.decode([labels[start]], skip_special=False) if kinds[start] > 1 else ""
            text += part if not kinds[start] else f"[[{part}]]" if kinds[start] == 1 else f"({part}={label})"
            start = i
    return text
