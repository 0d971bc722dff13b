"""Tiny random models of every family, nearly all by transformers: the oracle that ours are compared with."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from tests.core.models.baichuan import BaichuanConfig, BaichuanForCausalLM

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "baichuan": (BaichuanConfig, BaichuanForCausalLM),
    "deepseek2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    "deepseek3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},  # shorter than what tests read
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.0},  # the oracle's loss is the cross entropy alone
    "baichuan": {"max_position_embeddings": None, "model_max_length": 128, "rms_norm_eps": 1e-6},  # 13B's linear biases
    # V2-Lite's shape: one dense layer, then experts of which two are shared; heads of 8 + 4 whose values have 6
    "deepseek2": {
        "num_key_value_heads": 8,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "topk_method": "greedy",
        "aux_loss_alpha": 0.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
}
# its queries have a latent too, and its experts are chosen within the best of their groups, by scores that a bias moves
OWN["deepseek3"] = {
    **OWN["deepseek2"],
    "head_dim": 4,  # what transformers turns
    "q_lora_rank": 24,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
del OWN["deepseek3"]["topk_method"]  # it has only one


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
    model = model_class(config_class(**{**sizes, **OWN.get(family, {}), **more})).eval()
    with torch.no_grad():  # norms start at one and biases at zero, which would hide a swapped tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or name.endswith("bias"):
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def config_of(model: Any) -> dict[str, Any]:
    """Return config.json as `save_pretrained` would write it."""
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


class StateTensors:
    """A transformers model as a source of tensors, under the names that it saves them with."""

    def __init__(self, model: Any) -> None:
        self._state: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())

    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]
