"""Where a rank stands: how far its work is, and the collective that it waits in. Told when a job fails.

While a rank works nothing is noted for it: its stack knows. An object that knows how far the work is has a method
`stands(function)`, which is asked when the object is found on the stack as the `self` of that function. A process group that
knows its own handles has a method `begun(handle)`, which returns the name of the collective; torch's own do not know.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
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

AWAITED = re.compile(r"([\w.]*)\.wait\(")  # a handle, by the name it has in a line

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
    inside = [i for i, (frame, _) in enumerate(stack) if _module(frame) == COLLECTIVES and not _of_handle(frame)]
    if not inside:
        return None
    frame = stack[inside[-1]][0]  # all_gather_object rather than the all_gather within
    outside = (entry for entry in stack[inside[-1] :] if not _module(entry[0]).startswith(("torch.", "contextlib")))
    function = getattr(frame.f_locals.get("op0"), "__name__", frame.f_code.co_name)  # op0: of several sent as one
    group = _named(frame.f_locals.get("group")) or "all ranks"
    return Standing(place=_place(*next(outside, stack[-1])), function=function, group=group)


def _before_handle(stack: Stack) -> Standing | None:
    """A collective that was begun earlier, as the group that began it says.

    Where none says so: the function that waits, and the nearest group on the stack.
    """
    # a handle that is written in Python waits itself, and may hold others
    handles = [i for i, (frame, _) in enumerate(stack) if _of_handle(frame)]
    place = handles[-1] + 1 if handles else 0
    if len(stack) == place:
        return None
    awaited = [_awaited(frame, line) for frame, line in stack[: place + 1]]
    if not awaited[-1]:
        return None
    frame, line = stack[place]
    function, group = _begun(awaited[::-1]) or (frame.f_code.co_name.lstrip("_"), _nearest(stack[place:]))
    return None if group is None else Standing(place=_place(frame, line), function=function, group=group)


def _awaited(frame: FrameType, line: int) -> Any:
    """Return the handle that a function waits for in that line; True where it may be one, None where it is none."""
    found = AWAITED.search(linecache.getline(frame.f_code.co_filename, line))
    if found is None:
        return None
    name, *attributes = found[1].split(".")
    value = reduce(lambda value, attribute: getattr(value, attribute, None), attributes, frame.f_locals.get(name, True))
    return value if value is True or _is_handle(value) else None


def _begun(handles: Sequence[Any]) -> tuple[str, str | None] | None:
    """Ask every group for the first of the handles that it knows: the collective, and the group."""
    world = getattr(sys.modules.get(COLLECTIVES), "_world", None)
    groups = [group for group in list(getattr(world, "pg_map", ())) if hasattr(group, "begun")]
    known = ((group.begun(handle), _named(group)) for handle in handles if _is_handle(handle) for group in groups)
    return next((told for told in known if told[0] is not None), None)


def _nearest(stack: Stack) -> str | None:
    """Return the group that the nearest function has at hand; of several each that it may be."""
    for held in (held for frame, _ in stack for held in _held(frame)):
        names = [_named(value) for value in held if _is_group(value) and value.size() > 1]
        if names:
            return " or ".join(dict.fromkeys(filter(None, names)))
    return None


def _held(frame: FrameType) -> Iterator[list[Any]]:
    """What a function has at hand: its variables; what its object or its autograd context holds; what that holds."""
    yield list(frame.f_locals.values())
    owned = [value for name in ("self", "ctx") for value in _attributes(frame.f_locals.get(name))]
    yield owned
    yield [value for owner in owned for value in _attributes(owner)]


def _attributes(owner: Any) -> list[Any]:
    return list(getattr(owner, "__dict__", {}).values())


def _of_handle(frame: FrameType) -> bool:
    """True in a method of a handle."""
    return _is_handle(frame.f_locals.get("self"))


def _is_handle(value: Any) -> bool:
    """True for the handle of a collective, and of several that were sent as one."""
    collectives = sys.modules.get(COLLECTIVES)
    return collectives is not None and isinstance(value, (collectives.Work, collectives._CoalescingManager))


def _is_group(value: Any) -> bool:
    collectives = sys.modules.get(COLLECTIVES)  # a command that has not loaded torch waits in none
    return collectives is not None and isinstance(value, collectives.ProcessGroup)


def _named(group: Any) -> str | None:
    """Return a group as a person calls it; None for what is no group."""
    if not _is_group(group):
        return None
    if group.group_desc == "default_pg":
        return "all ranks"
    ranks = f"ranks {', '.join(map(str, sys.modules[COLLECTIVES].get_process_group_ranks(group)))}"
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
