"""Builds the model of this rank: the only writer of Megatron's TransformerConfig."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch.nn.functional as F

from mindspeed_core.errors import InputError
from mindspeed_core.kernels import Kernels, matmul_collective, select
from mindspeed_core.memory.config import MemoryConfig
from mindspeed_core.models.expert_config import ExpertsConfig
from mindspeed_core.models.family import Architecture, pad_vocab
from mindspeed_core.models.split import recipe_key, split_problems
from mindspeed_core.parallel.context import ContextSplit, head_problems, ring_problems
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig
from mindspeed_core.parallel.pipeline import Placement
from mindspeed_core.precision import DTYPES, Precision


def check(arch: Architecture, parallel: ParallelConfig) -> list[str]:
    """Return what keeps a model of this architecture from being split so; one line per rule broken."""
    problems = split_problems(
        arch,
        tp=parallel.tp,
        placement=parallel.placement(arch),
        name=recipe_key,
        ep=parallel.ep,
        etp=parallel.etp,
    )
    if parallel.tp == 1 and parallel.collective_matmul != "none":
        problems.append(
            f"parallel.collective_matmul={parallel.collective_matmul}: overlaps the collectives of tp and needs tp of at "
            "least 2; leave it out"
        )
    problems += head_problems(parallel, arch.num_heads)
    return problems + ring_problems(parallel, window=arch.window, alibi=arch.alibi)


def fused_problems(arch: Architecture, parallel: ParallelConfig, precision: Precision) -> list[str]:
    """Return what keeps an NPU from fusing the products and collectives that `collective_matmul: mc2` asks for."""
    if parallel.collective_matmul != "mc2" or parallel.tp == 1:
        return []
    # without sp only the sums of the row linears are fused, whose operator takes any width
    features = _summed(arch, parallel.tp) if parallel.sp else {}
    return matmul_collective.problems(tp=parallel.tp, dtype=DTYPES[precision], features=features)


def _summed(arch: Architecture, tp: int) -> dict[str, int]:
    """Return the features that the linears beside a collective sum over, forward and back, by name."""
    heads, latent = arch.num_heads // tp, arch.latent
    found = {"hidden_size": arch.hidden_size}
    if latent is None:
        found["queries, keys and values"] = (arch.num_heads + 2 * arch.num_query_groups) // tp * arch.head_dim
        found["heads"] = heads * arch.head_dim
    else:
        found |= {"queries": heads * arch.head_dim, "kv_lora_rank": latent.rank}
        if latent.query_rank is not None:
            found["q_lora_rank"] = latent.query_rank
        found["keys and values"] = heads * (latent.nope_dim + latent.value_dim)
        found["heads"] = heads * latent.value_dim
    if not all(map(arch.has_experts, range(arch.num_layers))):
        found |= {"feed-forward": arch.ffn_hidden_size // tp, "gate and up": 2 * arch.ffn_hidden_size // tp}
    if arch.shared_experts:
        width = arch.dimension("sf") // tp
        found |= {"shared experts": width, "gate and up of shared experts": 2 * width}
    return found


def transformer_config(
    arch: Architecture, parallel: ParallelConfig, *, precision: Precision = "fp32", on_host: bool = True, **more: Any
) -> Any:
    """Return Megatron's TransformerConfig; `more` overrides fields of it by Megatron's names (schedules, recompute)."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = DTYPES[precision]
    fields: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "layernorm_epsilon": arch.norm_eps,
        "normalization": "RMSNorm",
        "qk_layernorm": arch.qk_norm,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "use_te_activation_func": True,  # Megatron's name for "the activation is a module of the spec"
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision == "bf16",
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "context_parallel_size": parallel.cp,
        "sequence_parallel": parallel.sp and parallel.tp > 1,
        "use_cpu_initialization": on_host,
        "perform_initialization": False,  # models/weights.py fills every parameter
        "calculate_per_token_loss": True,  # the loss is a mean over the tokens of the global batch
        "variable_seq_lengths": False,
        "moe_token_dispatcher_type": "alltoall",  # the other one refuses variable lengths, experts or not
        # Between chunks Megatron frees an output before it has waited for its send. Streams keep the memory until then;
        # on the host it would be overwritten while it is being sent.
        "deallocate_pipeline_outputs": parallel.vpp == 1 or not on_host,
        # fused paths that need apex or Transformer Engine
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    if parallel.pp > 1:
        fields["pipeline_model_parallel_layout"] = _megatron_layout(parallel.placement(arch))
    if parallel.vpp > 1:
        fields |= {
            "virtual_pipeline_model_parallel_size": parallel.vpp,
            # With two stages a rank's neighbours before and behind are one and the same, and without overlap Megatron sends
            # it activations and gradients in an order in which it does not expect them: the run goes on, and is wrong.
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own defaults for CUDA graphs
        return TransformerConfig(**{**fields, **more})


def _megatron_layout(placement: Placement) -> list[list[str]]:
    """Return what each chunk holds, in Megatron's words and order. It does not hear of noop layers: nothing is built for them."""
    layout = [["decoder"] * len(placement.layers(stage, chunk)) for stage, chunk in placement.chunks]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def build_model(
    arch: Architecture,
    mesh: Mesh,
    *,
    precision: Precision = "fp32",
    kernels: Kernels | None = None,
    memory: MemoryConfig | None = None,
    experts: ExpertsConfig | None = None,
    **more: Any,
) -> list[Any]:
    """Return this rank's LanguageModel chunks, one per pipeline chunk. Weights are allocated, not set."""
    experts = experts or ExpertsConfig()
    problems = check(arch, mesh.config) + experts.problems(arch)
    if mesh.device.type == "npu":
        problems += fused_problems(arch, mesh.config, precision)
    if problems:
        raise InputError("\n".join(problems))
    from mindspeed_core.memory import recompute, swap
    from mindspeed_core.models.model import LanguageModel

    memory = memory or MemoryConfig()
    if memory.recompute == "full":
        more |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}  # see Block
    config = transformer_config(arch, mesh.config, precision=precision, on_host=mesh.device.type == "cpu", **more)
    kernels = kernels or select(mesh.device)
    side = matmul_collective.select(
        mesh.config.collective_matmul, mesh.device.type, chunks=mesh.config.coc_chunks, product=kernels.matmul
    )
    kernels = dataclasses.replace(kernels, collectives=side)
    placement, stage = mesh.config.placement(arch), mesh.pp.rank
    chunks = [
        LanguageModel(
            config,
            arch,
            kernels,
            layers=placement.layers(stage, chunk),
            padded_vocab=pad_vocab(arch.vocab_size, mesh.tp.size),
            first=placement.is_first(stage, chunk),
            last=placement.is_last(stage, chunk),
            chunk=chunk if placement.vpp > 1 else None,
            pg_collection=mesh.groups,
            experts=experts,
            context=ContextSplit.of(mesh),
        )
        for chunk in range(placement.vpp)
    ]
    for place, chunk in enumerate(chunks):
        plan = memory.plan(len(placement.layers(stage, place)), chunk=place, chunks=placement.vpp)
        recompute.apply(chunk.decoder, plan, in_advance=memory.recompute_in_advance)
        swap.apply(chunk.decoder, plan, mesh.device, last=placement.is_last(stage, place))
    return [chunk.to(mesh.device.torch) for chunk in chunks]
