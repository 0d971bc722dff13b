"""Where a rank stands is read from its stack, while it stands there."""

import threading

import pytest

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


def in_rank(name, length):
    """Return where rank 0 stood in a collective, before rank 1 came; rank 1 comes when rank 0 is seen to wait."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    group = dist.new_group([0, 1], group_desc="TENSOR_MODEL_PARALLEL_GROUP")
    values = torch.ones(length)
    calls = {
        "all_reduce": lambda: dist.all_reduce(values, group=group),
        "barrier": dist.barrier,
        "all_gather_object": lambda: dist.all_gather_object([None, None], 1),
        "handle": lambda: waits(begun, group),
    }
    store = _get_default_store()
    if dist.get_rank() == 1:
        store.wait([name])
    begun = dist.all_reduce(values, group=group, async_op=True) if name == "handle" else None
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


def waits(work, group):
    work.wait()


@pytest.mark.parametrize(
    ("name", "length", "function", "group"),
    [
        ("all_reduce", 2, "all_reduce", "tp (ranks 0, 1)"),
        ("all_reduce", LARGE, "all_reduce", "tp (ranks 0, 1)"),
        ("barrier", 2, "barrier", "all ranks"),
        ("all_gather_object", 2, "all_gather_object", "all ranks"),
        ("handle", 2, "waits", "tp (ranks 0, 1)"),
        ("handle", LARGE, "waits", "tp (ranks 0, 1)"),
    ],
)
def test_a_collective_is_named_with_its_group_and_its_caller(name, length, function, group):
    stood, _ = run_ranks(in_rank, 2, name, length)
    assert (stood.function, stood.group, stood.work) == (function, group, "in inner of a test")
    assert stood.place.startswith("test_standing.py:")
    assert str(stood) == f"in {function} of {group} at {stood.place}, in inner of a test"


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
