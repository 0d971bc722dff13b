"""Checkpoints of every format, as lazy mappings from Hugging Face names to tensors."""

from mindspeed_core.checkpoint.checkpoint import Checkpoint
from mindspeed_core.checkpoint.open import open_checkpoint
from mindspeed_core.checkpoint.tensors import CastTensors, Tensors

__all__ = ["CastTensors", "Checkpoint", "Tensors", "open_checkpoint"]
