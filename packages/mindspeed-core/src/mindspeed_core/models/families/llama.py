"""Llama 1, 2 and 3 and their like (TinyLlama, SmolLM2, stories): RMSNorm, SwiGLU, rotary, grouped queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_core.errors import InputError
from mindspeed_core.models.family import Architecture, Family, Weight, gated, qkv, replicated, row, vocab


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rope_scaling from either spelling of config.json.

    transformers 5 writes one `rope_parameters` mapping; before, there were `rope_theta` and `rope_scaling`.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    return {"rope_theta": float(theta), "rope_scaling": None if kind == "default" else parameters}


def refuse(config: Mapping[str, Any], *switches: str) -> None:
    """Raise where the configuration asks for what the table below has no rows for."""
    for switch in switches:
        if config.get(switch):
            raise InputError(
                f"config.json: {switch}={config[switch]} is not supported for {config.get('architectures')}"
            )
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"config.json: hidden_act={config['hidden_act']} is not supported; this family computes SwiGLU (silu)"
        )


def require(config: Mapping[str, Any], *keys: str) -> None:
    """Raise where the configuration lacks a size without which no model can be built."""
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise InputError(f"config.json: {', '.join(missing)} missing; {config.get('architectures')} needs it")


def decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that all Llama-like configurations share."""
    require(config, "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab_size": config["vocab_size"],
        "max_positions": config.get("max_position_embeddings", 2048),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied": config.get("tie_word_embeddings", False),
        "init_std": config.get("initializer_range", 0.02),
        **rope(config),
    }


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Llama configuration; biased projections exist in no released checkpoint."""
    refuse(config, "attention_bias", "mlp_bias")
    return Architecture(**decoder(config))


WEIGHTS = (
    Weight("embedding.word_embeddings.weight", vocab, "model.embed_tokens.weight", "v h"),
    Weight("decoder.layers.{i}.input_layernorm.weight", replicated, "model.layers.{i}.input_layernorm.weight", "h", init="ones"),
    Weight("decoder.layers.{i}.self_attention.linear_qkv.weight", qkv, "model.layers.{i}.self_attn.{q,k,v}_proj.weight", "nd h|gd h|gd h"),
    Weight("decoder.layers.{i}.self_attention.linear_qkv.bias", qkv, "model.layers.{i}.self_attn.{q,k,v}_proj.bias", "nd|gd|gd", when="qkv_bias", init="zeros"),
    Weight("decoder.layers.{i}.self_attention.q_layernorm.weight", replicated, "model.layers.{i}.self_attn.q_norm.weight", "d", when="qk_norm", init="ones"),
    Weight("decoder.layers.{i}.self_attention.k_layernorm.weight", replicated, "model.layers.{i}.self_attn.k_norm.weight", "d", when="qk_norm", init="ones"),
    Weight("decoder.layers.{i}.self_attention.linear_proj.weight", row, "model.layers.{i}.self_attn.o_proj.weight", "h nd", init="scaled"),
    Weight("decoder.layers.{i}.pre_mlp_layernorm.weight", replicated, "model.layers.{i}.post_attention_layernorm.weight", "h", init="ones"),
    Weight("decoder.layers.{i}.mlp.linear_fc1.weight", gated, "model.layers.{i}.mlp.{gate,up}_proj.weight", "f h"),
    Weight("decoder.layers.{i}.mlp.linear_fc2.weight", row, "model.layers.{i}.mlp.down_proj.weight", "h f", init="scaled"),
    Weight("decoder.final_layernorm.weight", replicated, "model.norm.weight", "h", init="ones"),
    Weight("output_layer.weight", vocab, "lm_head.weight", "v h", when="untied"),
)  # fmt: skip


def _size(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab_size: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": hidden // heads,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **more,
    }


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

LLAMA = Family(
    name="llama",
    hf_classes=("LlamaForCausalLM",),
    architecture=architecture,
    weights=WEIGHTS,
    sizes={
        "llama2-7b": _size(32, 4096, 11008, 32, 32, 32000),
        "llama2-13b": _size(40, 5120, 13824, 40, 40, 32000),
        "llama2-70b": _size(80, 8192, 28672, 64, 8, 32000),
        "llama3-8b": _size(
            32, 4096, 14336, 32, 8, 128256, max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
        "llama3.1-8b": _size(32, 4096, 14336, 32, 8, 128256, max_position_embeddings=131072, rope_parameters=_LLAMA3_ROPE),
        "llama3.1-70b": _size(80, 8192, 28672, 64, 8, 128256, max_position_embeddings=131072, rope_parameters=_LLAMA3_ROPE),
        "llama3.2-1b": _size(
            16, 2048, 8192, 32, 8, 128256, tie_word_embeddings=True, max_position_embeddings=131072,
            rope_parameters={**_LLAMA3_ROPE, "factor": 32.0},
        ),
        "tinyllama-1.1b": _size(22, 2048, 5632, 32, 4, 32000, max_position_embeddings=2048),
        "smollm2-135m": _size(
            30, 576, 1536, 9, 3, 49152, tie_word_embeddings=True, max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        ),
    },
    template="llama2",
)  # fmt: skip
