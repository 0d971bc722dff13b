"""The parallel linears: Megatron's, with the product of the device."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mindspeed_core.kernels import Kernels, matmul, matmul_collective


class _DeviceProduct:
    """Replaces the product inside Megatron's linears where the device has one of its own."""

    def __init__(self, *args: Any, kernels: Kernels, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernels = kernels

    def _forward_impl(self, input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        """Return input @ weight.T + bias, with the collective before it that Megatron's own function folds in."""
        if self.kernels.matmul is matmul.native:
            megatron: Any = super()
            return megatron._forward_impl(input, weight, **kwargs)
        if kwargs["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(
                input, tensor_parallel_output_grad=True, group=kwargs["tp_group"]
            )
        elif kwargs["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=kwargs["tp_group"])
        out = self.kernels.matmul(input, weight)
        return out if kwargs["bias"] is None else out + kwargs["bias"]


class ColumnLinear(_DeviceProduct, ColumnParallelLinear):
    """Output features are cut over the tensor-parallel ranks."""

    @classmethod
    def of(
        cls,
        in_features: int,
        out_features: int,
        *,
        config: TransformerConfig,
        kernels: Kernels,
        tp_group: Any,
        **more: Any,
    ) -> ColumnLinear:
        """Return one as our models use it: the output stays cut, without bias if `more` does not ask for one."""
        told = {
            "init_method": config.init_method,
            "bias": False,
            "skip_bias_add": False,
            "gather_output": False,
            **more,
        }
        return cls(in_features, out_features, config=config, kernels=kernels, tp_group=tp_group, **told)

    def _forward_impl(self, input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        side = self.kernels.collectives
        if side is None and self.kernels.matmul is matmul.npu:
            # of the input only this rank's share is kept, as in Megatron's own: it is gathered a second time for the gradient
            side = matmul_collective.plain(matmul.npu)
        if side is None or not kwargs["sequence_parallel"]:
            return super()._forward_impl(input, weight, **kwargs)
        out = matmul_collective.gather_matmul(input, weight, kwargs["tp_group"], side)
        return out if kwargs["bias"] is None else out + kwargs["bias"]


class RowLinear(_DeviceProduct, RowParallelLinear):
    """Input features are cut over the tensor-parallel ranks; the partial products are summed afterwards."""

    @classmethod
    def of(
        cls, in_features: int, out_features: int, *, config: TransformerConfig, kernels: Kernels, tp_group: Any
    ) -> RowLinear:
        """Return one as our models use it: its input comes cut, it has no bias."""
        told = {"init_method": config.init_method, "bias": False, "skip_bias_add": False, "input_is_parallel": True}
        return cls(in_features, out_features, config=config, kernels=kernels, tp_group=tp_group, **told)

    def forward(self, input_: Any) -> Any:
        """Return the output and no bias, as Megatron's modules expect."""
        side, group = self.kernels.collectives, self.tp_group
        if side is None or group is None or group.size() == 1 or not self.input_is_parallel or self.bias is not None:
            return super().forward(input_)
        operation = matmul_collective.matmul_scatter if self.sequence_parallel else matmul_collective.matmul_reduce
        return operation(input_, self.weight, group, side), None


class ReplicatedLinear(torch.nn.Module):
    """A linear without bias whose weight [out, in] every tensor-parallel rank holds whole: [..., in] -> [..., out].

    Under sequence parallelism each rank sees its share of the positions, so the gradients of the ranks are summed.
    """

    def __init__(self, in_features: int, out_features: int, *, config: TransformerConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernel = kernels.matmul
        device = "cpu" if config.use_cpu_initialization else None
        weight = torch.empty(out_features, in_features, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight)
