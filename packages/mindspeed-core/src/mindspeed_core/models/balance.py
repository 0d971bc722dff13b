"""How evenly tokens are spread over the experts: the balance loss, the z-loss, the bias that follows the load.

The loss of a run is a sum over tokens that one division by the tokens of the global batch ends. A balance loss is a mean,
so it is multiplied by the tokens it was taken over, with each token counted by its weight in the loss: padding and what is
not learned count for nothing, and the terms of all micro batches and ranks add up to their mean over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_core.models.family import Experts
from mindspeed_core.models.router import Choice

TERMS = ("aux_loss", "device_loss", "communication_loss", "z_loss")


class Tally:
    """What one layer's router has added up since it was last asked: sums over tokens of each term, and of their weights."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # [*TERMS, weights]

    def add(self, sums: Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self) -> Tensor | None:
        sums, self.sums = self.sums, None
        return sums


def losses(
    logits: Tensor, choice: Choice, experts: Experts, weights: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return (this rank's share of the terms to learn from, [*TERMS, weights] summed over its tokens).

    The balance loss of a set of tokens is e / k * sum over experts of f * p, with f the share of tokens that chose the
    expert and p the mean of its likelihood: 1 when all are equal (Fedus et al., 2021). f has no gradient, so the share of
    each rank is a sum over its own tokens, and only counts travel.

    Where a router chooses groups first, which stand on different devices, DeepSeek-V2 (2024, equations 26 to 31) adds two
    of the same kind over the g groups, with p the sum over the group's experts: e / k * sum of f * p, f the mean of its
    experts' (the device's load), and g / groups chosen * sum of f * p, f the share of tokens that it receives.

    Args:
        logits: fp32 [s * b, e].
        choice: of the same tokens, before any was dropped.
        weights: fp32 [s, b], the weight of each token.
        group: the ranks that share these sequences (tensor and context parallel).
    """
    count, k, groups = experts.count, choice.experts.shape[1], experts.groups
    each = weights[..., None]  # [s, b, 1]
    likely = (choice.likelihood.view(*weights.shape, count) * each).sum(0)  # [b, e]
    with torch.no_grad():
        hits = torch.zeros_like(logits).scatter_(1, choice.experts, 1.0).view(*weights.shape, count)
        sent = hits.unflatten(-1, (groups, -1)).amax(-1)
        seen = (torch.cat([hits, sent, torch.ones_like(each)], -1) * each).sum(0)  # [b, e + g + 1]
        if group.size() > 1:
            dist.all_reduce(seen, group=group)
        if experts.balance == "micro_batch":
            seen = seen.sum(0, keepdim=True)
        share, receives, _ = (seen / seen[:, -1:].clamp(min=1e-20)).split((count, groups, 1), 1)
        load = share.unflatten(1, (groups, -1)).mean(-1)
    terms = {
        "aux_loss": count / k * (share * likely).sum(),
        "z_loss": (logits.logsumexp(-1).square() * weights.flatten()).sum(),
    }
    if groups > 1:
        by_group = likely.unflatten(1, (groups, -1)).sum(-1)
        terms["device_loss"] = count / k * (load * by_group).sum()
        terms["communication_loss"] = groups / experts.topk_groups * (receives * by_group).sum()
    nothing = logits.new_zeros(())
    sums = torch.stack([*(terms.get(name, nothing).detach() for name in TERMS), weights.sum()])
    return sum((getattr(experts, name) * term for name, term in terms.items()), nothing), sums


def attach(x: Tensor, loss: Tensor) -> Tensor:
    """Return x; where its gradient comes by, `loss` gets the gradient of a loss of its own."""
    return _Attach.apply(x, loss)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def take_terms(chunks: Sequence[Any], device: torch.device) -> Tensor:
    """Return what the routers of these chunks have added up, [*TERMS, weights], and let them forget it.

    Divided by the last after a sum over all ranks, each is a mean over tokens and layers.
    """
    total = torch.zeros(len(TERMS) + 1, device=device)
    for router in _routers(chunks):
        sums = router.tally.take()
        if sums is not None:
            total += sums
    return total


@torch.no_grad()
def update_biases(chunks: Sequence[Any], group: dist.ProcessGroup) -> None:
    """Move the bias of every expert by its rate, up where it had less than the mean of its layer and down where more.

    Once per global batch; `group` holds all ranks that saw other tokens (tensor, context and data parallel).
    """
    routers = [router for router in _routers(chunks) if router.follows_load]
    if not routers:
        return
    counts = torch.stack([router.counts for router in routers])
    if group.size() > 1:
        dist.all_reduce(counts, group=group)
    ahead = counts.mean(1, keepdim=True) - counts
    for router, difference in zip(routers, ahead.sign(), strict=True):
        router.expert_bias += router.experts.bias_update_rate * difference
        router.counts.zero_()


def _routers(chunks: Sequence[Any]) -> Iterator[Any]:
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(getattr(module, "tally", None), Tally):
                yield module
