"""Tokens into hidden states, by a matrix whose rows are cut over the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mindspeed_core.kernels import Kernels


class Embedding(MegatronModule):
    """Tokens [b, s] to hidden states [s, b, h], under sequence parallelism [s / tp, b, h]."""

    def __init__(self, config: TransformerConfig, padded_vocab: int, *, kernels: Kernels, tp_group: Any) -> None:
        super().__init__(config=config)
        self.word_embeddings = _Rows(
            padded_vocab,
            config.hidden_size,
            init_method=config.embedding_init_method,
            config=config,
            tp_group=tp_group,
            kernels=kernels,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, group = self.word_embeddings(tokens).transpose(0, 1).contiguous(), self.word_embeddings.tp_group
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(hidden, group=group)
        return reduce_from_tensor_model_parallel_region(hidden, group=group)


class _Rows(VocabParallelEmbedding):
    """Megatron's weight, under the name that its pipelines look for; each rank returns zeros for the rows of others."""

    def __init__(self, *args: Any, kernels: Kernels, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernel = kernels.embedding

    def forward(self, input_: Tensor) -> Tensor:
        group: Any = self.tp_group
        if group.size() == 1:
            return self.kernel(input_, self.weight)
        own = input_ - self.vocab_start_index
        elsewhere = (own < 0) | (own >= self.num_embeddings_per_partition)
        return self.kernel(own.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[..., None], 0.0)
