"""Published models at their full sizes, as one rank of real layouts sees them: no trainable parameter lacks its gradient.

Nothing is computed: tensors are fake ones on device npu, and the other ranks are torch's fake process group. So a shape
that an operator refuses, or one that loses a gradient without a word, is found in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mindspeed_core.device import Device
from mindspeed_core.models.families import family_of, preset
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig

LENGTH, BATCH = 4096, 1

# (preset, layout, ranks)
LAYOUTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama2-7b": ("llama2-7b", {}, 1),
    "llama2-7b tp8 sp dp2": ("llama2-7b", {"tp": 8, "sp": True}, 16),
    "llama2-70b tp8 pp4 sp": ("llama2-70b", {"tp": 8, "pp": 4, "sp": True}, 32),
    "llama3.1-70b tp8 pp4 cp2 ring": ("llama3.1-70b", {"tp": 8, "pp": 4, "cp": 2, "sp": True}, 64),
    "llama3.1-8b cp4 ulysses": ("llama3.1-8b", {"cp": 4, "cp_algorithm": "ulysses"}, 4),
    "llama2-13b tp4 mc2": ("llama2-13b", {"tp": 4, "sp": True, "collective_matmul": "mc2"}, 4),
    "qwen3-8b tp4 sp": ("qwen3-8b", {"tp": 4, "sp": True}, 4),
    "mixtral-8x7b ep8": ("mixtral-8x7b", {"ep": 8}, 8),
    "mixtral-8x7b tp4 ep2 sp": ("mixtral-8x7b", {"tp": 4, "ep": 2, "sp": True}, 8),
    "deepseek-v2-lite": ("deepseek-v2-lite", {}, 1),
    "deepseek-v2-lite tp2 sp ep4": ("deepseek-v2-lite", {"tp": 2, "ep": 4, "sp": True}, 8),
}


@contextmanager
def rank_zero(parallel: ParallelConfig, ranks: int) -> Iterator[Mesh]:
    """Be rank 0 of so many, of whom the others do not exist."""
    dist.init_process_group("cpu:fake,npu:fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = Mesh.create(parallel, Device.open("npu"))
    try:
        yield mesh
    finally:
        mesh.close()
        dist.destroy_process_group()


@contextmanager
def without_data() -> Iterator[None]:
    """Say what depends on values: fake tensors have none, nor do ranks that do not exist."""
    from megatron.core.tensor_parallel import random

    from mindspeed_core.kernels import attention, matmul_collective
    from mindspeed_core.parallel import expert

    def evenly(experts: Tensor, count: int, group: dist.ProcessGroup) -> list[list[int]]:
        return [[experts.numel() // count] * count for _ in range(group.size())]

    def order(runs: list[list[int]], device: torch.device) -> Tensor:
        return torch.empty(sum(map(sum, runs)), dtype=torch.int64, device=device)

    attention.triangle.cache_clear()
    with (
        mock.patch.object(random.CudaRNGStatesTracker, "fork", return_value=nullcontext()),  # reads its seed
        mock.patch.object(matmul_collective, "_hcom", return_value="hccl"),
        mock.patch.object(expert, "_sizes", evenly),
        mock.patch.object(expert, "_by_expert", order),
        mock.patch.object(torch.nn.Module, "to", lambda module, *_: module),  # fake parameters are where they are
    ):
        try:
            yield
        finally:
            attention.triangle.cache_clear()  # a fake one must not outlive its mode


def build(name: str, mesh: Mesh) -> Any:
    """Return the first two layers that this rank would hold."""
    from mindspeed_core.models.build import build_model

    config = preset(name)
    arch = family_of(config).architecture({**config, "num_hidden_layers": 2 * mesh.pp.size})
    (model,) = build_model(arch, mesh, precision="bf16")
    return model.train()


def gradients(name: str, *, sums: bool = False) -> dict[str, bool]:
    """Say of each trainable parameter whether a forward and a backward pass give it a gradient of its own shape.

    With `sums` every parameter has the fp32 sum that data parallelism keeps, to which a kernel may take the gradient.
    """
    config, layout, ranks = LAYOUTS[name]
    with (
        rank_zero(ParallelConfig(**layout), ranks) as mesh,
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device("npu"),
        without_data(),
    ):
        model = build(config, mesh)
        for parameter in model.parameters() if sums else ():
            parameter.main_grad = torch.empty(parameter.shape, dtype=torch.float32)
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        out = model(tokens, labels=tokens, weights=torch.ones(BATCH, LENGTH))
        if model.post_process:
            assert (out.shape, out.dtype) == ((), torch.float32)
        else:
            cut = mesh.cp.size * (mesh.tp.size if layout.get("sp") else 1)
            assert out.shape == (LENGTH // cut, BATCH, model.arch.hidden_size)
        out.backward(torch.empty_like(out))
        assert sum(p.numel() for p in model.parameters()) > 5e7
        return {
            key: p.grad is not None and (p.grad.shape, p.grad.dtype, p.grad.device) == (p.shape, p.dtype, p.device)
            for key, p in model.named_parameters()
        }


def without_gradient(name: str) -> list[str]:
    return [key for key, there in gradients(name).items() if not there]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    assert without_gradient(name) == []


ADDING = ("llama2-7b", "llama2-7b tp8 sp dp2", "llama2-13b tp4 mc2", "mixtral-8x7b tp4 ep2 sp", "deepseek-v2-lite")


@pytest.mark.parametrize("name", ADDING)
def test_gradients_of_linears_and_experts_go_to_their_sums(name: str) -> None:
    linears = {key: there for key, there in gradients(name, sums=True).items() if "linear" in key}
    assert len(linears) >= 2 * 4
    assert not any(linears.values()), linears


def test_of_an_input_that_is_gathered_only_a_share_is_kept() -> None:
    kept: list[tuple[int, ...]] = []

    def note(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        gradients("llama2-7b tp8 sp dp2", sums=True)
    assert (LENGTH // 8, BATCH, 4096) in kept
    assert (LENGTH, BATCH, 4096) not in kept


def test_a_gradient_that_is_lost_is_seen() -> None:
    """torch_npu's grouped product has no gradient, and says nothing."""
    from mindspeed_core.kernels import grouped_matmul

    def directly(counts: tuple[int, ...], x: Tensor, *weights: Tensor) -> Tensor:
        rows = torch.tensor(counts, device=x.device)
        return grouped_matmul._fused(x, torch.stack(weights).transpose(1, 2), rows, group_type=0)

    with mock.patch.object(grouped_matmul, "_Npu", SimpleNamespace(apply=directly)):
        lost = without_gradient("mixtral-8x7b ep8")
    assert {key.split(".")[-2] for key in lost} >= {"linear_fc1", "linear_fc2"}
