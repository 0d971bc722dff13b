"""`mindspeed-train` as a user meets it: its own ranks, torchrun, Ctrl-C, a full disk, a wrong key."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness import ROOT, run_command
from tests.train import runs


@pytest.fixture(scope="session")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def recipe(where: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(runs.values(where, tmp_path / "run", train={"steps": 4}, log={"tensorboard": True})))
    return file


def test_a_wrong_recipe_ends_with_code_2_and_a_line_for_each_fault(recipe: Path) -> None:
    done = run_command("mindspeed-train", "pretrain", recipe, "parallel.tp=4", "data.train=nowhere", "batch.micro=3")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.split(" ")[0:2] for line in lines] == [
        ["error:", "batch.global:"],
        ["error:", "parallel.tp=4"],
        ["error:", "nowhere:"],
    ]
    done = run_command("mindspeed-train", "pretrain", recipe, "optim.learning_rate=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: override optim.learning_rate=1: optim.learning_rate: no such key")


def test_ctrl_c_ends_the_run_with_one_line_and_the_run_goes_on(recipe: Path, tmp_path: Path) -> None:
    line = ["pretrain", recipe, "parallel.tp=2", "checkpoint.every=3", "train.steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mindspeed_train", *map(str, line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    latest = tmp_path / "run" / "checkpoints" / "latest"
    end = time.monotonic() + 120
    while not latest.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no checkpoint after two minutes"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    last = err.splitlines()[-1]
    assert re.fullmatch(r"interrupted at step \d+ of 100000; the same command continues after step \d+", last), err
    saved = int(last.rsplit(" ", 1)[1])
    assert latest.read_text() == f"step_{saved}\n"

    # one rank is enough to go on
    line = ["pretrain", recipe, "parallel.tp=1", "checkpoint.every=3", f"train.steps={saved + 2}"]
    done = run_command("mindspeed-train", *line)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"continuing after step {saved} of {saved + 2}" in done.stderr
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, saved + 3))
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_torchrun_starts_the_ranks_as_well(recipe: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, "-m", "mindspeed_train", "pretrain", str(recipe), "train.steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    layout = json.loads((tmp_path / "run" / "checkpoints" / "step_1" / "meta.json").read_text())["layout"]
    assert layout == {"tp": 1, "pp": 1, "cp": 1, "dp": 2}  # what the recipe leaves over is dp


def test_a_disk_that_takes_no_more_is_told_in_one_line(recipe: Path, tmp_path: Path) -> None:
    # no process may write a file of more than 100 KiB: the checkpoint is larger
    command = f"ulimit -f 100; exec {sys.executable} -m mindspeed_train pretrain {recipe} log.tensorboard=false"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the checkpoint")
    assert "could not be written: file too large" in last
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
