"""Ranks: start our own on this machine, or join the ones that torchrun started.

Our launcher executes the command line again, once per rank, and waits. Rank 0 owns the terminal; the others are silent,
and what they write to stderr is kept aside until they are the ones that failed. A rank that fails leaves a report
in the launcher's folder instead of writing it, so that of several ranks one is told. Ranks die with the launcher.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_core.errors import InputError

FOLDER = "MINDSPEED_LAUNCH_FOLDER"  # set for the ranks of our launcher
LAUNCHER = "MINDSPEED_LAUNCH_PID"

SETTLE = 0.5  # seconds in which the other ranks may tell their side of a failure
GRACE = 5.0  # seconds from SIGTERM to SIGKILL
ANSWER = 10.0  # seconds in which rank 0 must notice Ctrl-C; in a collective that never ends it cannot
AGAIN = 2.0  # a second Ctrl-C within these seconds ends everything at once
LINGER = 300.0  # seconds the other ranks may go on after rank 0 has finished well
TAIL = 40  # lines of a dead rank's stderr that are shown

SURROUNDINGS = {
    "OMP_NUM_THREADS": "1",  # the ranks share the cores
    "MKL_NUM_THREADS": "1",
    # Keep freed memory: without it every large tensor is a fresh mmap, 90,000 page faults in a step of a 25M model.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
}


def launched() -> bool:
    """True when this process is a rank, of our launcher or of torchrun."""
    if FOLDER in os.environ:
        return _own_rank()
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def by_us() -> bool:
    """True when this process is a rank of our launcher: the same command line has run in the launcher up to `run_ranks`."""
    return FOLDER in os.environ and _own_rank()


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) when nobody launched us."""
    if not launched():
        return 0, 1
    return _number("RANK"), _number("WORLD_SIZE")


def rendezvous() -> dict[str, Any]:
    """The arguments by which `torch.distributed.init_process_group` finds the other ranks."""
    rank, size = world()
    if not launched():
        from torch.distributed import HashStore

        return {"store": HashStore(), "rank": 0, "world_size": 1}
    if _own_rank():
        return {"init_method": f"file://{os.environ[FOLDER]}/store", "rank": rank, "world_size": size}
    return {"init_method": "env://", "rank": rank, "world_size": size}


def run_ranks(main: Callable[[], None], world_size: int) -> None:
    """Run `main` on `world_size` ranks.

    In a rank: check that the launcher started as many, and run `main`. Else, for one rank: run `main` here; for more:
    execute this command line again as ranks, which arrive here again. What the command does before this call, every
    rank does too. When a rank fails, the failure is told and the process exits with its code.
    """
    bind()
    if launched():
        size = world()[1]
        if size != world_size:
            raise InputError(
                f"the launcher started {size} ranks, but {world_size} are asked for; "
                f"start {world_size} ranks or change the parallel sizes"
            )
        main()
    elif world_size == 1:
        main()
    else:
        code = _launch(world_size)
        if code:
            raise SystemExit(code)


def run_again(arguments: Sequence[str]) -> tuple[int, str]:
    """Run this program with other arguments, as a process that dies with this one.

    Returns its exit code (below 0: the signal that killed it) and what it wrote to stderr; what it writes to stdout is lost.
    """
    with tempfile.TemporaryFile() as stderr:
        done = subprocess.run(
            _command_line(arguments),
            env={**os.environ, LAUNCHER: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            check=False,
        )
        stderr.seek(0)
        return done.returncode, stderr.read().decode(errors="replace")


def bind() -> None:
    """Tie this process to the launcher that started it, if one did: it dies when the launcher dies. Repeatable."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    if not _own_rank():
        if not _alive(int(launcher)):
            os._exit(1)  # an orphan: the launcher died before this line
        return  # a command that a rank started: not a rank itself
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    else:
        threading.Thread(target=_watch, args=(int(launcher),), daemon=True).start()
    if not _own_rank():
        os._exit(1)
    if FOLDER not in os.environ:
        return  # a command of its own, such as `run_again` starts
    # Ctrl-C at a terminal reaches every process. Rank 0 decides what it means; the launcher then ends the others.
    if threading.current_thread() is threading.main_thread():
        rank = _number("RANK")
        if rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupted)


def report(code: int, text: str) -> bool:
    """Hand in why this rank ends. True when it will be told by another process, False when it is ours to write."""
    if not launched():
        return False
    if _own_rank():
        file = Path(os.environ[FOLDER]) / f"report-{_number('RANK')}"
        try:
            aside = file.with_suffix(".new")
            aside.write_text(json.dumps({"code": code, "text": text}))
            aside.rename(file)
        except OSError:  # a full disk must not hide the error
            return False
        return True
    return not _first_of_torchrun()


def _own_rank() -> bool:
    return os.environ.get(LAUNCHER) == str(os.getppid())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


def _interrupted(number: int, frame: Any) -> None:
    with suppress(OSError):
        (Path(os.environ[FOLDER]) / "noticed").touch()
    signal.default_int_handler(number, frame)


def _first_of_torchrun() -> bool:
    """True for the first rank that fails: torchrun gives the ranks of a node a folder in which it leaves a mark."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if own is None:
        return os.environ.get("RANK") == "0"
    try:
        (Path(own).parents[1] / "mindspeed-told").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return os.environ.get("RANK") == "0"
    return True


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise InputError(
            f"the environment variable {name} must be a whole number, not {os.environ.get(name)!r}; "
            "start the ranks with torchrun, or unset RANK and WORLD_SIZE"
        ) from None


# --------------------------------------------------------------------------------------------------- the launcher


@dataclass
class _Rank:
    """A rank as its launcher sees it."""

    rank: int
    process: subprocess.Popen[bytes]
    folder: Path
    stopped: bool = False  # ended by us, so its ending says nothing
    reported: float | None = None  # when its report was first seen while it still ran
    ended: float | None = None
    outcome: tuple[int, str] | None = field(default=None)  # (exit code, what to tell), once known

    def look(self) -> None:
        """Note what has become of the process."""
        if self.ended is None and self.process.poll() is not None:
            self.ended = time.monotonic()
        if self.outcome is None and not self.stopped:
            self.outcome = self._report()
            if self.outcome is not None:
                self.reported = time.monotonic()
            elif self.ended is not None and self.process.returncode != 0:
                self.outcome = self._silent_death(self.process.returncode)

    def _report(self) -> tuple[int, str] | None:
        file = self.folder / f"report-{self.rank}"
        if not file.exists():
            return None
        told = json.loads(file.read_text())
        text = told["text"]
        return told["code"], f"rank {self.rank} failed:\n{text}" if told["code"] == 1 else text

    def _silent_death(self, code: int) -> tuple[int, str]:
        if code == -signal.SIGINT:
            return 130, "interrupted\n"
        if code < 0:
            name = signal.Signals(-code).name
            if -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
                mend = "; somebody ended it or the machine ran out of memory (see the system log)"
                return 2, f"error: rank {self.rank} was killed by {name}{mend}\n"
            return 1, f"{self._stderr()}error: rank {self.rank} was killed by {name}\n"
        return 1, f"{self._stderr()}error: rank {self.rank} ended with exit code {code} and gave no reason\n"

    def _stderr(self) -> str:
        file = self.folder / f"stderr-{self.rank}"
        if not file.exists():
            return ""  # rank 0 wrote to the terminal
        lines = file.read_text(errors="replace").splitlines()[-TAIL:]
        return "".join(f"rank {self.rank}: {line}\n" for line in lines)


def _launch(world_size: int) -> int:
    """Start the ranks, wait for them, tell one failure; the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="mindspeed-ranks-"))
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            ranks.append(_start(rank, world_size, folder))
        return _supervise(ranks)
    finally:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.kill()
            rank.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(rank: int, world_size: int, folder: Path) -> _Rank:
    environment = {**SURROUNDINGS, **os.environ}
    environment.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    environment.update({FOLDER: str(folder), LAUNCHER: str(os.getpid())})
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    line = _command_line()
    if rank == 0:
        return _Rank(rank, subprocess.Popen(line, env=environment), folder)
    with open(folder / f"stderr-{rank}", "wb") as stderr:
        silent = subprocess.DEVNULL
        return _Rank(rank, subprocess.Popen(line, env=environment, stdin=silent, stdout=silent, stderr=stderr), folder)


def _command_line(replaced: Sequence[str] | None = None) -> list[str]:
    """The command that started this process; `sys.argv` counts where a caller has changed it.

    With `replaced`: the same program with these arguments.
    """
    arguments = sys.argv[1:]
    wanted = arguments if replaced is None else list(replaced)
    before = len(sys.orig_argv) - len(arguments)
    if sys.orig_argv[before:] == arguments:
        return [sys.executable, *sys.orig_argv[1:before], *wanted]
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        return [sys.executable, "-m", spec.name.removesuffix(".__main__"), *wanted]
    return [sys.executable, sys.argv[0], *wanted]


def _supervise(ranks: list[_Rank]) -> int:
    """Wait for all ranks; when one fails or the user interrupts, end the rest. The exit code."""
    interrupted: float | None = None  # Ctrl-C that rank 0 has not noticed yet
    previous = float("-inf")
    finished: float | None = None
    noticed = ranks[0].folder / "noticed"
    with _signals() as next_signal:
        while True:
            received, typed = next_signal()
            now = time.monotonic()
            for rank in ranks:
                rank.look()

            if received == signal.SIGTERM:
                _stop(ranks)
                sys.stderr.write("terminated\n")
                sys.stderr.flush()
                return 128 + signal.SIGTERM
            if received == signal.SIGINT:
                if now - previous < AGAIN:
                    return _interrupt(ranks)
                interrupted = previous = now
                noticed.unlink(missing_ok=True)
                if not typed and ranks[0].ended is None:
                    ranks[0].process.send_signal(signal.SIGINT)
            if noticed.exists():
                interrupted = None
            if interrupted is not None and now - interrupted > ANSWER:
                return _interrupt(ranks)

            failed = [rank for rank in ranks if rank.outcome is not None]
            if failed:
                _hear_the_others(ranks)
                _stop(ranks)
                return _tell(ranks)
            if all(rank.ended is not None for rank in ranks):
                return 0
            if ranks[0].ended is not None:
                finished = finished or now
                if now - finished > LINGER:
                    late = [rank.rank for rank in ranks if rank.ended is None]
                    _stop(ranks)
                    sys.stderr.write(f"error: rank 0 is done but ranks {late} went on for {LINGER:.0f} s; stopped\n")
                    return 1


def _hear_the_others(ranks: list[_Rank]) -> None:
    """The victims of a failure often tell theirs first: give the rank that caused it the time to tell its own."""
    end = time.monotonic() + SETTLE
    while time.monotonic() < end and any(rank.outcome is None and rank.ended is None for rank in ranks):
        time.sleep(0.02)
        for rank in ranks:
            rank.look()


def _stop(ranks: list[_Rank]) -> None:
    """End every rank that still runs: SIGTERM, and SIGKILL after a grace period."""
    running = [rank for rank in ranks if rank.process.poll() is None]
    for rank in running:
        rank.stopped = rank.outcome is None
        rank.process.terminate()
    end = time.monotonic() + GRACE
    for rank in running:
        try:
            rank.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()


def _interrupt(ranks: list[_Rank]) -> int:
    _stop(ranks)
    sys.stderr.write("interrupted\n")
    return 130


def _tell(ranks: list[_Rank]) -> int:
    """Write the one failure that matters; its exit code."""
    outcomes = [(rank.ended or float("inf"), *rank.outcome) for rank in ranks if rank.outcome is not None]
    _, code, text = min(outcomes, key=lambda outcome: (_weight(outcome[1], outcome[2]), outcome[0]))
    sys.stderr.write(text)
    sys.stderr.flush()
    return code


def _weight(code: int, text: str) -> int:
    """Smaller is nearer to the cause: Ctrl-C, a killed rank, bad input, our fault, the echo of a peer's death."""
    if code == 130:
        return 0
    if "was killed by" in text:
        return 1
    if code == 2:
        return 2
    return 4 if any(sign in text for sign in ("by peer", "Broken pipe", "Connection refused")) else 3


@contextmanager
def _signals() -> Iterator[Callable[[], tuple[int | None, bool]]]:
    """A function that waits a moment for SIGINT or SIGTERM: (signal or None, typed at the terminal).

    Ctrl-C at a terminal reaches rank 0 by itself; a SIGINT sent to the launcher alone has to be passed on. The kernel
    tells the two apart.
    """
    if not hasattr(signal, "sigtimedwait"):  # not on macOS: KeyboardInterrupt ends the launcher, and the ranks with it
        yield lambda: (time.sleep(0.1), (None, False))[1]
        return
    watched = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}

    def next_signal() -> tuple[int | None, bool]:
        info = signal.sigtimedwait(watched, 0.2)
        if info is None or info.si_signo == signal.SIGCHLD:
            return None, False
        return info.si_signo, info.si_code > 0  # SI_KERNEL; SI_USER and the like are not above zero

    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        yield next_signal
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
