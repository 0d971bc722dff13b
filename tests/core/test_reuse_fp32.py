"""Masters in the bits of their weights, exactly; moments in bf16, by their formula; and the memory that leaves."""

from __future__ import annotations

import struct
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mindspeed_core.optim.adamw import AdamW
from mindspeed_core.optim.bf16 import Narrow
from mindspeed_core.optim.build import OptimConfig
from mindspeed_core.optim.reuse_fp32 import Rounding, join, split
from tests.core.memory import forgetful
from tests.harness import run_ranks

ROUNDINGS: tuple[Rounding, ...] = ("nearest_even", "half_away")
BETAS, EPS, DECAY, LR = (0.9, 0.95), 1e-8, 0.1, 1e-2
SIGNS = (0, 1 << 31)
CLASSES = {
    "zeros": (0, 0),
    "denormals": (1, 0x7FFFFF),
    "normals": (0x800000, 0x7F7FFFFF),
    "rounds to infinity": (0x7F7F8000, 0x7F7FFFFF),
    "infinities": (0x7F800000, 0x7F800000),
    "signalling NaN": (0x7F800001, 0x7FBFFFFF),
    "quiet NaN": (0x7FC00000, 0x7FFFFFFF),
}


def _patterns() -> st.SearchStrategy[int]:
    """fp32 bit patterns of every class, and those whose low half lies on or beside the middle."""
    classes = st.sampled_from(list(CLASSES.values())).flatmap(lambda ends: st.integers(*ends))
    middle = st.builds(
        lambda high, low: high << 16 | low, st.integers(0, 0x7FFF), st.sampled_from([0x7FFF, 0x8000, 0x8001])
    )
    return st.builds(lambda bits, sign: bits | sign, classes | middle, st.sampled_from(SIGNS))


def _numbers(patterns: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(patterns, dtype=np.uint32).view(np.int32)).view(torch.float32)


def _bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.view({4: torch.int32, 2: torch.int16}[numbers.element_size()])


@settings(max_examples=300, deadline=None)
@given(st.lists(_patterns(), min_size=1, max_size=50), st.sampled_from(ROUNDINGS))
def test_every_number_comes_back_to_the_bit(patterns: list[int], rounding: Rounding) -> None:
    numbers = _numbers(patterns)
    assert torch.equal(_bits(join(*split(numbers, rounding))), _bits(numbers))


@settings(max_examples=300, deadline=None)
@given(st.lists(_patterns(), min_size=1, max_size=50))
def test_the_weight_is_the_master_as_any_cast_rounds_it(patterns: list[int]) -> None:
    numbers = _numbers(patterns)
    weight, _residual, _tie = split(numbers, "nearest_even")
    nan = numbers.isnan()
    assert torch.equal(_bits(weight[~nan]), _bits(numbers[~nan].bfloat16()))
    assert weight[nan].isnan().all()


@settings(max_examples=300, deadline=None)
@given(_patterns())
def test_half_away_rounds_the_magnitude_up_from_the_middle(pattern: int) -> None:
    (number,) = struct.unpack("<f", struct.pack("<I", pattern))
    if number != number:
        return
    weight, _residual, tie = split(_numbers([pattern]), "half_away")
    assert tie is None
    magnitude = ((pattern & 0x7FFFFFFF) + 0x8000) >> 16
    assert int(_bits(weight)) & 0xFFFF == magnitude | (pattern >> 16 & 0x8000)


def test_every_high_half_with_every_kind_of_low_half() -> None:
    high = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    numbers = _numbers((high | low).flatten().tolist())
    for rounding in ROUNDINGS:
        assert torch.equal(_bits(join(*split(numbers, rounding))), _bits(numbers))


def _weights(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _gradients(count: int, step: int) -> torch.Tensor:
    grad = torch.randn(count, generator=torch.Generator().manual_seed(100 + step))
    grad[: count // 10] = 0  # the second moment of these stays zero, which must not lose their tie
    return grad


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_fifty_steps_are_those_of_a_separate_master(rounding: Rounding) -> None:
    count = (1 << 18) + 77  # more than one piece, and no multiple of a vector
    settings: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    weight = torch.nn.Parameter(_weights(count, 0))
    master = torch.nn.Parameter(weight.detach().float())
    ours, theirs = AdamW([weight], **settings), AdamW([master], **settings)
    ours.narrow = Narrow(rounding=rounding)
    ties = 0
    for step in range(50):
        master.grad = _gradients(count, step)
        weight.decoupled_grad = master.grad.clone()  # type: ignore[attr-defined]
        if step == 25:  # masters in the middle between two weights, on both sides of even, some with a zero moment
            held = ours.held(weight)
            for tensor in (held["fp32_param"], master.data):
                tensor[: count // 5].view(torch.int16)[0::2] = -0x8000
            ours.hold(weight, held)
        ours.step()
        theirs.step()
        held, state = ours.held(weight), theirs.state[master]
        assert torch.equal(_bits(held["fp32_param"]), _bits(master.detach())), step
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(held[name], state[name]), (step, name)
        ties += int((_bits(master.detach()) & 0x1FFFF == 0x8000).sum())
        if rounding == "nearest_even":
            assert torch.equal(_bits(weight.detach()), _bits(master.detach().bfloat16())), step
    assert ties > 0
    stored = [weight, *ours.state[weight].values()]
    assert sum(t.numel() * t.element_size() for t in stored) == count * (
        2 + 2 + 4 + 4
    )  # 2 bytes less than 2 + 4 + 4 + 4


def test_bf16_moments_by_their_formula() -> None:
    count = 1000
    param = torch.nn.Parameter(_weights(count, 0).float())
    optimizer = AdamW([param], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    optimizer.narrow = Narrow(moments=torch.bfloat16)
    expected = param.detach().double()
    average = square = torch.zeros(count, dtype=torch.bfloat16)
    for step in range(1, 31):
        grad = _gradients(count, step)
        param.grad = grad.clone()
        optimizer.step()
        m = BETAS[0] * average.float() + (1 - BETAS[0]) * grad
        v = BETAS[1] * square.float() + (1 - BETAS[1]) * grad * grad
        mhat, vhat = m.double() / (1 - BETAS[0] ** step), v.double() / (1 - BETAS[1] ** step)
        expected = expected * (1 - LR * DECAY) - LR * mhat / (vhat.sqrt() + EPS)
        average, square = m.bfloat16(), v.bfloat16()
        state = optimizer.state[param]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        # a moment on the edge between two bf16 numbers may fall to either side
        for name, moment in (("exp_avg", average), ("exp_avg_sq", square)):
            torch.testing.assert_close(state[name], moment, rtol=2**-7, atol=1e-30)
        average, square = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        torch.testing.assert_close(param.detach().double(), expected, rtol=1e-5, atol=1e-6)
        expected = param.detach().double()


def test_both_together_keep_the_tie_in_a_bf16_moment() -> None:
    count = 4096
    weight = torch.nn.Parameter(_weights(count, 0))
    optimizer = AdamW([weight], lr=LR)
    optimizer.narrow = Narrow(moments=torch.bfloat16, rounding="nearest_even")
    weight.decoupled_grad = _gradients(count, 0)  # type: ignore[attr-defined]
    optimizer.step()
    held = optimizer.held(weight)
    held["fp32_param"].view(torch.int16)[0::2] = -0x8000
    expected = {name: tensor.clone() for name, tensor in held.items()}
    optimizer.hold(weight, held)
    again = optimizer.held(weight)
    assert again.keys() == expected.keys()
    for name, tensor in again.items():
        assert torch.equal(tensor, expected[name]), name
    assert sum(t.numel() * t.element_size() for t in (weight, *optimizer.state[weight].values())) == count * (
        2 + 2 + 2 + 2
    )


OVERLAP = {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


def trained(
    parallel: dict[str, Any], optim: dict[str, Any], steps: int, total: int, *, with_experts: bool = False
) -> dict[str, Any]:
    """Train a tiny bf16 model.

    Returns the norms of its gradients, its weights, how many of them this rank's optimizer has, and the bytes of both.
    """
    from mindspeed_core.device import Device
    from mindspeed_core.optim.build import build_optimizer
    from mindspeed_core.parallel.data import gather_parameters, wrap_data_parallel
    from mindspeed_core.parallel.mesh import Mesh, ParallelConfig

    mesh = Mesh.create(ParallelConfig(**parallel), Device.open("cpu"))
    config = OptimConfig(lr=LR, **optim)
    built = forgetful.build(mesh, {}, precision="bf16", with_experts=with_experts)
    chunks = wrap_data_parallel(built, config, mesh)
    optimizer = build_optimizer(config, chunks, mesh, "bf16")
    norms = []
    for _ in range(steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        forgetful.run(mesh, chunks, total // mesh.dp.size, start=mesh.dp.rank, stride=mesh.dp.size)
        norms.append(float(optimizer.step()[1]))
    gather_parameters(chunks)
    weights = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
    alive = [p for chunk in chunks for p in chunk.parameters()]
    # the ranks that share the states of a weight: Megatron marks those of experts
    ranks = {True: mesh.dp.size, False: mesh.edp.size}
    share = sum(p.numel() / (ranks[getattr(p, "allreduce", True)] if config.distributed else 1) for p in alive)
    for inner in optimizer.chained_optimizers:
        for group in inner.param_groups:
            alive += group["params"]
            alive += [tensor for p in group["params"] for tensor in inner.optimizer.state[p].values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    return {"norms": norms, "weights": weights, "share": share, "bytes": sum(storages.values())}


@pytest.mark.parametrize(
    ("parallel", "settings"),
    [
        ({"dp": 2}, {}),
        ({"dp": 2}, {"distributed": True}),
        ({"dp": 2}, {"overlap_grad_reduce": True}),
        ({"dp": 2}, OVERLAP),
        ({"dp": 2, "ep": 2}, OVERLAP),
        ({"tp": 2, "sp": True}, {}),
        ({"pp": 2, "vpp": 2}, {}),
    ],
    ids=["dp2", "dp2-distributed", "dp2-sum", "dp2-overlap", "ep2-overlap", "tp2-sp", "pp2-vpp2"],
)
def test_a_model_trains_as_with_separate_masters(parallel: dict[str, Any], settings: dict[str, Any]) -> None:
    run = partial(trained, with_experts="ep" in parallel)
    plain = run_ranks(run, 2, parallel, settings, 5, 4)
    own = run_ranks(run, 2, parallel, {**settings, "reuse_fp32_param": True}, 5, 4)
    for rank, other in zip(own, plain, strict=True):
        assert rank["norms"] == other["norms"]
        assert all(torch.equal(one, two) for one, two in zip(rank["weights"], other["weights"], strict=True))
        assert other["bytes"] - rank["bytes"] == pytest.approx(2 * other["share"], rel=0.01)  # padding of the shards


@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "distributed"])
def test_narrow_states_and_gradients_stay_near(distributed: bool) -> None:
    parallel, settings = {"dp": 2}, {"distributed": distributed}
    plain = run_ranks(trained, 2, parallel, settings, 5, 4)[0]
    narrow = {**settings, "bf16_states": True, "bf16_grads": True}
    for more in ({}, {"reuse_fp32_param": True}, {"reuse_fp32_param": "half_away"}):
        found = run_ranks(trained, 2, parallel, {**narrow, **more}, 5, 4)[0]
        # 8 bits of each gradient and moment
        assert found["norms"] == pytest.approx(plain["norms"], rel=2e-2)
        saved = (4 + (2 if more else 0)) * plain["share"]
        assert plain["bytes"] - found["bytes"] == pytest.approx(saved, rel=0.01)


def test_gradients_added_apart_stay_near() -> None:
    fused, apart = (run_ranks(trained, 2, {"dp": 2}, {"fused_accumulation": on}, 3, 4)[0] for on in (True, False))
    assert apart["norms"] == pytest.approx(fused["norms"], rel=1e-2)


def test_fp32_has_nothing_to_make_narrow() -> None:
    config = OptimConfig(reuse_fp32_param=True, bf16_states=True, bf16_grads=True)
    assert not config.precision_problems("bf16")
    lines = config.precision_problems("fp32")
    assert [line.split(":")[0] for line in lines] == ["optim.reuse_fp32_param", "optim.bf16_states", "optim.bf16_grads"]
    assert all("use precision: bf16, or leave it out" in line for line in lines)
    with pytest.raises(ValidationError):
        OptimConfig(reuse_fp32_param="up")  # type: ignore[arg-type]
