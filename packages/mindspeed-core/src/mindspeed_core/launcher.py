"""The launcher: starts ranks on this machine, waits for them, and tells one failure.

It executes the command line again, once per rank. Rank 0 owns the terminal; the others are silent, and what they write
to stderr is kept aside until they are the ones that failed. What the ranks leave in the launcher's folder:

    report-R     why rank R failed, and where
    standing-R   where rank R stood when it was ended
    done-R       rank R has done its work
    stderr-R     its stderr
    noticed      rank 0 has heard Ctrl-C
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mindspeed_core.standing import Standing
from mindspeed_core.verdict import Ending, left_behind, verdict

FOLDER = "MINDSPEED_LAUNCH_FOLDER"  # set for the ranks of our launcher
LAUNCHER = "MINDSPEED_LAUNCH_PID"

SETTLE = 0.5  # seconds in which the other ranks may tell their side of a failure
CAUSE = 5.0  # seconds for the rank that caused it, while none but its victims have told
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


@dataclass
class _Rank:
    """A rank as its launcher sees it."""

    rank: int
    process: subprocess.Popen[bytes]
    folder: Path
    stopped: bool = False  # ended by us, so its ending says nothing
    deaf: bool = False  # it had to be killed
    ended: float | None = None
    failure: Ending | None = None

    def look(self) -> None:
        """Note what has become of the process."""
        if self.ended is None and self.process.poll() is not None:
            self.ended = time.monotonic()
        if self.failure is None and not self.stopped:
            self.failure = self._report()
            if self.failure is None and self.ended is not None:
                self.failure = self._silent_death(self.process.returncode)

    def ending(self) -> Ending:
        """How it ended, once all have."""
        if self.failure is not None:
            return self.failure
        kind = "done" if self._file("done").exists() else "deaf" if self.deaf else "stopped"
        return Ending(rank=self.rank, kind=kind, standing=self._standing())

    def _report(self) -> Ending | None:
        file = self._file("report")
        if not file.exists():
            return None
        told = json.loads(file.read_text())
        if told["standing"] is not None:
            told["standing"] = Standing(**told["standing"])
        return Ending(rank=self.rank, **told)

    def _silent_death(self, code: int) -> Ending | None:
        if code == 0 and self._file("done").exists():
            return None
        if code == -signal.SIGINT:
            return Ending(rank=self.rank, kind="interrupted", code=130, text="interrupted\n")
        standing = self._standing()
        if standing is not None:  # it has heard a SIGTERM that is not ours
            code = -signal.SIGTERM
        if -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
            return Ending(rank=self.rank, kind="killed", code=code, standing=standing)
        return Ending(rank=self.rank, kind="dead", code=code, text=self._last_words())

    def _standing(self) -> Standing | None:
        file = self._file("standing")
        return Standing(**json.loads(file.read_text())) if file.exists() else None

    def _last_words(self) -> str:
        file = self._file("stderr")
        if not file.exists():
            return ""  # rank 0 wrote to the terminal
        lines = file.read_text(errors="replace").splitlines()[-TAIL:]
        return "".join(f"rank {self.rank}: {line}\n" for line in lines)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}-{self.rank}"


def launch(world_size: int) -> int:
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
    line = command_line()
    if rank == 0:
        return _Rank(rank, subprocess.Popen(line, env=environment), folder)
    with open(folder / f"stderr-{rank}", "wb") as stderr:
        silent = subprocess.DEVNULL
        return _Rank(rank, subprocess.Popen(line, env=environment, stdin=silent, stdout=silent, stderr=stderr), folder)


def command_line(replaced: Sequence[str] | None = None) -> list[str]:
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

            failed = [rank for rank in ranks if rank.failure is not None]
            if failed:
                _hear_the_others(ranks)
                _stop(ranks)
                return _tell(ranks)
            if all(rank.ended is not None for rank in ranks):
                return 0
            if ranks[0].ended is not None:
                finished = finished or now
                if now - finished > LINGER:
                    _stop(ranks)
                    sys.stderr.write(left_behind([rank.ending() for rank in ranks], LINGER))
                    return 1


def _hear_the_others(ranks: list[_Rank]) -> None:
    """The victims of a failure often tell theirs first: give the rank that caused it the time to tell its own."""
    start = time.monotonic()
    while any(rank.failure is None and rank.ended is None for rank in ranks):
        only_echoes = all(rank.failure.kind == "echo" for rank in ranks if rank.failure is not None)
        if time.monotonic() - start > (CAUSE if only_echoes else SETTLE):
            break
        time.sleep(0.02)
        for rank in ranks:
            rank.look()


def _stop(ranks: list[_Rank]) -> None:
    """End every rank that still runs: SIGTERM, and SIGKILL after a grace period."""
    running = [rank for rank in ranks if rank.process.poll() is None]
    for rank in running:
        rank.stopped = rank.failure is None
        rank.process.terminate()
    end = time.monotonic() + GRACE
    for rank in running:
        try:
            rank.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.deaf = True
            rank.process.kill()
            rank.process.wait()


def _interrupt(ranks: list[_Rank]) -> int:
    _stop(ranks)
    sys.stderr.write("interrupted\n")
    return 130


def _tell(ranks: list[_Rank]) -> int:
    """Write the one failure that matters; its exit code."""
    last = float("inf")
    endings = [rank.ending() for rank in sorted(ranks, key=lambda rank: rank.ended or last)]
    code, text = verdict(endings)
    sys.stderr.write(text)
    sys.stderr.flush()
    return code


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
