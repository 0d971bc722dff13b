"""Run a function on N gloo ranks, or a command of ours as a process, with a deadline and a readable failure.

Ranks are fresh processes forked from one server that has torch and Megatron loaded, so a call costs tenths of a second.
They meet in a file store in a private folder: no port is chosen and parallel runs cannot collide.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SETTLE = 0.5  # seconds to hear the other ranks after the first failure: the peers of a dead rank fail too
JOIN = 10.0  # seconds a rank may take to end once it has answered


class RankError(AssertionError):
    """A rank failed. The message holds its traceback; `error` is its exception where that could be sent."""

    def __init__(self, rank: int, text: str, error: BaseException | None = None) -> None:
        super().__init__(f"rank {rank} failed: {text}")
        self.rank = rank
        self.error = error


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60) -> list[Any]:
    """The results of `fn(*args)` on `world` ranks, by rank. `fn` lives in an importable test module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "tests.preload"])  # no effect once the server runs
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    processes, pipes = [], []
    try:
        with _importable_tests():
            for rank in range(world):
                receive, send = context.Pipe(duplex=False)
                job = pickle.dumps((fn, args, dict(os.environ), os.getcwd()))
                process = context.Process(
                    target=_rank, args=(rank, world, str(folder), timeout, job, send), daemon=True
                )
                process.start()
                send.close()
                processes.append(process)
                pipes.append(receive)
        results = _collect(processes, pipes, timeout, folder)
        for process in processes:
            process.join(JOIN)
        return results
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()
        shutil.rmtree(folder, ignore_errors=True)


def run_command(
    command: str, *args: object, timeout: float = 120, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`mindspeed-X args` in a process of its own; the caller looks at returncode, stdout and stderr."""
    line = [sys.executable, "-m", command.replace("-", "_"), *map(str, args)]
    full = {**os.environ, **(env or {})}
    return subprocess.run(
        line, capture_output=True, text=True, timeout=timeout, env=full, cwd=cwd, stdin=subprocess.DEVNULL, check=False
    )


@contextmanager
def _importable_tests() -> Iterator[None]:
    """The fork server starts with the checkout on its path: it imports `tests.preload`."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _rank(rank: int, world: int, folder: str, timeout: float, job: bytes, send: Connection) -> None:
    """One rank: join the group, run the job, send (ok, value or traceback)."""
    try:
        stacks = open(f"{folder}/stacks-{rank}", "w")  # noqa: SIM115 (stays open for the handler)
        faulthandler.register(signal.SIGUSR1, file=stacks)
        fn, args, environment, cwd = pickle.loads(job)
        os.environ.update(environment)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
        if sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.chdir(cwd)
        import torch
        import torch.distributed

        from mindspeed_core.device import BACKENDS

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            BACKENDS["cpu"],
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        answer = pickle.dumps((True, fn(*args), None))
    except BaseException as error:  # SystemExit and pytest's outcomes too: whatever it was, the test must hear of it
        send.send_bytes(pickle.dumps((False, traceback.format_exc(), _sendable(error))))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # destructors would wait for the peers
    send.send_bytes(answer)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while a peer still reads from it
        torch.distributed.destroy_process_group()


def _sendable(error: BaseException) -> BaseException | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return None


def _collect(processes: list[BaseProcess], pipes: list[Connection], timeout: float, folder: Path) -> list[Any]:
    """All results by rank, or the failure that came first; never longer than `timeout`."""
    results: dict[int, Any] = {}
    failures: list[RankError] = []
    end = time.monotonic() + timeout
    pending = set(range(len(pipes)))
    while pending:
        ready = wait([pipes[r] for r in pending], timeout=max(0.0, end - time.monotonic()))
        if not ready:
            break
        for rank in sorted(r for r in pending if pipes[r] in ready):
            pending.discard(rank)
            try:
                ok, value, error = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                processes[rank].join(JOIN)
                failures.append(RankError(rank, f"its process ended with {_ending(processes[rank].exitcode)}"))
                continue
            if ok:
                results[rank] = value
            else:
                failures.append(RankError(rank, "\n" + value, error))
        if failures:
            end = min(end, time.monotonic() + SETTLE)
    if failures:
        raise min(failures, key=_echo)
    if pending:
        raise TimeoutError(
            f"ranks {sorted(pending)} did not answer within {timeout} s\n{_stacks(processes, pending, folder)}"
        )
    return [results[rank] for rank in range(len(pipes))]


def _echo(failure: RankError) -> bool:
    """True for a failure that only echoes a peer's death; the real one is told instead."""
    return any(
        sign in str(failure) for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    )


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def _stacks(processes: list[BaseProcess], silent: set[int], folder: Path) -> str:
    """Where each silent rank stands."""
    for rank in silent:
        pid = processes[rank].pid
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    files = ((rank, folder / f"stacks-{rank}") for rank in sorted(silent))
    return "\n".join(f"rank {rank} stands at\n{file.read_text()}" for rank, file in files if file.exists())
