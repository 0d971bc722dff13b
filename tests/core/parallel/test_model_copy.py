"""A weight that nothing uses ends a run that overlaps its sums, with its name, and hinders no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mindspeed_core.device import Device
from mindspeed_core.errors import InputError
from mindspeed_core.optim.build import OptimConfig, build_optimizer
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig
from tests.core.memory import forgetful
from tests.harness import RankError, run_ranks


def steps(optim: dict[str, Any], unused_from: int) -> list[float]:
    """Train two steps with one weight more, which is used in the steps before `unused_from`; return the norms."""
    from mindspeed_core.parallel.data import wrap_data_parallel

    mesh = Mesh.create(ParallelConfig(dp=2), Device.open("cpu"))
    chunks = forgetful.build(mesh, {})
    model = chunks[0]
    model.scale = torch.nn.Parameter(torch.ones(()))
    model.scale_is_used = True
    model.register_forward_hook(lambda module, _, out: out * module.scale if module.scale_is_used else out)
    config = OptimConfig(**optim)
    copies = wrap_data_parallel(chunks, config, mesh)
    optimizer = build_optimizer(config, copies, mesh, "fp32")
    norms = []
    for step in range(2):
        model.scale_is_used = step < unused_from
        copies[0].zero_grad_buffer()
        optimizer.zero_grad()
        forgetful.run(mesh, copies, 2)
        norms.append(float(optimizer.step()[1]))
    return norms


@pytest.mark.parametrize("unused_from", [0, 1], ids=["from the start", "later"])
def test_an_unused_weight_is_named(unused_from: int) -> None:
    optim = {"overlap_grad_reduce": True}
    with pytest.raises(RankError, match=r"overlap_grad_reduce: .* made none of scale; set it to false") as caught:
        run_ranks(steps, 2, optim, unused_from, timeout=60)
    assert isinstance(caught.value.error, InputError)


def test_without_overlap_it_has_a_gradient_of_zero() -> None:
    assert all(norm > 0 for norm in run_ranks(steps, 2, {}, 1)[0])


def test_a_used_weight_is_no_fault() -> None:
    plain, beside = (run_ranks(steps, 2, {"overlap_grad_reduce": on}, 2)[0] for on in (False, True))
    assert beside == pytest.approx(plain, rel=1e-6)
