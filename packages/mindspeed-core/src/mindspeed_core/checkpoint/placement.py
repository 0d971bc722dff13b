"""Which piece of which global tensor this rank holds: weights, fp32 masters and Adam's moments alike.

A checkpoint knows only global tensors, in the layout of a model that nothing splits. A rank holds boxes of them:

    tp cuts a dimension              pp holds some layers        the distributed optimizer cuts the flat weight
    +-----------+                                                +-----------+
    | rank 0    |                    other keys                  |aaaaaaaaaaa|   rank 0: whole rows, then the
    |-----------|                                                |aaaa|bbbbbb|   start of one; rank 1: its rest,
    | rank 1    |                                                |bbbbbbbbbbb|   then whole rows
    +-----------+                                                +-----------+

so every layout reads what any other has written, and nobody gathers anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = "optimizer.state."  # the prefix of all keys that are not weights, as Megatron names them
MASTER = "fp32_param"


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor, and the memory of this rank that holds it."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]  # where the box begins
    data: Tensor  # a view: loading writes into it
    replica: tuple[int, ...]  # which copy of the box this is; the last number counts the data-parallel copies
    instead: str | None = None  # the key to read where a checkpoint has no `key`

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def writes(self) -> bool:
        """True on the one rank that saves this box."""
        return not any(self.replica)


def weight_pieces(chunks: list[Any], vocab_size: int) -> list[tuple[Tensor, list[Piece]]]:
    """Return each parameter of the model with the boxes it is made of, as they lie in its memory.

    Rows that only pad the vocabulary are left out: no checkpoint holds them.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found: dict[int, tuple[Tensor, list[Piece]]] = {}
    for chunk in chunks:
        module: Any = getattr(chunk, "module", chunk)  # data parallelism wraps each chunk
        # the layers of one model may differ, so each has keys of its own
        state = module.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        for part in state.values():
            if isinstance(part, ShardedTensor | ShardedTensorFactory) and id(part.data) not in found:
                shards = part.build() if isinstance(part, ShardedTensorFactory) else [part]
                pieces = [_piece(shard, vocab_size) for shard in shards]
                found[id(part.data)] = cast(Tensor, part.data), [piece for piece in pieces if piece.data.numel()]
    return list(found.values())


def optimizer_pieces(
    optimizer: Any, weights: list[tuple[Tensor, list[Piece]]], loaded: list[Callable[[], None]] | None = None
) -> Iterator[Piece]:
    """Yield the boxes of the moments, and of the fp32 masters where the weights themselves are not fp32.

    Some may be copies of what is stored in another way: `loaded` gets what is to be called when all have been filled.
    """
    places = {id(param): pieces for param, pieces in weights}
    for inner in optimizer.chained_optimizers:
        for param, start, stop, main in _mains(inner):
            tensors = inner.optimizer.held(main)
            if loaded is not None:
                loaded.append(partial(inner.optimizer.hold, main, tensors))
            if param.dtype != torch.float32:
                tensors = {MASTER: main, **tensors}
            for name, tensor in tensors.items():
                for piece in places[id(param)]:
                    yield from _cut(piece, param, start, stop, tensor.detach().view(-1), name)


def _mains(inner: Any) -> Iterator[tuple[Tensor, int, int | None, Tensor]]:
    """Yield (parameter, the flat range of it that this rank updates, the tensor Adam updates for it).

    The end is None where every data-parallel rank updates the whole parameter.
    """
    if inner.is_stub_optimizer:
        return
    if hasattr(inner, "model_param_group_index_map"):  # DistributedOptimizer
        own = inner.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8  # Megatron's mark of weights that are masters
        masters = inner.shard_float16_groups if own else inner.shard_fp32_from_float16_groups
        for groups, mains in (
            (inner.model_float16_groups, masters),
            (inner.model_fp32_groups, inner.shard_fp32_groups),
        ):
            for param, main in zip(chain(*groups), chain(*mains), strict=True):
                held = inner._get_model_param_range_map(param)["param"]
                yield param, held.start, held.end, main
        return
    params: dict[Any, Any] = {}  # by the id of its fp32 master
    if hasattr(inner, "float16_groups"):
        for group, masters in zip(inner.float16_groups, inner.fp32_from_float16_groups, strict=True):
            params.update({id(master): param for param, master in zip(group, masters, strict=True)})
    for group in inner.optimizer.param_groups:
        for main in group["params"]:
            held_by: Any = params.get(id(main), main)
            yield held_by, 0, None, main


def _piece(shard: Any, vocab_size: int) -> Piece:
    shape, offset, data = tuple(shard.global_shape), tuple(shard.global_offset), shard.data.detach()
    if shard.allow_shape_mismatch:  # Megatron's mark of a tensor whose first dimension is the padded vocabulary
        data = data[: max(0, vocab_size - offset[0])]
        shape = (vocab_size, *shape[1:])
    return Piece(shard.key, shape, offset, data, tuple(shard.replica_id))


def _cut(piece: Piece, param: Tensor, start: int, stop: int | None, flat: Tensor, name: str) -> Iterator[Piece]:
    """Yield the boxes of `piece` that the range [start, stop) of its parameter holds; `flat` is the memory of the range."""
    assert piece.data.is_contiguous(), f"{piece.key}: the pieces of one parameter are cut by rows"
    begin = int(piece.data.storage_offset()) - int(param.storage_offset())
    low, high = max(start, begin), min(param.numel() if stop is None else stop, begin + piece.data.numel())
    for offset, sizes in boxes(piece.sizes, low - begin, high - begin):
        place = begin + _flat(offset, piece.sizes) - start
        yield Piece(
            f"{STATE}{name}.{piece.key}",
            piece.shape,
            tuple(own + inner for own, inner in zip(piece.offset, offset, strict=True)),
            flat[place : place + math.prod(sizes)].view(sizes),
            # no other data-parallel rank has a range that the optimizer distributes
            piece.replica if stop is None else (*piece.replica[:-1], 0),
            instead=piece.key if name == MASTER else None,
        )


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, sizes) of the boxes that the elements [start, stop) of a row-major tensor fill, in order.

    A range of a matrix is the end of one row, whole rows, the start of one: at most three boxes, 2n - 1 in n dimensions.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    inner = math.prod(shape[1:])
    row, within = divmod(start, inner)
    if within:
        end = min(stop, (row + 1) * inner)
        for offset, sizes in boxes(shape[1:], within, end - row * inner):
            yield (row, *offset), (1, *sizes)
        start = end
    row, rows = start // inner, stop // inner - start // inner
    if rows > 0:
        yield (row, *([0] * (len(shape) - 1))), (rows, *shape[1:])
        start += rows * inner
    if start < stop:
        row = start // inner
        for offset, sizes in boxes(shape[1:], 0, stop - row * inner):
            yield (row, *offset), (1, *sizes)


def _flat(offset: tuple[int, ...], shape: tuple[int, ...]) -> int:
    place = 0
    for at, size in zip(offset, shape, strict=True):
        place = place * size + at
    return place
