"""DeepSeek-V2 and V2-Lite: latent attention, and behind the first layers many small experts beside shared ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_core.errors import InputError
from mindspeed_core.models.families.llama import WEIGHTS as LLAMA_WEIGHTS
from mindspeed_core.models.families.llama import decoder, refuse, require
from mindspeed_core.models.family import (
    Architecture,
    Experts,
    Family,
    Latent,
    RouterKind,
    Weight,
    column,
    gated,
    replicated,
    router_of,
    row,
)

ROUTERS: dict[str, RouterKind] = {"greedy": "softmax_topk", "group_limited_greedy": "group_limited_greedy"}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a DeepSeek-V2 configuration."""
    method = config.get("topk_method") or "greedy"
    if method not in ROUTERS:
        raise InputError(f"config.json: topk_method={method} is not supported; supported are {', '.join(ROUTERS)}")
    own: RouterKind = ROUTERS[method]
    return latent_decoder(config, router=router_of(config, own), normalize=config.get("norm_topk_prob") or False)


def latent_decoder(config: Mapping[str, Any], **experts: Any) -> Architecture:
    """Return what DeepSeek's models have in common: latent attention, and experts of which the given fields are their own."""
    refuse(config, "attention_bias", "mlp_bias")
    require(
        config,
        *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    )
    latent = Latent(
        rank=config["kv_lora_rank"],
        nope_dim=config["qk_nope_head_dim"],
        rope_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
        query_rank=config.get("q_lora_rank"),
    )
    width = config["moe_intermediate_size"]
    common: dict[str, Any] = {
        "count": config["n_routed_experts"],
        "top_k": config["num_experts_per_tok"],
        "ffn_hidden_size": width,
        "shared_ffn_hidden_size": width * (config.get("n_shared_experts") or 0),
        "first_dense": config.get("first_k_dense_replace", 0),
        "every": config.get("moe_layer_freq", 1),
        "groups": config.get("n_group") or 1,
        "topk_groups": config.get("topk_group") or 1,
        "scaling": config.get("routed_scaling_factor", 1.0),
        "balance": "sequence" if config.get("seq_aux", True) else "micro_batch",
        "aux_loss": config.get("aux_loss_alpha", 0.001),
    }
    shape: dict[str, Any] = {**decoder(config), "head_dim": latent.nope_dim + latent.rope_dim}
    shape["num_query_groups"] = shape["num_heads"]  # every head has keys of its own, made from the one latent
    return Architecture(**shape, latent=latent, experts=Experts(**common, **experts))


ATTENTION = (
    Weight("decoder.layers.{i}.self_attention.linear_q_proj.weight", column, "model.layers.{i}.self_attn.q_proj.weight", "nd h", when="plain_query"),
    Weight("decoder.layers.{i}.self_attention.linear_q_down_proj.weight", replicated, "model.layers.{i}.self_attn.q_a_proj.weight", "ql h", when="query_latent"),
    Weight("decoder.layers.{i}.self_attention.q_layernorm.weight", replicated, "model.layers.{i}.self_attn.q_a_layernorm.weight", "ql", when="query_latent", init="ones"),
    Weight("decoder.layers.{i}.self_attention.linear_q_up_proj.weight", column, "model.layers.{i}.self_attn.q_b_proj.weight", "nd ql", when="query_latent"),
    Weight("decoder.layers.{i}.self_attention.linear_kv_down_proj.weight", replicated, "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight", "lr h"),
    Weight("decoder.layers.{i}.self_attention.kv_layernorm.weight", replicated, "model.layers.{i}.self_attn.kv_a_layernorm.weight", "l", init="ones"),
    Weight("decoder.layers.{i}.self_attention.linear_kv_up_proj.weight", column, "model.layers.{i}.self_attn.kv_b_proj.weight", "nkv l"),
    Weight("decoder.layers.{i}.self_attention.linear_proj.weight", row, "model.layers.{i}.self_attn.o_proj.weight", "h nv", init="scaled"),
)  # fmt: skip

FEED_FORWARD = (
    Weight("decoder.layers.{i}.mlp.linear_fc1.weight", gated, "model.layers.{i}.mlp.{gate,up}_proj.weight", "f h", only="dense"),
    Weight("decoder.layers.{i}.mlp.linear_fc2.weight", row, "model.layers.{i}.mlp.down_proj.weight", "h f", only="dense", init="scaled"),
    Weight("decoder.layers.{i}.mlp.router.weight", replicated, "model.layers.{i}.mlp.gate.weight", "e h", only="experts"),
    Weight("decoder.layers.{i}.mlp.experts.local_experts.{e}.linear_fc1.weight", gated, "model.layers.{i}.mlp.experts.{e}.{gate,up}_proj.weight", "ef h", only="experts"),
    Weight("decoder.layers.{i}.mlp.experts.local_experts.{e}.linear_fc2.weight", row, "model.layers.{i}.mlp.experts.{e}.down_proj.weight", "h ef", only="experts", init="scaled"),
    Weight("decoder.layers.{i}.mlp.shared_experts.linear_fc1.weight", gated, "model.layers.{i}.mlp.shared_experts.{gate,up}_proj.weight", "sf h", only="experts", when="shared_experts"),
    Weight("decoder.layers.{i}.mlp.shared_experts.linear_fc2.weight", row, "model.layers.{i}.mlp.shared_experts.down_proj.weight", "h sf", only="experts", when="shared_experts", init="scaled"),
)  # fmt: skip

WEIGHTS = (
    LLAMA_WEIGHTS[0],
    Weight("decoder.layers.{i}.input_layernorm.weight", replicated, "model.layers.{i}.input_layernorm.weight", "h", init="ones"),
    *ATTENTION,
    Weight("decoder.layers.{i}.pre_mlp_layernorm.weight", replicated, "model.layers.{i}.post_attention_layernorm.weight", "h", init="ones"),
    *FEED_FORWARD,
    *LLAMA_WEIGHTS[-2:],
)  # fmt: skip


def _size(layers: int, hidden: int, ffn: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "vocab_size": 102400,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 163840,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        **more,
    }


DEEPSEEK2 = Family(
    name="deepseek2",
    hf_classes=("DeepseekV2ForCausalLM",),
    architecture=architecture,
    weights=WEIGHTS,
    sizes={
        "deepseek-v2-lite": _size(
            27, 2048, 10944, 16, n_routed_experts=64, moe_intermediate_size=1408, topk_method="greedy",
            n_group=1, topk_group=1, routed_scaling_factor=1.0,
        ),
        "deepseek-v2": _size(
            60, 5120, 12288, 128, q_lora_rank=1536, n_routed_experts=160, moe_intermediate_size=1536,
            topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0,
        ),
    },
    template="empty",
    routers={router: {"topk_method": method} for method, router in ROUTERS.items()},
)  # fmt: skip
