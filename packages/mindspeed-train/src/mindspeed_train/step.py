"""One global batch through the pipeline: forward, or forward and backward, and the loss of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_core.models.balance import TERMS, take_terms
from mindspeed_core.parallel.context import ContextSplit
from mindspeed_core.parallel.mesh import Mesh
from mindspeed_core.parallel.pipeline import micro_batch_group
from mindspeed_data.batches import Batch

Forward = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Loss:
    """What a global batch came to, the same on every rank."""

    total: float  # the sum of weight * loss over all tokens
    tokens: int  # those that counted in the loss
    positions: int  # those that were computed, padding included
    terms: Mapping[str, float] = field(default_factory=dict)  # what else is learned from, each a mean over tokens

    @property
    def mean(self) -> float:
        """The mean over the tokens of the global batch."""
        return self.total / max(1, self.tokens)

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.total + other.total, self.tokens + other.tokens, self.positions + other.positions, self.terms)


def run_batch(chunks: list[Any], micro_batches: Sequence[Batch], mesh: Mesh, forward: Forward, *, train: bool) -> Loss:
    """Run this rank's micro batches of one global batch; with `train` the gradients lie ready in `main_grad`.

    Gradients are those of the mean over the tokens of the global batch: Megatron's schedule sums the micro batches, the
    data-parallel sum follows, and one division by the number of tokens ends it.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from mindspeed_core.memory import in_advance
    from mindspeed_core.parallel import weight_gradients

    reports: list[Tensor] = []
    context = ContextSplit.of(mesh)

    def step(iterator: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        batch = {name: values.to(mesh.device.torch, non_blocking=True) for name, values in next(iterator).items()}
        return forward(model, batch), partial(_loss, batch, context)

    rows, length = micro_batches[0]["tokens"].shape
    chunked = len(chunks) > 1
    micro_batches = _filled(micro_batches, micro_batch_group(mesh.pp.size, len(chunks)))
    for chunk in chunks:
        chunk.train(train)  # routers draw at random only while they learn
    beside: Any = None  # Megatron's own messages between stages
    if train:
        beside = (
            in_advance.communicator(chunks, mesh, len(micro_batches))
            if chunked
            else weight_gradients.communicator(chunks, mesh)
        )
    own: dict[str, Any] = {} if beside is None else {"p2p_communicator": beside, "pg_collection": mesh.groups}
    with torch.set_grad_enabled(train):
        reports = get_forward_backward_func(mesh.pp.size, len(chunks) if chunked else None)(
            forward_step_func=step,
            # every chunk of a stage goes through the same micro batches
            data_iterator=[iter(micro_batches) for _ in chunks] if chunked else iter(micro_batches),
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=not train,
            **own,
        )
    if beside is not None:
        beside.close()
    return _everywhere(reports, take_terms(chunks, mesh.device.torch), mesh)


def _filled(micro_batches: Sequence[Batch], multiple: int) -> Sequence[Batch]:
    """Return as many micro batches as the schedule takes; those added, at the end of an evaluation, weigh nothing."""
    last = micro_batches[-1]
    nothing = {**last, "weights": torch.zeros_like(last["weights"])}
    return [*micro_batches, *[nothing] * (-len(micro_batches) % multiple)]


def _loss(batch: Batch, context: ContextSplit | None, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's triple: what to differentiate, the number of tokens to divide by in the end, what to report.

    Ranks that share sequences count their own positions, as they do in the loss.
    """
    weights = batch["weights"] if context is None else context.share(batch["weights"])
    tokens = weights.sum()
    positions = torch.tensor(float(weights.numel()), device=output.device)
    return output, tokens.int(), torch.stack([output.detach().float(), tokens, positions])


def _everywhere(reports: list[Tensor], terms: Tensor, mesh: Mesh) -> Loss:
    """Sum the reports of all micro batches over all ranks; each position is counted on one rank of its copy.

    `terms` are what the routers of this rank have added up; every rank has some of its own.
    """
    total = torch.zeros(3, device=mesh.device.torch)
    if mesh.is_last_stage and mesh.tp.rank == 0:
        total = torch.stack(reports).sum(0)
    total = torch.cat([total, terms])
    dist.all_reduce(total)
    loss, tokens, positions, *sums, routed = total.tolist()
    means = {name: value / routed for name, value in zip(TERMS, sums, strict=True) if value} if routed else {}
    return Loss(loss, round(tokens), round(positions), means)
