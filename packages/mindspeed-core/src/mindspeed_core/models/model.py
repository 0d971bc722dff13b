"""The language model of one pipeline chunk: embedding, decoder layers, output layer, each where it belongs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mindspeed_core.kernels import Kernels, alibi, cross_entropy, matmul
from mindspeed_core.kernels.segments import Segments
from mindspeed_core.memory.recompute import Block
from mindspeed_core.models import balance, rope
from mindspeed_core.models.attention import AttentionPlan, Cache
from mindspeed_core.models.embedding import Embedding
from mindspeed_core.models.expert_config import ExpertsConfig
from mindspeed_core.models.family import Architecture
from mindspeed_core.models.layer import block_spec
from mindspeed_core.parallel.context import ContextSplit
from mindspeed_core.parallel.linear import ColumnLinear


class LanguageModel(LanguageModule):
    """The part of a decoder-only language model that one pipeline stage holds, or one chunk of a stage.

    The first one turns tokens into hidden states, the last one hidden states into logits or a loss; between stages
    travel hidden states [s, b, h] (s/tp under sequence parallelism), put in by `set_input_tensor`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        arch: Architecture,
        kernels: Kernels,
        *,
        layers: range,
        padded_vocab: int,
        first: bool,
        last: bool,
        pg_collection: Any,
        chunk: int | None = None,
        context: ContextSplit | None = None,
        experts: ExpertsConfig | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.vp_stage = chunk  # Megatron's name for which of its stage's chunks this is; None where there is one
        self.arch, self.kernels, self.context = arch, kernels, context
        self.model_type = ModelType.encoder_or_decoder  # Megatron's schedules ask for it
        self.pre_process, self.post_process = first, last  # Megatron's schedules and tied embeddings read these names
        self.share_embeddings_and_output_weights = arch.tied
        inverse, self.rope_factor = rope.frequencies(arch)
        self.rope_inverse: Tensor
        self.register_buffer("rope_inverse", inverse, persistent=False)
        self.alibi = None
        if arch.alibi:
            dealt = [pg_collection.tp] if context is None else [pg_collection.tp, context.ulysses.group]
            slopes = alibi.slopes(arch.num_heads)
            for group in dealt:  # the heads that are attended on this rank
                slopes = slopes.chunk(group.size())[group.rank()]
            self.alibi = alibi.Alibi(slopes)
        if first:
            self.embedding = Embedding(config, padded_vocab, kernels=kernels, tp_group=pg_collection.tp)
        self.decoder = Block(
            config,
            block_spec(arch, kernels, layers, groups=pg_collection, experts=experts or ExpertsConfig()),
            pre_process=first,
            post_process=last,
            pg_collection=pg_collection,
            vp_stage=chunk,
        )
        if last:
            self.output_layer = ColumnLinear.of(
                arch.hidden_size,
                padded_vocab,
                config=config,
                skip_weight_param_allocation=arch.tied and first,  # the embedding of this very stage serves
                tp_group=pg_collection.tp,
                kernels=kernels,
            )
        if first or last:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Put in what the stage before sent; called by Megatron's schedules."""
        tensor: Any = input_tensor[0] if isinstance(input_tensor, list) else input_tensor  # None on the first stage
        self.decoder.set_input_tensor(tensor)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        padding: Sequence[int] | None = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Run this stage.

        Under context parallelism every tensor comes whole to all ranks of a sequence; s of the result is this rank's share.

        Args:
            tokens: [b, s]; every stage needs their shape, the first one their values.
            positions: [b, s], by default counted from the length of the cache.
            mask: bool [b or 1, 1, s, t], True where a query sees a key; by default causal.
            cache: past keys and values, which this pass extends by s positions; attention is causal then.
            padding: with a cache, how many positions at the beginning of each row hold nothing; by default none.
            labels: [b, s], already shifted.
            weights: [b, s] fp32, the weight of each token's loss; 0 leaves a token out.
            segments: [b, s] integers, which document of its row a token belongs to; documents do not see one another.

        Returns:
            Before the last stage hidden states [s, b, h]. On the last one, with labels, the fp32 sum over all tokens of
            weight * cross entropy; without, this rank's columns of the logits [b, s, padded_vocab / tp].
        """
        hidden = self.hidden_states(
            tokens,
            positions=positions,
            mask=mask,
            cache=cache,
            padding=padding,
            segments=segments,
            weights=weights,
        )
        if not self.post_process:
            return hidden
        if labels is None:
            return self.logits(hidden).transpose(0, 1)
        assert weights is not None, "labels need the weight of each token"
        if self.context is not None:
            labels, weights = self.context.share(labels), self.context.share(weights)
        # every rank of the tensor-parallel group sees all positions and makes its share of their gradient
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return cross_entropy.chunked(
            hidden.flatten(0, 1),
            self._head(),
            labels.T.reshape(-1),
            weights.T.reshape(-1),
            vocab_size=self.arch.vocab_size,
            group=self.tp_group,
            chunk=self.kernels.cross_entropy_chunk,
            product=self.kernels.matmul,
            wide=self.kernels.matmul is matmul.cpu and matmul.widens(),
        )

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        padding: Sequence[int] | None = None,
        segments: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [s, b, h] that this stage's layers make; the arguments are those of `forward`."""
        if positions is None:
            past = 0 if cache is None else cache.length
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
            if padding is not None and any(padding):
                positions = (positions - torch.tensor(padding, device=tokens.device)[:, None]).clamp_min(0)
        across, window = None, self.arch.window
        if self.context is not None:
            assert cache is None, "a cache holds whole sequences"
            how = {"mask": mask, "segments": segments, "window": window, "alibi": self.alibi}
            across = self.context.plan(tokens.shape[1], **how)
            tokens, positions = self.context.share(tokens), self.context.share(positions)
        cos, sin = (None, None) if self.arch.alibi else self.angles(positions)
        if across is not None:
            plan = AttentionPlan(cos, sin, context=across)
        elif cache is not None:
            assert mask is None, "a cache is attended causally"
            assert segments is None, "a cache holds one document per row"
            extent = cache.extent(tokens.shape[1], padding, window)
            plan = AttentionPlan(cos, sin, cache=cache, extent=extent, alibi=self.alibi)
        else:
            documents = None if segments is None else Segments.of(segments)
            plan = AttentionPlan(cos, sin, mask, segments=documents, window=window, alibi=self.alibi)
        hidden = self.embedding(tokens) if self.pre_process else None
        routed = None if weights is None or self.arch.experts is None else self._own(weights)
        # what Megatron calls `padding_mask` goes unread to where the experts are chosen
        out: Any = self.decoder(hidden, attention_mask=None, packed_seq_params=plan, padding_mask=routed)
        return out

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [s, b, 1, d] of positions [b, s], as the attention of this model takes them."""
        dtype = self.config.params_dtype
        return rope.angles(positions, self.rope_inverse, self.rope_factor, dtype, interleaved=self.arch.interleaved)

    def _own(self, weights: Tensor) -> Tensor:
        """Return the weights [s, b] of the positions whose experts this rank chooses."""
        own = (weights if self.context is None else self.context.share(weights)).T
        if self.config.sequence_parallel:
            tp = self.pg_collection.tp
            own = own.chunk(tp.size())[tp.rank()]
        return own

    def logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's columns of the logits [s, b, padded_vocab / tp] of the last stage's hidden states [s, b, h]."""
        logits, _bias = self.output_layer(hidden, weight=self._head())
        return logits

    def _head(self) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.arch.tied else self.output_layer.weight
        return F.normalize(weight) if self.arch.normed_head else weight

    def full_logits(self, logits: Tensor) -> Tensor:
        """Return the logits [b, s, vocab_size] of all tensor-parallel ranks, without the padding."""
        return gather_from_tensor_model_parallel_region(logits, group=self.tp_group)[..., : self.arch.vocab_size]

    def finish_batch(self) -> None:
        """Do what is due once per global batch, when the gradients of all its micro batches are there; collective."""
        balance.update_biases([self], self.pg_collection.tp_dp_cp)

    def new_cache(self, batch: int, max_length: int) -> Cache:
        """Return an empty cache for this stage's layers."""
        weight, latent = next(self.parameters()), self.arch.latent
        if latent is None:
            heads = self.arch.num_query_groups // self.pg_collection.tp.size()
            widths = ((heads, self.arch.head_dim), (heads, self.arch.head_dim))
        else:
            widths = ((1, latent.rank), (1, latent.rope_dim))  # of all heads, whole on every rank
        blocks: Any = self.decoder.layers
        layers = [layer.layer_number for layer in blocks]
        return Cache(layers, max_length, batch, widths, weight.dtype, weight.device)
