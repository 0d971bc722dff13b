"""Megatron folders of models with experts: against plain loops, in the three ways in which experts stand in files, and back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mindspeed_core.checkpoint import open_checkpoint
from mindspeed_core.checkpoint.hf import write_hf
from mindspeed_core.checkpoint.megatron import MegatronTensors, write_megatron
from mindspeed_core.checkpoint.megatron_layout import FILE, Layout
from mindspeed_core.errors import InputError
from tests.core.models.tiny import hf_model
from tests.tiny_checkpoint import contents

EXPERTS = 4  # of Mixtral; DeepSeek's have 8
Model = dict[str, Tensor]


@pytest.fixture(scope="module", params=["mixtral", "deepseek2", "deepseek3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    hf_model(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral, cut by tp=2 and ep=2 on one stage."""
    folder = tmp_path_factory.mktemp("mixtral")
    hf_model("mixtral").save_pretrained(folder / "hf")
    write_megatron(open_checkpoint(folder / "hf"), folder / "mcore", layout=Layout(tp=2, ep=2))
    return folder


@pytest.mark.parametrize("layout", [{}, {"ep": 4}, {"tp": 2, "ep": 2}, {"pp": 2, "ep": 2}, {"tp": 2, "pp": 3}], ids=str)
def test_there_and_back_is_byte_for_byte(source: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    write_megatron(open_checkpoint(source), tmp_path / "mcore", layout=Layout(**layout))
    opened = open_checkpoint(tmp_path / "mcore")
    assert isinstance(opened.tensors, MegatronTensors)
    found = {"tp": opened.tensors.tp, "pp": opened.tensors.pp, "ep": opened.tensors.ep}
    assert found == {"tp": 1, "pp": 1, "ep": 1, **layout}
    write_hf(opened, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_every_rank_holds_its_experts_numbered_from_zero(mixtral: Path) -> None:
    hf = load_file(mixtral / "hf" / "model.safetensors")
    step = mixtral / "mcore/iter_0000001"
    assert sorted(path.name for path in step.iterdir()) == [f"mp_rank_0{t}_00{e}" for t in (0, 1) for e in (0, 1)]
    for tp_rank in (0, 1):
        for ep_rank in (0, 1):
            document = torch.load(step / f"mp_rank_0{tp_rank}_00{ep_rank}" / FILE, weights_only=False)
            model = document["model"]
            assert document["args"].expert_model_parallel_size == 2
            assert document["args"].num_experts == EXPERTS
            for layer in range(4):
                mlp, moe = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
                assert torch.equal(model[f"{mlp}.router.weight"], hf[f"{moe}.gate.weight"])
                for local in (0, 1):
                    there = f"{moe}.experts.{2 * ep_rank + local}"
                    gate, up, down = (hf[f"{there}.{w}.weight"] for w in ("w1", "w3", "w2"))
                    own = slice(48 * tp_rank, 48 * (tp_rank + 1))  # of 96
                    expert = f"{mlp}.experts.local_experts.{local}"
                    assert torch.equal(model.pop(f"{expert}.linear_fc1.weight"), torch.cat([gate[own], up[own]]))
                    assert torch.equal(model.pop(f"{expert}.linear_fc2.weight"), down[:, own])
            assert not [key for key in model if "local_experts" in key]


def _one_matrix(model: Model) -> None:
    """All experts of a rank in one matrix, as Megatron's --moe-grouped-gemm stores them."""
    for layer in range(4):
        experts = f"decoder.layers.{layer}.mlp.experts"
        fc1, fc2 = (
            torch.stack([model.pop(f"{experts}.local_experts.{e}.linear_fc{n}.weight").T for e in (0, 1)])
            for n in (1, 2)
        )
        model[f"{experts}.weight1"] = fc1.reshape(64, -1)  # [experts, h, 2f/tp] seen as [h, ...]
        model[f"{experts}.weight2"] = fc2.reshape(-1, 64)


def _transformer_engine(model: Model) -> None:
    """The experts of a rank as Transformer Engine's grouped linear names them."""
    for layer in range(4):
        experts = f"decoder.layers.{layer}.mlp.experts"
        for n in (1, 2):
            for e in (0, 1):
                model[f"{experts}.linear_fc{n}.weight{e}"] = model.pop(
                    f"{experts}.local_experts.{e}.linear_fc{n}.weight"
                )
                model[f"{experts}.linear_fc{n}._extra_state{e}"] = torch.zeros(3)


def _changed(folder: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(folder, target)
    for path in target.glob("iter_*/*/" + FILE):
        document = torch.load(path, weights_only=False)
        change(document)
        torch.save(document, path)
    return target


@pytest.mark.parametrize("way", [_one_matrix, _transformer_engine])
@pytest.mark.parametrize("arguments", [True, False], ids=["with arguments", "without arguments"])
def test_grouped_experts_are_read(mixtral: Path, tmp_path: Path, way: Callable[[Model], None], arguments: bool) -> None:
    def change(document: dict[str, Any]) -> None:
        way(document["model"])
        if not arguments:  # the names of folders do not say whether two numbers mean stages or experts
            del document["args"]

    opened = open_checkpoint(_changed(mixtral / "mcore", tmp_path / "mcore", change))
    write_hf(opened, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(mixtral / "hf")


def test_stages_without_arguments_are_not_taken_for_experts(mixtral: Path, tmp_path: Path) -> None:
    write_megatron(open_checkpoint(mixtral / "hf"), tmp_path / "pp", layout=Layout(pp=2))
    opened = open_checkpoint(_changed(tmp_path / "pp", tmp_path / "bare", lambda document: document.pop("args")))
    assert isinstance(opened.tensors, MegatronTensors)
    assert (opened.tensors.pp, opened.tensors.ep) == (2, 1)


def _argument(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: vars(document["args"]).update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_argument(expert_tensor_parallel_size=1), "cuts its experts over 1 ranks at tp=2"),
        (_argument(expert_model_parallel_size=4), r"mp_rank_00_002 is missing \(4 of 8 ranks are, of tp=2 pp=1 ep=4\)"),
        (_argument(expert_model_parallel_size=3), "deals experts over ep=3 ranks where config.json has 4 experts"),
        (
            lambda document: document["model"].pop("decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"),
            r"layers\.1\.mlp\.experts\.local_experts\.1\.linear_fc2\.weight \(and 1 more\) is missing",
        ),
    ],
)
def test_a_bad_folder_is_refused_in_words(
    mixtral: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_checkpoint(_changed(mixtral / "mcore", tmp_path / "mcore", change))


def test_ranks_that_do_not_divide_the_experts_are_refused(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--ep 3 does not divide the 4 experts of a layer; use 1 or 2 or 4"):
        write_megatron(open_checkpoint(mixtral / "hf"), tmp_path / "mcore", layout=Layout(ep=3))
