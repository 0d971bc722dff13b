"""Loads megatron.core for the device at hand. The only file that knows Megatron says "cuda".

megatron.core names `torch.cuda` some five hundred times. An import hook rewrites that, and only that, in the source of
`megatron.core.*` as it loads, so that the same code runs on an NPU and on a CPU; torch itself and every other library
stay as they are, and on CUDA nothing is rewritten:

    torch.cuda.stream(...)      ->  the device's own module (torch.npu), or `CPU` below
    device="cuda"               ->  device="npu" | "cpu"
    tensor.cuda()               ->  tensor.to("npu" | "cpu")
    tensor.is_cuda              ->  tensor.device.type == "npu" | "cpu"
    "torch.cuda.FloatTensor"    ->  "torch.npu.FloatTensor" | "torch.FloatTensor"
    pin_memory                  ->  dropped on the CPU, which has no device to copy to

Line numbers are kept, so tracebacks point into the installed files. What must be mended in megatron.core beyond its
device stands in `MENDS`, each row with a test that fails when upstream no longer needs it.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import marshal
import os
import sys
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mindspeed_core.device import Device

PACKAGE = "megatron.core"
TENSOR_TYPES = ("FloatTensor", "HalfTensor", "BFloat16Tensor")


@dataclass(frozen=True)
class Mend:
    """One assignment into megatron.core, made as soon as its module has loaded."""

    module: str
    name: str
    value: Callable[[], Any]  # called at that moment, so that nothing of ours is imported before
    why: str


def _keep(function: Callable) -> Callable:
    return function


def _adam() -> type:
    from mindspeed_core.optim.adamw import AdamW

    return AdamW


def _scale() -> Callable:
    from mindspeed_core.optim.scaling import scale

    return scale


_APEX = "without apex or Transformer Engine the optimizer state cannot be resharded: it wants `step` in the param group"

MENDS: tuple[Mend, ...] = (
    Mend(
        "megatron.core.jit",
        "jit_fuser",
        lambda: _keep,
        "torch.compile of pointwise functions needs a compiler and 15 s",
    ),
    Mend(
        "megatron.core.utils",
        "local_multi_tensor_scale",
        _scale,
        "it makes a product of every tensor and copies that, also to scale in place and to copy",
    ),
    Mend("megatron.core.optimizer", "Adam", _adam, _APEX),
    Mend("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER", lambda: False, _APEX),
    Mend("megatron.core.optimizer.distrib_optimizer", "Adam", _adam, _APEX),
    Mend("megatron.core.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE", lambda: True, _APEX),
    Mend("megatron.core.optimizer.distrib_optimizer", "USING_APEX_OPTIMIZER", lambda: True, _APEX),
)


def load(device: Device) -> None:
    """Make megatron.core importable for `device`. Call it before anything of Megatron is imported; again is harmless."""
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):
            if finder.device_type != device.type:
                raise RuntimeError(f"megatron.core is loaded for {finder.device_type}, not for {device.type}")
            return
    if any(name == PACKAGE or name.startswith(PACKAGE + ".") for name in sys.modules):
        raise RuntimeError("megatron.core was imported before mindspeed_core.megatron.load")
    sys.meta_path.insert(0, _Finder(device.type))


class _Stream:
    """A CPU's only stream: everything has happened when the call returns."""

    def wait_stream(self, stream: _Stream) -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Event:
    """An event on that stream: it has always happened."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None: ...

    def record(self, stream: _Stream | None = None) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _nothing(*args: object, **kwargs: object) -> None: ...


def _zero(*args: object, **kwargs: object) -> int:
    return 0


@contextlib.contextmanager
def _nullary(*args: object, **kwargs: object) -> Iterator[None]:
    yield


def _seed(seed: int) -> torch.Generator:
    return torch.default_generator.manual_seed(seed)


def _rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


def _cpu_module() -> types.ModuleType:
    """Return a module of torch.cuda's shape for the CPU: one stream, no memory counters, the host's generator."""
    cpu = types.ModuleType(f"{__name__}.cpu", "torch.cuda's names, as far as megatron.core uses them, on a CPU.")
    stream = _Stream()
    names: dict[str, object] = {
        "Stream": lambda *args, **kwargs: stream,
        "Event": _Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": _nullary,
        "set_stream": _nothing,
        "device": _nullary,
        "current_device": lambda: torch.device("cpu"),
        "set_device": _nothing,
        "device_count": lambda: 1,
        "is_available": lambda: False,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: (0, 0),
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
        "manual_seed": _seed,
        "manual_seed_all": _seed,
        "get_rng_state": _rng_state,
        "set_rng_state": _set_rng_state,
        "random": types.SimpleNamespace(get_rng_state=_rng_state, set_rng_state=_set_rng_state),
        "default_generators": {torch.device("cpu"): torch.default_generator},
        "_lazy_call": lambda call, **kwargs: call(),
        "_lazy_init": _nothing,
        "memory_allocated": _zero,
        "max_memory_allocated": _zero,
        "memory_reserved": _zero,
        "max_memory_reserved": _zero,
        "memory_stats": lambda device=None: defaultdict(int),
        "reset_peak_memory_stats": _nothing,
        "nvtx": types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=_nullary),
        "OutOfMemoryError": torch.OutOfMemoryError,
        "amp": torch.cuda.amp,  # decorators that only carry a device type
        **{name: getattr(torch, name) for name in TENSOR_TYPES},
    }
    for name, value in names.items():
        setattr(cpu, name, value)
    return cpu


class _Npu(types.ModuleType):
    """torch.npu, and the few torch.cuda names it lacks."""

    def __getattr__(self, name: str) -> object:
        lacking = {
            "OutOfMemoryError": torch.OutOfMemoryError,
            "nvtx": types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=_nullary),
        }
        module: Any = torch
        return lacking[name] if name in lacking and not hasattr(module.npu, name) else getattr(module.npu, name)


MODULES: dict[str, Callable[[], types.ModuleType]] = {"cpu": _cpu_module, "npu": lambda: _Npu(f"{__name__}.npu")}


class _Port(ast.NodeTransformer):
    """The rewriting itself, on the syntax tree of one module."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        prefix = "torch." if device_type == "cpu" else f"torch.{device_type}."
        self.strings = {f"torch.cuda.{name}": prefix + name for name in TENSOR_TYPES}

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name("_accelerator", node.ctx), node)
        if node.attr == "is_cuda" and isinstance(node.ctx, ast.Load):
            return self._call("_on_accelerator", [node.value], [], node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Attribute):
            if function.attr == "cuda":
                return self._call("_to_accelerator", [function.value, *node.args], node.keywords, node)
            if function.attr == "pin_memory" and self.device_type == "cpu" and not node.args:
                return function.value
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if isinstance(value, str):
            if value == "cuda" or value.startswith("cuda:"):
                return ast.copy_location(ast.Constant(value.replace("cuda", self.device_type, 1)), node)
            if value in self.strings:
                return ast.copy_location(ast.Constant(self.strings[value]), node)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node  # messages for people

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        if node.arg == "pin_memory" and self.device_type == "cpu":
            node.value = ast.copy_location(ast.Constant(False), node.value)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.AST]:
        # `from torch.cuda import a as b` becomes `b = _accelerator.a`
        if node.module != "torch.cuda":
            return node
        return [
            ast.copy_location(
                ast.Assign(
                    [ast.Name(alias.asname or alias.name, ast.Store())],
                    ast.Attribute(ast.Name("_accelerator", ast.Load()), alias.name, ast.Load()),
                ),
                node,
            )
            for alias in node.names
        ]

    @staticmethod
    def _call(name: str, args: list[ast.expr], keywords: list[ast.keyword], at: ast.expr) -> ast.Call:
        return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), args, keywords), at)


def _on_accelerator(device_type: str) -> Callable[[torch.Tensor], bool]:
    return lambda tensor: tensor.device.type == device_type


def _to_accelerator(device_type: str) -> Callable[..., torch.Tensor]:
    def to(tensor: torch.Tensor, device: object = None, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
        return tensor.to(device_type, non_blocking=non_blocking, **kwargs)

    return to


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads one module of megatron.core: rewritten source, then its mends."""

    def __init__(self, name: str, path: str, device_type: str, names: dict[str, object]) -> None:
        super().__init__(name, path)
        self.device_type = device_type
        self.names = names

    def get_code(self, fullname: str) -> types.CodeType:
        """Return the module's code, from our own cache where the same source was rewritten before."""
        source = self.get_data(self.path)
        if self.device_type == "cuda" or not (b"cuda" in source or b"pin_memory" in source):
            code = super().get_code(fullname)
            assert code is not None  # only a package without source has none
            return code
        # code says which file it is of: tracebacks, and who looks where a rank stands, read the lines there
        said = f"{self.device_type}\n{self.path}".encode()
        key = hashlib.sha256(source + Path(__file__).read_bytes() + said).hexdigest()[:32]
        cached = _cache_folder() / f"{key}.{sys.implementation.cache_tag}.bin"
        with contextlib.suppress(OSError, EOFError, ValueError):  # no cache is only slower
            return marshal.loads(cached.read_bytes())
        tree = ast.fix_missing_locations(_Port(self.device_type).visit(ast.parse(source, self.path)))
        code = compile(tree, self.path, "exec", dont_inherit=True)
        with contextlib.suppress(OSError):  # a read-only home is no fault
            cached.parent.mkdir(parents=True, exist_ok=True)
            aside = cached.with_suffix(f".{os.getpid()}")
            aside.write_bytes(marshal.dumps(code))
            aside.replace(cached)
        return code

    def exec_module(self, module: types.ModuleType) -> None:
        if self.device_type != "cuda":
            module.__dict__.update(self.names)
        with warnings.catch_warnings():
            # a dozen modules say that apex or Transformer Engine is missing; here it always is
            warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            super().exec_module(module)
        for mend in MENDS:
            if mend.module == module.__name__:
                if not hasattr(module, mend.name):
                    raise RuntimeError(f"{mend.module}.{mend.name} is gone upstream: {mend.why}")
                setattr(module, mend.name, mend.value())


class _Finder:
    """Finds modules of megatron.core on the path and gives them our loader."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.names: dict[str, object] = {}
        if device_type != "cuda":
            self.names = {
                "_accelerator": MODULES[device_type](),
                "_on_accelerator": _on_accelerator(device_type),
                "_to_accelerator": _to_accelerator(device_type),
            }

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != PACKAGE and not name.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self.device_type, self.names)
        return spec


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mindspeed" / "megatron"
