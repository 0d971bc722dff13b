"""The gradients of weights put behind those of activations, which another pipeline stage waits for.

    at once     stage 0   .. .. .. B3 B3         delayed     stage 0   .. .. B3 W3
                stage 1   F3 B3 B3                           stage 1   F3 B3 W3

A backward pass ends as soon as the gradient of its input is made; while that travels and the stage before works on, the
products of weights follow. The bubble at the end of a batch loses their part of the time, a third of a pass where
products are most of it. After Qi et al., "Zero Bubble Pipeline Parallelism" (2023), within the order of 1F1B.

What a product needs, the input of a linear and the gradient of its output, lives until then: that of one micro batch.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from mindspeed_core.kernels.matmul_add import Waiting
from mindspeed_core.parallel.mesh import Mesh


def delay(chunk: Any) -> None:
    """Let the gradients of the weights of a chunk wait for each other until a `Communicator` has sent what is in a hurry."""
    chunk.weight_gradients = waiting = []
    for parameter in chunk.parameters():
        parameter.waiting = waiting


def communicator(chunks: list[Any], mesh: Mesh) -> Communicator | None:
    """Return what one global batch is sent and received with; None: nothing is delayed."""
    models: list[Any] = [getattr(chunk, "module", chunk) for chunk in chunks]
    waiting = getattr(models[0], "weight_gradients", None)
    return None if waiting is None else Communicator(mesh, models[0].config, waiting)


class Communicator(P2PCommunicator):
    """Megatron's messages between stages, which makes the gradients that wait when one has been sent."""

    def __init__(self, mesh: Mesh, config: Any, waiting: Waiting) -> None:
        super().__init__(mesh.groups.pp, config)
        self._waiting = waiting

    def send_backward(self, input_tensor_grads: Any, is_first_stage: bool) -> None:
        super().send_backward(input_tensor_grads, is_first_stage)
        self._make()

    def send_backward_recv_forward(
        self, input_tensor_grads: Any, tensor_shapes: Any, is_first_stage: bool
    ) -> Tensor | list[Tensor]:
        received = super().send_backward_recv_forward(input_tensor_grads, tensor_shapes, is_first_stage)
        self._make()
        return received

    def close(self) -> None:
        """End the global batch."""
        assert not self._waiting, f"{len(self._waiting)} gradients were not made"

    @torch.no_grad()
    def _make(self) -> None:
        for make in self._waiting:
            make()
        self._waiting.clear()
