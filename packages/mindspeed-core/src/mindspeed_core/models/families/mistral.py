"""Mistral 7B: Llama's table, in which a query may see a sliding window of the positions before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_core.errors import InputError
from mindspeed_core.models.families.llama import WEIGHTS, decoder, refuse
from mindspeed_core.models.family import Architecture, Family

SLIDING, FULL = "sliding_attention", "full_attention"  # what `layer_types` calls a layer


def sliding_window(config: Mapping[str, Any], *, default: int | None, first: int = 0) -> int | None:
    """Return how many positions a query sees in every layer; None: all.

    The configuration says it of the layers from `first` on, or by `layer_types` of each. `default` is what transformers takes
    where there is no such key.
    """
    window = config.get("sliding_window", default)
    if window is None:
        return None
    if not isinstance(window, int) or window < 1:
        raise InputError(f"config.json: sliding_window={window} is no number of positions; use null for all of them")
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or [SLIDING if layer >= first else FULL for layer in range(layers)]
    sliding = [kind == SLIDING for kind in kinds[:layers]]
    if any(sliding) and not all(sliding):
        raise InputError(
            f"config.json: {sum(sliding)} of {layers} layers have a sliding window (layer_types, or max_window_layers); "
            "supported is one window for all layers or for none"
        )
    return window if all(sliding) else None


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Mistral configuration."""
    refuse(config, "attention_bias", "mlp_bias")
    return Architecture(**decoder(config), window=sliding_window(config, default=4096))


def _size(vocab_size: int, window: int | None, theta: float) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "sliding_window": window,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


MISTRAL = Family(
    name="mistral",
    hf_classes=("MistralForCausalLM",),
    architecture=architecture,
    weights=WEIGHTS,
    sizes={
        "mistral-7b-v0.1": _size(32000, 4096, 10000.0),
        "mistral-7b-v0.2": _size(32000, None, 1000000.0),
        "mistral-7b-v0.3": _size(32768, None, 1000000.0),
    },
    template="mistral",
)
