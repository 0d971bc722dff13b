"""The device a run computes on: npu, cuda or cpu behind one object.

The only file that imports torch_npu, and with `kernels/` and `megatron.py` the only place that tells devices apart.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from mindspeed_core.errors import InputError
from mindspeed_core.parallel.gloo import SHARED_GLOO

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": SHARED_GLOO}


@dataclass(frozen=True)
class Device:
    """One device of this process: its type, its index on the node, and what torch calls it."""

    type: str  # npu | cuda | cpu
    index: int = 0

    @staticmethod
    def find(name: str = "auto") -> Device:
        """Return the device called `name`, of which nothing is taken yet.

        `auto` takes an accelerator when torch sees one and the CPU otherwise. Any other name is taken at its word:
        asking for an NPU that is not there is an error, never a CPU run. The index is the launcher's LOCAL_RANK.
        """
        if name == "auto":
            name = _present()
        if name not in BACKENDS:
            raise InputError(f"device={name}: no such device; use auto, {', '.join(BACKENDS)}")
        if name == "npu":
            _load_npu()
        module = _module(name)
        if name != "cpu" and (module is None or not module.is_available()):
            raise InputError(
                f"device={name}: torch {torch.__version__} sees no {name} on this machine; run `mindspeed-core doctor`, "
                "or use device=cpu"
            )
        return Device(name, 0 if name == "cpu" else int(os.environ.get("LOCAL_RANK", "0")))

    @staticmethod
    def open(name: str = "auto", *, deterministic: bool = False) -> Device:
        """Find the device called `name` and make it this process's current one, which takes memory of an accelerator."""
        device = Device.find(name)
        if device.module is not None:
            device.module.set_device(device.index)
        if deterministic:
            # cuBLAS and HCCL read these once, at their first call
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            os.environ.setdefault("HCCL_DETERMINISTIC", "true")
            torch.use_deterministic_algorithms(True)
        return device

    @property
    def torch(self) -> torch.device:
        """The device as torch writes it, such as `npu:3` or `cpu`."""
        return torch.device(self.type) if self.type == "cpu" else torch.device(self.type, self.index)

    @property
    def backend(self) -> str:
        """The collective backend: hccl, nccl, or gloo with shared memory."""
        return BACKENDS[self.type]

    @property
    def module(self) -> ModuleType | None:
        """torch.npu or torch.cuda; None on the CPU, which has no streams, events or memory counters."""
        return _module(self.type)

    @property
    def profiler(self) -> ModuleType:
        """torch_npu.profiler, or torch.profiler, which it is modelled on."""
        return importlib.import_module("torch_npu.profiler") if self.type == "npu" else torch.profiler

    def seed(self, seed: int) -> None:
        """Seed python, numpy and torch on the host and on the device."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def synchronize(self) -> None:
        """Wait until the device has done all that was queued."""
        if self.module is not None:
            self.module.synchronize()

    def free_memory(self) -> int:
        """Return the bytes that are free on the device; on the CPU what the machine can give without swapping."""
        if self.module is not None:
            return self.module.mem_get_info()[0]
        import psutil

        return psutil.virtual_memory().available

    def count(self) -> int:
        """Return how many such devices this machine has; on the CPU ranks are not bound to devices, so 1."""
        return 1 if self.module is None else self.module.device_count()


def _present() -> str:
    if importlib.util.find_spec("torch_npu") is not None:
        _load_npu()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None and accelerator.type in BACKENDS else "cpu"


def _load_npu() -> None:
    try:
        importlib.import_module("torch_npu")
    except ModuleNotFoundError as error:
        raise InputError("device=npu: torch_npu is not installed; pip install 'mindspeed-core[npu]'") from error
    except (ImportError, OSError) as error:  # CANN's libraries are missing or of another version
        raise InputError(f"device=npu: torch_npu does not load ({error}); source CANN's set_env.sh first") from error


def _module(name: str) -> ModuleType | None:
    return None if name == "cpu" else getattr(torch, name, None)
