"""An evaluation of ours gives lm-eval's own numbers: the same requests to its `hf` model, answer by answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_command, run_ranks
from tests.tiny_model import tiny_model

TEXTS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "Once upon a time, there was a little girl. ",
    "x",
    "def f(x):\n    " * 60,  # longer than the context
]
PAIRS = [
    ("the quick brown", " fox jumps"),
    ("the quick brown ", "fox"),  # the blank moves to the continuation
    ("", "Once upon a time"),
    ("Once upon a", " t"),
    ("Once upon a", " g"),
    ("over the lazy dog. " * 40, "the quick"),
]
SETTINGS: dict[str, Any] = {"until": ["\n", "he"], "max_gen_toks": 40, "do_sample": False}


def requests(kind: str) -> list[Any]:
    from lm_eval.api.instance import Instance

    arguments: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": PAIRS,
        "loglikelihood_rolling": [(text,) for text in TEXTS],
        "generate_until": [(text, SETTINGS) for text in TEXTS]
        + [("Once", {**SETTINGS, "until": [], "max_gen_toks": 9})],
    }
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments[kind])]  # type: ignore[arg-type]


def answers(lm: Any) -> dict[str, Any]:
    kinds = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    return {kind: getattr(lm, kind)(requests(kind)) for kind in kinds}


def ours(folder: Path, parallel: dict[str, int]) -> dict[str, Any] | None:
    from mindspeed_core.generate.engine import Engine

    engine = Engine.open(folder, **parallel)
    if not engine.mesh.is_main:
        engine.follow()
        return None
    from mindspeed_core.tokenizer import Tokenizer
    from mindspeed_eval.model import EngineLM

    with engine:
        return answers(EngineLM(engine, Tokenizer.load(folder), batch_size=3))


def hf_model(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)


def test_every_request_is_answered_as_by_lm_evals_own_model(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny", max_position_embeddings=128)
    expected = answers(hf_model(folder))
    got = run_ranks(ours, 2, folder, {"tp": 2}, timeout=120)[0]
    for (score, greedy), (wanted, wanted_greedy) in zip(got["loglikelihood"], expected["loglikelihood"], strict=True):
        assert score == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy
    assert got["loglikelihood_rolling"] == pytest.approx(expected["loglikelihood_rolling"], abs=1e-3)
    assert got["generate_until"] == expected["generate_until"]


@pytest.mark.real_data
def test_mmlu_on_real_questions_gives_lm_evals_own_numbers(shared_data: Path, tmp_path: Path) -> None:
    from mindspeed_eval import suites
    from mindspeed_eval.evaluate import ask

    folder = shared_data / "models" / "stories260k_hf"
    tasks = ["mmlu_anatomy", "mmlu_formal_logic", "mmlu_virology"]
    output = tmp_path / "scores"
    options = ["--tasks", ",".join(tasks), "--data", shared_data / "eval", "--output", output]
    done = run_command("mindspeed-eval", "run", folder, *options, "--limit", 8, "--shots", 2, "--json", timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads((output / "results.json").read_text())

    [part] = suites.load(shared_data / "eval", suites.choose(tasks))
    expected = ask(hf_model(folder), part, limit=8, shots=2)
    assert results["suites"]["mmlu"] == expected.summary()
    lines = [json.loads(line) for line in (output / "mmlu.samples.jsonl").read_text().splitlines()]
    for line, wanted in zip(lines, expected.samples, strict=True):
        assert line["prompt"] == wanted["prompt"]
        assert line["loglikelihoods"] == pytest.approx(wanted["loglikelihoods"], abs=1e-3)
        assert line["choice"] == wanted["choice"]
