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
from mindspeed_train.exactness import DEPARTURES, LeftOut
from tests.harness import ROOT, run_command
from tests.train import runs
from tests.train.models import EXPERTS


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


def test_what_only_moves_work_is_plain_in_one_process(where: Path, tmp_path: Path) -> None:
    moved = {"dispatcher": "allgather", "grouped": False}
    values = runs.values(
        where,
        tmp_path / "run",
        model=EXPERTS,
        parallel={"ep": 2},
        experts={**moved, "aux_loss": 0.5, "drop": "position", "capacity_factor": 2.0},
        kernels={"matmul": "reference", "cross_entropy_chunk": 0},
        profile={"start": 100},
    )
    wanted = Recipe.model_validate(values | {"train": {"steps": 1000}})
    layout, one = verify.both(wanted, tmp_path, steps=2, precision="fp32")
    assert layout.experts == wanted.experts
    assert one.experts == wanted.experts.model_copy(update={"dispatcher": "alltoall", "grouped": True})
    assert layout.kernels == wanted.kernels
    assert one.kernels == type(one.kernels)()
    assert layout.profile is one.profile is None
    assert verify.layout_name(wanted, 2, "fp32") == (
        "ep=2 experts.dispatcher=allgather experts.grouped=false kernels.matmul=reference kernels.cross_entropy_chunk=0 "
        "(2 ranks)"
    )


def test_one_rank_may_have_something_to_verify_too(where: Path, tmp_path: Path) -> None:
    for section in ({"kernels": {"matmul": "reference"}}, {"model": EXPERTS, "experts": {"grouped": False}}):
        runs_of = verify.both(
            Recipe.model_validate(runs.values(where, tmp_path, **section)), tmp_path, steps=1, precision="fp32"
        )
        assert verify._splits(runs_of[0]) != verify._splits(runs_of[1]), section


def test_a_layout_is_named_by_what_runs(where: Path, tmp_path: Path) -> None:
    narrow = {"optim": {"bf16_states": True}, "precision": "bf16", "parallel": {"dp": 2}}
    wanted = Recipe.model_validate(runs.values(where, tmp_path) | narrow)
    assert verify.layout_name(wanted, 2, "bf16") == "dp=2 bf16_states=true (2 ranks)"
    assert verify.layout_name(wanted, 2, "fp32") == "dp=2 (2 ranks)"


def test_what_is_known_to_differ_is_left_out_and_named(where: Path, tmp_path: Path) -> None:
    experts = {"capacity_factor": 1.0, "drop": "position", "pad_to_capacity": True, "jitter": 0.1}
    file = tmp_path / "recipe.yaml"
    values = runs.values(where, tmp_path / "run", model=EXPERTS, parallel={"tp": 2, "sp": True}, experts=experts)
    file.write_text(json.dumps(values))
    done = run_command("mindspeed-train", "verify", file, "--steps", "2", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "experts.jitter=0.1 left out of both runs: on more than one rank it is expected to differ from one process, since "
        "every rank draws random numbers of its own",
        "experts.capacity_factor=1.0 left out of both runs: with tp or cp it is expected to differ from one process, since "
        "it looks at the tokens of one rank together, and these cut a sequence",
        "tp=2 sp=true (2 ranks), fp32: equals one process",
    ]


def test_a_number_that_is_none_is_infinitely_far() -> None:
    assert verify._relative(math.nan, 1.0) == math.inf
    assert verify._relative(1.0, math.nan) == math.inf
    assert verify._relative(0.0, 0.0) == 0.0
    assert not verify.equal([verify.Difference("loss", math.inf, "step 1")], "fp32")
    (sparsemixer,) = (row for row in DEPARTURES if row.value == "sparsemixer")
    left_out = [LeftOut(departure=sparsemixer, value="sparsemixer")]
    found = [verify.Difference("loss", math.inf, "step 1")]
    told = json.loads(verify.as_json(found, "tp=2", "fp32", steps=1, left_out=left_out))
    assert (told["equal"], told["differences"][0]["largest"]) == (False, None)
    assert [(one["key"], one["value"]) for one in told["left_out"]] == [("experts.router", "sparsemixer")]
    assert verify.table(found, "tp=2", "fp32", left_out=left_out).splitlines()[-1].startswith("tp=2, fp32: DIFFERS")
