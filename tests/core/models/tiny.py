"""Tiny random models of every family, by transformers: the oracle that ours are compared with."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def hf_model(family: str, *, tied: bool = False, groups: int = 4, seed: int = 0, **more: Any) -> Any:
    """Return a random model with 8 heads of 8, 4 layers and 99 tokens (no multiple of 2, so that tp pads)."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": groups,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    model = model_class(config_class(**{**sizes, **more})).eval()
    with torch.no_grad():  # norms start at one and biases at zero, which would hide a swapped tensor
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def config_of(model: Any) -> dict[str, Any]:
    """Return config.json as `save_pretrained` would write it."""
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


class StateTensors:
    """A transformers model as a source of tensors."""

    def __init__(self, model: Any) -> None:
        self._state: dict[str, Tensor] = model.state_dict()

    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]
