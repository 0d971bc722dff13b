"""Ranks: start our own on this machine, or join the ones that torchrun started.

Of several ranks that fail one is told. A rank of our launcher leaves its report in the launcher's folder instead of
writing it; under torchrun the first of a node speaks. A rank that is ended because of another one says where it stood.
Ranks die with the launcher.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mindspeed_core import launcher, standing
from mindspeed_core.errors import InputError
from mindspeed_core.launcher import FOLDER, LAUNCHER, SETTLE
from mindspeed_core.verdict import Ending, Kind, kind_of, verdict


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
        if by_us():
            _left("done").touch()
    elif world_size == 1:
        main()
    else:
        code = launcher.launch(world_size)
        if code:
            raise SystemExit(code)


def run_again(arguments: Sequence[str]) -> tuple[int, str]:
    """Run this program with other arguments, as a process that dies with this one.

    Returns its exit code (below 0: the signal that killed it) and what it wrote to stderr; what it writes to stdout is lost.
    """
    with tempfile.TemporaryFile() as stderr:
        done = subprocess.run(
            launcher.command_line(arguments),
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
    parent = os.environ.get(LAUNCHER)
    if parent is None:
        return
    if not _own_rank():
        if not _alive(int(parent)):
            os._exit(1)  # an orphan: the launcher died before this line
        return  # a command that a rank started: not a rank itself
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    else:
        threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()
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


def listen() -> None:
    """Let this rank say where it stands before SIGTERM ends it, as it does when another rank has failed.

    In a collective the main thread is inside C++ and runs no handler, but the signal reaches a pipe, and a thread reads it.
    """
    if not launched() or threading.current_thread() is not threading.main_thread():
        return
    faulthandler.enable()  # a rank that crashes shows in which function
    hears, tells = os.pipe()
    os.set_blocking(tells, False)
    signal.signal(signal.SIGTERM, _heard)
    signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_as_before)
    threading.Thread(target=_answer, args=(hears, threading.get_ident()), daemon=True).start()


def report(code: int, text: str, error: BaseException | None = None) -> str:
    """Hand in why this rank ends; return what is left for this process to write."""
    if not launched():
        return text
    stood = None if error is None else standing.of_error(error)
    kind: Kind = "interrupted" if code == 130 else kind_of(error, stood) if code == 1 else "input"
    ending = Ending(rank=_number("RANK"), kind=kind, code=code, text=text, standing=stood)
    if not by_us():
        return verdict([ending])[1] if _first_of_torchrun() else ""
    told = {**vars(ending), "standing": stood and asdict(stood)}
    del told["rank"]
    try:
        _leave("report", told)
    except OSError:  # a full disk must not hide the error
        return text
    return ""


def _heard(number: int, frame: Any) -> None:
    """Nothing: the thread that reads the pipe does it all."""


def _as_before() -> None:
    """A forked process would write into the pipe of its parent."""
    if signal.getsignal(signal.SIGTERM) is _heard:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _answer(hears: int, main: int) -> None:
    """Wait for SIGTERM, say where the thread `main` stands, and end the process."""
    while signal.SIGTERM not in os.read(hears, 64):
        pass
    stood = standing.of_process(main)
    if not stood.waits:
        time.sleep(SETTLE)  # a failure of its own may be on its way to be told
    with suppress(OSError):
        if by_us():
            _leave("standing", asdict(stood))
        elif _first_of_torchrun() or not stood.waits:  # one of those that waited speaks for all
            verb = "waited" if stood.waits else "stood"
            sys.stderr.write(f"error: rank {_number('RANK')} was ended by SIGTERM; it {verb} {stood}\n")
            sys.stderr.flush()
    os._exit(128 + signal.SIGTERM)


def _left(name: str) -> Path:
    """What this rank leaves for its launcher to read."""
    return Path(os.environ[FOLDER]) / f"{name}-{_number('RANK')}"


def _leave(name: str, values: dict[str, Any]) -> None:
    aside = _left(f"new-{name}")
    aside.write_text(json.dumps(values))
    aside.rename(_left(name))


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
