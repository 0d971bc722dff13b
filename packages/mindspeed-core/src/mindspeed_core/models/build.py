"""Builds the model of this rank: the only writer of Megatron's TransformerConfig."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F

from mindspeed_core.errors import InputError
from mindspeed_core.kernels import Kernels, matmul_collective, select
from mindspeed_core.memory.config import MemoryConfig
from mindspeed_core.models.family import Architecture, pad_vocab
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig
from mindspeed_core.parallel.pipeline import stage_layers

Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check(arch: Architecture, parallel: ParallelConfig) -> list[str]:
    """Return what keeps a model of this architecture from being split so; one line per rule broken."""
    tp, pp, problems = parallel.tp, parallel.pp, []
    for name, size in (
        ("num_attention_heads", arch.num_heads),
        ("num_key_value_heads", arch.num_query_groups),
        ("intermediate_size", arch.ffn_hidden_size),
    ):
        if size % tp:
            problems.append(f"parallel.tp={tp} does not divide {name}={size}; use {_divisors(size)}")
    if tp == 1 and parallel.collective_matmul != "none":
        problems.append(
            f"parallel.collective_matmul={parallel.collective_matmul}: overlaps the collectives of tp and needs tp of at "
            "least 2; leave it out"
        )
    if pp > arch.num_layers:
        problems.append(f"parallel.pp={pp} is more stages than num_hidden_layers={arch.num_layers}; use fewer")
    return problems


def _divisors(size: int) -> str:
    found = [str(n) for n in range(1, size + 1) if size % n == 0]
    return " or ".join(found[:6])


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
    if arch.num_layers % parallel.pp:
        # Megatron divides evenly unless it is told what each stage holds
        stages = [["decoder"] * len(stage_layers(arch.num_layers, parallel.pp, i)) for i in range(parallel.pp)]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        fields["pipeline_model_parallel_layout"] = stages
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own defaults for CUDA graphs
        return TransformerConfig(**{**fields, **more})


def build_model(
    arch: Architecture,
    mesh: Mesh,
    *,
    precision: Precision = "fp32",
    kernels: Kernels | None = None,
    memory: MemoryConfig | None = None,
    **more: Any,
) -> list[Any]:
    """Return this rank's LanguageModel chunks, one per pipeline chunk. Weights are allocated, not set."""
    problems = check(arch, mesh.config)
    if problems:
        raise InputError("\n".join(problems))
    from mindspeed_core.memory import recompute
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
    model = LanguageModel(
        config,
        arch,
        kernels,
        layers=len(stage_layers(arch.num_layers, mesh.pp.size, mesh.pp.rank)),
        padded_vocab=pad_vocab(arch.vocab_size, mesh.tp.size),
        first=mesh.is_first_stage,
        last=mesh.is_last_stage,
        pg_collection=mesh.groups,
    )
    recompute.apply(model.decoder, memory.plan(len(model.decoder.layers)))
    return [model.to(mesh.device.torch)]
