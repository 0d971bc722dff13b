"""`mindspeed-train` in which one rank meets an accident, as machines and people make them.

ACCIDENT=what,where,rank,note names it. It happens the second time that the place is passed, and leaves the file `note`.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspeed_core import launch
from mindspeed_core.checkpoint import native
from mindspeed_train import __main__ as program
from mindspeed_train import step, trainer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    ctypes.string_at(0)


def leave() -> None:
    os._exit(0)


def fail() -> None:
    raise ValueError("an accident")


def hang() -> None:
    time.sleep(3600)


def skip() -> step.Loss:
    return step.Loss(1.0, 1, 1)


PLACES = {
    "meet": (launch, "rendezvous"),
    "start": (trainer, "find_model"),  # when the ranks have met
    "loss": (step, "_loss"),  # in the forward pass of the last stage
    "save": (native, "_write"),
    "sum": (step, "_everywhere"),  # a collective, for the loss of all ranks
}
ACCIDENTS = {"kill": kill, "crash": crash, "leave": leave, "fail": fail, "hang": hang, "skip": skip}


def hurt(honest: Callable[..., Any], accident: Callable[[], Any], *, number: int, note: str) -> Callable[..., Any]:
    """Return the function with an accident before its call of that number; one that returns something replaces the call."""
    calls = []

    def function(*given: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            Path(note).touch()
            instead = accident()
            if instead is not None:
                return instead
        return honest(*given, **named)

    return function


def together(honest: Callable[[], Any], note: str) -> Callable[[], Any]:
    """Return `rendezvous` for ranks that are patient for seconds only: on a busy machine they load at different speeds."""

    def rendezvous() -> Any:
        rank, size = launch.world()
        Path(f"{note}-{rank}").touch()
        while not all(Path(f"{note}-{other}").exists() for other in range(size)):
            time.sleep(0.02)
        return honest()

    return rendezvous


if __name__ == "__main__":
    what, where, rank, note = os.environ["ACCIDENT"].split(",")
    if launch.launched() and launch.world()[0] == int(rank):
        module, name = PLACES[where]
        number = 1 if where in ("meet", "start") else 2
        setattr(module, name, hurt(getattr(module, name), ACCIDENTS[what], number=number, note=note))
    launch.rendezvous = together(launch.rendezvous, note)
    program.main()
