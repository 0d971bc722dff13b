"""`mindspeed-train verify`: a layout is compared with one process, and a wrong one is caught."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_train import verify
from mindspeed_train.config import Recipe
from tests.harness import ROOT, run_command
from tests.train import runs


@pytest.fixture(scope="session")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def recipe(where: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(runs.values(where, tmp_path / "run", parallel={"dp": 2})))
    return file


@pytest.mark.real_data
def test_a_real_model_on_real_text_gets_its_certificate(shared_data: Path, tmp_path: Path) -> None:
    model = shared_data / "models/stories260k_hf"
    text = tmp_path / "shakespeare.txt"
    text.write_text((shared_data / "pretrain/tinyshakespeare.txt").read_text()[:60_000])
    done = run_command(
        "mindspeed-data", "pretrain", text, "--tokenizer", model, "--output", tmp_path / "text", "--per-line"
    )
    assert done.returncode == 0, done.stderr
    recipe = {
        "model": {"path": str(model)},
        "data": {"train": str(tmp_path / "text"), "seq_length": 64},
        "batch": {"micro": 2, "global": 8},
        "parallel": {"tp": 2, "pp": 2, "sp": True},
        "precision": "bf16",  # the certificate is of fp32 all the same
        "train": {"steps": 1000, "eval_every": 10},
        "optim": {"lr": 1e-3, "warmup": 100},
        "checkpoint": {"folder": str(tmp_path / "run")},
    }
    recipe["data"]["split"] = "90,10"
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    done = run_command("mindspeed-train", "verify", file, "--json", timeout=280)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["equal"], told["precision"], told["steps"]) == (True, "fp32", 3)
    assert told["layout"] == "tp=2 pp=2 sp=true (4 ranks)"
    found = {one["quantity"]: one for one in told["differences"]}
    assert list(found) == ["loss", "gradient norm", "mean gradient", "weights"]
    assert all(0 <= one["largest"] <= one["bound"] == 1e-5 for one in told["differences"])
    assert found["weights"]["where"].startswith(("decoder.layers.", "embedding."))
    assert not (tmp_path / "run").exists()


def test_a_wrong_layout_is_caught(recipe: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "tests/train/broken.py"), "verify", str(recipe), "--steps", "2"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "dp=2 (2 ranks), fp32: DIFFERS from one process by more than rounding: do not train on it, and report this"
    )
    norm = next(line for line in done.stdout.splitlines() if line.startswith("gradient norm"))
    assert "1.0e+00" in norm, "twice the norm is a difference of one"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_verified_is_told_before_anything_runs(recipe: Path) -> None:
    done = run_command("mindspeed-train", "verify", recipe, "parallel.dp=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the recipe splits nothing, so there is nothing to verify")
    done = run_command("mindspeed-train", "verify", recipe, "parallel.tp=4", "--task", "pretrain")
    assert done.returncode == 2
    assert done.stderr == "error: parallel.tp=4 does not divide num_key_value_heads=2; use 1 or 2\n"


def test_a_model_that_one_process_cannot_hold_is_refused_with_a_smaller_one(where: Path, tmp_path: Path) -> None:
    model = {"preset": "llama2-70b", "num_hidden_layers": 4000}
    wanted = Recipe.model_validate(runs.values(where, tmp_path / "run", parallel={"tp": 8}) | {"model": model})
    with pytest.raises(verify.InputError, match=r"one process cannot hold .* model\.num_hidden_layers=\d+$"):
        verify.verify(wanted, "pretrain", steps=3, precision="fp32", ranks=8, folder=tmp_path)


def test_the_two_runs_differ_in_nothing_but_the_split(where: Path, tmp_path: Path) -> None:
    values = runs.values(where, tmp_path / "run", parallel={"tp": 2, "sp": True}, optim={"distributed": True})
    layout, one = verify.both(Recipe.model_validate(values), tmp_path, steps=2, precision="fp32")
    a, b = layout.model_dump(), one.model_dump()
    assert {name for name in a if a[name] != b[name]} == {"parallel", "optim", "checkpoint"}
    assert {name for name in a["optim"] if a["optim"][name] != b["optim"][name]} == {"distributed"}
    assert (one.parallel.model_ranks, one.parallel.dp) == (1, 1)
    assert layout.data.train == values["data"]["train"]
    assert layout.train.seed == one.train.seed


def test_a_number_that_is_none_is_infinitely_far() -> None:
    assert verify._relative(math.nan, 1.0) == math.inf
    assert verify._relative(1.0, math.nan) == math.inf
    assert verify._relative(0.0, 0.0) == 0.0
    assert not verify.equal([verify.Difference("loss", math.inf, "step 1")], "fp32")
    assert (
        json.loads(verify.as_json([verify.Difference("loss", math.inf, "step 1")], "tp=2", "fp32", steps=1))["equal"]
        is False
    )
