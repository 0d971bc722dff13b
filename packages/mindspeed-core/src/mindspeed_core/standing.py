"""Where a rank stands: how far its work is, and the collective that it waits in. Told when a job fails.

Nothing is noted down while a rank works: its stack knows. An object that knows how far the work is has a method
`stands(function)`, which is asked when the object is found on the stack as the `self` of that function.
"""

from __future__ import annotations

import linecache
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

COLLECTIVES = "torch.distributed.distributed_c10d"
AXES = {  # what Megatron calls the groups of a mesh, and what a recipe does
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp x cp",
    "MODEL_PARALLEL_GROUP": "tp x pp",
    "EMBEDDING_GROUP": "the embeddings",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
}

Stack = Sequence[tuple[FrameType, int]]  # frames and their lines, the innermost first


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where one rank stands."""

    place: str  # file:line of the function it is in; of the call where it waits
    function: str  # that function, or the collective
    group: str = ""  # whom it waits for: `tp (ranks 0, 1)`; empty where it waits for nobody
    work: str = ""  # how far it is: `in step 3`; empty where nothing on the stack knows

    @property
    def waits(self) -> bool:
        """True in a collective, or before the handle of one."""
        return bool(self.group)

    def __str__(self) -> str:
        at = f"{self.function} of {self.group} at {self.place}" if self.waits else f"{self.function} ({self.place})"
        return f"in {at}, {self.work}" if self.work else f"in {at}"


def of_process(main: int) -> Standing:
    """Return where the thread `main` stands, as another thread sees it.

    On accelerators a backward pass, and what it waits for, runs in a thread of its own.
    """
    stacks = {thread: list(_outward(frame)) for thread, frame in sys._current_frames().items()}
    del stacks[threading.get_ident()]
    own = _read(stacks.pop(main))
    if own.waits:
        return own
    waiting = (found for found in map(_in_collective, stacks.values()) if found is not None)
    beside = next(waiting, None)
    return own if beside is None else replace(beside, work=own.work)


def of_error(error: BaseException) -> Standing | None:
    """Return where an error came from; None for one that was never raised."""
    stack, trace = [], error.__traceback__
    while trace is not None:
        stack.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return _read(stack[::-1]) if stack else None


def _outward(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _read(stack: Stack) -> Standing:
    frame, line = stack[0]
    here = Standing(place=_place(frame, line), function=frame.f_code.co_name)
    return replace(_in_collective(stack) or _before_handle(stack) or here, work=_work(stack))


def _in_collective(stack: Stack) -> Standing | None:
    inside = [i for i, (frame, _) in enumerate(stack) if _module(frame) == COLLECTIVES]
    if not inside:
        return None
    frame = stack[inside[-1]][0]  # all_gather_object rather than the all_gather within
    outside = (entry for entry in stack[inside[-1] :] if not _module(entry[0]).startswith(("torch.", "contextlib")))
    function = getattr(frame.f_locals.get("op0"), "__name__", frame.f_code.co_name)  # op0: of several sent as one
    group = _named(frame.f_locals.get("group")) or "all ranks"
    return Standing(place=_place(*next(outside, stack[-1])), function=function, group=group)


def _before_handle(stack: Stack) -> Standing | None:
    """A collective that was started earlier: the nearest group on the stack is the one it belongs to."""
    handle = [i for i, (frame, _) in enumerate(stack) if _is_handle(frame.f_locals.get("self"))]
    stack = stack[handle[-1] + 1 :] if handle else stack  # one that is written in Python is on the stack itself
    if not stack:
        return None
    frame, line = stack[0]
    if ".wait(" not in linecache.getline(frame.f_code.co_filename, line):
        return None
    group = next((name for inner, _ in stack for name in map(_named, _held(inner)) if name), None)
    if group is None:
        return None
    return Standing(place=_place(frame, line), function=frame.f_code.co_name.lstrip("_"), group=group)


def _held(frame: FrameType) -> Iterator[Any]:
    """What a function has at hand: its variables, and what its object or its autograd context holds."""
    values = frame.f_locals
    yield from values.values()
    for owner in (values.get("self"), values.get("ctx")):
        yield from getattr(owner, "__dict__", {}).values()


def _is_handle(value: Any) -> bool:
    collectives = sys.modules.get(COLLECTIVES)
    return collectives is not None and isinstance(value, collectives.Work)


def _named(group: Any) -> str | None:
    """Return a group as a person calls it; None for what is no group."""
    collectives = sys.modules.get(COLLECTIVES)  # a command that has not loaded torch waits in none
    if collectives is None or not isinstance(group, collectives.ProcessGroup):
        return None
    if group.group_desc == "default_pg":
        return "all ranks"
    ranks = f"ranks {', '.join(map(str, collectives.get_process_group_ranks(group)))}"
    axis = AXES.get(group.group_desc)
    return ranks if axis is None else f"{axis} ({ranks})"


def _work(stack: Stack) -> str:
    """Ask the outermost object that knows, in the innermost of its functions."""
    functions: dict[int, tuple[Any, str]] = {}
    for frame, _ in stack:
        owner = frame.f_locals.get("self")
        if hasattr(type(owner), "stands"):
            functions.setdefault(id(owner), (owner, frame.f_code.co_name))
    if not functions:
        return ""
    owner, function = list(functions.values())[-1]
    return owner.stands(function)


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def _place(frame: FrameType, line: int) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{line}"
