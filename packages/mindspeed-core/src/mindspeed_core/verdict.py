"""What is told of a job that failed: from how every rank ended and where it stood, one message and the exit code."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mindspeed_core.standing import Standing

Kind = Literal["interrupted", "killed", "input", "fault", "dead", "overdue", "echo", "stopped", "deaf", "done"]

# Nearest to the cause first: of several ranks that failed, one is told. The rest of the kinds are no failures.
CAUSES: tuple[Kind, ...] = ("interrupted", "killed", "input", "fault", "dead", "overdue", "echo")
ABSENT: tuple[Kind, ...] = ("stopped", "deaf", "done")

# What torch, gloo, nccl and hccl say, in their own cases, of a peer that does not come, and of one that is gone.
SIGNS: dict[Kind, tuple[str, ...]] = {
    "overdue": ("timed out", "timeout"),
    "echo": ("by peer", "broken pipe", "connection refused", "failed to recv", "remote process exited"),
}


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one rank ended, as far as is known.

    killed     by a signal from outside
    input      it said all that there is to say; interrupted likewise
    fault      an error of its own
    dead       it crashed, or left without a word
    overdue    it waited for its peers too long
    echo       a peer was gone
    stopped    it still worked, and was ended because of another one
    deaf       as stopped, but it did not say where it stood
    done       it had done its work
    """

    rank: int
    kind: Kind
    code: int = 0  # what it ended with; below 0 a signal
    text: str = ""  # what it had to say
    standing: Standing | None = None

    @property
    def waits(self) -> bool:
        """True where it waited for its peers."""
        return self.standing is not None and self.standing.waits

    @property
    def name(self) -> str:
        """The rank as a sentence begins with it."""
        return f"rank {self.rank}"


def kind_of(error: BaseException | None, standing: Standing | None) -> Kind:
    """Return whether an error that came from there is the rank's own, or speaks of its peers."""
    if not isinstance(error, RuntimeError):  # as all of torch.distributed are
        return "fault"
    text = str(error).lower()
    found = next((kind for kind, signs in SIGNS.items() if any(sign in text for sign in signs)), None)
    if found is None or (found == "overdue" and not (standing and standing.waits)):
        return "fault"
    return found


def verdict(endings: Sequence[Ending]) -> tuple[int, str]:
    """Return the exit code and the message; `endings` are in the order in which they came."""
    cause = min((e for e in endings if e.kind in CAUSES), key=lambda e: CAUSES.index(e.kind))
    return TELL[cause.kind](cause, [e for e in endings if e is not cause])


def left_behind(endings: Sequence[Ending], seconds: float) -> str:
    """Return the message about ranks that went on long after rank 0 had done its work."""
    return f"error: rank 0 has been done for {seconds:.0f} s{_waited(endings)}{_stood(endings, 'stopped', 'deaf')}\n"


def _as_told(cause: Ending, others: Sequence[Ending]) -> tuple[int, str]:
    return cause.code, cause.text


def _killed(cause: Ending, others: Sequence[Ending]) -> tuple[int, str]:
    mend = "; somebody ended it or the machine ran out of memory (see the system log)"
    return 2, f"error: {cause.name} was killed by {_signal(cause)}{_work(cause)}{mend}{_waited(others)}\n"


def _fault(cause: Ending, others: Sequence[Ending]) -> tuple[int, str]:
    return 1, f"{cause.name} failed{_work(cause)}{_waited(others)}:\n{cause.text}"


def _dead(cause: Ending, others: Sequence[Ending]) -> tuple[int, str]:
    if cause.code < 0:
        # perhaps its library gave up waiting, as nccl and hccl do: then it matters who did not come
        return 1, f"{cause.text}error: {cause.name} was killed by {_signal(cause)}{_waited(others)}{_stood(others)}\n"
    early = "" if cause.code else " before its work was done"
    told = f"{cause.name} ended with exit code {cause.code}{early} and gave no reason"
    return 1, f"{cause.text}error: {told}{_waited(others)}\n"


def _overdue(cause: Ending, others: Sequence[Ending]) -> tuple[int, str]:
    absent = [e for e in others if e.kind in ABSENT and not e.waits]
    seconds = _seconds(cause.text)
    waited = f"{cause.name} waited{seconds} {cause.standing}{_waited(others)}"
    if absent:
        (first, *rest) = absent
        came = f"{first.name} did not come: it {_where(first)}{_stood(rest)}; {waited}"
        return 2, f"error: {came}. Find out what holds it, or allow more time (train.timeout of a recipe)\n"
    if not others:  # under another launcher a rank knows of itself alone
        return 1, f"error: {waited}, and not every rank came\n"
    return 1, f"error: the ranks are out of step: {waited}\n{cause.text}"


def _echo(cause: Ending, others: Sequence[Ending]) -> tuple[int, str]:
    lost = f"{cause.name} lost the connection to another rank {cause.standing}"
    return 1, f"error: {lost}{_waited(others)}{_stood(others, 'done')}\n"


TELL: dict[Kind, Callable[[Ending, Sequence[Ending]], tuple[int, str]]] = {
    "interrupted": _as_told,
    "killed": _killed,
    "input": _as_told,
    "fault": _fault,
    "dead": _dead,
    "overdue": _overdue,
    "echo": _echo,
}


def _waited(endings: Iterable[Ending]) -> str:
    """Name those that waited, all that wait in one place together."""
    places: dict[str, list[int]] = {}
    for ending in endings:
        if ending.waits:
            places.setdefault(str(ending.standing), []).append(ending.rank)
    return "".join(f"; {_ranks(ranks)} waited {place}" for place, ranks in sorted(places.items(), key=lambda p: p[1]))


def _stood(endings: Iterable[Ending], *kinds: Kind) -> str:
    """Say of each of those kinds what it did instead."""
    return "".join(f"; {e.name} {_where(e)}" for e in endings if e.kind in (kinds or ABSENT) and not e.waits)


def _where(ending: Ending) -> str:
    """Say of a rank that did not wait what it did."""
    if ending.kind == "done":
        return "had done its work and left"
    if ending.kind == "deaf":
        return "did not say where it stands (halted, or in code that never lets Python run)"
    return f"stood {ending.standing}" if ending.standing is not None else "was still starting"


def _work(ending: Ending) -> str:
    return "" if ending.standing is None or not ending.standing.work else f" {ending.standing.work}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _signal(ending: Ending) -> str:
    return signal.Signals(-ending.code).name


def _seconds(text: str) -> str:
    """How long torch says that it waited."""
    found = re.search(r"(\d+) ?ms", text)
    return f" {int(found[1]) / 1000:g} s" if found else ""
