"""Processes in which torch_npu's own kernels run on operators that only write down their names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from tests.harness import ROOT


def traced(module: str, libraries: Path) -> Any:
    """Return what a module prints as JSON when it is run with the folder of the stub libraries."""
    environment = {name: value for name, value in os.environ.items() if name != "CANN_STUB"}
    line = [sys.executable, "-m", module, str(libraries)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@cache
def golden(file: str) -> dict[str, tuple[list[str], list[str]]]:
    """Return name -> (forward, backward) of a file of lines `name: A B / C`."""
    found = {}
    for line in (Path(__file__).parent / file).read_text().splitlines():
        name, _, names = line.partition(": ")
        forward, _, backward = names.partition(" /")
        found[name] = (forward.split(), backward.split())
    return found


def written(came: dict[str, Any]) -> str:
    """Return the line that `golden` reads: what to put into the file when a change is meant."""
    return f"{' '.join(came['forward'])} / {' '.join(came.get('backward', []))}".rstrip()
