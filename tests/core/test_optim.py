"""The optimizer's arithmetic and the learning rate of each step."""

from __future__ import annotations

import pytest
import torch

from mindspeed_core.optim.adamw import AdamW
from mindspeed_core.optim.scaling import scale
from mindspeed_core.optim.schedule import Schedule


def _parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((37, 5), (11,), (2, 3, 4))]


def _run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs_fused_adamw_bit_for_bit(weight_decay: float) -> None:
    ours, theirs = _parameters(0), _parameters(0)
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    _run(AdamW(ours, **settings), ours, 20)
    _run(torch.optim.AdamW(theirs, fused=True, **settings), theirs, 20)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_adamw_is_torchs_plain_adamw_to_rounding() -> None:
    ours, theirs = _parameters(0), _parameters(0)
    _run(AdamW(ours, lr=1e-2, weight_decay=0.1), ours, 50)
    _run(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False), theirs, 50)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_adamw_keeps_its_step_in_the_group_and_goes_on_from_its_state() -> None:
    straight, params = _parameters(0), _parameters(0)
    _run(AdamW(straight, lr=1e-2), straight, 6)
    first = AdamW(params, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        if step == 3:
            state = first.state_dict()
            assert state["param_groups"][0]["step"] == 3
            assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq"}
            first = AdamW(params, lr=1e-2)
            first.load_state_dict(state)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        first.step()
    assert all(torch.equal(one, other) for one, other in zip(straight, params, strict=True))


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    params = _parameters(0)
    before = params[0].clone()
    optimizer = AdamW(params, lr=1.0)
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_lists_are_scaled_into_each_other_and_in_place(factor: float) -> None:
    sources = [torch.randn(3, 4), torch.randn(5)]
    expected = [source * factor for source in sources]
    same, narrow = [s.clone() for s in sources], [torch.empty_like(s, dtype=torch.bfloat16) for s in sources]
    scale(0, None, [same, same], factor)
    scale(0, None, [sources, narrow], factor)
    for one, other, oracle in zip(same, narrow, expected, strict=True):
        assert torch.equal(one, oracle)
        assert torch.equal(other, oracle.bfloat16())


@pytest.mark.parametrize(
    ("shape", "warmup", "expected"),
    [
        ("cosine", 0, [1.0, 0.9755282581475768, 0.9045084971874737, 0.7938926261462366]),
        ("cosine", 2, [0.5, 1.0, 1.0, 0.9619397662556434]),
        ("cosine", 0.2, [0.5, 1.0, 1.0, 0.9619397662556434]),  # a fraction of the steps
        ("linear", 0, [1.0, 0.9, 0.8, 0.7]),
        ("constant", 4, [0.25, 0.5, 0.75, 1.0]),
        ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_schedule_warms_up_and_then_follows_its_shape(shape: str, warmup: float, expected: list[float]) -> None:
    schedule = Schedule(lr=1.0, shape=shape, warmup=warmup, steps=10)
    assert [schedule.lr_at(step) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_schedule_ends_at_the_lowest_rate_and_stays_there(shape: str) -> None:
    schedule = Schedule(lr=1e-3, min_lr=1e-4, shape=shape, warmup=3, steps=20)
    rates = [schedule.lr_at(step) for step in range(20)]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert min(rates[3:]) > 1e-4
    assert schedule.lr_at(20) == pytest.approx(1e-4)
    assert schedule.lr_at(200) == pytest.approx(1e-4)
