"""A machine with NPUs, made of stub libraries and kernels on the host, for this process and those that it starts.

CANN_STUB          the folder of the libraries
CANN_STUB_DEVICES  how many NPUs there are
CANN_STUB_DIR      where the ranks meet
CANN_STUB_TIMEOUT  seconds that a rank waits for another
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

from tests.ascend import cann

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 4


def surroundings(libraries: Path, meeting: Path) -> dict[str, str]:
    """Return the environment in which a Python finds the NPUs."""
    path = [str(ROOT / "tests/ascend/site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "ASCEND_HOME_PATH": str(libraries),
        "ASCEND_OPP_PATH": str(libraries / "opp"),
        "CANN_STUB": str(libraries),
        "CANN_STUB_DEVICES": str(DEVICES),
        "CANN_STUB_DIR": str(meeting),
        "CANN_STUB_TIMEOUT": "60",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "TASK_QUEUE_ENABLE": "0",  # kernels run when they are called, in the thread that calls them
    }


def enter() -> None:
    """Load the libraries now and put the kernels in place as soon as torch_npu is imported."""
    cann.load(Path(os.environ["CANN_STUB"]))
    sys.meta_path.insert(0, _AfterTorchNpu())


class _AfterTorchNpu(importlib.abc.MetaPathFinder):
    """Finds torch_npu, once, and gives it a loader that goes on to put the kernels in place."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch_npu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        from tests.ascend import host

        host.install()
