"""Baichuan and Baichuan2: Llama's table with queries, keys and values in one matrix; the models of 13B have linear biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mindspeed_core.models.families.llama import WEIGHTS as LLAMA_WEIGHTS
from mindspeed_core.models.families.llama import decoder, refuse
from mindspeed_core.models.family import Architecture, Family, Weight, qkv

SECOND = 125_696  # the vocabulary of Baichuan2, whose config.json says in no other way that its output rows are normed


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a Baichuan configuration: those with rotary positions say how many, the others do not."""
    refuse(config, "tie_word_embeddings")
    shape = decoder(config)
    alibi = config.get("max_position_embeddings") is None
    if alibi:
        shape["max_positions"] = config.get("model_max_length", 4096)
    return Architecture(**shape, alibi=alibi, normed_head=shape["vocab_size"] == SECOND)


def _parts(tensor: Tensor, arch: Architecture) -> Sequence[Tensor]:
    rows = [arch.num_heads * arch.head_dim] + 2 * [arch.num_query_groups * arch.head_dim]
    return tensor.split(rows)


packed_qkv = replace(
    qkv,
    name="packed_qkv",  # one Hugging Face tensor: all queries, then all keys, then all values
    pack=lambda tensors, arch: qkv.pack(_parts(tensors[0], arch), arch),
    unpack=lambda view, arch: [torch.cat(qkv.unpack(view, arch))],
)

WEIGHTS = tuple(
    Weight(row.megatron, packed_qkv, "model.layers.{i}.self_attn.W_pack.weight", "nggd h") if row.kind is qkv else row
    for row in LLAMA_WEIGHTS
    if row.when in (None, "untied")
)


def _size(layers: int, hidden: int, ffn: int, heads: int, vocab_size: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "model_max_length": 4096,
        **more,
    }


BAICHUAN = Family(
    name="baichuan",
    hf_classes=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    architecture=architecture,
    weights=WEIGHTS,
    sizes={
        "baichuan-7b": _size(32, 4096, 11008, 32, 64000, max_position_embeddings=4096),
        "baichuan-13b": _size(40, 5120, 13696, 40, 64000),
        "baichuan2-7b": _size(32, 4096, 11008, 32, SECOND, max_position_embeddings=4096),
        "baichuan2-13b": _size(40, 5120, 13696, 40, SECOND),
    },
    template="baichuan2",
)
