"""Delayed gradients of weights are made behind the message that is in a hurry, and are the same to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mindspeed_core.device import Device
from mindspeed_core.optim.build import OptimConfig
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig
from tests.core.memory import forgetful
from tests.harness import run_ranks

NUMBER = 4  # micro batches


def gradients(layers_per_stage: tuple[int, ...], *, delayed: bool) -> tuple[list[torch.Tensor], list[str]]:
    """The gradients of this stage, and in which order it sent gradients of its input and made those of its weights."""
    from mindspeed_core.kernels import matmul_add
    from mindspeed_core.parallel.data import wrap_data_parallel
    from mindspeed_train.step import run_batch
    from mindspeed_train.tasks.task import token_loss

    config = ParallelConfig(pp=2, layers_per_stage=layers_per_stage, delay_weight_gradients=delayed)
    mesh = Mesh.create(config, Device.open("cpu"))
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    events: list[str] = []

    def noting(real: Any, what: str) -> Any:
        def noted(*args: Any, **more: Any) -> Any:
            found = real(*args, **more)
            events.append(what)
            return found

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("send_backward", "send_backward_recv_forward"):
            patch.setattr(P2PCommunicator, name, noting(getattr(P2PCommunicator, name), "sent"))
        patch.setattr(matmul_add, "add", noting(matmul_add.add, "made"))
        chunks = wrap_data_parallel(forgetful.build(mesh, {}), OptimConfig(), mesh)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        run_batch(chunks, forgetful.micro_batches(NUMBER), mesh, token_loss, train=True)
    found = [parameter.main_grad.clone() for chunk in chunks for parameter in chunk.parameters()]
    mesh.close()
    return found, events


LAYERS = ((2, 2), (3, 1))  # of the stages


def both() -> list[Any]:
    return [[gradients(layers, delayed=delayed) for delayed in (False, True)] for layers in LAYERS]


def test_gradients_are_the_same_and_made_after_what_is_sent() -> None:
    for stage, answers in enumerate(run_ranks(both, 2)):
        for layers, ((plain, early), (delayed, late)) in zip(LAYERS, answers, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(plain, delayed, strict=True))
            assert all(gradient.any() for gradient in plain)
            linears = 4 * layers[stage] + stage  # with the output layer
            assert early == [*["made"] * linears, "sent"] * NUMBER
            assert late == ["sent", *["made"] * linears] * NUMBER
