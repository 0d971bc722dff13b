"""The parallel linears: Megatron's, with the product of the device."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from mindspeed_core.kernels import Kernels, matmul


def _product(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group: dist.ProcessGroup | None,
    *,
    sequence: bool,
    reduce: bool,
) -> Tensor:
    """x @ weight.T + bias, with the collective before it that Megatron's own function folds in."""
    if sequence:
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    elif reduce:
        x = copy_to_tensor_model_parallel_region(x, group=group)
    out = kernels.matmul(x, weight)
    return out if bias is None else out + bias


class ColumnLinear(ColumnParallelLinear):
    """Output features are cut over the tensor-parallel ranks."""

    def __init__(self, *args: Any, kernels: Kernels, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernels = kernels

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.kernels.matmul is matmul.native:
            return super()._forward_impl(input, weight, *args, **kwargs)
        return _product(
            self.kernels,
            input,
            weight,
            kwargs["bias"],
            self.tp_group,
            sequence=kwargs["sequence_parallel"],
            reduce=kwargs["allreduce_dgrad"],
        )


class RowLinear(RowParallelLinear):
    """Input features are cut over the tensor-parallel ranks; Megatron sums the partial products afterwards."""

    def __init__(self, *args: Any, kernels: Kernels, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernels = kernels

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.kernels.matmul is matmul.native:
            return super()._forward_impl(input, weight, *args, **kwargs)
        return _product(self.kernels, input, weight, kwargs["bias"], self.tp_group, sequence=False, reduce=False)
