"""Sampling: the chain equals transformers' processors, draws follow the distribution, bad values are told at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mindspeed_core.errors import InputError
from mindspeed_core.generate.sampling import Sampler, SamplingConfig, filter_logits

CPU = torch.device("cpu")


def peer(logits: Tensor, config: SamplingConfig) -> Tensor:
    """What transformers' processors make of the same logits."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    logits = TemperatureLogitsWarper(config.temperature)(ids, logits)
    if config.top_k:
        logits = TopKLogitsWarper(config.top_k)(ids, logits)
    if config.top_p < 1:
        logits = TopPLogitsWarper(config.top_p)(ids, logits)
    return logits


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1),
    coarse=st.booleans(),
)
def test_the_chain_equals_the_processors_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, coarse: bool
) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * 3
    if coarse:
        logits = logits.round()  # many ties
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(filter_logits(logits, config), peer(logits, config), rtol=0, atol=0)


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(temperature=1.3, top_k=1)])
def test_temperature_zero_and_top_k_one_take_the_likeliest(config: SamplingConfig) -> None:
    logits = torch.randn(4, 100)
    assert torch.equal(Sampler(config, 4, CPU).choose(logits), logits.argmax(-1))


def test_a_tiny_top_p_keeps_the_likeliest_token() -> None:
    logits = torch.randn(4, 100)
    config = SamplingConfig(temperature=1.0, top_p=1e-6, seed=1)
    assert torch.equal(Sampler(config, 4, CPU).choose(logits), logits.argmax(-1))


def test_draws_follow_the_filtered_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -4.0]])
    config = SamplingConfig(temperature=0.8, top_k=5, top_p=0.95, seed=7)
    expected = peer(logits, config).softmax(-1)[0]
    sampler, draws = Sampler(config, 1, CPU), 4000
    counts = torch.bincount(torch.cat([sampler.choose(logits) for _ in range(draws)]), minlength=6).float()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - draws * expected)[possible] ** 2 / (draws * expected[possible])).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, one in a thousand; the seed is fixed


def test_a_seed_repeats_a_row_whatever_its_neighbours() -> None:
    config = SamplingConfig(temperature=1.0, seed=3)
    logits = torch.randn(20, 3, 40)
    together, alone = Sampler(config, 3, CPU), Sampler(config, 1, CPU)
    assert [together.choose(step)[2].item() for step in logits] == [alone.choose(step[2:]).item() for step in logits]


def test_without_a_seed_rows_and_answers_differ() -> None:
    config = SamplingConfig(temperature=1.0)
    logits = torch.zeros(2, 1000)
    draws = {
        tuple(torch.stack([s.choose(logits)[i] for _ in range(4)]).tolist())
        for s in [Sampler(config, 2, CPU), Sampler(config, 2, CPU)]
        for i in range(2)
    }
    assert len(draws) == 4


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(InputError) as error:
        SamplingConfig(temperature=-1, top_k=-2, top_p=0, max_new_tokens=0, seed=-1)
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == [
        "temperature",
        "top_k",
        "top_p",
        "max_new_tokens",
        "seed",
    ]


@pytest.mark.parametrize("values", [{"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 1.5}])
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError):
        SamplingConfig(**values)
