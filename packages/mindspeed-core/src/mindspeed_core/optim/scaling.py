"""Lists of tensors times a number, as Megatron's optimizers clip gradients and copy masters into the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def scale(chunk_size: int, overflow: Any, tensors: list[list[Tensor]], factor: float) -> None:
    """Set every tensor of the second list to `factor` times its partner in the first.

    The contract is apex's `multi_tensor_scale`. Megatron's own stand-in makes the product first and copies it, also
    where the lists are the same or the factor is 1.
    """
    for source, target in zip(*tensors, strict=True):
        if factor == 1:
            target.copy_(source)
        elif source is target:
            target *= factor
        else:
            target.copy_(source * factor)
