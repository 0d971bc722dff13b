"""Megatron's optimizers for bf16 weights that are their own masters (reuse_fp32.py): they give AdamW the weights."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer


class OwnMasters(FP32Optimizer):
    """An optimizer without masters, whose gradients may have a dtype other than the weights'."""

    def prepare_grads(self) -> bool:
        """Take the gradients from where data parallelism has summed them; there is no overflow to be found."""
        for param in self.get_parameters():
            param.decoupled_grad = param.main_grad  # type: ignore[attr-defined]
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of the gradients."""
        for param in self.get_parameters():
            param.grad = param.decoupled_grad = None  # type: ignore[attr-defined]


class Optimizers(ChainedOptimizer):
    """The optimizers of dense and expert weights, which clip together, in fp32."""

    def prepare_grads(self) -> bool:
        """Make the gradients ready for their norm, for clipping and for the step."""
        found = super().prepare_grads()
        for inner in self.chained_optimizers:
            for param in inner.get_parameters():
                if param.decoupled_grad.dtype != torch.float32:  # type: ignore[attr-defined]
                    param.decoupled_grad = param.decoupled_grad.float()  # type: ignore[attr-defined]
        return found


def own_masters(chained: Any) -> Optimizers:
    """Return Megatron's optimizers as ones that step the weights themselves; the distributed one can do so already."""
    return Optimizers(
        [inner if hasattr(inner, "model_chunks") else _plain(inner) for inner in chained.chained_optimizers]
    )


def _plain(inner: Any) -> OwnMasters:
    optimizer: Any = OwnMasters(inner.optimizer, inner.config, inner.init_state_fn)
    optimizer.grad_stats_parallel_group, optimizer.tp_group = inner.grad_stats_parallel_group, inner.tp_group
    return optimizer
