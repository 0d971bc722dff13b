"""What is told of a job that failed, for every kind of ending."""

import re
import signal

import pytest

from mindspeed_core.standing import Standing
from mindspeed_core.verdict import Ending, kind_of, left_behind, verdict

SUM = Standing(function="all_reduce", group="tp (ranks 0, 1)", place="layers.py:7", work="in step 3")
RECEIVE = Standing(function="recv", group="pp (ranks 0, 2)", place="stages.py:9", work="in step 3")
READS = Standing(function="read", place="data.py:5", work="in step 3")

IN_SUM = "in all_reduce of tp (ranks 0, 1) at layers.py:7, in step 3"
IN_RECEIVE = "in recv of pp (ranks 0, 2) at stages.py:9, in step 3"

killed = Ending(rank=1, kind="killed", code=-signal.SIGKILL)
fault = Ending(rank=1, kind="fault", code=1, text="Traceback\nValueError: bad\n", standing=READS)
dead = Ending(rank=1, kind="dead", code=9, text="rank 1: last words\n")
left = Ending(rank=1, kind="dead")
aborted = Ending(rank=1, kind="dead", code=-signal.SIGABRT)
overdue = Ending(rank=0, kind="overdue", code=1, text="Traceback\nwaiting 4000ms for recv\n", standing=SUM)
echo = Ending(rank=0, kind="echo", code=1, text="Traceback\nclosed by peer\n", standing=SUM)


def waiting(rank, standing=SUM):
    return Ending(rank=rank, kind="stopped", standing=standing)


@pytest.mark.parametrize(
    ("endings", "code", "told"),
    [
        (
            [echo, killed, waiting(2, RECEIVE)],
            2,
            "error: rank 1 was killed by SIGKILL; somebody ended it or the machine ran out of memory (see the system log); "
            f"rank 0 waited {IN_SUM}; rank 2 waited {IN_RECEIVE}\n",
        ),
        ([fault, echo], 1, f"rank 1 failed in step 3; rank 0 waited {IN_SUM}:\nTraceback\nValueError: bad\n"),
        ([fault, waiting(0, READS)], 1, "rank 1 failed in step 3:\nTraceback\nValueError: bad\n"),
        (
            [dead, waiting(0), waiting(2, READS)],
            1,
            f"rank 1: last words\nerror: rank 1 ended with exit code 9 and gave no reason; rank 0 waited {IN_SUM}\n",
        ),
        (
            [left, waiting(0)],
            1,
            "error: rank 1 ended with exit code 0 before its work was done and gave no reason; "
            f"rank 0 waited {IN_SUM}\n",
        ),
        (
            [aborted, waiting(0), waiting(2, READS)],
            1,
            f"error: rank 1 was killed by SIGABRT; rank 0 waited {IN_SUM}; rank 2 stood in read (data.py:5), in step 3\n",
        ),
        (
            [overdue, waiting(2, RECEIVE), waiting(1, READS)],
            2,
            "error: rank 1 did not come: it stood in read (data.py:5), in step 3; "
            f"rank 0 waited 4 s {IN_SUM}; rank 2 waited {IN_RECEIVE}. "
            "Find out what holds it, or allow more time (train.timeout of a recipe)\n",
        ),
        (
            [overdue, Ending(rank=1, kind="deaf")],
            2,
            "error: rank 1 did not come: it did not say where it stands (halted, or in code that never lets Python run); "
            f"rank 0 waited 4 s {IN_SUM}. Find out what holds it, or allow more time (train.timeout of a recipe)\n",
        ),
        (
            [overdue, Ending(rank=1, kind="stopped"), Ending(rank=2, kind="done")],
            2,
            "error: rank 1 did not come: it was still starting; rank 2 had done its work and left; "
            f"rank 0 waited 4 s {IN_SUM}. Find out what holds it, or allow more time (train.timeout of a recipe)\n",
        ),
        (
            [overdue, waiting(1, RECEIVE)],
            1,
            f"error: the ranks are out of step: rank 0 waited 4 s {IN_SUM}; rank 1 waited {IN_RECEIVE}\n{overdue.text}",
        ),
        ([overdue], 1, f"error: rank 0 waited 4 s {IN_SUM}, and not every rank came\n"),
        (
            [echo, waiting(2), waiting(3), Ending(rank=1, kind="done")],
            1,
            f"error: rank 0 lost the connection to another rank {IN_SUM}; ranks 2, 3 waited {IN_SUM}; "
            "rank 1 had done its work and left\n",
        ),
        ([echo, Ending(rank=1, kind="input", code=2, text="error: no such file\n")], 2, "error: no such file\n"),
        ([killed, Ending(rank=0, kind="interrupted", code=130, text="interrupted\n")], 130, "interrupted\n"),
    ],
)
def test_the_cause_is_told_with_what_the_others_waited_for(endings, code, told):
    assert verdict(endings) == (code, told)


def test_of_causes_of_one_kind_the_first_is_told():
    later = Ending(rank=2, kind="fault", code=1, text="ValueError: later\n")
    assert "ValueError: bad" in verdict([fault, later])[1]
    assert "ValueError: later" in verdict([later, fault])[1]


def test_ranks_that_go_on_after_rank_0_are_told():
    told = left_behind([Ending(rank=0, kind="done"), waiting(1), waiting(2, READS)], 300)
    assert told == (
        f"error: rank 0 has been done for 300 s; rank 1 waited {IN_SUM}; rank 2 stood in read (data.py:5), in step 3\n"
    )


@pytest.mark.parametrize(
    ("error", "standing", "kind"),
    [
        (RuntimeError("[gloo/pair.cc] Connection closed by peer [127.0.0.1]:4711"), SUM, "echo"),
        (RuntimeError("Timed out waiting 4000ms for recv operation to complete"), SUM, "overdue"),
        (RuntimeError("Wait timeout"), SUM, "overdue"),
        (RuntimeError("the door timed out"), READS, "fault"),
        (ValueError("Connection closed by peer"), SUM, "fault"),
        (RuntimeError("shapes do not match"), SUM, "fault"),
        (None, None, "fault"),
    ],
)
def test_an_error_that_speaks_of_a_peer_is_no_cause(error, standing, kind):
    assert kind_of(error, standing) == kind


def test_every_message_names_a_rank():
    for ending in (killed, fault, dead, left, aborted, overdue, echo):
        assert re.search(r"rank \d", verdict([ending])[1])
