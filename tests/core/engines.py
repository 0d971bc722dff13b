"""Engines on the ranks of a test: models come as configuration and tensors, so that no rank has to load transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mindspeed_core.device import Device
from mindspeed_core.generate.engine import Engine
from mindspeed_core.models.families import family_of
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig
from tests.harness import run_ranks

Model = tuple[Any, ...]  # config.json, the tensors by Hugging Face name, and perhaps options of the engine
Work = Callable[..., Any]


class Held:
    """Tensors of a dictionary."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> Any:
        return self._tensors[name].dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def engine_of(model: Model, mesh: Mesh) -> Engine:
    from mindspeed_core.models.build import build_model
    from mindspeed_core.models.weights import load_weights

    config, tensors, *options = model
    family = family_of(config)
    arch = family.architecture(config)
    chunks = build_model(arch, mesh)
    load_weights(chunks, Held(tensors), family, arch, mesh)
    return Engine(chunks[0], mesh, **(options[0] if options else {}))


def _on_a_rank(parallel: dict[str, int], jobs: Sequence[tuple[Work, Model, tuple[Any, ...]]]) -> list[Any]:
    mesh = Mesh.create(ParallelConfig(**parallel), Device.open("cpu"))
    results = []
    for work, model, args in jobs:
        engine = engine_of(model, mesh)
        if mesh.is_main:
            with engine:
                results.append(work(engine, *args))
        else:
            engine.follow()
    mesh.close()
    return results


def run(parallel: dict[str, int], *jobs: tuple[Any, ...]) -> list[Any]:
    """Return for each job (work, model, *arguments) what `work(engine, *arguments)` gives on rank 0, the others following."""
    world = parallel.get("tp", 1) * parallel.get("pp", 1)
    return run_ranks(_on_a_rank, world, parallel, [(work, model, args) for work, model, *args in jobs])[0]
