"""One data-parallel copy of a model chunk: Megatron's, for models that hand parameters to kernels instead of calling modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from mindspeed_core.errors import InputError


class ModelCopy(DistributedDataParallel):
    """A model with the buffers of its gradients, which sums gradients and gathers parameters while the model computes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.use_forward_hook:
            self.disable_forward_pre_hook(param_sync=False)
            self._gather_by_layer()

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        """Return what runs when a backward has made all of a parameter's gradient.

        A kernel may have added it to `main_grad` itself and left none; Megatron takes that for a fault.
        """
        group = self.param_to_bucket_group[param]
        held: Any = param

        def ready(*_: Any) -> None:
            if held.grad is not None:
                held.main_grad.add_(held.grad)
                held.grad = None
            if self.ddp_config.overlap_grad_reduce:
                group.register_grad_ready(param, self.force_all_reduce)

        return ready

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Wait until gradients are summed.

        A weight without one would keep its bucket, and with it the other copies, waiting: Megatron stops without its name.
        """
        if self.ddp_config.overlap_grad_reduce:
            groups = [*self.bucket_groups, *self.expert_parallel_bucket_groups]
            there = {parameter for group in groups for parameter in group.per_param_grad_ready_counts}
            missing = [n for n, p in self.module.named_parameters() if p.requires_grad and p not in there]
            if missing:
                raise InputError(
                    f"optim.overlap_grad_reduce: waits for a gradient of every weight, and the last micro batch made none of "
                    f"{', '.join(missing)}; set it to false, or freeze what is not used"
                )
        super().finish_grad_sync(force_all_reduce)

    def _gather_by_layer(self) -> None:
        """Let every layer wait for its parameters before it is called.

        Megatron lets each module wait for those it owns. The loss reads the output layer's weight without calling it, and
        would compute with that of the step before.
        """
        model: Any = self.module
        parts = [(layer, [layer]) for layer in model.decoder.layers]
        if model.pre_process:
            parts.append((model.embedding, [model.embedding]))
        if model.post_process:
            head = [model.decoder.final_layernorm, model.output_layer]
            parts.append((model.decoder.final_layernorm, head + ([model.embedding] if model.pre_process else [])))
        for module, owners in parts:
            parameters = [parameter for owner in owners for parameter in owner.parameters()]
            groups = dict.fromkeys(
                self.param_to_bucket_group[parameter]
                for parameter in parameters
                if parameter in self.param_to_bucket_group
            )
            module.register_forward_pre_hook(_waits(list(groups)))


def _waits(groups: list[Any]) -> Callable[..., None]:
    def wait(*_: Any) -> None:
        for group in groups:
            group.finish_param_sync()

    return wait
