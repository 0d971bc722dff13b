"""Where a rank stands is read from its stack, while it stands there."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from mindspeed_core import standing
from mindspeed_core.standing import Standing
from tests.harness import run_ranks

LARGE = 1 << 14  # numbers that go through shared memory


class Work:
    """An object that knows how far it is."""

    def stands(self, function):
        return f"in {function} of a test"

    def outer(self, call):
        return self.inner(call)

    def inner(self, call):
        return call()


class Owner:
    """An object that waits for what it began earlier, as Megatron's buckets do; of its groups one has nobody to wait for."""

    def __init__(self, begun, alone, group):
        self.begun = begun
        self.alone, self.group = alone, group

    def finishes(self):
        self.begun.wait()


def together(x, group):
    """Return the handle of several collectives that are sent as one."""
    with dist._coalescing_manager(group, async_ops=True) as begun:
        dist.all_reduce(x, group=group)
        dist.all_reduce(x.clone(), group=group)
    return begun


def begins(name, x, group):
    """Begin the collective that a handle of that name belongs to."""
    return together(x, group) if name.startswith("several") else dist.all_reduce(x, group=group, async_op=True)


def in_rank(name, length, backend=None):
    """Return where rank 0 stood in a collective, before rank 1 came; rank 1 comes when rank 0 is seen to wait."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    group = dist.new_group([0, 1], group_desc="TENSOR_MODEL_PARALLEL_GROUP", backend=backend)
    values = torch.ones(length)
    calls = {
        "all_reduce": lambda: dist.all_reduce(values, group=group),
        "barrier": dist.barrier,
        "all_gather_object": lambda: dist.all_gather_object([None, None], 1),
        "handle": lambda: waits(begun),
        "several": lambda: waits(begun),
        "owner": lambda: Owner(begun, alone, group).finishes(),
        "several owned": lambda: Owner(begun, alone, group).finishes(),
    }
    store = _get_default_store()
    if dist.get_rank() == 1:
        store.wait([name])
    begun = begins(name, values, group) if name not in ("all_reduce", "barrier", "all_gather_object") else None
    if dist.get_rank() == 1:
        Work().outer(calls[name])
        return None
    seen = []

    def watch(main):
        while not seen or not seen[-1].waits:
            seen[:] = [standing.of_process(main)]
        store.set(name, "seen")

    threading.Thread(target=watch, args=(threading.get_ident(),)).start()
    Work().outer(calls[name])
    return seen[-1]


def waits(work):
    work.wait()


@pytest.mark.parametrize("length", [2, LARGE])
@pytest.mark.parametrize(
    ("name", "function", "group"),
    [
        ("all_reduce", "all_reduce", "tp (ranks 0, 1)"),
        ("barrier", "barrier", "all ranks"),
        ("all_gather_object", "all_gather_object", "all ranks"),
        ("handle", "all_reduce", "tp (ranks 0, 1)"),
        ("several", "all_reduce", "tp (ranks 0, 1)"),
    ],
)
def test_a_collective_is_named_with_its_group_and_its_caller(name, length, function, group):
    stood, _ = run_ranks(in_rank, 2, name, length)
    assert (stood.function, stood.group, stood.work) == (function, group, "in inner of a test")
    assert stood.place.startswith("test_standing.py:")
    assert str(stood) == f"in {function} of {group} at {stood.place}, in inner of a test"


@pytest.mark.parametrize("name", ["owner", "several owned"])
def test_a_handle_of_a_backend_that_does_not_know_it_is_told_by_its_owner(name):
    stood, _ = run_ranks(in_rank, 2, name, LARGE, "gloo")
    assert (stood.function, stood.group) == ("finishes", "tp (ranks 0, 1)")
    assert stood.place.startswith("test_standing.py:")


def fails():
    raise ValueError("here")


def test_an_error_says_where_it_came_from():
    with pytest.raises(ValueError, match="here") as caught:
        Work().outer(fails)
    stood = standing.of_error(caught.value)
    line = fails.__code__.co_firstlineno + 1
    assert stood == Standing(place=f"test_standing.py:{line}", function="fails", work="in inner of a test")
    assert str(stood) == f"in fails (test_standing.py:{line}), in inner of a test"
    assert not stood.waits
    assert standing.of_error(ValueError("never raised")) is None


def test_waiting_for_a_thread_is_no_collective():
    begun, ended = threading.Event(), threading.Event()
    main = threading.Thread(target=lambda: (begun.set(), ended.wait()))
    main.start()
    begun.wait()
    assert not standing.of_process(main.ident).waits
    ended.set()
    main.join()
