"""Delayed gradients of weights are made behind the message that is in a hurry, and are the same to the bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from mindspeed_core.device import Device
from mindspeed_core.optim.build import OptimConfig
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig
from tests.core.memory import forgetful
from tests.harness import run_ranks

NUMBER = 4  # micro batches
Made = tuple[list[torch.Tensor], list[str]]


def gradients(*, with_experts: bool = False, **parallel: Any) -> Made:
    """The gradients of this rank, and in which order it sent gradients of its input and made those of its weights.

    One that a linear leaves to autograd stands among the events by name.
    """
    from mindspeed_core.kernels import matmul_add
    from mindspeed_core.parallel.data import wrap_data_parallel
    from mindspeed_train.step import run_batch
    from mindspeed_train.tasks.task import token_loss

    mesh = Mesh.create(ParallelConfig(pp=2, **parallel), Device.open("cpu"))
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    events: list[str] = []

    def left(name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            events.append(name)

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
        chunks = wrap_data_parallel(forgetful.build(mesh, {}, with_experts=with_experts), OptimConfig(), mesh)
        for chunk in chunks:
            chunk.zero_grad_buffer()
            for name, parameter in chunk.named_parameters():
                if "linear" in name or "output_layer" in name:
                    parameter.register_post_accumulate_grad_hook(partial(left, name))
        run_batch(chunks, forgetful.micro_batches(NUMBER), mesh, token_loss, train=True)
    found = [parameter.main_grad.clone() for chunk in chunks for parameter in chunk.parameters()]
    mesh.close()
    return found, events


LAYERS = ((2, 2), (3, 1))  # of the stages


def both(layouts: list[dict[str, Any]]) -> list[list[Made]]:
    """Of each layout: made at once, and delayed."""
    return [[gradients(**layout, delay_weight_gradients=delayed) for delayed in (False, True)] for layout in layouts]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_gradients_are_the_same_and_made_after_what_is_sent() -> None:
    layouts = [{"layers_per_stage": layers} for layers in LAYERS]
    for stage, answers in enumerate(run_ranks(both, 2, layouts)):
        for layers, ((plain, early), (delayed, late)) in zip(LAYERS, answers, strict=True):
            assert same(delayed, plain)
            assert all(gradient.any() for gradient in plain)
            linears = 4 * layers[stage] + stage  # with the output layer
            assert early == [*["made"] * linears, "sent"] * NUMBER
            assert late == ["sent", *["made"] * linears] * NUMBER


def test_gradients_of_experts_are_made_after_what_is_sent() -> None:
    for stage, (answers,) in enumerate(run_ranks(both, 2, [{"with_experts": True}])):
        (plain, early), (delayed, late) = answers
        assert same(delayed, plain)
        assert all(gradient.any() for gradient in plain)
        linears = 2 * (2 + 2 * 4) + stage  # two layers of attention and four experts
        assert early == [*["made"] * linears, "sent"] * NUMBER
        assert late == ["sent", *["made"] * linears] * NUMBER


# the linears of the first are those that the others are compared with
BESIDE: dict[bool, tuple[dict[str, Any], ...]] = {
    True: ({}, {"collective_matmul": "mc2"}, {"collective_matmul": "coc", "coc_chunks": 2}),
    False: ({}, {"collective_matmul": "coc", "coc_chunks": 2}),
}


def test_gradients_beside_collectives_are_those_of_linears_without() -> None:
    layouts = [{"tp": 2, "sp": sp, **layout} for sp, some in BESIDE.items() for layout in some]
    for rank, answers in enumerate(run_ranks(both, 4, layouts, timeout=120)):
        linears = 2 * 4 + rank // 2
        plain: list[torch.Tensor] = []
        for layout, ((at_once, early), (delayed, late)) in zip(layouts, answers, strict=True):
            assert early == [*["made"] * linears, "sent"] * NUMBER, layout
            assert late == ["sent", *["made"] * linears] * NUMBER, layout
            assert same(delayed, at_once), layout
            if "collective_matmul" not in layout:
                plain = at_once
            for one, other in zip(at_once, plain, strict=True):
                # products in pieces sum in another order
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))
            if layout.get("collective_matmul") == "mc2":
                assert same(at_once, plain), "on a CPU: one piece"
