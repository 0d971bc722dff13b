"""The weights of training checkpoints, as PyTorch's own distributed checkpoint writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mindspeed_core.checkpoint import Checkpoint, open_checkpoint
from mindspeed_core.checkpoint.folder import copy_assets
from mindspeed_core.checkpoint.hf import write_hf
from mindspeed_core.checkpoint.tensors import pack
from mindspeed_core.errors import InputError
from mindspeed_core.models.family import pad_rows
from tests.tiny_checkpoint import KINDS, contents, hf_folder


def _packed(source: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """The whole model under global Megatron names, the vocabulary padded to 40 rows."""
    found = {}
    for placed in source.family.placed(source.architecture):
        view = pack(placed, source.tensors, source.architecture)
        rows = 40 if placed.row.kind.padded else view.shape[0]
        found[prefix + placed.megatron] = placed.row.kind.shard(pad_rows(view, rows), rank=0, size=1, padded_vocab=rows)
    return found


def _native(source: Path, step: Path, prefix: str = "") -> Path:
    state = {**_packed(open_checkpoint(source), prefix), "optimizer.step": torch.tensor(3)}
    dcp.save(state, checkpoint_id=step, no_dist=True)
    copy_assets(source, step / "hf")
    return step


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_step_becomes_the_folder_that_it_came_from(tmp_path: Path, kind: str, prefix: str) -> None:
    source = hf_folder(tmp_path / "hf", kind, tied=kind == "qwen2")
    step = _native(source, tmp_path / "run" / "checkpoints" / "step_12", prefix)
    checkpoint = open_checkpoint(step)
    assert (checkpoint.format, checkpoint.iteration) == ("native", 12)
    write_hf(checkpoint, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_a_run_folder_is_its_newest_step(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "hf")
    folder = tmp_path / "run" / "checkpoints"
    for step in (2, 10):
        _native(source, folder / f"step_{step}")
    (folder / "latest").write_text("step_2\n")
    assert open_checkpoint(tmp_path / "run").iteration == 2
    assert open_checkpoint(folder).iteration == 2
    assert open_checkpoint(folder / "step_10").iteration == 10
    (folder / "latest").write_text("step_3")
    with pytest.raises(InputError, match="latest: names 'step_3'"):
        open_checkpoint(tmp_path / "run")


def test_a_bad_step_is_refused_in_words(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "hf")
    step = _native(source, tmp_path / "step_1")
    (file,) = step.glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=r"__0_0\.distcp: is cut"):
        open_checkpoint(step)
    file.write_bytes(bytes(len(whole)))
    with pytest.raises(InputError, match=r"__0_0\.distcp: is damaged"):
        open_checkpoint(step).tensors["model.norm.weight"]
    file.unlink()
    with pytest.raises(InputError, match=r"__0_0\.distcp: no such file"):
        open_checkpoint(step)
    file.write_bytes(whole)
    other = hf_folder(tmp_path / "other", layers=6)
    with pytest.raises(InputError, match=r"holds no decoder\.layers\.4\.input_layernorm\.weight"):
        open_checkpoint(step, config=other)
    wide = hf_folder(tmp_path / "wide", groups=4)
    with pytest.raises(InputError, match=r"linear_qkv\.weight has shape \(64, 16\) where .* \(96, 16\)"):
        open_checkpoint(step, config=wide)
    (step / "hf" / "config.json").unlink()
    with pytest.raises(InputError, match=r"hf/config\.json: no such file"):
        open_checkpoint(step)
