"""Swap: what attention saves for the backward pass lies on the host until the turn of its layer comes.

    forward     layer 0         layer 1         layer 2           backward    layer 2         layer 1         layer 0
    copies           out 0 ---->     out 1 ---->                              <-- back 1      <-- back 0

Copies run on a stream of their own, beside the computation: a layer's tensors leave while the next layers run, and are
fetched while the layer behind it computes its gradients. On a CPU, where host and device are one, the same code copies
from one place to another.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mindspeed_core.device import Device
from mindspeed_core.memory.config import Plan

LEAST = 1024  # bytes below which a copy costs more than the memory is worth


def apply(block: Any, plan: Plan, device: Device, *, last: bool) -> None:
    """Make the layers of a block swap what their input norm and attention save, as the plan says.

    The backward pass of the model's last layer (`last`: it is in this block) follows at once, so that one stays.
    """
    layers = range(len(block.layers))
    swapped = [i for i in layers if i in plan.swap and not (last and i == layers[-1])]
    if not swapped:
        return
    lane = _Lane(device)
    first, before = swapped[0], None
    for index in range(first, len(layers)):
        layer = block.layers[index]
        before = _Layer(lane, before if index > first else None, index in swapped)
        layer.register_forward_pre_hook(before.begin)
        layer.register_forward_hook(before.end)
        if index in swapped:
            before.watch(layer.input_layernorm, dropped=False)
            before.watch(layer.self_attention, dropped=index in plan.norm)


class _Lane:
    """Copies between host and device, in an order of their own beside the computation where the device has streams."""

    def __init__(self, device: Device) -> None:
        self.device, self.module = device, device.module
        self.stream: Any = None if self.module is None else self.module.Stream()

    def out(self, flat: Tensor) -> Tensor:
        """Return a copy of bytes on the host; complete when `back` is asked for it."""
        if self.module is None:
            return flat.clone()
        host = torch.empty(flat.numel(), dtype=flat.dtype, pin_memory=True)
        self.stream.wait_stream(self.module.current_stream())
        with self.module.stream(self.stream):
            host.copy_(flat, non_blocking=True)
        flat.record_stream(self.stream)  # its memory is another's only after the copy
        return host

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        """Return a copy of the bytes on the device, and the event after which it is complete."""
        if self.module is None:
            return host, None
        flat = torch.empty(host.numel(), dtype=host.dtype, device=self.device.torch)
        self.stream.wait_stream(self.module.current_stream())
        with self.module.stream(self.stream):
            flat.copy_(host, non_blocking=True)
        flat.record_stream(self.stream)
        return flat, self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Let the computation go on only after an event."""
        if event is not None:
            self.module.current_stream().wait_event(event)  # type: ignore[union-attr]


class _Away:
    """The memory of one storage while it is on the host."""

    def __init__(self, lane: _Lane, flat: Tensor) -> None:
        self.lane, self.host = lane, lane.out(flat)
        self._here: tuple[Tensor, Any] | None = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self._here is None:
            self._here = self.lane.back(self.host)

    def storage(self) -> torch.UntypedStorage:
        """Return it, brought back."""
        self.fetch()
        assert self._here is not None
        flat, event = self._here
        self.lane.wait(event)
        return flat.untyped_storage()


@dataclasses.dataclass(frozen=True)
class _View:
    """A saved tensor: its place in a storage that is away. The graph holds on to it, and it alone to the storage."""

    away: _Away
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        storage = self.away.storage()
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.shape, self.stride
        )


class _Layer:
    """One layer of a chunk: during a forward pass what it has sent away in it, and what the layer before has."""

    def __init__(self, lane: _Lane, before: _Layer | None, swaps: bool) -> None:
        self.lane, self.before, self.swaps = lane, before, swaps
        self.sent: weakref.WeakSet[_Away] = weakref.WeakSet()
        self._by_address: dict[int, _Away] = {}
        self._held: list[torch.UntypedStorage] = []
        self._hooks: list[saved_tensors_hooks] = []
        self._kept: set[int] = set()

    def begin(self, _layer: Any, _inputs: Any) -> None:
        """Open a forward pass of the layer: its pre-hook."""
        self.sent = weakref.WeakSet()

    def end(self, _layer: Any, _inputs: Any, outputs: Any) -> None:
        """Close it: when the gradient of its output comes, the layer before is the next to be needed."""
        self._by_address.clear()
        self._held.clear()
        hidden = outputs[0] if isinstance(outputs, tuple) else outputs
        if hidden.requires_grad:
            wanted = [self.sent, self.before.sent] if self.before is not None else [self.sent]
            hidden.register_hook(lambda _grad: _fetch(wanted))

    def watch(self, module: torch.nn.Module, *, dropped: bool) -> None:
        """Send away what this module saves; `dropped`: but not its input, which recompute will fill again."""

        def enter(module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            kept = [*module.parameters(), *_tensors(named), *(inputs[:1] if dropped else ())]
            self._kept = {tensor.untyped_storage().data_ptr() for tensor in kept}
            self._hooks.append(saved_tensors_hooks(self._pack, _unpack))
            self._hooks[-1].__enter__()

        def leave(_module: Any, _inputs: Any, _outputs: Any) -> None:
            self._hooks.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, always_call=True)

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if tensor.device.type != self.lane.device.type or storage.nbytes() < LEAST or address in self._kept:
            return tensor
        away = self._by_address.get(address)
        if away is None:
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            away = self._by_address[address] = _Away(self.lane, flat)
            self._held.append(storage)  # nothing else may come to lie at this address in this pass
            self.sent.add(away)
        return _View(away, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: Tensor | _View) -> Tensor:
    return saved.tensor() if isinstance(saved, _View) else saved


def _fetch(wanted: list[weakref.WeakSet[_Away]]) -> None:
    for sent in wanted:
        for away in sent:
            away.fetch()


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a module is told besides its input: all layers share them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(values) and not isinstance(values, type):
        for field in dataclasses.fields(values):
            yield from _tensors(getattr(values, field.name))
