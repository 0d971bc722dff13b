"""torch_npu's kernels, computed on the host: allocator, streams, autograd and dispatcher stay torch_npu's own.

Device memory is host memory there, so a kernel lays CPU tensors over the same bytes, calls torch's CPU kernel, or for
`npu::` operators the formula in `operators`, and hands the results back on the device. Stricter than CPU kernels in three
things: tensors of host and device do not mix, an operator without a formula is an error, and the shapes and dtypes of a
formula are those that torch_npu's own meta kernel gives.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tests.ascend.host import operators

# kernels that move memory or change what a tensor says of itself: these stay torch_npu's own
OWN = {
    *("empty.memory_format", "empty_strided", "empty_like", "new_empty", "new_empty_strided"),
    *("set_", "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "resize_"),
    *("detach", "alias", "_reshape_alias", "_unsafe_view", "_has_compatible_shallow_copy_type"),
    *("_local_scalar_dense", "record_stream", "is_pinned", "_pin_memory", "_copy_from", "_copy_from_and_resize"),
}
MIXING = (
    "aten::index",
    "aten::_index_put",
    "aten::_copy",
    "aten::copy",
    "aten::_to_copy",
)  # indices may be on the host
_LIBRARIES: list[Any] = []  # a library's kernels go with it


def install() -> None:
    """Put the kernels in place of torch_npu's, for the rest of this process."""
    warnings.filterwarnings("error", message="CAUTION: The operator")  # torch_npu found no kernel and took the CPU's
    names = torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
    for namespace in ("aten", "npu"):
        library = torch.library.Library(namespace, "IMPL")
        _LIBRARIES.append(library)
        for name in sorted(name.partition("::")[2] for name in names if name.startswith(f"{namespace}::")):
            function = _function(namespace, name)
            if function is None or name in OWN or function.is_view:
                continue
            kernel = _kernel_of(function)
            if kernel is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that a kernel is replaced is the point
                    library.impl(name, kernel, "PrivateUse1")


def on_host(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the same bytes as one on the device."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = torch.frombuffer((ctypes.c_byte * size).from_address(storage.data_ptr()), dtype=torch.uint8)
    flat = torch.empty(0, dtype=tensor.dtype)
    return flat.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device."""
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    on_host(made).copy_(tensor)
    return made


def _function(namespace: str, name: str) -> Any:
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops, namespace), packet, None)
    return getattr(found, overload or "default", None)


def _kernel_of(function: Any) -> Callable[..., Any] | None:
    name = function._schema.name
    if name in SPECIAL:
        return SPECIAL[name]
    if name in operators.ON_DEVICE:
        return operators.ON_DEVICE[name]
    if name in operators.FORMULAS:
        return _by_formula(function, operators.FORMULAS[name])
    return None if name.startswith("npu::") else _by_host(function)


def _by_host(function: Any) -> Callable[..., Any]:
    random = torch.Tag.nondeterministic_seeded in function.tags

    def kernel(*args: Any, **kwargs: Any) -> Any:
        call = _Call(function)
        args, kwargs = call.down((args, kwargs))
        with _seeded(call.generator, call.device) if random else contextlib.nullcontext():
            out = function(*args, **kwargs)
        return call.up(out)

    return kernel


def _by_formula(function: Any, formula: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        call = _Call(function)
        args, kwargs = call.down((args, kwargs))
        out = formula(**_named(function, args, kwargs))
        if function.namespace == "npu":
            _check_shapes(function, args, kwargs, out)
        return call.up(tree_map(lambda x: x.contiguous() if isinstance(x, Tensor) else x, out))

    return kernel


def _named(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by name, without those that are their default anyway: what is left, a formula must know."""
    arguments = function._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs

    def told(argument: Any) -> bool:
        value = given[argument.name]
        if not argument.has_default_value() or isinstance(value, (Tensor, list)):
            return True
        return value != argument.default_value

    return {argument.name: given[argument.name] for argument in arguments if argument.name in given and told(argument)}


def _check_shapes(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    def meta(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")

    def shapes(x: Any) -> list[Any]:
        return [(tuple(t.shape), t.dtype) for t in tree_leaves(x) if isinstance(t, Tensor)]

    try:
        wanted = function(*tree_map(meta, args), **tree_map(meta, kwargs))
    except NotImplementedError:  # some have no meta kernel
        return
    assert shapes(out) == shapes(wanted), f"{function}: {shapes(out)}, but torch_npu says {shapes(wanted)}"


class _Call:
    """The tensors of one call, on their way to the host and back."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.device: torch.device | None = None
        self.generator: torch.Generator | None = None
        self._given: dict[int, tuple[Tensor, Tensor, torch.Size]] = {}
        self._on_host: Tensor | None = None

    def down(self, arguments: Any) -> Any:
        found = tree_map(self._down, arguments)
        if self._given and self._on_host is not None and not self.function._schema.name.startswith(MIXING):
            raise RuntimeError(
                f"{self.function}: expected all tensors on the same device, but found {self.device} and cpu "
                f"{tuple(self._on_host.shape)}"
            )
        return found

    def up(self, out: Any) -> Any:
        for host, tensor, shape in self._given.values():
            if host.shape != shape:  # an `out` tensor was resized
                tensor.resize_(host.shape)
                on_host(tensor).copy_(host)
        return tree_map(self._up, out)

    def _down(self, x: Any) -> Any:
        if isinstance(x, torch.device) and x.type == "npu":
            self.device = x
            return torch.device("cpu")
        if isinstance(x, torch.Generator) and x.device.type == "npu":
            self.device, self.generator = self.device or x.device, x
            return None
        if not isinstance(x, Tensor):
            return x
        if x.device.type != "npu":
            if x.dim():  # a number may come from anywhere
                self._on_host = x
            return x
        self.device = self.device or x.device
        host = on_host(x)
        self._given[id(host)] = (host, x, host.shape)
        return host

    def _up(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in self._given:
            return self._given[id(x)][1]
        assert self.device is not None, self.function
        return on_device(x, self.device)


@contextlib.contextmanager
def _seeded(generator: torch.Generator | None, device: torch.device | None) -> Iterator[None]:
    """Draw from the CPU's generator, seeded by what the device's stands at, which moves on: its states mean what they say.

    The numbers are not those that the device would draw.
    """
    npu: Any = torch.get_device_module("npu")
    if generator is None:
        index = None if device is None else device.index
        generator = npu.default_generators[npu.current_device() if index is None else index]
    seed, offset = generator.get_state().view(torch.int64).tolist()
    kept = torch.default_generator.get_state()
    torch.default_generator.manual_seed((seed * 0x9E3779B97F4A7C15 + offset * 0xD1B54A32D192ED03) % 2**63)
    try:
        yield
    finally:
        torch.default_generator.set_state(kept)
        generator.set_state(torch.tensor([seed, offset + 4]).view(torch.uint8))


def _host_of(tensor: Tensor) -> Tensor:
    return on_host(tensor) if tensor.device.type == "npu" else tensor


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _host_of(target).copy_(_host_of(source))
    return target


def _to_copy(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    made = torch.ops.aten._to_copy.default(_host_of(x), dtype=dtype, memory_format=memory_format)
    target = x.device if device is None else torch.device(device)
    return on_device(made, target) if target.type == "npu" else made


SPECIAL: dict[str, Callable[..., Any]] = {"aten::copy_": _copy, "aten::_to_copy": _to_copy}
