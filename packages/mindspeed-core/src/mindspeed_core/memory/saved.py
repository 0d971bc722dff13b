"""Counts what a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class SavedBytes:
    """Counts the bytes that the graphs built inside it keep alive, the weights themselves aside.

        with SavedBytes(model.parameters()) as saved:
            loss = model(tokens)
        saved.bytes

    A storage counts once, whatever number of tensors lie in it, and with the size it has when it is asked for. What a
    hook inside has taken away (swap) is not seen. It holds on to what it counts: drop it before measuring memory.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._tensors: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    @property
    def bytes(self) -> int:
        """The bytes alive now."""
        storages = [tensor.untyped_storage() for tensor in self._tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self._weights:
            self._tensors.append(tensor)
        return tensor


def _unpack(tensor: Tensor) -> Tensor:
    return tensor
