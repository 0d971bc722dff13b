"""Calls of our kernels' NPU sides through torch_npu's own C++, on operators that only write down that they were launched.

    python -m tests.ascend.calls LIBRARIES      prints, as JSON, what came of each call

GOOD calls go forward and back. A BAD call has something wrong with it that must be told before anything is launched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from tests.ascend import cann

S, B, N, G, D = 8, 2, 4, 2, 64  # positions, rows, heads, groups of keys, width of a head


class Shape(NamedTuple):
    """A tensor to make: of bf16 and with a gradient, if nothing else is said."""

    sizes: tuple[int, ...]
    dtype: str = "bfloat16"
    grad: bool = True


def shape(*sizes: int, dtype: str = "bfloat16", grad: bool = True) -> Shape:
    return Shape(sizes, dtype, grad)


QKV = (shape(S, B, N, D), shape(S, B, G, D), shape(S, B, G, D))
ROOM = 12  # positions of a cache
CACHE = (shape(B, G, ROOM, D, grad=False), shape(B, G, ROOM, D, grad=False))
CHUNK, STEP = (
    shape(3, B, N, D, grad=False),
    shape(1, B, N, D, grad=False),
)  # queries of a part of a prompt, of one token
ANGLES = (shape(S, 1, 1, D, grad=False), shape(S, 1, 1, D, grad=False))
SUM = (*[shape(S, B, D, grad=False)] * 2, shape(D, grad=False))  # what is added, and the weight of its norm


def _kernels() -> Any:
    from mindspeed_core import kernels

    return kernels


def _attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return _kernels().attention.npu(q, k, v, scale=0.1, **options)


def _cached(
    q: Any, keys: Any, values: Any, padding: tuple[int, ...] = (0, 0), window: int | None = None, **options: Any
) -> Any:
    from mindspeed_core.kernels.cached_attention import Extent

    extent = Extent(len(q), S, ROOM, padding, q.device, window)
    return _kernels().cached_attention.npu(q, keys, values, extent, scale=0.1, **options)


def _sum_and_norm(x: Any, residual: Any, weight: Any) -> list[Any]:
    import torch

    with torch.inference_mode():
        return list(_kernels().rms_norm.npu_add(x, residual, weight, 1e-5))


def _mask(rows: int = 1, keys: int = S) -> Any:
    import torch

    return torch.empty(rows, 1, S, keys, dtype=torch.bool, device="npu")


def _biases() -> Any:
    alibi = _kernels().alibi
    return alibi.Alibi(alibi.slopes(N)).to("npu")


def _segments() -> Any:
    import torch

    from mindspeed_core.kernels.segments import Segments

    return Segments.of(torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1]]))


def _block(q: Any, k: Any, v: Any, **options: Any) -> list[Any]:
    """Forward and backward of a block, which know nothing of autograd."""
    import torch

    block = _kernels().attention_block.npu
    with torch.no_grad():
        out, lse = block.forward(q, k, v, scale=0.1, **options)
        grads = block.backward(torch.empty_like(q), q, k, v, out.to(q.dtype), lse, scale=0.1, **options)
    return [out, lse, *grads]


def _experts(rows: int) -> Any:
    import torch

    return torch.zeros(rows, 2, dtype=torch.int64, device="npu")


def _beside(operation: str, x: Any, weight: Any, ranks: int = 2) -> Any:
    from mindspeed_core.kernels import matmul_collective

    group = SimpleNamespace(size=lambda: ranks)
    return getattr(matmul_collective.fused(), operation)(x.detach(), weight.detach(), group)


def _with_sums(*weights: Any) -> None:
    import torch

    for weight in weights:
        weight.main_grad = torch.empty(weight.shape, dtype=torch.float32, device="npu")


def _linear(x: Any, weight: Any) -> Any:
    _with_sums(weight)
    return _kernels().matmul.npu(x, weight)


def _experts_with_sums(x: Any, *weights: Any) -> Any:
    _with_sums(*weights)
    return _kernels().grouped_matmul.npu(x, weights, (4, 0, 2))


GOOD: dict[str, tuple[tuple[Shape, ...], Callable[..., Any]]] = {
    "attention": (QKV, _attention),
    "attention of the last query": ((shape(1, B, N, D), *QKV[1:]), _attention),
    "attention of later queries": ((shape(3, B, N, D), *QKV[1:]), _attention),
    "attention with a mask": (QKV, lambda q, k, v: _attention(q, k, v, mask=_mask())),
    "attention with a mask per row": (QKV, lambda q, k, v: _attention(q, k, v, mask=_mask(B))),
    "attention of documents": (QKV, lambda q, k, v: _attention(q, k, v, segments=_segments())),
    "attention in a window": (QKV, lambda q, k, v: _attention(q, k, v, window=4)),
    "attention of the last query in a window": (
        (shape(1, B, N, D), *QKV[1:]),
        lambda q, k, v: _attention(q, k, v, window=4),
    ),
    "attention with a mask in a window": (QKV, lambda q, k, v: _attention(q, k, v, mask=_mask(), window=4)),
    "attention of documents in a window": (QKV, lambda q, k, v: _attention(q, k, v, segments=_segments(), window=3)),
    "attention with biases": (QKV, lambda q, k, v: _attention(q, k, v, alibi=_biases())),
    "attention of documents with biases": (
        QKV,
        lambda q, k, v: _attention(q, k, v, segments=_segments(), alibi=_biases()),
    ),
    "attention in fp32": (tuple(x._replace(dtype="float32") for x in QKV), _attention),
    "attention with narrow values": (
        (shape(S, B, N, 192), shape(S, B, N, 192), shape(S, B, N, 128)),
        _attention,
    ),
    "documents with narrow values": (
        (shape(S, B, N, 192), shape(S, B, N, 192), shape(S, B, N, 128)),
        lambda q, k, v: _attention(q, k, v, segments=_segments()),
    ),
    "block": (QKV, lambda q, k, v: _block(q, k, v, causal=True)),
    "block with a mask": (QKV, lambda q, k, v: _block(q, k, v, mask=_mask())),
    "block of documents": (QKV, lambda q, k, v: _block(q, k, v, segments=_segments(), causal=True)),
    "cache, a prompt": ((CHUNK, *CACHE), _cached),
    "cache, a prompt of uneven rows": ((CHUNK, *CACHE), lambda *qkv: _cached(*qkv, padding=(0, 2))),
    "cache, a token": ((STEP, *CACHE), _cached),
    "cache, a token of uneven rows": ((STEP, *CACHE), lambda *qkv: _cached(*qkv, padding=(0, 2))),
    "cache, a prompt in a window": ((CHUNK, *CACHE), lambda *qkv: _cached(*qkv, window=4)),
    "cache, a token in a window": ((STEP, *CACHE), lambda *qkv: _cached(*qkv, window=4)),
    "cache, a token with biases": ((STEP, *CACHE), lambda *qkv: _cached(*qkv, alibi=_biases())),
    "cache in fp32": (tuple(x._replace(dtype="float32") for x in (STEP, *CACHE)), _cached),
    "cache of wide heads": (
        (shape(1, B, N, 576, grad=False), *[shape(B, G, ROOM, 576, grad=False)] * 2),
        _cached,
    ),
    "rms_norm": ((shape(S, B, D), shape(D)), lambda x, w: _kernels().rms_norm.npu(x, w, 1e-5)),
    "rms_norm of a sum": (SUM, _sum_and_norm),
    "swiglu": ((shape(S, B, 2 * D),), lambda x: _kernels().swiglu.npu(x)),
    "rotary": ((QKV[0], *ANGLES), lambda x, cos, sin: _kernels().rotary.npu(x, cos, sin)),
    "rotary of pairs": ((QKV[0], *ANGLES), lambda *x: _kernels().rotary.npu(*x, interleaved=True)),
    "rotary of pairs, rows apart": (
        (QKV[0], shape(S, B, 1, D, grad=False), shape(S, B, 1, D, grad=False)),
        lambda *x: _kernels().rotary.npu(*x, interleaved=True),
    ),
    "grouped_matmul": (
        (shape(6, D), shape(32, D), shape(32, D), shape(32, D)),
        lambda x, *weights: _kernels().grouped_matmul.npu(x, weights, (4, 0, 2)),
    ),
    "grouped_matmul with sums": ((shape(6, D), shape(32, D), shape(32, D), shape(32, D)), _experts_with_sums),
    "permute": ((shape(3, D),), lambda x: _kernels().permute.npu(x, _experts(3), 6)[0]),
    "unpermute": (
        (shape(6, D), shape(3, 2, dtype="float32")),
        lambda x, weights: _kernels().permute.npu_back(x, _experts(3).int().flatten(), weights),
    ),
    "matmul": ((shape(S, B, D), shape(32, D)), lambda x, w: _kernels().matmul.npu(x, w)),
    "matmul with a sum": ((shape(S, B, D), shape(32, D)), _linear),
}

BAD: dict[str, tuple[tuple[Shape, ...], Callable[..., Any]]] = {
    "heads that groups do not divide": ((shape(S, B, 3, D), *QKV[1:]), _attention),
    "keys of another width": ((QKV[0], shape(S, B, G, 32), QKV[2]), _attention),
    "values wider than keys": ((QKV[0], QKV[1], shape(S, B, G, 128)), _attention),
    "keys of another dtype": ((QKV[0], QKV[1]._replace(dtype="float32"), QKV[2]), _attention),
    "a mask of another length": (QKV, lambda q, k, v: _attention(q, k, v, mask=_mask(1, S - 1))),
    "heads too wide": ((shape(S, B, N, 1024), shape(S, B, G, 1024), shape(S, B, G, 1024)), _attention),
    "a cache of other rows": ((STEP, shape(1, G, ROOM, D, grad=False), shape(1, G, ROOM, D, grad=False)), _cached),
    "a cache of another width": ((shape(1, B, N, 32, grad=False), *CACHE), _cached),
    "a cache of another dtype": ((STEP._replace(dtype="float32"), *CACHE), _cached),
    "a cache whose groups do not divide": ((shape(1, B, 3, D, grad=False), *CACHE), _cached),
    "a cache that should learn": ((STEP._replace(grad=True), *CACHE), _cached),
    "mc2 in fp32": (
        (shape(S, 256, dtype="float32"), shape(32, 256, dtype="float32")),
        lambda *x: _beside("scatter", *x),
    ),
    "mc2 of few features": ((shape(S, 255), shape(32, 255)), lambda *x: _beside("gather", *x)),
    "mc2 of many features": ((shape(S, 65535), shape(32, 65535)), lambda *x: _beside("scatter", *x)),
    "mc2 of three ranks": ((shape(S, 256), shape(32, 256)), lambda *x: _beside("reduce", *x, ranks=3)),
    "mc2 of other features": ((shape(S, 256), shape(32, 512)), lambda *x: _beside("gather", *x)),
    "mc2 of rows that ranks do not divide": ((shape(S + 1, 256), shape(32, 256)), lambda *x: _beside("scatter", *x)),
    "a norm of another width": ((shape(S, B, D), shape(D + 1)), lambda x, w: _kernels().rms_norm.npu(x, w, 1e-5)),
    "a sum of other rows": ((SUM[0], shape(1, B, D, grad=False), SUM[2]), _sum_and_norm),
    "a sum of two dtypes": ((SUM[0], SUM[1]._replace(dtype="float32"), SUM[2]), _sum_and_norm),
    "the norm of a sum in another dtype": ((*SUM[:2], SUM[2]._replace(dtype="float32")), _sum_and_norm),
    "the norm of a sum, of another width": ((*SUM[:2], shape(D + 1, grad=False)), _sum_and_norm),
    "a sum that should learn": (SUM, lambda *x: _kernels().rms_norm.npu_add(*x, 1e-5)),
    "an odd gate": ((shape(S, B, 2 * D + 1),), lambda x: _kernels().swiglu.npu(x)),
    "angles of another width": (
        (QKV[0], shape(S, 1, 1, D // 2, grad=False), shape(S, 1, 1, D // 2, grad=False)),
        lambda x, cos, sin: _kernels().rotary.npu(x, cos, sin),
    ),
    "an odd head": (
        (shape(S, B, N, 63), shape(S, 1, 1, 63, grad=False), shape(S, 1, 1, 63, grad=False)),
        lambda x, cos, sin: _kernels().rotary.npu(x, cos, sin),
    ),
    "pairs of an odd head": (
        (shape(S, B, N, 63), shape(S, 1, 1, 63, grad=False), shape(S, 1, 1, 63, grad=False)),
        lambda *x: _kernels().rotary.npu(*x, interleaved=True),
    ),
    "angles of other pairs": (
        (QKV[0], shape(S, 1, 1, D // 2, grad=False), shape(S, 1, 1, D // 2, grad=False)),
        lambda *x: _kernels().rotary.npu(*x, interleaved=True),
    ),
    "rows that no expert has": (
        (shape(7, D), shape(32, D), shape(32, D)),
        lambda x, *weights: _kernels().grouped_matmul.npu(x, weights, (4, 2)),
    ),
    "experts of another width": (
        (shape(6, D), shape(32, 32), shape(32, 32)),
        lambda x, *weights: _kernels().grouped_matmul.npu(x, weights, (4, 2)),
    ),
    "experts of fewer tokens": ((shape(3, D),), lambda x: _kernels().permute.npu(x, _experts(2), 4)[0]),
    "weights of other tokens": (
        (shape(6, D), shape(2, 2, dtype="float32")),
        lambda x, weights: _kernels().permute.npu_back(x, _experts(3).int().flatten(), weights),
    ),
}


def main(libraries: str) -> None:
    folder = Path(libraries)
    cann.load(folder, operators=True)
    import torch

    launches = cann.Launches(folder)

    def make(wanted: Shape) -> Any:
        dtype = getattr(torch, wanted.dtype)
        return torch.empty(wanted.sizes, dtype=dtype, device="npu").requires_grad_(wanted.grad)

    def told(tensor: Any) -> list[Any]:
        return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]

    def good(shapes: tuple[Shape, ...], call: Callable[..., Any]) -> dict[str, Any]:
        inputs = [make(wanted) for wanted in shapes]
        launches.take()
        made = call(*inputs)
        outs = made if isinstance(made, list) else [made]
        found: dict[str, Any] = {"outs": [told(out) for out in outs], "forward": launches.take()}
        if outs[0].requires_grad:
            learned = [x for x in inputs if x.requires_grad]
            grad = torch.empty_like(outs[0])
            launches.take()
            grads = torch.autograd.grad(outs[0], learned, grad, allow_unused=True)
            found["grads"] = [None if x is None else told(x) for x in grads]
            found["backward"] = launches.take()
        return found

    def bad(shapes: tuple[Shape, ...], call: Callable[..., Any]) -> dict[str, Any]:
        inputs = [make(wanted) for wanted in shapes]
        launches.take()
        try:
            call(*inputs)
        except (RuntimeError, AssertionError) as error:
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        return {"launched": launches.take()}

    print(json.dumps({"good": {k: good(*v) for k, v in GOOD.items()}, "bad": {k: bad(*v) for k, v in BAD.items()}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
