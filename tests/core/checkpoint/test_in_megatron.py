"""A converted folder is Megatron's own: its GPTModel loads the file as it is, and computes what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_core.checkpoint import open_checkpoint
from mindspeed_core.checkpoint.megatron import write_megatron
from mindspeed_core.checkpoint.megatron_layout import Layout
from tests.core.models.tiny import hf_model
from tests.harness import run_ranks
from tests.tiny_checkpoint import hf_folder

TOKENS = torch.arange(24).view(2, 12) % 37


def megatron_logits(folder: Path) -> torch.Tensor:
    """Build Megatron's model from the stored arguments, load the stored weights strictly, and run it."""
    from mindspeed_core import megatron
    from mindspeed_core.device import Device

    megatron.load(Device.open("cpu"))
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # without Transformer Engine its router asks for a name that is not there
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    document = torch.load(folder / "iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False)
    args = document["args"]
    experts: dict[str, Any] = {}
    if args.num_experts is not None:
        experts = {
            "num_moe_experts": args.num_experts,
            "moe_router_topk": args.moe_router_topk,
            "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
            "moe_layer_freq": args.moe_layer_freq,
            "moe_grouped_gemm": args.moe_grouped_gemm,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        qk_layernorm=args.qk_layernorm,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        window_size=args.window_size,
        hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        attention_softmax_in_fp32=True,
        params_dtype=args.params_dtype,
        **experts,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(
            num_experts=args.num_experts,
            moe_grouped_gemm=False,
            qk_layernorm=args.qk_layernorm,
            normalization=args.normalization,
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )
    wanted = {name for name in model.state_dict() if not name.endswith("_extra_state")}
    assert wanted == set(document["model"])
    model.load_state_dict(document["model"], strict=False)
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    mask = torch.ones(TOKENS.shape[1], TOKENS.shape[1], dtype=torch.bool).triu(1)[None, None]  # True: may not attend
    with torch.no_grad():
        return model.eval()(TOKENS, positions, mask)[..., : args.vocab_size]


@pytest.mark.parametrize(
    ("kind", "tied", "groups"),
    [
        ("llama", False, 2),
        ("llama", True, 4),
        ("qwen2", False, 2),
        ("qwen3", True, 1),
        ("mistral", False, 2),
        ("mixtral", False, 4),
    ],
)
def test_megatrons_own_model_computes_the_same_logits(tmp_path: Path, kind: str, tied: bool, groups: int) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "hf"
    if kind in ("mistral", "mixtral"):
        hf_model(kind, tied=tied, groups=groups).save_pretrained(source)
    else:
        hf_folder(source, kind, tied=tied, groups=groups, layers=2)
    write_megatron(open_checkpoint(source), tmp_path / "mcore", layout=Layout(vocab_divisor=8))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(TOKENS).logits
    (found,) = run_ranks(megatron_logits, 1, tmp_path / "mcore")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)  # random weights make logits of about 100
