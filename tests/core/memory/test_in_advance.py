"""Recompute in advance changes when layers are recomputed, and no gradient."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.core.memory import forgetful
from tests.harness import run_ranks

FEATURES: dict[str, dict[str, Any]] = {
    "all": {"recompute": "full", "recompute_in_advance": True},
    "one of each chunk": {"recompute": "full", "recompute_layers": 1, "recompute_in_advance": True},
    # of chunk 1 nothing is recomputed
    "per rank": {"recompute": "full", "recompute_layers": 1, "recompute_per_rank": True, "recompute_in_advance": True},
}


@pytest.mark.parametrize("layers", [4, 8])
@pytest.mark.parametrize("number", [2, 4, 8], ids=["all in the warm-up", "four", "eight"])
def test_gradients_are_the_same_to_the_bit(layers: int, number: int) -> None:
    model = {"layers": layers}
    parallel = {"pp": 2, "vpp": 2}
    for rank, answers in enumerate(run_ranks(forgetful.compare, 2, list(FEATURES.values()), parallel, model, number)):
        for name, answer in zip(("plain", *FEATURES), answers, strict=True):
            assert (answer["losses"], answer["gradients"]) == (True, True), f"{name} on rank {rank}"


def order(number: int) -> list[str]:
    """The order in which segments of a stage are recomputed, gradients are waited for, and backward passes begin."""
    from mindspeed_core.device import Device
    from mindspeed_core.memory import in_advance, recompute
    from mindspeed_core.parallel.mesh import Mesh, ParallelConfig

    mesh = Mesh.create(ParallelConfig(pp=2, vpp=2), Device.open("cpu"))
    events: list[str] = []

    def noting(real: Any, what: str) -> Any:
        def noted(*args: Any) -> Any:
            events.append(what)
            return real(*args)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "run_again", noting(recompute.run_again, "recompute"))
        patch.setattr(in_advance.Communicator, "_begin", noting(in_advance.Communicator._begin, "backward"))
        patch.setattr(in_advance._Waits, "wait", noting(in_advance._Waits.wait, "wait"))
        chunks = forgetful.build(mesh, {"recompute": "full", "recompute_in_advance": True})
        forgetful.run(mesh, chunks, number)
    return events


def test_a_gradient_is_waited_for_after_the_recompute() -> None:
    number = 8
    for rank, events in enumerate(run_ranks(order, 2, number)):
        assert events.count("backward") == events.count("recompute") == 2 * number
        early = sum(pair == ("wait", "recompute") for pair in pairwise(events))
        assert early == events.count("wait")
        # the last stage waits for no gradient of its last chunk, and the first for each but that of the first backward pass
        assert early >= number, f"rank {rank}: {events}"
