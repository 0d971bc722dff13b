"""The same recipes with `device: npu` as on a CPU: losses, gradient norms and weights, through our real commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness import run_command
from tests.train import runs
from tests.train.models import ALIBI, EXPERTS, LATENT, LLAMA, WINDOW

pytestmark = pytest.mark.timeout(600)
STEPS = 5
RELATIVE = 1e-5  # fp32 sums in another order
BF16 = 3e-3  # the same with bf16 products, of which each is rounded once
# with a large eps a weight moves by what its gradient is worth, and weights agree as gradients do
OPTIM = {"lr": 1e-2, "min_lr": 1e-3, "warmup": 0, "eps": 1e-3}
Sections = dict[str, Any]
# heads as wide as the operator for inference takes them
WIDE: dict[str, Any] = {**LLAMA, "preset": "qwen3-8b", "head_dim": 16}
BAND = {**WINDOW, "sliding_window": 5, "head_dim": 16}
# layers as wide as the operators take them that hold a collective
BROAD: dict[str, Any] = {
    **LLAMA,
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
ONE: Sections = {"parallel": {"dp": 1}}
OVERLAP = {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}

CASES: dict[str, tuple[dict[str, Any], Sections]] = {
    "one process": (LLAMA, ONE),
    "one process, plain torch": (LLAMA, ONE | {"kernels": {"attention": "reference"}}),
    "window": (BAND, ONE),
    "alibi": (ALIBI, ONE),
    "mla": (LATENT, ONE),
    "experts": (EXPERTS, ONE),
    "tp2 sp": (LLAMA, {"parallel": {"tp": 2, "sp": True, "dp": 1}}),
    "pp2": (LLAMA, {"parallel": {"pp": 2, "dp": 1}}),
    "ring2": (LLAMA, {"parallel": {"cp": 2, "dp": 1}}),
    "ulysses2": (LLAMA, {"parallel": {"cp": 2, "dp": 1, "cp_algorithm": "ulysses"}}),
    "ep2": (EXPERTS, {"parallel": {"ep": 2, "dp": 2}}),
    "distributed optimizer": (LLAMA, {"parallel": {"dp": 2}, "optim": OVERLAP}),
    "swap": (LLAMA, ONE | {"memory": {"swap_attention": True}}),
    "ep2 overlap": (LATENT, {"parallel": {"ep": 2, "dp": 2}, "experts": {"overlap": True}}),
}
# what runs beside the computation; not swap: the sanitizer takes `set_`, which moves no byte, for a write
STREAMS = ("distributed optimizer", "ep2 overlap")


class Trained:
    """The runs of this session, each in a folder of its name; those on the CPU once per model."""

    def __init__(self, material: Path, where: Path) -> None:
        self._material, self._where = material, where

    def folder(self, name: str) -> Path:
        """Return the folder of a run."""
        return self._where / name

    def on_npu(self, name: str, model: dict[str, Any], sections: Sections, **environment: str) -> Path:
        """Run `mindspeed-train pretrain` on NPUs, or go on with the run of that name; return the run's folder."""
        path = self._where / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self._recipe(name, model, sections)))
        done = run_command("mindspeed-train", "pretrain", path, "device=npu", timeout=500, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "fall back to run on the CPU" not in done.stderr, done.stderr
        return self.folder(name)

    def refused(self, name: str, model: dict[str, Any], sections: Sections) -> list[str]:
        """Return what `mindspeed-train pretrain` says to a recipe that it does not start."""
        path = self._where / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self._recipe(name, model, sections)))
        done = run_command("mindspeed-train", "pretrain", path, "device=npu", timeout=500)
        assert done.returncode == 2, done.stdout + done.stderr
        return [line for line in done.stderr.splitlines() if not line.startswith("Warning: ASCEND")]

    def on_cpu(self, model: dict[str, Any], *, name: str | None = None) -> Path:
        """Run it in one process on the CPU, or go on with the run of that name; return the run's folder."""
        folder = self.folder(name or f"cpu {model['preset']}")
        if name is not None or not folder.exists():
            runs.train(self._recipe(folder.name, model, {}))
        return folder

    def _recipe(self, name: str, model: dict[str, Any], sections: Sections) -> dict[str, Any]:
        sections = {"train": {"steps": STEPS}, "data": {"seq_length": 48}, **sections}
        sections["optim"] = {**OPTIM, **sections.get("optim", {})}
        return {**runs.values(self._material, self.folder(name), **sections), "model": model}


@pytest.fixture(scope="module")
def trained(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(material, tmp_path_factory.mktemp("runs"))


def same(found: Path, expected: Path) -> None:
    """Assert that two runs had the same losses and gradient norms and ended in the same state."""
    lines, wanted = runs.metrics(found), runs.metrics(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    assert wanted[-1]["loss"] < wanted[0]["loss"] - 0.05, "it learns, so there is something to compare"
    for name in {"loss", "grad_norm", "aux_loss"} & wanted[0].keys():
        values = [line[name] for line in lines]
        assert values == pytest.approx([line[name] for line in wanted], rel=RELATIVE), name
    step = f"checkpoints/step_{lines[-1]['step']}"
    ours, theirs = runs.stored(found / step), runs.stored(expected / step)
    for key in ours | theirs:
        if not key.startswith("random."):
            apart = (ours[key] - theirs[key]).abs().max() / theirs[key].abs().max().clamp(min=1e-30)
            assert apart < RELATIVE, f"{key}: {apart:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_npus_equals_one_on_the_cpu(name: str, trained: Trained) -> None:
    model, sections = CASES[name]
    same(trained.on_npu(name, model, sections), trained.on_cpu(model))


def test_products_fused_with_collectives_equal_those_apart(trained: Trained) -> None:
    """In bf16, which the operators ask for, and with layers as wide as they ask for."""

    def metrics(name: str, **parallel: Any) -> list[dict[str, Any]]:
        sections = {"parallel": {"tp": 2, "dp": 1, **parallel}, "precision": "bf16"}
        return runs.metrics(trained.on_npu(name, BROAD, sections))

    expected = metrics("apart", sp=True)
    for name, sp in {"gathered and scattered": True, "reduced": False}.items():
        found = metrics(name, sp=sp, collective_matmul="mc2")
        for key in ("loss", "grad_norm"):
            values = [line[key] for line in expected]
            assert [line[key] for line in found] == pytest.approx(values, rel=BF16), (name, key)


def test_layers_that_the_operators_do_not_take_are_refused_before_any_rank_starts(trained: Trained) -> None:
    sections = {"parallel": {"tp": 2, "sp": True, "dp": 1, "collective_matmul": "mc2"}}
    told = trained.refused("narrow", LLAMA, sections)
    assert [line.partition("mc2: ")[0] for line in told] == ["error: parallel.collective_matmul="] * 2
    assert "precision=bf16" in told[0]
    assert "256 to 65,534" in told[1]


@pytest.mark.stubs
@pytest.mark.parametrize("name", STREAMS)
def test_streams_wait_for_one_another(name: str, trained: Trained) -> None:
    """torch_npu's sanitizer ends a run in which two streams use a tensor in no order; stubs finish too soon to show it."""
    model, sections = CASES[name]
    short = {**sections, "train": {"steps": 2}}
    run = trained.on_npu(f"{name}, watched", model, short, TORCH_NPU_SANITIZER="1")
    assert len(runs.metrics(run)) == 2


RACE = """
import torch
x, stream = torch.zeros(1000, device="npu"), torch.npu.Stream()
{}
with torch.npu.stream(stream):
    x.add_(1)
"""


@pytest.mark.stubs
@pytest.mark.parametrize(("between", "code"), [("", 1), ("stream.wait_stream(torch.npu.current_stream())", 0)])
def test_a_race_between_streams_is_seen(between: str, code: int) -> None:
    environment = {**os.environ, "TORCH_NPU_SANITIZER": "1"}
    line = [sys.executable, "-c", RACE.format(between)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == code, done.stderr
    assert ("data race" in done.stderr) == bool(code)


def stopped_after(step: int, run: Path, elsewhere: Path) -> None:
    """Copy a run as it was after that step."""
    shutil.copytree(run, elsewhere)
    checkpoints = elsewhere / "checkpoints"
    for saved in checkpoints.glob("step_*"):
        if int(saved.name.removeprefix("step_")) > step:
            shutil.rmtree(saved)
    (checkpoints / "latest").write_text(f"step_{step}\n")


SPLIT: Sections = {"parallel": {"tp": 2, "sp": True, "dp": 1}}
CONTINUED: dict[str, Sections] = {"resumed": SPLIT, "resharded": {"parallel": {"dp": 2}, "optim": OVERLAP}}


@pytest.fixture(scope="module")
def straight(trained: Trained) -> Path:
    """A run on two NPUs that saved at every other step."""
    return trained.on_npu("straight", LLAMA, {**SPLIT, "checkpoint": {"every": 2, "keep": 3}})


@pytest.mark.parametrize("name", CONTINUED)
def test_a_run_goes_on_in_its_layout_and_in_another(name: str, trained: Trained, straight: Path) -> None:
    stopped_after(2, straight, trained.folder(name))
    same(trained.on_npu(name, LLAMA, CONTINUED[name]), straight)


def test_a_run_goes_on_on_the_host(trained: Trained, straight: Path) -> None:
    stopped_after(2, straight, trained.folder("on the host"))
    same(trained.on_cpu(LLAMA, name="on the host"), straight)


@pytest.mark.parametrize("ranks", [(), ("--tp", 2), ("--pp", 2)], ids=str)
def test_generation_writes_the_same_tokens(ranks: tuple[Any, ...], trained: Trained) -> None:
    options = ("--prompt", "the quick brown", "--max-new-tokens", 12, "--temperature", 0, *ranks)
    on_cpu, on_npu = (
        run_command("mindspeed-serve", "generate", trained.on_cpu(LLAMA), *options, "--device", device, timeout=500)
        for device in ("cpu", "npu")
    )
    assert on_npu.returncode == on_cpu.returncode == 0, on_npu.stderr + on_cpu.stderr
    assert len(on_cpu.stdout) > 5
    assert on_npu.stdout == on_cpu.stdout


BATCH = """
import json, sys
from torch.utils._python_dispatch import TorchDispatchMode
from mindspeed_core.generate.engine import Engine
from mindspeed_core.generate.sampling import SamplingConfig

class Called(TorchDispatchMode):
    names = set()
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))

prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [20, 21, 22, 23, 24]]
if __name__ == "__main__":
    with Engine.open(sys.argv[1], device=sys.argv[2], dtype="bf16") as engine, Called() as called:
        engine.read = 4  # of a prompt at once
        answers = engine.generate_batch(prompts, SamplingConfig(max_new_tokens=10))
        print(json.dumps([answers, sorted(name for name in called.names if "attention" in name)]))
"""
GENERATING = {
    "heads": (WIDE, "npu::npu_fused_infer_attention_score"),
    "window": (BAND, "npu::npu_fused_infer_attention_score"),
    "alibi": (ALIBI, "npu::npu_fusion_attention"),
    "latents": (LATENT, "npu::npu_fusion_attention"),
}


@pytest.mark.parametrize("name", GENERATING)
def test_rows_of_different_lengths_generate_the_same_tokens(name: str, trained: Trained) -> None:
    """In bf16, prompts in pieces, some of which hold nothing of a row."""
    told, (model, operator) = [], GENERATING[name]
    for device in ("cpu", "npu"):
        line = [sys.executable, "-c", BATCH, str(trained.on_cpu(model)), device]
        done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))
    (expected, _), (answers, called) = told
    assert [name for name in called if name.startswith("npu::")] == [operator]
    assert answers == expected
    assert [len(answer) for answer in answers] == [10] * 4
