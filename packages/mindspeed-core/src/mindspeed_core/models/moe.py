"""The mixture of experts of one layer: router, experts, shared experts, and the way of the tokens between them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules, apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from mindspeed_core.kernels import Kernels
from mindspeed_core.kernels.matmul import Product
from mindspeed_core.models import balance
from mindspeed_core.models.balance import Tally
from mindspeed_core.models.expert_config import ExpertsConfig
from mindspeed_core.models.family import Architecture
from mindspeed_core.models.router import Choice, Setting, route, within_capacity
from mindspeed_core.parallel.expert import DISPATCHERS, Chosen, ExpertGroups


class MoE(MegatronModule):
    """A mixture of experts: [s, b, h] -> [s, b, h], with s cut over the tp ranks under sequence parallelism."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        arch: Architecture,
        kernels: Kernels,
        settings: ExpertsConfig,
        shared: MLPSubmodules,
        groups: Any,
    ) -> None:
        super().__init__(config=config)
        assert arch.experts is not None
        self.settings, self.kernels = settings, kernels
        self.tp = groups.tp
        self.groups = ExpertGroups(arch.experts.count, groups.ep, groups.expt_tp, groups.tp_ep)
        self.router = Router(config, arch, sequence_group=groups.tp_cp)
        self.experts = Experts(config, arch, self.groups, kernels, grouped=settings.grouped, data_group=groups.expt_dp)
        self.shared_experts = None
        if arch.shared_experts:
            self.shared_experts = SharedExperts(config, arch, shared, groups.tp, data_group=groups.dp_cp)

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Return the output and no bias, as Megatron's layer expects.

        In the argument that this layer calls `padding_mask` the model hands on the weight of each token's loss [s, b],
        in a pass that has one.
        """
        shared: list[Tensor] = []

        def compute_shared() -> None:
            if self.shared_experts is not None:
                shared.append(self.shared_experts.say(hidden))

        whole = self.tp.size() > 1 and not self.config.sequence_parallel
        tokens = hidden.flatten(0, 1)
        total = len(tokens)
        if whole:  # every tp rank has all tokens: each takes a share
            tokens = F.pad(tokens, (0, 0, 0, -total % self.tp.size()))
            tokens = scatter_to_sequence_parallel_region(tokens, group=self.tp)
        choice = self.router(tokens, padding_mask)
        chosen, capacity = self._chosen(choice)
        overlap = self.settings.overlap
        sent = DISPATCHERS[self.settings.dispatcher](
            tokens,
            chosen,
            self.groups,
            self.kernels.permute,
            capacity=capacity if self.settings.pad_to_capacity else None,
            meanwhile=compute_shared if overlap else None,
        )
        out = sent.combine(self.experts(sent.rows, sent.counts))
        if whole:
            out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False, group=self.tp)[:total]
        out = out.view_as(hidden)
        if not overlap:
            compute_shared()
        return out + shared[0] if shared else out, None

    def _chosen(self, choice: Choice) -> tuple[Chosen, int | None]:
        """Return which experts compute which tokens, and how many rows an expert takes; None: all there are."""
        if self.settings.capacity_factor is None:
            return Chosen(choice.experts, choice.weights), None
        tokens, k = choice.experts.shape
        count = self.groups.count
        capacity = math.ceil(tokens * k / count * self.settings.capacity_factor)
        fits = within_capacity(choice, capacity, count, self.settings.drop)
        return Chosen(choice.experts.masked_fill(~fits, count), choice.weights * fits), capacity


class Router(torch.nn.Module):
    """Chooses the experts of each token. It computes in fp32 whatever the model does: a rounded logit changes a choice."""

    def __init__(self, config: TransformerConfig, arch: Architecture, *, sequence_group: Any) -> None:
        super().__init__()
        assert arch.experts is not None
        self.experts = arch.experts
        self.sequence_group = sequence_group  # the ranks that share a sequence
        self.tally = Tally()
        device = "cpu" if config.use_cpu_initialization else None
        count = self.experts.count
        self.weight = torch.nn.Parameter(torch.empty(count, arch.hidden_size, dtype=config.params_dtype, device=device))
        # each rank routes its share of the positions only: Megatron sums the gradients of parameters marked so
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.expert_bias: Tensor | None
        bias = torch.zeros(count, dtype=torch.float32, device=device) if self.experts.bias else None
        self.register_buffer("expert_bias", bias)
        self.follows_load = bias is not None and self.experts.router == "noaux_tc"  # others choose without the bias
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(count, dtype=torch.float32, device=device), persistent=False)

    def forward(self, tokens: Tensor, token_weights: Tensor | None) -> Choice:
        """Route tokens [t, h]; with their weights in the loss [s, b], the terms that keep the experts even are attached."""
        learns = token_weights is not None and self.training
        seen = tokens.float()
        if learns and self.experts.jitter:
            seen = seen * torch.empty_like(seen).uniform_(1 - self.experts.jitter, 1 + self.experts.jitter)
        logits = F.linear(seen, self.weight.float())
        choice = route(logits, Setting(self.experts, self.expert_bias, draws=learns))
        # a pass without gradients is an evaluation, or will be made again when it is recomputed
        if not learns or not torch.is_grad_enabled():
            return choice
        assert token_weights is not None
        if self.follows_load:
            each = token_weights.reshape(-1, 1).expand_as(choice.experts)
            self.counts.scatter_add_(0, choice.experts.flatten(), each.flatten())
        loss, sums = balance.losses(logits, choice, self.experts, token_weights, self.sequence_group)
        self.tally.add(sums)
        return Choice(choice.experts, balance.attach(choice.weights, loss), choice.likelihood)


class Experts(MegatronModule):
    """The experts of this rank, named by their numbers in the layer."""

    def __init__(
        self,
        config: TransformerConfig,
        arch: Architecture,
        groups: ExpertGroups,
        kernels: Kernels,
        *,
        grouped: bool,
        data_group: Any,
    ) -> None:
        super().__init__(config=config)
        self.kernels, self.grouped = kernels, grouped
        self.activation = kernels.swiglu  # recompute puts another way of calling it here
        self.local_experts = torch.nn.ModuleDict(
            {str(e): Expert(config, arch, groups.etp, data_group=data_group) for e in groups.local}
        )

    def forward(self, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Return what each expert says of its rows: [r, h] -> [r, h], a part of the sum where etp cuts the experts."""
        experts: list[Any] = list(self.local_experts.values())
        if self.grouped:
            product = self.kernels.grouped_matmul
            inner = product(rows, [expert.linear_fc1.weight for expert in experts], counts)
            return product(self.activation(inner), [expert.linear_fc2.weight for expert in experts], counts)
        parts = zip(experts, rows.split(counts), strict=True)
        return torch.cat([expert(part, self.kernels.matmul, self.activation) for expert, part in parts])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None, **_: Any
    ) -> ShardedStateDict:
        """Ask every expert: Megatron takes what lies in a container of torch to be whole on every rank."""
        state: ShardedStateDict = {}
        experts: list[tuple[str, Any]] = list(self.local_experts.items())
        for number, expert in experts:
            state |= expert.sharded_state_dict(f"{prefix}local_experts.{number}.", sharded_offsets, metadata)
        return state


class Expert(MegatronModule):
    """The weights of one expert, or of this rank's slice of it."""

    def __init__(self, config: TransformerConfig, arch: Architecture, etp: Any, *, data_group: Any) -> None:
        super().__init__(config=config)
        assert arch.experts is not None
        self.etp, self.data_group = etp, data_group
        width = arch.experts.ffn_hidden_size // etp.size()
        self.linear_fc1 = Linear(config, 2 * width, arch.hidden_size)
        self.linear_fc2 = Linear(config, arch.hidden_size, width)

    def forward(self, rows: Tensor, product: Product, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what this expert alone says of its rows [r, h]."""
        return product(activation(product(rows, self.linear_fc1.weight)), self.linear_fc2.weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None, **_: Any
    ) -> ShardedStateDict:
        """Tell Megatron's checkpoints which slice of which tensor this rank holds."""
        state: ShardedStateDict = {}
        for name, linear, axis in (("linear_fc1", self.linear_fc1, 0), ("linear_fc2", self.linear_fc2, 1)):
            key = f"{prefix}{name}.weight"
            tensor = make_tp_sharded_tensor_for_checkpoint(
                linear.weight,
                key,
                axis,
                prepend_offsets=sharded_offsets,
                tp_group=self.etp,
                dp_cp_group=self.data_group,
            )
            state[key] = apply_swiglu_sharded_factory(tensor, sharded_offsets) if linear is self.linear_fc1 else tensor
        return state


class Linear(torch.nn.Module):
    """A weight [out, in] of an expert."""

    def __init__(self, config: TransformerConfig, out: int, into: int) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else None
        self.weight = torch.nn.Parameter(torch.empty(out, into, dtype=config.params_dtype, device=device))
        # Megatron's mark of a gradient that is summed over the ranks that hold this expert, not over all of dp
        self.weight.allreduce = False  # type: ignore[attr-defined]


class SharedExperts(MLP):
    """The experts that every token meets: one feed-forward layer, cut over tp like any other."""

    def __init__(
        self, config: TransformerConfig, arch: Architecture, submodules: MLPSubmodules, tp: Any, *, data_group: Any
    ) -> None:
        assert arch.experts is not None
        # Megatron's layer takes the width of its second linear from the configuration, whatever it is told
        own = copy.copy(config)
        own.ffn_hidden_size = arch.experts.shared_ffn_hidden_size
        super().__init__(own, submodules, ffn_hidden_size=own.ffn_hidden_size, tp_group=tp)
        self.data_group = data_group
        self.gate_weight = None
        if arch.experts.shared_gate:
            device = "cpu" if config.use_cpu_initialization else None
            self.gate_weight = torch.nn.Parameter(
                torch.empty(1, arch.hidden_size, dtype=config.params_dtype, device=device)
            )
            self.gate_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def say(self, hidden: Tensor) -> Tensor:
        """Return what they say of hidden [s, b, h]."""
        out, _bias = self(hidden)
        if self.gate_weight is None:
            return out
        return out * F.linear(hidden, self.gate_weight).sigmoid()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Add the gate to what Megatron's own layer tells its checkpoints."""
        state: ShardedStateDict = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.gate_weight is not None:
            own = {"gate_weight": self.gate_weight}
            state |= make_sharded_tensors_for_checkpoint(
                own, prefix, sharded_offsets=sharded_offsets, tp_group=self.tp_group, dp_cp_group=self.data_group
            )
        return state
