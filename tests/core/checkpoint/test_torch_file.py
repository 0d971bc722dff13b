"""`.pt` files: what torch and Megatron read, and what cannot run code."""

from __future__ import annotations

import enum
import os
import random
import zipfile
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mindspeed_core.checkpoint.torch_file import TorchFile, read_torch_file
from mindspeed_core.errors import InputError

TENSORS = {
    "fp32": torch.randn(3, 5),
    "bf16": torch.randn(7).bfloat16(),
    "fp16": torch.randn(2, 2, 2).half(),
    "int64": torch.arange(4),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "strided": torch.randn(4, 6)[:, 1:4],
}


def _write(path: Path, tensors: dict[str, Tensor]) -> Path:
    promised = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    with TorchFile(path, {"args": Namespace(dtype=torch.bfloat16), "model": promised, "iteration": 7}) as file:
        for tensor in tensors.values():
            file.write(tensor)
    return path


def test_a_streamed_file_is_what_torch_reads_and_a_sound_zip(tmp_path: Path) -> None:
    path = _write(tmp_path / "model_optim_rng.pt", TENSORS)
    assert zipfile.ZipFile(path).testzip() is None
    for read in (read_torch_file, lambda p: torch.load(p, weights_only=False)):
        document: Any = read(path)
        assert document["iteration"] == 7
        assert document["args"] == Namespace(dtype=torch.bfloat16)
        assert list(document["model"]) == list(TENSORS)
        for name, tensor in TENSORS.items():
            assert document["model"][name].dtype == tensor.dtype
            assert torch.equal(document["model"][name], tensor)


def test_its_pickle_is_the_one_that_torch_save_writes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    path = _write(tmp_path / "a.pt", tensors)
    torch.save({"args": Namespace(dtype=torch.bfloat16), "model": tensors, "iteration": 7}, tmp_path / "b.pt")
    ours, theirs = zipfile.ZipFile(path), zipfile.ZipFile(tmp_path / "b.pt")
    assert ours.read("a/data.pkl") == theirs.read("b/data.pkl")


def test_equal_tensors_make_equal_files_with_aligned_storages(tmp_path: Path) -> None:
    one, other = (_write(tmp_path / folder / "x.pt", TENSORS) for folder in _folders(tmp_path))
    assert one.read_bytes() == other.read_bytes()
    mapped = read_torch_file(one)["model"]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped.values())


def _folders(tmp_path: Path) -> list[str]:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    return ["one", "other"]


def test_a_tensor_of_another_shape_or_too_few_are_our_bugs(tmp_path: Path) -> None:
    file = TorchFile(tmp_path / "x.pt", {"a": torch.empty(2, device="meta"), "b": torch.empty(2, device="meta")})
    with pytest.raises(AssertionError):
        file.write(torch.zeros(3))
    file.write(torch.zeros(2))
    with pytest.raises(AssertionError, match="1 of 2"):
        file.close()


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.999])
def test_a_cut_file_is_named(tmp_path: Path, keep: float) -> None:
    path = _write(tmp_path / "x.pt", TENSORS)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(InputError, match=r"x\.pt: is cut"):
        read_torch_file(path)


class Backend(enum.Enum):
    AUTO = 1


class Evil:
    """A pickle that runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Sly(Evil):
    """The same with a function that is no system call by name."""

    def __reduce__(self) -> Any:
        return _touch, (self.command.split()[1],)


def _touch(path: str) -> None:
    Path(path).touch()


def test_what_megatron_stores_beside_the_weights_becomes_inert(tmp_path: Path) -> None:
    args = Namespace(attention_backend=Backend.AUTO, where=Path("/data"), num_layers=4)
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    torch.save({"args": args, "rng_state": [state], "model": {"w": torch.ones(2)}}, tmp_path / "x.pt")
    document = read_torch_file(tmp_path / "x.pt")
    assert document["args"].num_layers == 4
    assert type(document["args"].attention_backend).__name__ == "Inert"
    assert torch.equal(document["model"]["w"], torch.ones(2))


@pytest.mark.parametrize("kind", [Evil, Sly])
def test_a_file_cannot_run_code(tmp_path: Path, kind: type[Evil]) -> None:
    mark = tmp_path / "mark"
    torch.save({"model": {}, "x": kind(f"touch {mark}")}, tmp_path / "x.pt")
    with nullcontext() if kind is Sly else pytest.raises(InputError, match=r"posix\.system"):
        read_torch_file(tmp_path / "x.pt")  # what is no system call by name is never called: it stands there, inert
    assert not mark.exists()
