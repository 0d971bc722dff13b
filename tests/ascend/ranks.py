"""Run a function on N ranks that talk by HCCL, each in a fresh process: torch_npu does not survive a fork."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.harness import ROOT


def run_ranks(module: str, function: str, world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Return the results of `module.function(*args)` by rank; arguments and results are JSON."""
    with tempfile.TemporaryDirectory(prefix="npu-ranks-") as folder:
        processes = []
        for rank in range(world):
            environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            line = [sys.executable, "-m", "tests.ascend.ranks", folder, module, function, json.dumps(args)]
            processes.append(
                subprocess.Popen(line, env=environment, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
            )
        told = []
        try:
            told = [process.communicate(timeout=timeout)[1].decode() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for rank, process in enumerate(processes):
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}\n{told[rank]}"
        return [json.loads((Path(folder) / f"result-{rank}").read_text()) for rank in range(world)]


def main(folder: str, module: str, function: str, arguments: str) -> None:
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    npu: Any = torch.get_device_module("npu")
    npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    (Path(folder) / f"result-{rank}").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
