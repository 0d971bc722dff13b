"""Our training checkpoint: everything a run goes on from, in a folder that any layout can read.

    FOLDER/latest               "step_20": the newest, replaced only when its folder is complete
    FOLDER/step_20/.metadata    + __R_0.distcp: weights, fp32 masters, Adam's moments, random states (torch_dist)
    FOLDER/step_20/meta.json    how far the run was, the layout and the versions that wrote it
    FOLDER/step_20/hf/          config.json and the tokenizer, so that every command opens the folder as a model
    FOLDER/.step_30.tmp/        one that is being written; a run that was killed leaves it, the next one removes it

Weights stand under the global names of Megatron's modules (`decoder.layers.3.mlp.linear_fc1.weight`), whole and in the
layout of one rank.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mindspeed_core.checkpoint.folder import copy_assets, read_json, sync
from mindspeed_core.checkpoint.placement import Piece, optimizer_pieces, weight_pieces
from mindspeed_core.checkpoint.torch_dist import Stored, overlap, read_box, read_metadata, write_boxes, write_metadata
from mindspeed_core.errors import InputError
from mindspeed_core.parallel.mesh import Mesh

FORMAT = {"format": "mindspeed", "version": 1}
STEP = re.compile(r"step_(\d+)")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    step: int = 0  # optimizer steps made
    samples: int = 0  # samples consumed, over all data-parallel ranks
    tokens: int = 0  # tokens consumed that counted in the loss


@dataclass(frozen=True, kw_only=True)
class State:
    """What a checkpoint holds, as this rank has it."""

    chunks: list[Any]  # the model, wrapped or not
    optimizer: Any  # Megatron's
    mesh: Mesh
    vocab_size: int  # without padding


def save(folder: Path, state: State, progress: Progress, *, assets: Path | None = None, keep: int = 0) -> Path:
    """Write `folder/step_N` and make it the latest; collective. Return its path.

    Whatever happens, the checkpoint before stays valid, and one that is incomplete never has a name that counts.

    Args:
        folder: where all checkpoints of the run lie.
        assets: a folder with config.json and the tokenizer, copied into `hf/`.
        keep: how many of the newest to keep; 0 keeps all.
    """
    mesh = state.mesh
    path = folder / f"step_{progress.step}"
    aside = folder / f".{path.name}.tmp"
    try:
        _together(mesh, lambda: _begin(aside), path, main=True)
        written = _together(mesh, lambda: _write(aside, state), path)
        everything: list[Any] | None = [None] * mesh.world_size if mesh.is_main else None
        dist.gather_object(written, everything, dst=0)
        _together(mesh, lambda: _finish(aside, path, everything or [], state, progress, assets), path, main=True)
        _together(mesh, lambda: _prune(folder, progress.step, keep), path, main=True)
    except BaseException:
        if mesh.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return path


def load(path: Path, state: State) -> Progress:
    """Fill the model, the optimizer and the random generators from `path` and return how far it was; collective.

    Any layout reads what any other has written. On the layout that wrote it a run goes on bit for bit.
    """
    return _together(state.mesh, lambda: _load(path, state), path, reads=True)


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run, None where there is none yet."""
    pointer = folder / "latest"
    if pointer.is_file():
        name = pointer.read_text().strip()
        if not STEP.fullmatch(name) or not (folder / name).is_dir():
            raise InputError(
                f"{pointer}: names {name!r}, which is not there; write the name of a step_N folder into it"
            )
        return folder / name
    steps = list(_steps(folder))  # a first checkpoint whose run was killed before it wrote `latest`
    return max(steps)[1] if steps else None


def clear(folder: Path) -> None:
    """Remove what killed runs have left; call it on one rank, before anything is saved."""
    if folder.is_dir():
        for path in folder.iterdir():
            if re.fullmatch(r"\.step_\d+\.(tmp|old)", path.name):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name == ".latest.tmp":
                path.unlink(missing_ok=True)


def _begin(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _write(aside: Path, state: State) -> list[tuple[str, tuple[int, ...], torch.dtype, Any]]:
    shapes = []

    def boxes() -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:  # one by one: some are copies
        for piece in chain(_pieces(state), _random_pieces(state.mesh, _random_states(state.mesh))):
            if piece.writes:
                shapes.append(piece.shape)
                yield piece.key, piece.offset, piece.data

    written = write_boxes(aside, state.mesh.rank, boxes())
    return [(key, shape, dtype, box) for shape, (key, dtype, box) in zip(shapes, written, strict=True)]


def _finish(
    aside: Path, path: Path, everything: list[Any], state: State, progress: Progress, assets: Path | None
) -> None:
    tensors: dict[str, Stored] = {}
    for key, shape, dtype, box in (row for rows in everything for row in rows):
        before = tensors.get(key, Stored(shape, dtype, ()))
        tensors[key] = dataclasses.replace(before, boxes=(*before.boxes, box))
    write_metadata(aside, tensors)
    meta = {**FORMAT, **dataclasses.asdict(progress), "optimizer_step": _optimizer_step(state), **_layout(state.mesh)}
    (aside / "meta.json").write_text(json.dumps({**meta, "torch": torch.__version__}, indent=2) + "\n")
    if assets is not None:
        copy_assets(assets, aside / "hf")
    for file in aside.rglob("*"):
        sync(file)
    sync(aside)
    old = path.with_name(f".{path.name}.old")
    if path.exists():  # the run went back to an earlier step and has come here again
        path.rename(old)
    aside.rename(path)
    pointer = path.with_name("latest")
    fresh = path.with_name(".latest.tmp")
    fresh.write_text(path.name + "\n")
    sync(fresh)
    fresh.replace(pointer)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the `keep` newest; those of later steps belong to a run that was gone back from, and stay."""
    past = sorted(found for found in _steps(folder) if found[0] <= step)
    for _number, path in past[:-keep] if keep else []:
        old = path.with_name(f".{path.name}.old")  # a name that does not count, should this be interrupted
        path.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _steps(folder: Path) -> Iterator[tuple[int, Path]]:
    if folder.is_dir():
        for path in folder.iterdir():
            match = STEP.fullmatch(path.name)
            if match and path.is_dir():
                yield int(match[1]), path


def _load(path: Path, state: State) -> Progress:
    meta = read_json(path / "meta.json") if (path / "meta.json").is_file() else {}
    if {key: meta.get(key) for key in FORMAT} != FORMAT:
        raise InputError(
            f"{path}: is no training checkpoint that this version reads; use one written by mindspeed-train"
        )
    tensors = read_metadata(path)
    same_layout = all(meta.get(key) == value for key, value in _layout(state.mesh).items())
    wanted: dict[str, list[Piece]] = {}
    random = {name: torch.empty_like(value) for name, value in _random_states(state.mesh).items()}
    loaded: list[Callable[[], None]] = []
    for piece in (*_pieces(state, loaded), *(_random_pieces(state.mesh, random) if same_layout else ())):
        key = piece.key
        if key not in tensors and piece.instead is not None:
            key = piece.instead
        if key not in tensors:
            raise InputError(f"{path}: holds no {key}; it was written by a run of another model or optimizer")
        if tensors[key].shape != piece.shape:
            raise InputError(
                f"{path}: {key} has shape {list(tensors[key].shape)}, the model of the recipe {list(piece.shape)}; "
                "continue with the recipe that wrote it, or start from it with model.path in another checkpoint.folder"
            )
        wanted.setdefault(key, []).append(piece)
    for key, pieces in wanted.items():
        _fill(path, key, tensors[key], pieces)
    for done in loaded:
        done()
    for inner in state.optimizer.chained_optimizers:
        for group in inner.param_groups:
            group["step"] = meta["optimizer_step"]
    if same_layout:
        _set_random_states(state.mesh, random)
    return Progress(**{field.name: meta[field.name] for field in dataclasses.fields(Progress)})


@torch.no_grad()
def _fill(path: Path, key: str, stored: Stored, pieces: list[Piece]) -> None:
    """Copy what the stored boxes and the pieces have in common; each box is read once."""
    missing = sum(math.prod(piece.sizes) for piece in pieces)
    for box in stored.boxes:
        common = [(piece, overlap((piece.offset, piece.sizes), (box.offset, box.sizes))) for piece in pieces]
        if not any(shared for _, shared in common):
            continue
        values = read_box(path, box)
        for piece, shared in common:
            if shared:
                mine, theirs = shared
                piece.data[mine].copy_(values[theirs])
                missing -= math.prod(place.stop - place.start for place in mine)
    if missing:
        raise InputError(f"{path}: {missing} elements of {key} are not stored; use another checkpoint")


def _pieces(state: State, loaded: list[Callable[[], None]] | None = None) -> Iterator[Piece]:
    weights = weight_pieces(state.chunks, state.vocab_size)
    for _, pieces in weights:
        yield from pieces
    yield from optimizer_pieces(state.optimizer, weights, loaded)


def _layout(mesh: Mesh) -> dict[str, Any]:
    axes = {"tp": mesh.tp.size, "pp": mesh.pp.size, "cp": mesh.cp.size, "dp": mesh.dp.size}
    return {"layout": axes, "device": mesh.device.type}


def _optimizer_step(state: State) -> int:
    groups = [group for inner in state.optimizer.chained_optimizers for group in inner.param_groups]
    return max((group.get("step", 0) for group in groups), default=0)


def _random_states(mesh: Mesh) -> dict[str, torch.Tensor]:
    """Return the state of every random generator of this rank."""
    states = {"host": torch.get_rng_state()}
    if mesh.device.module is not None:
        states["device"] = mesh.device.module.get_rng_state()
    return states | {f"megatron.{name}": value for name, value in _tracker().get_states().items()}


def _set_random_states(mesh: Mesh, states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["host"])
    if mesh.device.module is not None:
        mesh.device.module.set_rng_state(states["device"])
    prefix = "megatron."
    _tracker().set_states(
        {name.removeprefix(prefix): value for name, value in states.items() if name.startswith(prefix)}
    )


def _tracker() -> Any:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


def _random_pieces(mesh: Mesh, states: dict[str, torch.Tensor]) -> Iterator[Piece]:
    for name, value in states.items():
        yield Piece(f"random.rank_{mesh.rank}.{name}", tuple(value.shape), (0,), value, (0,))


def _together(mesh: Mesh, work: Callable[[], T], path: Path, *, main: bool = False, reads: bool = False) -> T:
    """Do `work` on every rank, or on rank 0 for all; when it fails on one for a fault of the disk, all raise it."""
    result: Any = None
    fault = None
    try:
        if mesh.is_main or not main:
            result = work()
    except InputError as error:
        fault = str(error)
    except OSError as error:
        fault = _explain(error, path, reads=reads)
    faults: list[str | None] = [None] * mesh.world_size
    dist.all_gather_object(faults, fault)
    if any(faults):
        raise InputError(next(fault for fault in faults if fault))
    return result


def _explain(error: OSError, path: Path, *, reads: bool) -> str:
    where = error.filename2 or error.filename or path  # of a copy, the second is what could not be written
    reason = (error.strerror or str(error)).lower()
    if reads:
        return f"the checkpoint {where} could not be read: {reason}; use another checkpoint"
    mends = {
        errno.ENOSPC: "free some space or lower checkpoint.keep, then start again to continue from the checkpoint before",
        errno.EDQUOT: "free some of your quota or lower checkpoint.keep, then start again to continue from the checkpoint before",
    }
    mend = mends.get(error.errno or 0, "choose a checkpoint.folder that can be written")
    return f"the checkpoint {where} could not be written: {reason}; {mend}"
