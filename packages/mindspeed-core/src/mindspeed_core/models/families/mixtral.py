"""Mixtral: Llama's attention, and in every layer a mixture of experts of which each token meets two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_core.models.families.llama import WEIGHTS as LLAMA_WEIGHTS
from mindspeed_core.models.families.llama import decoder, refuse
from mindspeed_core.models.families.mistral import sliding_window
from mindspeed_core.models.family import Architecture, Experts, Family, Weight, gated, replicated, router_of, row

DENSE = "decoder.layers.{i}.mlp."  # the rows that a mixture of experts replaces


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Mixtral configuration."""
    refuse(config, "attention_bias")
    experts = Experts(
        count=config.get("num_local_experts", 8),
        top_k=config.get("num_experts_per_tok", 2),
        ffn_hidden_size=config.get("intermediate_size", 0),
        router=router_of(config, "aux_loss"),
        aux_loss=config.get("router_aux_loss_coef", 0.02),
        jitter=config.get("router_jitter_noise") or 0.0,
    )
    return Architecture(**decoder(config), window=sliding_window(config, default=None), experts=experts)


WEIGHTS = (
    *(weight for weight in LLAMA_WEIGHTS[:-2] if not weight.megatron.startswith(DENSE)),
    Weight("decoder.layers.{i}.mlp.router.weight", replicated, "model.layers.{i}.block_sparse_moe.gate.weight", "e h"),
    Weight("decoder.layers.{i}.mlp.experts.local_experts.{e}.linear_fc1.weight", gated, "model.layers.{i}.block_sparse_moe.experts.{e}.{w1,w3}.weight", "ef h"),
    Weight("decoder.layers.{i}.mlp.experts.local_experts.{e}.linear_fc2.weight", row, "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight", "h ef", init="scaled"),
    *LLAMA_WEIGHTS[-2:],
)  # fmt: skip


def _size(
    layers: int, hidden: int, ffn: int, heads: int, vocab_size: int, positions: int, aux: float
) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": hidden // heads,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": aux,
        "router_jitter_noise": 0.0,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }


MIXTRAL = Family(
    name="mixtral",
    hf_classes=("MixtralForCausalLM",),
    architecture=architecture,
    weights=WEIGHTS,
    sizes={
        "mixtral-8x7b": _size(32, 4096, 14336, 32, 32000, 32768, 0.02),
        "mixtral-8x22b": _size(56, 6144, 16384, 48, 32000, 65536, 0.001),
    },
    template="llama2",
    routers={"aux_loss": {}},
)
