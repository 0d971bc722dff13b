"""A disk that is really full: a small file system of its own, and what each command that writes says and leaves there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_model import tiny_model
from tests.train import runs

SCRIPT = """
mount -t tmpfs -o size=$1 none "$2" || exit 77
cd "$2"; shift 2
"$@"
code=$?
find . -mindepth 1
exit $code
"""


def on_small_disk(place: Path, size: int, *command: object) -> tuple[str, list[str]]:
    """The error line of a command that runs in a file system of `size` bytes, and the paths that it left there."""
    place.mkdir()
    line = ["unshare", "--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh", str(size), str(place)]
    try:
        done = subprocess.run([*line, *map(str, command)], capture_output=True, text=True, timeout=240, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare on this system")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert "no space left on device; free some space" in error
    return error, done.stdout.splitlines()


def ours(package: str) -> list[str]:
    return [sys.executable, "-m", f"mindspeed_{package}"]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_data_set_is_whole_or_not_there(where: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It rains on the small disk. " * 3000)
    command = ["pretrain", text, "--tokenizer", where / "tokenizer", "--output", "set"]
    error, left = on_small_disk(tmp_path / "disk", 64 << 10, *ours("data"), *command)
    assert "set_text_document.bin.tmp: " in error
    assert left == []


@pytest.mark.parametrize("format", ["hf", "mcore"])
def test_a_converted_model_is_whole_or_not_there(format: str, folder: Path, tmp_path: Path) -> None:
    weights = (folder / "model.safetensors").stat().st_size  # they alone would fit
    error, left = on_small_disk(tmp_path / "disk", weights + 8192, *ours("convert"), format, folder, "out")
    assert error.startswith(("error: out: ", "error: .out.partial/"))
    assert left == []


def test_a_run_keeps_the_checkpoint_before(where: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(runs.values(where, Path("run"), log={"tensorboard": True})))
    command = [*ours("train"), "pretrain", str(recipe), "checkpoint.every=1", "checkpoint.keep=0"]
    error, left = on_small_disk(tmp_path / "disk", 1 << 20, *command)
    steps = sorted(int(match[1]) for path in left if (match := re.fullmatch(r"\./run/checkpoints/step_(\d+)", path)))
    assert steps == list(range(1, steps[-1] + 1))
    assert f"the checkpoint run/checkpoints/step_{steps[-1] + 1} could not be written" in error
    assert {f"./run/checkpoints/step_{steps[-1]}/.metadata", "./run/checkpoints/latest"} <= set(left)
    assert not [path for path in left if path.endswith(".tmp")]


@pytest.mark.parametrize("free", [8 << 10, 28 << 10, 64 << 10])
def test_a_run_says_which_of_its_files_did_not_fit(free: int, where: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    sections = {"log": {"tensorboard": True}, "train": {"steps": 400}}
    recipe.write_text(json.dumps(runs.values(where, Path("run"), **sections)))
    full = f'head -c {(1 << 20) - free} /dev/zero > full && exec "$@"'
    error, left = on_small_disk(tmp_path / "disk", 1 << 20, "sh", "-c", full, "sh", *ours("train"), "pretrain", recipe)
    assert error.startswith("error: run")
    assert not [path for path in left if path.endswith(".tmp")]


def test_scores_that_cannot_be_written_are_not_half_written(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "bbh"
    data.mkdir(parents=True)
    rows = [{"input": "not True is", "target": "False"}]
    (data / "boolean_expressions.json").write_text(json.dumps({"canary": "", "examples": rows}))
    full = 'head -c 65536 /dev/zero > full && exec "$@"'
    command = ["run", folder, "--tasks", "bbh_boolean_expressions", "--data", data.parent, "--output", "scores"]
    line = ["sh", "-c", full, "sh", *ours("eval"), *command, "--shots", 0]
    error, left = on_small_disk(tmp_path / "disk", 64 << 10, *line)
    assert error.startswith("error: scores/bbh.samples.jsonl: ")
    assert sorted(left) == ["./full", "./scores"]
