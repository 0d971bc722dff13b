"""A real chat model learns from real instructions: the held-out loss falls, and it still answers, here and on the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_command
from tests.integration.test_web import open_page
from tests.train import runs

HELD_OUT = 24
SHORT = 300  # characters of a row
QUESTION = "Where is the Eiffel Tower?"
ANSWERING = ["--temperature", "0", "--max-new-tokens", "40", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def data(smollm2: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two data sets made by the command: `train` and, of rows that are not among them, `held_out`."""
    folder = tmp_path_factory.mktemp("instructions")
    rows = json.loads((shared_data / "sft" / "alpaca_en_demo.json").read_text())
    short = [row for row in rows if sum(len(row[key]) for key in ("instruction", "input", "output")) < SHORT]
    for name, part in (("train", short[:-HELD_OUT]), ("held_out", short[-HELD_OUT:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
        options = ["--tokenizer", smollm2, "--output", folder / name, "--format", "alpaca", "--template", "chatml"]
        done = run_command("mindspeed-data", "sft", folder / f"{name}.json", *options, "--seq-length", 128)
        assert done.returncode == 0, done.stderr
    return folder


def recipe(smollm2: Path, data: Path, run: Path, **sections: Any) -> dict[str, Any]:
    """What one would write: bf16, a low rate, and the held-out rows looked at before and after."""
    return {
        "model": {"path": str(smollm2)},
        "data": {"train": str(data / "train"), "valid": str(data / "held_out"), "template": "chatml"},
        "batch": {"micro": 8, "global": 8},
        "precision": "bf16",
        "optim": {"lr": 5e-5, "warmup": 3},
        "checkpoint": {"folder": str(run)},
        "log": {"tensorboard": False},
        "device": "cpu",
        **sections,
    }


def held_out(run: Path) -> list[float]:
    return [line["valid_loss"] for line in runs.metrics(run) if "valid_loss" in line]


@pytest.mark.real_data
def test_a_few_steps_lower_the_loss_on_rows_not_learned(smollm2: Path, data: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "parallel": {"pp": 2},
        "optim": {"lr": 5e-5, "warmup": 1},
        "train": {"steps": 6, "eval_every": 6},
    }
    runs.train(recipe(smollm2, data, tmp_path / "run", **sections), "sft", world=2, timeout=280)
    before, after = held_out(tmp_path / "run")
    assert after < before - 0.02


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.browser
@pytest.mark.timeout(900)
def test_a_tuned_model_answers_in_the_terminal_and_on_the_page(
    smollm2: Path, data: Path, chromium: str, tmp_path: Path
) -> None:
    # its 9 heads and 3 key/value heads are cut by 3 and not by 2
    sections: dict[str, Any] = {"parallel": {"tp": 3}, "train": {"steps": 24, "eval_every": 12}}
    run = tmp_path / "tuned"
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(smollm2, data, run, **sections)))
    done = run_command("mindspeed-train", "sft", tmp_path / "recipe.yaml", timeout=600)
    assert done.returncode == 0, done.stderr
    losses = held_out(run)
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.05

    written = json.loads((data / "held_out.json").read_text())[0]["instruction"]
    said: dict[Path, list[str]] = {}
    for model in (smollm2, run):
        said[model] = told(model, [QUESTION, "/clear", written])
        assert "Paris" in said[model][0]
        assert all(said[model])
        with open_page(model, chromium, *ANSWERING) as page:
            page.send(QUESTION)
            page.wait(lambda page=page: len(page.answers()) == 1 and page.idle(), "an answer", seconds=120)
            assert page.page.get_by_role("heading", name="tuned step_24" if model == run else smollm2.name).is_visible()
            assert page.answers()[0] == said[model][0], "the page and the terminal give the same answer"
            assert page.foreign == page.errors == []
    assert said[smollm2] != said[run]


def told(model: Path, lines: list[str]) -> list[str]:
    """The answers of `mindspeed-serve chat` to what comes through a pipe."""
    line = [sys.executable, "-m", "mindspeed_serve", "chat", str(model), *ANSWERING]
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(line, input=text, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [answer.strip() for answer in done.stdout.splitlines() if answer.strip()]
