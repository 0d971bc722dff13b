"""Swapped attention computes the same gradients, to the bit, from copies on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mindspeed_core.device import Device
from mindspeed_core.memory import swap
from tests.core.memory import forgetful
from tests.core.memory.forgetful import HIDDEN, LAYERS, LENGTH, ROWS
from tests.harness import run_ranks

FEATURES: dict[str, dict[str, Any]] = {
    "swap": {"swap_attention": True},
    "swap, norm": {"swap_attention": True, "recompute_norm": True},
    "swap, activation, selective": {
        "swap_attention": True,
        "recompute": "selective",
        "recompute_norm": 2,
        "recompute_activation": True,
    },
    "full, then swap": {"swap_attention": True, "recompute": "full", "recompute_layers": 2},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2 sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_the_same_to_the_bit(layout: str) -> None:
    parallel = LAYOUTS[layout]
    world = parallel.get("tp", 1) * parallel.get("pp", 1)
    for rank, answers in enumerate(run_ranks(forgetful.compare, world, list(FEATURES.values()), parallel)):
        for name, answer in zip(("plain", *FEATURES), answers, strict=True):
            assert (answer["losses"], answer["gradients"]) == (True, True), f"{name} on rank {rank}"


def test_what_attention_saves_leaves() -> None:
    answers = run_ranks(forgetful.compare, 1, list(FEATURES.values()), {})[0]
    plain, saved = answers[0]["saved"], {name: a["saved"] for name, a in zip(FEATURES, answers[1:], strict=True)}
    hidden = HIDDEN * ROWS * LENGTH * 4
    # at least its input, the norm's output, queries, keys and values, and the output, of all layers but the last
    assert plain - saved["swap"] >= (LAYERS - 1) * 5 * hidden
    assert saved["swap, norm"] < saved["swap"]


def test_small_tensors_weights_and_shared_storages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and what is small stay; views of one storage are copied once and come back as they were."""
    sent: list[int] = []

    class Counting(swap._Lane):
        def out(self, flat: torch.Tensor) -> torch.Tensor:
            sent.append(flat.numel())
            return super().out(flat)

    layer = swap._Layer(Counting(Device("cpu")), None, swaps=True)
    weight = torch.nn.Parameter(torch.randn(32, 32))

    class Views(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            left, right = x.unbind(-1)  # strided views of the memory of x
            small = x[:2, :2, 0].clone()
            return ((left @ self.weight) * right * scale).sum() + (small * small).sum()

    module = Views()
    x = torch.randn(32, 32, 2, requires_grad=True)
    scale = torch.randn(32, 32)
    expected = torch.autograd.grad(module(x * 1, scale=scale), (x, weight))
    layer.watch(module, dropped=False)
    result = module(x * 1, scale=scale)
    layer.end(None, None, result)
    # x and x @ weight; not the weight, the scale that was given, or the 16 bytes
    assert sent == [32 * 32 * 2 * 4, 32 * 32 * 4]
    for found, wanted in zip(torch.autograd.grad(result, (x, weight)), expected, strict=True):
        assert torch.equal(found, wanted)
