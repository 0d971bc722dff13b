"""One decoder layer as a Megatron spec: our norm, attention and activation on its parallel linears."""

from __future__ import annotations

from typing import cast

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from mindspeed_core.kernels import Kernels
from mindspeed_core.models.attention import SelfAttention
from mindspeed_core.models.family import Architecture
from mindspeed_core.models.norm import RMSNorm
from mindspeed_core.parallel.linear import ColumnLinear, RowLinear


class SwiGLU(MegatronModule):
    """The gated activation between the two linears of the feed-forward layer: [s, b, 2f/tp] -> [s, b, f/tp]."""

    def __init__(self, config: TransformerConfig, *, kernels: Kernels) -> None:
        super().__init__(config=config)
        self.kernel = kernels.swiglu

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x)


def block_spec(arch: Architecture, kernels: Kernels, layers: range) -> TransformerBlockSubmodules:
    """Return the spec of a stage with those layers, counted over the whole model from 0."""
    norm = ModuleSpec(RMSNorm, params={"kernels": kernels})
    layer = ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(SelfAttention, params={"arch": arch, "kernels": kernels}),
            self_attn_bda=cast("type", get_bias_dropout_add),
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ModuleSpec(ColumnLinear, params={"kernels": kernels}),
                    activation_func=ModuleSpec(SwiGLU, params={"kernels": kernels}),
                    linear_fc2=ModuleSpec(RowLinear, params={"kernels": kernels}),
                ),
            ),
            mlp_bda=cast("type", get_bias_dropout_add),
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * len(layers), layer_norm=norm)
