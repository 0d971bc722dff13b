"""Rotary frequencies equal those of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mindspeed_core.errors import InputError
from mindspeed_core.models.families import family_of
from mindspeed_core.models.rope import angles, frequencies

RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("rule", RULES)
def test_frequencies_equal_transformers(rule: str):
    parameters = {"rope_type": rule, "rope_theta": 10000.0, **RULES[rule]}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=parameters)
    as_json = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    got, factor = frequencies(family_of(as_json).architecture(as_json))
    if rule == "default":
        expected, expected_factor = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16), 1.0
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[rule](config, device=torch.device("cpu"))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-6)


def test_far_positions_stay_apart_in_bf16():
    cos, _sin = angles(torch.tensor([[4000, 4001]]), torch.ones(4), 1.0, torch.bfloat16)
    torch.testing.assert_close(cos[:, 0, 0, 0].float(), torch.tensor([4000.0, 4001.0]).cos(), rtol=0, atol=4e-3)


def test_an_unknown_rule_and_a_missing_number_are_named():
    as_json = {**LlamaConfig().to_dict(), "architectures": ["LlamaForCausalLM"]}
    arch = family_of(as_json).architecture(as_json)
    with pytest.raises(InputError, match="rope_type=spiral"):
        frequencies(replace(arch, rope_scaling={"rope_type": "spiral"}))
    with pytest.raises(InputError, match="lacks factor"):
        frequencies(replace(arch, rope_scaling={"rope_type": "linear"}))
