"""Section `experts` of a recipe: how a mixture of experts is balanced, dispatched and computed."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import Field

from mindspeed_core.models.family import Architecture, Balance, RouterKind
from mindspeed_core.recipe import Section


class ExpertsConfig(Section):
    """Section `experts`. What is null is as the model's own configuration says."""

    dispatcher: Literal["alltoall", "allgather"] = "alltoall"  # how tokens reach their experts
    overlap: bool = False  # shared experts compute while the tokens travel
    grouped: bool = True  # the products of all experts in one call; false: one expert after another
    router: RouterKind | None = None
    aux_loss: float | None = Field(None, ge=0)  # coefficient of the balance loss
    balance: Balance | None = None  # the tokens it is taken over
    device_loss: float | None = Field(None, ge=0)  # coefficient of the balance of groups by what their experts compute
    communication_loss: float | None = Field(None, ge=0)  # ... by the tokens that they receive
    z_loss: float | None = Field(None, ge=0)  # coefficient of the mean of logsumexp(logits)^2
    jitter: float | None = Field(None, ge=0, lt=1)  # random factor on what the router sees
    bias_update_rate: float | None = Field(None, ge=0)  # of the bias of noaux_tc, once per global batch
    capacity_factor: float | None = Field(None, gt=0)  # rows of an expert over an even share; null: nothing is dropped
    pad_to_capacity: bool = False  # every expert computes as many rows as its capacity, zeros if need be
    drop: Literal["probs", "position"] = "probs"  # who is left out: the smallest weights, or those that come last

    def applied(self, arch: Architecture) -> Architecture:
        """Return the architecture with what this section replaces."""
        if arch.experts is None:
            return arch
        names = (
            "router",
            "aux_loss",
            "balance",
            "device_loss",
            "communication_loss",
            "z_loss",
            "jitter",
            "bias_update_rate",
        )
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(arch, experts=dataclasses.replace(arch.experts, **changes))

    def problems(self, arch: Architecture) -> list[str]:
        """Return what keeps a model of this architecture from being run so; one line per rule broken."""
        changed = sorted(self.model_fields_set)
        if arch.experts is None:
            if self != ExpertsConfig():
                return [f"experts.{changed[0]}: the model has no experts; leave the section out"]
            return []
        found, experts = [], self.applied(arch).experts
        assert experts is not None
        if experts.router == "noaux_tc" and not experts.bias:
            found.append("experts.router=noaux_tc: needs a bias of each expert, which this model lacks; use aux_loss")
        if experts.router == "sparsemixer" and experts.top_k != 2:
            found.append(f"experts.router=sparsemixer: chooses 2 experts, the model {experts.top_k}; use softmax_topk")
        if self.router == "group_limited_greedy" and experts.groups == 1:
            found.append(f"experts.router={self.router}: chooses groups first, the model has none; use softmax_topk")
        if self.bias_update_rate is not None and experts.router != "noaux_tc":
            found.append(
                f"experts.bias_update_rate: moves the bias of noaux_tc, and router={experts.router} has none; leave it out"
            )
        for name in ("device_loss", "communication_loss"):
            if getattr(self, name) and experts.groups == 1:
                found.append(f"experts.{name}: balances groups of experts, and this model has none; leave it out")
        if self.overlap and not arch.shared_experts:
            found.append(
                "experts.overlap: needs shared experts to compute meanwhile, which the model lacks; leave it out"
            )
        if self.pad_to_capacity and self.capacity_factor is None:
            found.append("experts.pad_to_capacity: needs a capacity; set experts.capacity_factor too")
        if self.pad_to_capacity and self.dispatcher == "allgather":
            found.append(
                "experts.pad_to_capacity: allgather sends no rows to pad; leave it out, or use dispatcher=alltoall"
            )
        if self.drop != "probs" and self.capacity_factor is None:
            found.append(
                f"experts.drop={self.drop}: without a capacity nothing is dropped; set experts.capacity_factor too"
            )
        if self.capacity_factor is not None and experts.router not in ("aux_loss", "softmax_topk"):
            found.append(
                f"experts.capacity_factor: drops tokens, which router={experts.router} does not expect; leave it out"
            )
        return found
