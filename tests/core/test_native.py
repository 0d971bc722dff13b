"""Training checkpoints: every layout reads what any other wrote, and nothing incomplete ever counts."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_core.checkpoint.placement import boxes
from mindspeed_core.checkpoint.torch_dist import Stored, overlap, read_box, read_metadata, write_boxes, write_metadata
from mindspeed_core.errors import InputError
from tests.harness import run_ranks

SIZES: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,  # no tp > 1 divides it: the padding must not reach the disk
}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_of_a_flat_range_hold_exactly_its_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = torch.arange(numel).view(shape)
    found = list(boxes(tuple(shape), start, stop))
    parts = [whole[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))] for offset, sizes in found]
    assert [value for part in parts for value in part.flatten().tolist()] == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def test_an_overlap_is_what_both_boxes_hold() -> None:
    assert overlap(((0, 0), (4, 4)), ((2, 3), (9, 9))) == (
        (slice(2, 4), slice(3, 4)),
        (slice(0, 2), slice(0, 1)),
    )
    assert overlap(((0, 0), (2, 4)), ((2, 0), (2, 4))) is None


def _write(folder: Path) -> dict[str, Stored]:
    folder.mkdir()
    rows = torch.arange(24.0).view(6, 4)
    written = write_boxes(folder, 0, [("w", (0, 0), rows[:2]), ("w", (2, 0), rows[2:])])
    tensors = {"w": Stored((6, 4), torch.float32, tuple(box for _, _, box in written))}
    write_metadata(folder, tensors)
    return tensors


def test_pytorch_and_megatron_read_our_files(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    _write(tmp_path / "c")
    state = {"w": torch.zeros(6, 4)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    assert torch.equal(state["w"], torch.arange(24.0).view(6, 4))
    assert run_ranks(_megatron_reads, 1, str(tmp_path / "c")) == [list(range(24))]


def _megatron_reads(folder: str) -> list[float]:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_plain_tensors(folder)["w"].flatten().tolist()


def test_a_damaged_checkpoint_is_named_with_its_file(tmp_path: Path) -> None:
    tensors = _write(tmp_path / "c")
    assert read_metadata(tmp_path / "c") == tensors
    data = tmp_path / "c" / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"__0_0\.distcp: is cut at \d+ of \d+ bytes"):
        read_metadata(tmp_path / "c")
    data.write_bytes(bytes(len(whole)))
    with pytest.raises(InputError, match=r"__0_0\.distcp: is damaged at byte 0"):
        read_box(tmp_path / "c", tensors["w"].boxes[0])
    data.unlink()
    with pytest.raises(InputError, match=r"__0_0\.distcp: no such file"):
        read_metadata(tmp_path / "c")
    metadata = tmp_path / "c" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:100])
    with pytest.raises(InputError, match=r"\.metadata: is cut or damaged"):
        read_metadata(tmp_path / "c")


def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    import os
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    _write(tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"names posix\.mkdir, which is no part of a checkpoint"):
        read_metadata(tmp_path / "c")
    assert not (tmp_path / "pwned").exists()


LAYOUTS = {
    "one": (1, {}, {}),
    "tp2": (2, {"tp": 2}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "dp2 distributed": (2, {"dp": 2}, {"distributed": True}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}, {}),
    "tp2 dp2 distributed": (4, {"tp": 2, "dp": 2}, {"distributed": True}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}, {}),
    "pp2 1+3": (2, {"pp": 2, "layers_per_stage": [1, 3]}, {}),
    "pp2 vpp2 noop distributed": (4, {"pp": 2, "vpp": 2, "noop_layers": [1, 2, 3, 6], "dp": 2}, {"distributed": True}),
}


@pytest.mark.parametrize(
    ("one", "other", "precision", "tied"),
    [
        ("tp2 pp2", "one", "bf16", True),
        ("dp2 distributed", "tp2", "bf16", False),
        ("pp2", "tp2 dp2 distributed", "bf16", True),
        ("tp2 dp2 distributed", "pp2", "fp32", False),
        ("pp2 vpp2", "pp2 1+3", "bf16", True),
        ("pp2 1+3", "pp2 vpp2 noop distributed", "bf16", True),
        ("pp2 vpp2 noop distributed", "pp2 vpp2", "fp32", False),
        ("pp2 vpp2", "one", "fp32", True),
    ],
)
def test_any_layout_reads_what_another_wrote(tmp_path: Path, one: str, other: str, precision: str, tied: bool) -> None:
    config = {**SIZES, "tie_word_embeddings": tied}
    run_ranks(_saves, LAYOUTS[one][0], str(tmp_path), LAYOUTS[one], precision, config)
    assert (tmp_path / "latest").read_text() == "step_7\n"
    stored = read_metadata(tmp_path / "step_7")
    names = {key for key in stored if not key.startswith(("optimizer.", "random."))}
    layers = [f"decoder.layers.{i}.mlp.linear_fc1.weight" for i in range(4)]
    assert names >= {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", *layers}
    assert ("output_layer.weight" in names) == (not tied)
    for key, tensor in stored.items():
        if key.startswith("random."):
            continue
        whole = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)
        for box in tensor.boxes:
            place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.sizes, strict=True))
            whole[place] = read_box(tmp_path / "step_7", box)
        assert torch.equal(whole, _value(key, tensor.shape).to(tensor.dtype)), key
    run_ranks(_loads, LAYOUTS[other][0], str(tmp_path), LAYOUTS[other], precision, config)


def _value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What a tensor holds in these tests: drawn by its name, so that a box in the wrong place shows."""
    generator = torch.Generator().manual_seed(sum(key.encode()) * 7919 + len(key))
    return torch.randn(shape, generator=generator)


def _state(layout: tuple[int, dict[str, Any], dict[str, Any]], precision: str, config: dict[str, Any]) -> Any:
    from mindspeed_core.checkpoint.native import State
    from mindspeed_core.device import Device
    from mindspeed_core.models.build import build_model
    from mindspeed_core.models.families import family_of
    from mindspeed_core.models.weights import load_weights, random_tensors
    from mindspeed_core.optim.build import OptimConfig, build_optimizer
    from mindspeed_core.parallel.data import wrap_data_parallel
    from mindspeed_core.parallel.mesh import Mesh, ParallelConfig

    mesh = Mesh.create(ParallelConfig(**layout[1]), Device.open("cpu"))
    family = family_of(config)
    arch = family.architecture(config)
    optim = OptimConfig(**layout[2])
    chunks = build_model(arch, mesh, precision=precision)
    load_weights(chunks, random_tensors(family, arch, 0), family, arch, mesh)
    chunks = wrap_data_parallel(chunks, optim, mesh)
    optimizer = build_optimizer(optim, chunks, mesh, precision)
    return State(chunks=chunks, optimizer=optimizer, mesh=mesh, vocab_size=arch.vocab_size)


def _expected(piece: Any) -> torch.Tensor:
    place = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.sizes, strict=True))
    return _value(piece.key, piece.shape)[place].to(piece.data.dtype)


def _saves(folder: str, layout: Any, precision: str, config: dict[str, Any]) -> None:
    from mindspeed_core.checkpoint import native

    state = _state(layout, precision, config)
    for piece in native._pieces(state):
        piece.data.copy_(_expected(piece))
    for group in state.optimizer.param_groups:
        group["step"] = 7
    native.save(Path(folder), state, native.Progress(step=7, samples=56, tokens=999))
    state.mesh.close()


def _loads(folder: str, layout: Any, precision: str, config: dict[str, Any]) -> None:
    from mindspeed_core.checkpoint import native

    state = _state(layout, precision, config)
    path = native.latest(Path(folder))
    assert path is not None
    assert native.load(path, state) == native.Progress(step=7, samples=56, tokens=999)
    pieces = list(native._pieces(state))
    assert len(pieces) > 20
    for piece in pieces:
        assert torch.equal(piece.data, _expected(piece)), piece.key
    assert {group["step"] for group in state.optimizer.param_groups} == {7}
    for chunk in state.chunks:
        for name, param in chunk.named_parameters():
            assert param.isfinite().all(), f"{name}: padding was left unset"
    state.mesh.close()


def test_bf16_goes_on_from_an_fp32_run_with_its_weights_as_masters(tmp_path: Path) -> None:
    run_ranks(_saves, 1, str(tmp_path), LAYOUTS["one"], "fp32", SIZES)
    run_ranks(_masters_are_weights, 1, str(tmp_path))


def _masters_are_weights(folder: str) -> None:
    from mindspeed_core.checkpoint import native

    state = _state(LAYOUTS["one"], "bf16", SIZES)
    native.load(Path(folder) / "step_7", state)
    masters = [piece for piece in native._pieces(state) if piece.key.startswith("optimizer.state.fp32_param.")]
    assert masters
    for piece in masters:
        assert torch.equal(
            piece.data, _value(piece.key.removeprefix("optimizer.state.fp32_param."), piece.shape)[_all(piece)]
        )
    state.mesh.close()


def _all(piece: Any) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.sizes, strict=True))


def test_checkpoints_are_kept_counted_cleared_and_refused(tmp_path: Path) -> None:
    run_ranks(_life, 1, str(tmp_path))


def _life(folder: str) -> None:
    from mindspeed_core.checkpoint import native

    runs = Path(folder)
    state = _state(LAYOUTS["one"], "fp32", SIZES)
    assert native.latest(runs / "none") is None
    assets = runs / "assets"
    assets.mkdir()
    (assets / "config.json").write_text("{}")

    def save(step: int, keep: int = 0) -> None:
        native.save(runs, state, native.Progress(step=step), keep=keep, assets=assets)

    def names() -> set[str]:
        return {path.name for path in runs.iterdir()} - {"assets", "latest"}

    for step in (2, 4, 6):
        save(step)
    assert names() == {"step_2", "step_4", "step_6"}
    assert json.loads((runs / "step_4" / "hf" / "config.json").read_text()) == {}
    save(8, keep=2)
    assert names() == {"step_6", "step_8"}
    save(7, keep=1)  # the run was gone back: what lies ahead is not touched
    assert names() == {"step_7", "step_8"}
    assert native.latest(runs) == runs / "step_7"
    save(8)
    assert names() == {"step_7", "step_8"}

    # killed while writing: the leftovers do not count and are cleared
    (runs / ".step_9.tmp").mkdir()
    (runs / ".step_3.old").mkdir()
    (runs / ".latest.tmp").touch()
    assert native.latest(runs) == runs / "step_8"
    native.clear(runs)
    assert names() == {"step_7", "step_8"}
    (runs / "latest").unlink()  # killed between the first checkpoint and its pointer
    assert native.latest(runs) == runs / "step_8"
    (runs / "latest").write_text("step_99\n")
    with pytest.raises(InputError, match="latest: names 'step_99', which is not there"):
        native.latest(runs)
    (runs / "latest").write_text("step_8\n")

    # a full disk: one line, nothing half-written, the checkpoint before still counts
    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere/file")

    for name in ("write_boxes", "write_metadata", "sync"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, name, full)
            with pytest.raises(InputError, match=r"somewhere/file could not be written: no space left on device; free"):
                save(10)
        assert names() == {"step_7", "step_8"}, name
        assert native.latest(runs) == runs / "step_8"

    # another model, a folder of something else
    other = _state_again(state)
    with pytest.raises(InputError, match=r"has shape \[37, 16\], the model of the recipe \[36, 16\]"):
        native.load(runs / "step_8", other)
    with pytest.raises(InputError, match="is no training checkpoint"):
        native.load(assets, state)
    state.mesh.close()


def _state_again(state: Any) -> Any:
    import dataclasses

    return dataclasses.replace(state, vocab_size=36)


def test_a_disk_that_fills_while_a_tensor_is_written_is_the_disks_error(tmp_path: Path) -> None:
    class Full:
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    from mindspeed_core.checkpoint import torch_dist

    stream = torch_dist._Told(SimpleNamespace(write=Full().write, flush=lambda: None))  # type: ignore[arg-type]
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever torch makes of it)
        torch.save(torch.zeros(3), stream)
    assert stream.error is not None
    assert stream.error.errno == errno.ENOSPC
