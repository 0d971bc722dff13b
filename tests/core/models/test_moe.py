"""Experts on several ranks are one loop over tokens and experts: outputs and every gradient, by either dispatcher."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_core.device import Device
from mindspeed_core.errors import InputError
from mindspeed_core.kernels import grouped_matmul, permute
from mindspeed_core.models.expert_config import ExpertsConfig
from mindspeed_core.models.families import family_of, preset
from mindspeed_core.models.family import Architecture, Experts
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig
from tests.core.models.tiny import StateTensors, config_of, hf_model
from tests.harness import run_ranks

COUNT, K, HIDDEN, WIDTH = 4, 2, 6, 8
TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}  # fp32, sums of a few terms in another order


@dataclass(frozen=True)
class Case:
    """What the ranks compute."""

    dispatcher: str
    tokens: tuple[int, ...]  # of each rank
    idle: tuple[int, ...] = ()  # experts that nobody chooses
    dropped: bool = False  # some pairs are left out
    capacity: int | None = None

    def data(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each rank: tokens [t, h], experts [t, k], weights [t, k]."""
        generator = torch.Generator().manual_seed(sum(self.tokens))
        found = []
        for size in self.tokens:
            scores = torch.rand(size, COUNT, generator=generator)
            scores[:, list(self.idle)] = -1
            weights, experts = scores.topk(K, -1)
            if self.dropped:
                lost = torch.rand(size, K, generator=generator) < 0.3
                experts, weights = experts.masked_fill(lost, COUNT), weights.masked_fill(lost, 0)
            found.append((torch.randn(size, HIDDEN, generator=generator), experts, weights))
        return found

    def target(self, rank: int) -> Tensor:
        return torch.randn(self.tokens[rank], HIDDEN, generator=torch.Generator().manual_seed(rank))


def _weights() -> tuple[Tensor, Tensor]:
    """fc1 [experts, gate|up, width, hidden], fc2 [experts, hidden, width]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(COUNT, 2, WIDTH, HIDDEN, generator=generator), torch.randn(
        COUNT, HIDDEN, WIDTH, generator=generator
    )


def dispatched(parallel: dict[str, Any], cases: list[Case]) -> list[dict[str, Any]]:
    """One rank's outputs and gradients of every case."""
    from mindspeed_core.kernels import swiglu
    from mindspeed_core.parallel.expert import DISPATCHERS, Chosen, ExpertGroups

    mesh = Mesh.create(ParallelConfig(**parallel), Device.open("cpu"))
    groups = ExpertGroups(COUNT, mesh.ep.group, mesh.etp.group, mesh.groups.tp_ep)
    answers = []
    for case in cases:
        tokens, experts, weights = case.data()[mesh.rank]
        tokens.requires_grad_()
        weights.requires_grad_()
        fc1, fc2 = _weights()
        slices = fc1.chunk(mesh.etp.size, 2)[mesh.etp.rank], fc2.chunk(mesh.etp.size, 2)[mesh.etp.rank]
        own1, own2 = (
            [whole[e].reshape(-1, whole.shape[-1]).contiguous().requires_grad_() for e in groups.local]
            for whole in slices
        )
        meanwhile: list[Tensor] = []
        sent = DISPATCHERS[case.dispatcher](
            tokens,
            Chosen(experts, weights),
            groups,
            permute.REFERENCE,
            capacity=case.capacity,
            meanwhile=lambda tokens=tokens, to=meanwhile: to.append(tokens * 3),
        )
        inner = grouped_matmul.reference(sent.rows, own1, sent.counts)
        out = sent.combine(grouped_matmul.reference(swiglu.reference(inner), own2, sent.counts))
        ((out + meanwhile[0]) * case.target(mesh.rank)).sum().backward()
        if case.capacity is not None and case.dispatcher == "alltoall":
            assert set(sent.counts) == {case.capacity * mesh.ep.size * mesh.etp.size}
        answers.append(
            {
                "out": out.detach(),
                "tokens": tokens.grad,
                "weights": weights.grad,
                "experts": list(groups.local),
                "slice": mesh.etp.rank,
                "fc1": [weight.grad for weight in own1],
                "fc2": [weight.grad for weight in own2],
            }
        )
    return answers


def _loop(case: Case) -> dict[str, Any]:
    """The same, token by token, in one process."""
    fc1, fc2 = (weight.requires_grad_() for weight in _weights())
    data = case.data()
    outs, total = [], torch.zeros(())
    for rank, (tokens, experts, weights) in enumerate(data):
        tokens.requires_grad_()
        weights.requires_grad_()
        rows = []
        for t in range(len(tokens)):
            row = torch.zeros(HIDDEN)
            for j in range(K):
                e = int(experts[t, j])
                if e < COUNT:
                    gate, up = fc1[e] @ tokens[t]
                    row = row + weights[t, j] * (fc2[e] @ (F.silu(gate) * up))
            rows.append(row)
        out = torch.stack(rows) if rows else torch.zeros(0, HIDDEN)
        outs.append(out.detach())
        total = total + ((out + tokens * 3) * case.target(rank)).sum()
    if total.requires_grad:
        total.backward()
    grads = (torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in (fc1, fc2))
    return {"out": outs, "data": data, **dict(zip(("fc1", "fc2"), grads, strict=True))}


LAYOUTS = {
    "alone": (1, {}),
    "ep2": (2, {"ep": 2}),
    "ep4": (4, {"ep": 4}),
    "tp2 etp2": (2, {"tp": 2, "sp": True}),
    "tp2 etp1 ep2": (2, {"tp": 2, "sp": True, "etp": 1, "ep": 2}),
    "tp2 etp2 ep2": (4, {"tp": 2, "sp": True, "ep": 2}),
    "tp2 etp1 ep2 edp2": (4, {"tp": 2, "sp": True, "etp": 1, "ep": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dispatched_experts_equal_a_loop(layout: str):
    world, parallel = LAYOUTS[layout]
    uneven, none = tuple(5 + 3 * rank for rank in range(world)), (0, *[6] * (world - 1))
    shapes: list[dict[str, Any]] = [
        {"tokens": uneven},
        {"tokens": uneven, "idle": (1, 2)},
        {"tokens": none},
        {"tokens": uneven, "dropped": True},
        {"tokens": uneven, "dropped": True, "capacity": 20},
    ]
    cases = [Case(dispatcher, **shape) for dispatcher, shape in itertools.product(("alltoall", "allgather"), shapes)]
    by_rank = run_ranks(dispatched, world, parallel, cases, timeout=120)
    for i, case in enumerate(cases):
        expected = _loop(case)
        grads = {"fc1": torch.zeros(COUNT, 2, WIDTH, HIDDEN), "fc2": torch.zeros(COUNT, HIDDEN, WIDTH)}
        for rank, answers in enumerate(by_rank):
            got = answers[i]
            torch.testing.assert_close(got["out"], expected["out"][rank], **TOLERANCE)
            tokens, experts, weights = expected["data"][rank]
            if case.tokens[rank]:
                real = experts < COUNT  # what was dropped has no weight to learn
                torch.testing.assert_close(got["tokens"], tokens.grad, **TOLERANCE)
                torch.testing.assert_close(got["weights"] * real, weights.grad * real, **TOLERANCE)
            slices = max(answers[i]["slice"] for answers in by_rank) + 1
            for name, dim in (("fc1", 2), ("fc2", 2)):
                for e, grad in zip(got["experts"], got[name], strict=True):
                    part = grads[name].chunk(slices, dim)[got["slice"]][e]
                    part += grad.view_as(part)
                    assert e not in case.idle or not grad.any()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], **TOLERANCE)


@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0, 0), (0, 5, 0)], ids=str)
def test_a_grouped_product_is_that_of_each_run_of_rows(counts: tuple[int, ...]):
    x = torch.randn(sum(counts), 6, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in counts]
    expected = torch.cat([part @ weight.T for part, weight in zip(x.split(counts), weights, strict=True)])
    for side in (grouped_matmul.reference, grouped_matmul.cpu):
        got = side(x, weights, counts)
        torch.testing.assert_close(got, expected)
        ours, oracle = (
            torch.autograd.grad(out.square().sum(), (x, *weights), retain_graph=True) for out in (got, expected)
        )
        for a, b in zip(ours, oracle, strict=True):  # zeros, not None, where an expert had no rows
            torch.testing.assert_close(a, b)


def test_a_grouped_product_of_frozen_weights_passes_on_the_gradient_of_its_rows():
    x, weights = torch.randn(3, 6, requires_grad=True), [torch.randn(4, 6), torch.randn(4, 6, requires_grad=True)]
    grouped_matmul.reference(x, weights, (2, 1)).sum().backward()
    assert x.grad is not None
    assert weights[0].grad is None
    assert weights[1].grad is not None


def test_tokens_sorted_by_expert_come_back():
    tokens, experts = torch.randn(5, 3), torch.tensor([[1, 0], [1, 2], [0, 2], [3, 1], [3, 3]])
    rows, places = permute.reference(tokens, experts, 7)
    flat = experts.flatten()
    assert torch.equal(rows, torch.cat([tokens[(flat == e).nonzero()[:, 0] // 2] for e in range(3)]))
    back = permute.reference_back(rows, places, torch.full((5, 2), 0.5))
    present = (experts < 3).sum(-1, keepdim=True) / 2
    torch.testing.assert_close(back, tokens * present)


def as_transformers(coefficient: float) -> tuple[float, float, float, float]:
    """Ours and the oracle's balance loss, and the largest relative difference of the loss and of a router's gradient."""
    from mindspeed_core.models.balance import take_terms
    from mindspeed_core.models.build import build_model
    from mindspeed_core.models.weights import load_weights

    mesh = Mesh.create(ParallelConfig(), Device.open("cpu"))
    oracle = hf_model("mixtral", num_hidden_layers=1, router_aux_loss_coef=coefficient, output_router_logits=True)
    config = config_of(oracle)
    family = family_of(config)
    # its sum over the k choices of a token is not divided by k
    arch = ExpertsConfig(aux_loss=coefficient * 2).applied(family.architecture(config))
    (ours,) = build_model(arch, mesh)
    load_weights([ours], StateTensors(oracle), family, arch, mesh)
    tokens = torch.randint(0, 99, (3, 8), generator=torch.Generator().manual_seed(1))
    ours(tokens, labels=tokens.roll(-1, 1), weights=torch.ones(3, 8)).backward()
    aux, *_, total = take_terms([ours], torch.device("cpu")).tolist()
    assert not take_terms([ours], torch.device("cpu")).any()
    answer = oracle(tokens)
    loss = F.cross_entropy(answer.logits.flatten(0, 1), tokens.roll(-1, 1).flatten()) + coefficient * answer.aux_loss
    loss.backward()
    grad = ours.decoder.layers[0].mlp.router.weight.grad / total
    expected = oracle.model.layers[0].mlp.gate.weight.grad
    return aux / total, answer.aux_loss.item() / 2, ((grad - expected).abs().max() / expected.abs().max()).item(), total


def test_the_balance_loss_and_its_gradient_are_those_of_transformers():
    ours, oracle, difference, total = run_ranks(as_transformers, 1, 0.3)[0]
    assert total == 24
    assert ours == pytest.approx(oracle, rel=1e-5)
    assert difference < 1e-4


def _architecture(**more: Any) -> Architecture:
    experts = Experts(**{"count": 8, "top_k": 2, "ffn_hidden_size": 6, "router": "aux_loss", **more})
    return Architecture(
        num_layers=4, hidden_size=8, ffn_hidden_size=12, num_heads=4, num_query_groups=2, head_dim=4, vocab_size=7,
        max_positions=16, experts=experts,
    )  # fmt: skip


def test_which_layers_have_experts_is_a_function_of_their_number():
    def at(**more: Any) -> list[int]:
        arch = _architecture(**more)
        return [i for i in range(8) if arch.has_experts(i)]

    assert at() == list(range(8))
    assert at(first_dense=3) == [3, 4, 5, 6, 7]  # DeepSeek
    assert at(every=2, offset=1, dense_layers=(3,)) == [1, 5, 7]  # Qwen's decoder_sparse_step and mlp_only_layers


@pytest.mark.parametrize(
    ("section", "more", "message"),
    [
        ({"router": "noaux_tc"}, {}, "experts.router=noaux_tc: needs a bias"),
        ({"router": "sparsemixer"}, {"top_k": 3}, "chooses 2 experts, the model 3"),
        ({"overlap": True}, {}, "experts.overlap: needs shared experts"),
        ({"pad_to_capacity": True}, {}, "set experts.capacity_factor too"),
        (
            {"pad_to_capacity": True, "capacity_factor": 1.0, "dispatcher": "allgather"},
            {},
            "experts.pad_to_capacity: allgather sends no rows to pad; leave it out, or use dispatcher=alltoall",
        ),
        (
            {"drop": "position"},
            {},
            "experts.drop=position: without a capacity nothing is dropped; set experts.capacity",
        ),
        (
            {"bias_update_rate": 1e-3},
            {},
            "experts.bias_update_rate: moves the bias of noaux_tc, and router=aux_loss has none",
        ),
        ({"router": "group_limited_greedy"}, {}, "chooses groups first, the model has none; use softmax_topk"),
        ({"capacity_factor": 1.0}, {"router": "noaux_tc", "bias": True}, "which router=noaux_tc does not expect"),
    ],
)
def test_a_section_that_does_not_fit_the_model_is_refused(section: dict[str, Any], more: dict[str, Any], message: str):
    (line,) = ExpertsConfig(**section).problems(_architecture(**more))
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("section", "more"),
    [
        ({"pad_to_capacity": True, "capacity_factor": 1.0}, {}),
        ({"drop": "position", "capacity_factor": 1.0, "dispatcher": "allgather"}, {}),
        ({"bias_update_rate": 1e-3}, {"router": "noaux_tc", "bias": True}),
        ({"router": "group_limited_greedy"}, {"groups": 4, "topk_groups": 2}),
        ({}, {"router": "group_limited_greedy"}),  # a model's own, with all experts in one group
    ],
)
def test_a_section_that_fits_the_model_is_taken(section: dict[str, Any], more: dict[str, Any]):
    assert ExpertsConfig(**section).problems(_architecture(**more)) == []


def test_a_dense_model_takes_no_section():
    llama = family_of(preset("llama2-7b")).architecture(preset("llama2-7b"))
    assert ExpertsConfig().problems(llama) == []
    assert ExpertsConfig(grouped=False).problems(llama) == [
        "experts.grouped: the model has no experts; leave the section out"
    ]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"ep": 3}, "parallel.ep=3 does not divide the 8 experts of a layer; use 1 or 2 or 4 or 8"),
        ({"tp": 4, "etp": 4}, "parallel.etp=4 does not divide the width of an expert, 6; use 1 or 2 or 3 or 6"),
    ],
)
def test_experts_that_cannot_be_split_so_are_refused(parallel: dict[str, Any], message: str):
    from mindspeed_core.models.build import check

    assert message in check(_architecture(), ParallelConfig(**parallel))


def test_a_mesh_says_which_ep_its_ranks_allow():
    ParallelConfig(tp=2, cp=2, ep=4, dp=2).check(8)
    ParallelConfig(tp=2, etp=1, ep=8, dp=4).check(8)
    assert ParallelConfig(ep=4).world_size() == 4
    assert ParallelConfig(tp=2, ep=2, pp=2).world_size() == 8
    assert ParallelConfig(tp=2, ep=2, etp=1).world_size() == 2
    with pytest.raises(InputError, match=r"parallel.ep=4 does not divide cp x dp=2; use a divisor of 2"):
        ParallelConfig(tp=2, ep=4).check(4)
    with pytest.raises(InputError, match=r"parallel.ep=3 does not divide tp x cp x dp=4"):
        ParallelConfig(tp=2, ep=3, etp=1).check(4)
    with pytest.raises(ValueError, match="not at all; use 4 or 1"):
        ParallelConfig(tp=4, etp=2)
