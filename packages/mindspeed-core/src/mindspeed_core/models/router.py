"""Which experts compute a token, and with what weight: the routers, as functions of the logits.

    logits [t, e]  ->  experts [t, k], weights [t, k] and, for the balance loss, how likely each expert was [t, e]

Everything is fp32. What is chosen has no gradient; the weights and the likelihoods have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed_core.models.family import Experts

JITTER = 0.01  # how far below the best an expert may be and still be drawn by sparsemixer
THIRD = 1 / 3  # Heun's third-order method, of which the next two are the constants
PAST = 0.75
SINKHORN_TOLERANCE = 1e-4
SINKHORN_ROUNDS = 100


@dataclass(frozen=True)
class Choice:
    """What a router decides for t tokens."""

    experts: Tensor  # int64 [t, k]
    weights: Tensor  # fp32 [t, k]
    likelihood: Tensor  # fp32 [t, e], rows that sum to one


@dataclass(frozen=True)
class Setting:
    """What a router knows beside the logits."""

    experts: Experts
    bias: Tensor | None = None  # fp32 [e]
    draws: bool = False  # True while it learns: routers that draw at random do


def route(logits: Tensor, setting: Setting) -> Choice:
    """Return the choice of the architecture's router for logits [t, e]."""
    return ROUTERS[setting.experts.router](logits, setting)


def _softmax_of_chosen(logits: Tensor, setting: Setting) -> Choice:
    """Mixtral: the k largest logits, and the softmax over those k alone."""
    best, experts = logits.topk(setting.experts.top_k, -1)
    return Choice(experts, best.softmax(-1) * setting.experts.scaling, logits.softmax(-1))


def _chosen_of_softmax(logits: Tensor, setting: Setting) -> Choice:
    """Qwen: the softmax over all experts, and its k largest."""
    likelihood = logits.softmax(-1)
    weights, experts = likelihood.topk(setting.experts.top_k, -1)
    if setting.experts.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return Choice(experts, weights * setting.experts.scaling, likelihood)


def _group_limited(logits: Tensor, setting: Setting) -> Choice:
    """DeepSeek-V2: the k most likely experts of the groups whose best expert is most likely."""
    chosen = setting.experts
    likelihood = logits.softmax(-1)
    groups = _grouped(likelihood.detach(), chosen).amax(-1)
    experts = _within(likelihood.detach(), groups, chosen, hidden=0.0).topk(chosen.top_k, -1).indices
    weights = likelihood.gather(-1, experts)
    if chosen.normalize and chosen.top_k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    else:
        weights = weights * chosen.scaling
    return Choice(experts, weights, likelihood)


def _biased_sigmoid(logits: Tensor, setting: Setting) -> Choice:
    """DeepSeek-V3: chosen by sigmoid plus bias within the groups whose two best sum highest, weighed by sigmoid alone."""
    chosen = setting.experts
    scores = logits.sigmoid()
    ranked = scores.detach() if setting.bias is None else scores.detach() + setting.bias
    groups = _grouped(ranked, chosen).topk(min(2, chosen.count // chosen.groups), -1).values.sum(-1)
    experts = _within(ranked, groups, chosen, hidden=-torch.inf).topk(chosen.top_k, -1).indices
    weights = scores.gather(-1, experts)
    if chosen.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    # the bias steers what is chosen, never what is learned
    return Choice(experts, weights * chosen.scaling, scores / (scores.sum(-1, keepdim=True) + 1e-20))


def _grouped(scores: Tensor, experts: Experts) -> Tensor:
    return scores.unflatten(-1, (experts.groups, -1))


def _within(scores: Tensor, groups: Tensor, experts: Experts, *, hidden: float) -> Tensor:
    """Return the scores [t, e] with those outside the best groups hidden."""
    kept = torch.zeros_like(groups, dtype=torch.bool)
    kept.scatter_(-1, groups.topk(experts.topk_groups, -1).indices, True)
    return _grouped(scores, experts).masked_fill(~kept.unsqueeze(-1), hidden).flatten(-2)


def _sinkhorn(logits: Tensor, setting: Setting) -> Choice:
    """Chosen, while it learns, after scaling rows and columns until every expert has as much; weighed by the plain score."""
    k = setting.experts.top_k
    likelihood = logits.softmax(-1)
    scores = logits.sigmoid() if k == 1 else likelihood
    ranked = sinkhorn(logits.detach()) if setting.draws else scores.detach()
    experts = ranked.topk(k, -1).indices
    return Choice(experts, scores.gather(-1, experts) * setting.experts.scaling, likelihood)


def sinkhorn(logits: Tensor) -> Tensor:
    """Return exp(logits) [t, e], rows scaled to sum to 1 / t and columns to 1 / e (Sinkhorn and Knopp, 1967)."""
    tokens, experts = logits.shape
    if not tokens:
        return logits
    plan = (logits - logits.max()).exp()  # a common factor changes nothing, and keeps exp from overflowing
    columns = plan.new_ones(experts)
    rows = plan.new_ones(tokens)
    for _ in range(SINKHORN_ROUNDS):
        before = columns
        rows = 1 / tokens / ((plan * columns).sum(1) + 1e-8)
        columns = 1 / experts / ((plan * rows[:, None]).sum(0) + 1e-8)
        if (columns - before).abs().mean() <= SINKHORN_TOLERANCE:
            break
    return plan * columns * rows[:, None]


def _sparsemixer(logits: Tensor, setting: Setting) -> Choice:
    """Phi-3.5-MoE: two experts, one after the other, drawn at random while it learns (Liu et al., 2024)."""
    assert setting.experts.top_k == 2, "sparsemixer chooses two experts"
    first, weight = _drawn(logits, logits, draws=setting.draws)
    second, other = _drawn(logits, logits.detach().scatter(-1, first, -torch.inf), draws=setting.draws)
    weights = torch.cat([weight, other], -1) * setting.experts.scaling
    return Choice(torch.cat([first, second], -1), weights, logits.softmax(-1))


def _drawn(logits: Tensor, left: Tensor, *, draws: bool) -> tuple[Tensor, Tensor]:
    """Return one expert for each token [t, 1] of those `left` (not -inf), and its weight."""
    with torch.no_grad():
        best = left.amax(-1, keepdim=True)
        near = (best - logits) / torch.maximum(logits.abs(), best) <= 2 * JITTER
    # weights share the gradient of `logits` even where `left` was cut
    likelihood = logits.masked_fill(~near | left.isneginf(), -torch.inf).softmax(-1)
    if not draws:
        expert = left.argmax(-1, keepdim=True)
        return expert, likelihood.gather(-1, expert)
    # adding Gumbel noise and taking the largest draws from the softmax
    noise = -torch.empty_like(logits).exponential_().log()
    expert = (likelihood.detach().log() + noise).argmax(-1, keepdim=True)
    whole = expert == likelihood.argmax(-1, keepdim=True)
    whole |= torch.rand_like(best) > PAST
    scale = torch.where(whole, 1.0, THIRD)
    return expert, _MidpointGradient.apply(logits, likelihood.detach(), expert, scale)


class _MidpointGradient(torch.autograd.Function):
    """The weight of a drawn expert, scaled, whose gradient is that of the unscaled softmax at what was drawn."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, likelihood: Tensor, expert: Tensor, scale: Tensor) -> Tensor:
        weight = likelihood.gather(-1, expert)
        ctx.save_for_backward(likelihood, expert, weight)
        return weight * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        likelihood, expert, weight = ctx.saved_tensors
        flow = grad * weight
        return (-likelihood * flow).scatter_add(-1, expert, flow), None, None, None


ROUTERS: dict[str, Callable[[Tensor, Setting], Choice]] = {
    "aux_loss": _softmax_of_chosen,
    "softmax_topk": _chosen_of_softmax,
    "group_limited_greedy": _group_limited,
    "noaux_tc": _biased_sigmoid,
    "sinkhorn": _sinkhorn,
    "sparsemixer": _sparsemixer,
}


def within_capacity(choice: Choice, capacity: int, count: int, drop: str) -> Tensor:
    """Return which pairs [t, k] fit when each of `count` experts takes `capacity` of these tokens.

    `drop` says who is left out: `probs` those of the smallest weight, `position` those that come last.
    """
    experts = choice.experts.flatten()
    order = torch.arange(len(experts), device=experts.device)
    if drop == "probs":
        order = choice.weights.detach().flatten().argsort(descending=True, stable=True)
    order = order[experts[order].argsort(stable=True)]
    sizes = experts.bincount(minlength=count)
    place = torch.arange(len(experts), device=experts.device) - (sizes.cumsum(0) - sizes)[experts[order]]
    fits = torch.empty_like(order, dtype=torch.bool)
    fits[order] = place < capacity
    return fits.view_as(choice.experts)
