"""Recompute in advance: an interleaved stage recomputes while the gradient of its next chunk is still on its way.

    without     ... | wait for the gradient | recompute | backward | ...
    with        ... | recompute, the gradient arrives   | backward | ...

Only the order of work changes: what is recomputed is the same, so are the gradients. A chunk's layers are all there while
it waits, which is what they would be in its backward pass.
"""

from __future__ import annotations

from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from mindspeed_core.memory.recompute import Advance
from mindspeed_core.parallel.mesh import Mesh


def communicator(chunks: list[Any], mesh: Mesh, micro_batches: int) -> Communicator | None:
    """Return what one global batch of `micro_batches` is sent and received with; None: nothing is done in advance."""
    models: list[Any] = [getattr(chunk, "module", chunk) for chunk in chunks]
    advances = [model.decoder.advance for model in models]
    if not any(advances):
        return None
    group = models[0].config.microbatch_group_size_per_vp_stage
    table = get_schedule_table(micro_batches, len(chunks), group)
    # a backward pass goes through the chunks of a group of micro batches from the last to the first
    order = [advances[len(chunks) - 1 - chunk] for _micro_batch, chunk in table]
    return Communicator(mesh, models, order)


class Communicator(P2PCommunicator):
    """Megatron's messages between stages, which does the next recompute before it waits for a gradient."""

    def __init__(self, mesh: Mesh, models: list[Any], order: list[Advance | None]) -> None:
        super().__init__(mesh.groups.pp, models[0].config)
        self.order = order  # of the backward passes of this stage, by chunk
        self.begun = 0
        self._counts = [model.register_forward_hook(self._count) for model in models]

    def close(self) -> None:
        """End the global batch."""
        for hook in self._counts:
            hook.remove()
        assert self.begun == len(self.order), f"{self.begun} of {len(self.order)} backward passes were made"

    def recompute(self) -> None:
        """Recompute what the next backward pass needs."""
        advance = self.order[self.begun] if self.begun < len(self.order) else None
        if advance is not None:
            advance.recompute()

    def send_backward_recv_backward(
        self, input_tensor_grad: Any, recv_next: bool, tensor_shape: Any, overlap_p2p_comm: bool = False
    ) -> Any:
        """As Megatron's; whoever waits for what is received recomputes first."""
        grad, handles = super().send_backward_recv_backward(
            input_tensor_grad, recv_next=recv_next, tensor_shape=tensor_shape, overlap_p2p_comm=True
        )
        waiting = {name: _Waits(self, handle) if name == "recv_next" else handle for name, handle in handles.items()}
        if overlap_p2p_comm:
            return grad, waiting
        for handle in waiting.values():
            handle.wait()
        return grad

    def _count(self, _model: Any, _inputs: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(self._begin)

    def _begin(self, _grad: Any) -> None:
        self.begun += 1


class _Waits:
    """A message that is waited for after the recompute."""

    def __init__(self, communicator: Communicator, handle: Any) -> None:
        self.communicator, self.handle = communicator, handle

    def wait(self) -> None:
        self.communicator.recompute()
        self.handle.wait()
