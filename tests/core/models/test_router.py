"""Every router decides what a plain loop and the transformers model of its family decide, with the same gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mindspeed_core.models import balance
from mindspeed_core.models.family import Experts
from mindspeed_core.models.router import Choice, Setting, route, sinkhorn, within_capacity

TOKENS, COUNT, HIDDEN = 40, 8, 16


def _experts(router: Any, **more: Any) -> Experts:
    return Experts(**{"count": COUNT, "top_k": 2, "ffn_hidden_size": 8, "router": router, **more})


def _logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(TOKENS, COUNT, generator=generator) * 2).requires_grad_()


def _dense(experts: Tensor, weights: Tensor) -> Tensor:
    """The weight of every expert for every token: what does not depend on the order of the choice."""
    return torch.zeros(len(experts), COUNT).scatter(1, experts, weights)


def _loop(row: list[float], setting: dict[str, Any], bias: list[float]) -> dict[int, float]:
    """One token's experts and weights, written out."""
    kind, k = setting["router"], setting.get("top_k", 2)
    groups, kept = setting.get("groups", 1), setting.get("topk_groups", 1)
    high = max(row)
    odds = [math.exp(x - high) for x in row]
    scores = [x / sum(odds) for x in odds]
    if kind == "noaux_tc":
        scores = [1 / (1 + math.exp(-x)) for x in row]
    ranked = [score + extra for score, extra in zip(scores, bias, strict=True)] if kind == "noaux_tc" else list(scores)
    if kind in ("group_limited_greedy", "noaux_tc"):
        size = len(row) // groups
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        best = [sorted((ranked[e] for e in of), reverse=True)[: 2 if kind == "noaux_tc" else 1] for of in members]
        order = sorted(range(groups), key=lambda g: -sum(best[g]))[:kept]
        ranked = [value if e // size in order else -math.inf for e, value in enumerate(ranked)]
    chosen = sorted(range(len(row)), key=lambda e: -ranked[e])[:k]
    weights = {e: scores[e] for e in chosen}
    total = sum(weights.values())
    scaling = setting.get("scaling", 1.0)
    if kind == "aux_loss" or (setting.get("normalize") and kind != "group_limited_greedy"):
        return {e: weight / total * scaling for e, weight in weights.items()}
    if setting.get("normalize"):
        return {e: weight / total for e, weight in weights.items()}
    return {e: weight * scaling for e, weight in weights.items()}


@pytest.mark.parametrize(
    "setting",
    [
        {"router": "aux_loss"},
        {"router": "softmax_topk", "top_k": 3},
        {"router": "softmax_topk", "normalize": True},
        {"router": "group_limited_greedy", "groups": 4, "topk_groups": 2, "scaling": 16.0},
        {"router": "group_limited_greedy", "groups": 2, "topk_groups": 1, "normalize": True, "scaling": 16.0},
        {"router": "noaux_tc", "groups": 4, "topk_groups": 2, "top_k": 3, "normalize": True, "scaling": 2.5},
        {"router": "noaux_tc", "top_k": 1, "normalize": False},
    ],
    ids=str,
)
def test_a_router_decides_what_a_plain_loop_decides(setting: dict[str, Any]):
    logits, bias = _logits(), torch.linspace(-0.3, 0.3, COUNT)
    choice = route(logits, Setting(_experts(**setting), bias))
    expected = [_loop(row, setting, bias.tolist()) for row in logits.tolist()]
    for experts, weights, one in zip(choice.experts.tolist(), choice.weights.tolist(), expected, strict=True):
        assert dict(zip(experts, weights, strict=True)) == pytest.approx(one, rel=1e-5)
    torch.testing.assert_close(choice.likelihood.sum(-1), torch.ones(TOKENS))


def _oracle(kind: str) -> tuple[Any, dict[str, Any], Any]:
    """A router of transformers, what it is for us, and how it is called: hidden [t, h] -> (weights, experts)."""
    shape = {"hidden_size": HIDDEN, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    if kind == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter as Router

        config: Any = transformers.MixtralConfig(**shape, num_local_experts=COUNT)
        ours: dict[str, Any] = {"router": "aux_loss"}
    elif kind.startswith("qwen"):
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as Router

        normalize = kind == "qwen3"
        config = transformers.Qwen3MoeConfig(**shape, num_experts=COUNT, norm_topk_prob=normalize)
        ours = {"router": "softmax_topk", "normalize": normalize}
    elif kind == "deepseek2":
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter as Router

        groups = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}
        config = transformers.DeepseekV2Config(**shape, n_routed_experts=COUNT, **groups)
        ours = {"router": "group_limited_greedy", "groups": 4, "topk_groups": 2, "scaling": 16.0}
    else:
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter as Router

        groups = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
        config = transformers.DeepseekV3Config(**shape, n_routed_experts=COUNT, **groups)
        ours = {"router": "noaux_tc", "groups": 4, "topk_groups": 2, "normalize": True, "scaling": 2.5}
    return Router(config), ours, config


@pytest.mark.parametrize("kind", ["mixtral", "qwen2", "qwen3", "deepseek2", "deepseek3"])
def test_a_router_decides_what_transformers_decides(kind: str):
    torch.manual_seed(0)
    oracle, ours, _config = _oracle(kind)
    with torch.no_grad():
        oracle.weight.normal_()
        if kind == "deepseek3":
            oracle.e_score_correction_bias.uniform_(-0.5, 0.5)
    hidden = torch.randn(TOKENS, HIDDEN)
    _, weights, experts = oracle(hidden)
    expected = _dense(experts, weights)
    weight = oracle.weight.detach().clone().requires_grad_()
    choice = route(hidden @ weight.T, Setting(_experts(**ours), getattr(oracle, "e_score_correction_bias", None)))
    got = _dense(choice.experts, choice.weights)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    target = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad((expected * target).sum(), oracle.weight)
    (grad,) = torch.autograd.grad((got * target).sum(), weight)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6 * expected_grad.abs().max().item())


class _DrawnOnce(Tensor):
    """For its second expert transformers draws what it has drawn already."""

    def uniform_(self) -> Tensor:  # type: ignore[override]
        return self


@pytest.mark.parametrize("draws", [False, True])
def test_sparsemixer_is_that_of_transformers(draws: bool, monkeypatch: pytest.MonkeyPatch):
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits, target = _logits(), torch.randn(TOKENS, 2)
    logits.data[:10] = 5 + logits.data[:10] * 0.02  # close enough for the second best to be drawn at times
    torch.manual_seed(3)
    choice = route(logits, Setting(_experts("sparsemixer"), draws=draws))
    torch.manual_seed(3)
    oracle_logits = logits.detach().clone().requires_grad_()
    drawn = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda scores: drawn(scores).as_subclass(_DrawnOnce))
    weights, experts = sparsemixer(oracle_logits, jitter_eps=0.01, training=draws)
    assert torch.equal(choice.experts, experts)
    third = 1 / 3 / 0.3333 - 1  # what it writes for a third
    torch.testing.assert_close(choice.weights, weights.as_subclass(Tensor), rtol=third + 1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad((choice.weights * target).sum(), logits)
    (expected,) = torch.autograd.grad((weights * target).sum(), oracle_logits)
    torch.testing.assert_close(grad, expected, rtol=2e-4, atol=1e-5)
    if draws:
        assert not torch.equal(experts[:, 0], logits.argmax(-1))


def _scaled(logits: list[list[float]]) -> list[list[float]]:
    """Rows and columns of exp(logits) scaled in turn, until nothing moves any more."""
    plan = [[math.exp(value) for value in row] for row in logits]
    for _ in range(300):
        plan = [[value / sum(row) / TOKENS for value in row] for row in plan]
        sums = [sum(column) for column in zip(*plan, strict=True)]
        plan = [[value / of / COUNT for value, of in zip(row, sums, strict=True)] for row in plan]
    return plan


def test_sinkhorn_is_a_plain_loop_of_scaling():
    logits = _logits().detach()
    # ours ends when the factors of columns move by less than 1e-4
    torch.testing.assert_close(sinkhorn(logits), torch.tensor(_scaled(logits.tolist())), rtol=2e-3, atol=0)


def test_sinkhorn_gives_every_expert_as_much():
    logits = _logits().detach()
    plan = sinkhorn(logits)
    assert plan.sum(0).tolist() == pytest.approx([1 / COUNT] * COUNT, rel=1e-2)
    assert plan.sum(1).tolist() == pytest.approx([1 / TOKENS] * TOKENS, rel=5e-2)
    learns = route(logits, Setting(_experts("sinkhorn"), draws=True))
    chosen = [sorted(range(COUNT), key=lambda e: -row[e])[:2] for row in _scaled(logits.tolist())]
    assert learns.experts.tolist() == chosen
    torch.testing.assert_close(learns.weights, logits.softmax(-1).gather(-1, learns.experts))
    plain = route(logits, Setting(_experts("sinkhorn", top_k=1)))
    assert torch.equal(plain.experts[:, 0], logits.argmax(-1))
    torch.testing.assert_close(plain.weights[:, 0], logits.amax(-1).sigmoid())
    assert route(logits[:0], Setting(_experts("sinkhorn"), draws=True)).experts.shape == (0, 2)


@pytest.mark.parametrize("drop", ["probs", "position"])
@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_an_expert_takes_no_more_than_its_capacity(drop: str, capacity: int):
    choice = route(_logits().detach(), Setting(_experts("aux_loss")))
    fits = within_capacity(choice, capacity, COUNT, drop)
    for expert in range(COUNT):
        pairs = [
            (-choice.weights[t, j].item() if drop == "probs" else t, t, j)
            for t in range(TOKENS)
            for j in range(2)
            if choice.experts[t, j] == expert
        ]
        expected = {(t, j) for _, t, j in sorted(pairs)[:capacity]}
        assert {(t, j) for _, t, j in pairs if fits[t, j]} == expected


class _Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1


def _losses(choice: Choice, logits: Tensor, experts: Experts, weights: Tensor) -> tuple[Tensor, Tensor]:
    return balance.losses(logits, choice, experts, weights, _Alone())  # type: ignore[arg-type]


@pytest.mark.parametrize("router", ["aux_loss", "noaux_tc"])
def test_the_balance_loss_is_the_formula_of_each_sequence_weighted_by_its_tokens(router: Any):
    experts = _experts(router, balance="sequence", aux_loss=1.0, bias=True)
    logits, weights = _logits(), torch.rand(10, 4)  # [s, b], token i of the flat order is position i // 4 of row i % 4
    bias = torch.linspace(-1, 1, COUNT)
    choice = route(logits, Setting(experts, bias))
    loss, sums = _losses(choice, logits, experts, weights)
    scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True) if router == "noaux_tc" else logits.softmax(-1)
    total = torch.zeros(())
    for row in range(4):
        own = weights[:, row]
        tokens = range(row, TOKENS, 4)
        p = sum(w * scores[t] for w, t in zip(own, tokens, strict=True)) / own.sum()
        f = torch.zeros(COUNT)
        for w, t in zip(own, tokens, strict=True):
            for expert in choice.experts[t]:
                f[expert] += w * COUNT / (2 * own.sum())
        total = total + (f * p).sum() * own.sum()  # type: ignore[operator]
    torch.testing.assert_close(loss, total)
    assert sums[-1].item() == pytest.approx(weights.sum().item())
    # the gradient of the loss is that of the likelihoods alone: neither the counts nor the bias pass any on
    (grad,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(grad, expected)


def test_tokens_without_weight_count_for_nothing():
    experts = _experts("aux_loss", aux_loss=0.5, z_loss=0.25)
    logits, weights = _logits(), torch.ones(10, 4)
    weights[7:] = 0
    whole, sums = _losses(route(logits, Setting(experts)), logits, experts, weights)
    part = logits[:28]
    alone, same = _losses(route(part, Setting(experts)), part, experts, weights[:7])
    torch.testing.assert_close(whole, alone)
    torch.testing.assert_close(sums, same)
    z = part.logsumexp(-1).square().sum()
    torch.testing.assert_close(whole, 0.5 * sums[0] + 0.25 * z)


def test_equal_likelihoods_have_a_balance_loss_of_one():
    logits = torch.zeros(TOKENS, COUNT)
    experts = _experts("aux_loss", aux_loss=1.0)
    _, sums = _losses(route(logits, Setting(experts)), logits, experts, torch.ones(10, 4))
    assert (sums[0] / sums[-1]).item() == pytest.approx(1.0)


def test_groups_are_balanced_by_what_they_compute_and_by_what_they_receive():
    experts = _experts(
        "group_limited_greedy", groups=2, topk_groups=1, balance="sequence", device_loss=1.0, communication_loss=0.5
    )
    logits, weights = _logits(), torch.rand(10, 4)
    choice = route(logits, Setting(experts))
    loss, sums = _losses(choice, logits, experts, weights)
    device = communication = torch.zeros(())
    size, scores = COUNT // 2, logits.softmax(-1)
    for row in range(4):
        own, tokens = weights[:, row], range(row, TOKENS, 4)
        for group in range(2):
            members = range(group * size, (group + 1) * size)
            p = sum(w * scores[t, e] for w, t in zip(own, tokens, strict=True) for e in members) / own.sum()
            chosen = [[int(e) in members for e in choice.experts[t]] for t in tokens]
            load = sum(w * sum(hits) for w, hits in zip(own, chosen, strict=True)) / own.sum() / size
            receives = sum(w * any(hits) for w, hits in zip(own, chosen, strict=True)) / own.sum()
            device = device + COUNT / 2 * load * p * own.sum()  # two experts of a token
            communication = communication + 2 / 1 * receives * p * own.sum()  # one group of two
    torch.testing.assert_close(loss, device + 0.5 * communication)
    torch.testing.assert_close(sums[1:3], torch.stack([device, communication]).detach())
    (grad,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(device + 0.5 * communication, logits)
    torch.testing.assert_close(grad, expected)


def test_an_attached_loss_gets_its_gradient_whatever_that_of_the_tensor():
    x, other = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    (balance.attach(x, (other * torch.tensor([2.0, 3.0])).sum()) * 100).sum().backward()
    assert [tensor.grad.tolist() for tensor in (x, other) if tensor.grad is not None] == [[100.0] * 3, [2.0, 3.0]]


class _Router(torch.nn.Module):
    """What `update_biases` sees of a router."""

    follows_load = True

    def __init__(self, counts: list[float], rate: float) -> None:
        super().__init__()
        self.tally = balance.Tally()
        self.experts = _experts("noaux_tc", bias=True, bias_update_rate=rate)
        self.expert_bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
        self.counts = torch.tensor(counts).float()


def test_a_bias_rises_where_an_expert_had_less_than_the_mean():
    routers = torch.nn.ModuleList([_Router([1, 2, 3, 6], 0.1), _Router([8, 0, 2, 2], 0.2)])
    balance.update_biases([routers], _Alone())  # type: ignore[arg-type]
    found: list[Any] = list(routers)
    assert found[0].expert_bias.tolist() == pytest.approx([0.6, 0.1, -0.5, -0.1])
    assert found[1].expert_bias.tolist() == pytest.approx([0.3, 0.2, -0.3, 0.2])
    assert not any(router.counts.any() for router in found)
