"""The arguments that Megatron stores with a checkpoint: what we write of them, and what we read."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from mindspeed_core.checkpoint.megatron_layout import Layout
from mindspeed_core.models.family import Architecture
from mindspeed_core.models.split import command_option
from mindspeed_core.parallel.pipeline import Placement


def megatron_args(arch: Architecture, layout: Layout, dtype: torch.dtype) -> Namespace:
    """Return the arguments that Megatron stores with a checkpoint and compares when it loads one."""
    scaling = arch.rope_scaling or {}
    placement = layout.placement(arch)
    each = [len(placement.chunk_slots(stage)) for stage in range(layout.pp)]
    return Namespace(
        num_layers=placement.slots,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_heads,
        kv_channels=arch.head_dim,
        group_query_attention=arch.num_query_groups != arch.num_heads,
        num_query_groups=arch.num_query_groups,
        seq_length=arch.max_positions,
        max_position_embeddings=arch.max_positions,
        position_embedding_type="alibi" if arch.alibi else "rope",
        add_position_embedding=True,  # Megatron's default; it is compared and means nothing with rope
        use_rotary_position_embeddings=not arch.alibi,
        rotary_base=arch.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=scaling.get("rope_type") == "llama3",
        rope_scaling_factor=scaling.get("factor", 8.0),
        normalization="RMSNorm",
        norm_epsilon=arch.norm_eps,
        qk_layernorm=arch.qk_norm,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        window_size=None if arch.window is None else (arch.window - 1, 0),  # positions before a query and behind it
        untie_embeddings_and_output_weights=arch.untied,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **_expert_args(arch, layout),
        **_latent_args(arch),
        make_vocab_size_divisible_by=layout.vocab_divisor,
        vocab_size=arch.vocab_size,
        padded_vocab_size=layout.padded_vocab(arch),
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_per_virtual_pipeline_stage=each[0] if layout.vpp > 1 else None,
        num_layer_list=None if placement.even else each,
        noop_layers=set(layout.noop_layers) or None,
        context_parallel_size=1,
        expert_model_parallel_size=layout.ep,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        transformer_impl="local",
        use_mcore_models=True,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )


def _expert_args(arch: Architecture, layout: Layout) -> dict[str, Any]:
    experts = arch.experts
    if experts is None:
        return {"num_experts": None}
    return {
        "num_experts": experts.count,
        "expert_tensor_parallel_size": layout.tp,
        "moe_grouped_gemm": False,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_layer_freq": [int(arch.has_experts(layer)) for layer in range(arch.num_layers)],
        "moe_router_topk": experts.top_k,
    }


def _latent_args(arch: Architecture) -> dict[str, Any]:
    latent = arch.latent
    if latent is None:
        return {}
    return {
        "multi_latent_attention": True,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.rank,
        "qk_head_dim": latent.nope_dim,
        "qk_pos_emb_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
    }


def arguments(document: Any) -> Namespace:
    """Return the arguments in a rank's file; empty where it holds none."""
    args = document.get("args") if isinstance(document, dict) else None
    return args if isinstance(args, Namespace) else Namespace()


def said_placement(args: Namespace, arch: Architecture, *, pp: int, vpp: int) -> Placement | None:
    """Return the placement with the noop layers that the stored arguments name; None where they name none that fit."""
    said = getattr(args, "noop_layers", None)
    numbers = said.split(",") if isinstance(said, str) else said if isinstance(said, set | list | tuple) else ()
    if not numbers or not all(str(number).strip().isdigit() for number in numbers):
        return None
    placement = Placement(num_layers=arch.num_layers, pp=pp, vpp=vpp, noop_layers=tuple(sorted(map(int, numbers))))
    return None if placement.problems(command_option) else placement
