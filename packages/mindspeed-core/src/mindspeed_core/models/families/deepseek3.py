"""DeepSeek-V3, R1 and Moonlight: DeepSeek-V2's layers, whose experts are kept even by a bias in the choice, not by a loss alone.

Multi-token prediction is a model of its own beside this one, which transformers does not read either; a folder that holds its
layer is refused by the names of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_core.errors import InputError
from mindspeed_core.models.families.deepseek2 import WEIGHTS as DEEPSEEK2_WEIGHTS
from mindspeed_core.models.families.deepseek2 import latent_decoder
from mindspeed_core.models.family import Architecture, Family, Weight, replicated, router_of

GATE = "decoder.layers.{i}.mlp.router.weight"  # the row behind which the bias stands


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a DeepSeek-V3 configuration."""
    for key, own in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid"), ("rope_interleave", True)):
        if config.get(key, own) != own:
            raise InputError(f"config.json: {key}={config[key]} is not supported for DeepSeek-V3; it is {own}")
    normalize = config.get("norm_topk_prob", True)
    return latent_decoder(config, router=router_of(config, "noaux_tc"), normalize=normalize, bias=True)


BIAS = Weight("decoder.layers.{i}.mlp.router.expert_bias", replicated, "model.layers.{i}.mlp.gate.e_score_correction_bias", "e", only="experts", init="zeros")  # fmt: skip
WEIGHTS = tuple(row for known in DEEPSEEK2_WEIGHTS for row in ((known, BIAS) if known.megatron == GATE else (known,)))


def _size(layers: int, hidden: int, ffn: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **more,
    }


DEEPSEEK3 = Family(
    name="deepseek3",
    hf_classes=("DeepseekV3ForCausalLM",),
    architecture=architecture,
    weights=WEIGHTS,
    sizes={
        "deepseek-v3": _size(
            61, 7168, 18432, 128, q_lora_rank=1536, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
            moe_intermediate_size=2048, first_k_dense_replace=3, n_group=8, topk_group=4, routed_scaling_factor=2.5,
            vocab_size=129280, rms_norm_eps=1e-6, max_position_embeddings=163840,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "original_max_position_embeddings": 4096,
                "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        ),
        "moonlight-16b-a3b": _size(
            27, 2048, 11264, 16, q_lora_rank=None, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
            moe_intermediate_size=1408, first_k_dense_replace=1, n_group=1, topk_group=1, routed_scaling_factor=2.446,
            vocab_size=163840, rms_norm_eps=1e-5, max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        ),
    },
    template="deepseek3",
    routers={"noaux_tc": {}},
)  # fmt: skip
