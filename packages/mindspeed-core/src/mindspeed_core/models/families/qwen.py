"""Qwen2, Qwen2.5 (biased query, key and value) and Qwen3 (normed query and key): Llama's table with one switch each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_core.models.families.llama import WEIGHTS, decoder, refuse
from mindspeed_core.models.families.mistral import sliding_window
from mindspeed_core.models.family import Architecture, Family


def qwen2(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Qwen2 or Qwen2.5 configuration."""
    refuse(config)
    return Architecture(**decoder(config), window=_window(config), qkv_bias=True)


def qwen3(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Qwen3 configuration."""
    refuse(config, "attention_bias")
    return Architecture(**decoder(config), window=_window(config), qk_norm=True)


def _window(config: Mapping[str, Any]) -> int | None:
    if not config.get("use_sliding_window"):
        return None
    return sliding_window(config, default=4096, first=config.get("max_window_layers", 28))


def _size(
    kind: str, layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab_size: int, head_dim: int, tied: bool
) -> dict[str, Any]:
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40960 if kind == "qwen3" else 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }  # fmt: skip


QWEN2 = Family(
    name="qwen2",
    hf_classes=("Qwen2ForCausalLM",),
    architecture=qwen2,
    weights=WEIGHTS,
    sizes={
        "qwen2.5-0.5b": _size("qwen2", 24, 896, 4864, 14, 2, 151936, 64, True),
        "qwen2.5-1.5b": _size("qwen2", 28, 1536, 8960, 12, 2, 151936, 128, True),
        "qwen2.5-7b": _size("qwen2", 28, 3584, 18944, 28, 4, 152064, 128, False),
        "qwen2.5-14b": _size("qwen2", 48, 5120, 13824, 40, 8, 152064, 128, False),
        "qwen2.5-32b": _size("qwen2", 64, 5120, 27648, 40, 8, 152064, 128, False),
        "qwen2.5-72b": _size("qwen2", 80, 8192, 29568, 64, 8, 152064, 128, False),
    },
    template="qwen",
)

QWEN3 = Family(
    name="qwen3",
    hf_classes=("Qwen3ForCausalLM",),
    architecture=qwen3,
    weights=WEIGHTS,
    sizes={
        "qwen3-0.6b": _size("qwen3", 28, 1024, 3072, 16, 8, 151936, 128, True),
        "qwen3-1.7b": _size("qwen3", 28, 2048, 6144, 16, 8, 151936, 128, True),
        "qwen3-4b": _size("qwen3", 36, 2560, 9728, 32, 8, 151936, 128, True),
        "qwen3-8b": _size("qwen3", 36, 4096, 12288, 32, 8, 151936, 128, False),
        "qwen3-14b": _size("qwen3", 40, 5120, 17408, 40, 8, 151936, 128, False),
        "qwen3-32b": _size("qwen3", 64, 5120, 25600, 64, 8, 151936, 128, False),
    },
    template="qwen",
)
