"""Scores: a model that knows everything gets 1, one that knows nothing 0, and what is written says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from mindspeed_core.errors import InputError
from mindspeed_eval import report
from mindspeed_eval.evaluate import ask
from mindspeed_eval.suites import SUITES, Part

QUESTIONS = [{"question": f"Which is {i}?", "choices": ["p", "q", "r", "s"], "answer": i % 4} for i in range(6)]
EXPRESSIONS = [{"input": f"expression {i} is", "target": str(i % 2 == 0)} for i in range(5)]
MMLU = Part(SUITES["mmlu"], {"anatomy": {"test": QUESTIONS, "dev": QUESTIONS[:5]}, "virology": {"test": QUESTIONS[:2]}})
BBH = Part(SUITES["bbh"], {"boolean_expressions": {"test": EXPRESSIONS}, "navigate": {"test": EXPRESSIONS[:1]}})


class Oracle(LM):
    """Knows the answer to every question, and with `honest=False` gives any other."""

    def __init__(self, *, honest: bool) -> None:
        super().__init__()
        self.honest = honest
        self.prompts: list[str] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        answers = []
        for request in requests:
            context, choice = request.args
            self.prompts.append(context)
            number = int(context.rsplit("Which is ", 1)[1].split("?")[0])
            right = choice.strip() == "ABCD"[number % 4]
            answers.append((-1.0 if right == self.honest else -2.0, right))
        return answers

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = []
        for request in requests:
            self.prompts.append(request.args[0])
            number = int(request.args[0].rsplit("expression ", 1)[1].split(" ")[0])
            answers.append(f"We see. So the answer is {(number % 2 == 0) == self.honest}.")
        return answers


@pytest.mark.parametrize("part", [MMLU, BBH], ids=lambda part: part.suite.name)
@pytest.mark.parametrize("honest", [True, False])
def test_perfect_and_hopeless_models_score_one_and_zero(part: Part, honest: bool) -> None:
    outcome = ask(Oracle(honest=honest), part)
    assert outcome.score == float(honest)
    assert outcome.questions == len(outcome.samples) == sum(len(splits["test"]) for splits in part.rows.values())
    assert all(sample["correct"] == honest for sample in outcome.samples)


def test_every_question_counts_once_and_the_limit_is_per_subject() -> None:
    class Shy(Oracle):
        """Knows anatomy alone."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            answers = super().loglikelihood(requests)
            return [
                a if "about anatomy" in r.args[0] else (-a[0], a[1]) for a, r in zip(answers, requests, strict=True)
            ]

    assert ask(Shy(honest=True), MMLU).score == 6 / 8
    outcome = ask(Shy(honest=True), MMLU, limit=3)
    assert (outcome.score, outcome.questions) == (3 / 5, 5)
    assert outcome.subjects["virology"] == {"score": 0.0, "questions": 2}


def test_shots_are_lm_evals_unless_asked_for() -> None:
    part = Part(MMLU.suite, {"anatomy": MMLU.rows["anatomy"]})
    for shots, examples in ((None, 0), (5, 5)):
        oracle = Oracle(honest=True)
        assert ask(oracle, part, shots=shots).shots == examples
        assert oracle.prompts[0].count("Which is") == examples + 1
    oracle = Oracle(honest=True)
    assert ask(oracle, BBH).shots == 3
    assert oracle.prompts[0].count("\nA: Let's think step by step.\n") == 4
    with pytest.raises(InputError, match="--shots 6: the dev file of mmlu anatomy holds 5 worked examples"):
        ask(oracle, part, shots=6)
    with pytest.raises(InputError, match="--shots 1: the dev file of mmlu virology holds 0"):
        ask(oracle, MMLU, shots=1)


def test_what_is_written_names_every_answer(tmp_path: Path) -> None:
    outcomes = [ask(Oracle(honest=True), MMLU), ask(Oracle(honest=False), BBH)]
    for outcome in outcomes:
        report.write_samples(tmp_path, outcome)
    report.write_results(tmp_path, {"model": "m"}, outcomes)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bbh.samples.jsonl",
        "mmlu.samples.jsonl",
        "results.json",
    ]
    line = json.loads((tmp_path / "mmlu.samples.jsonl").read_text().splitlines()[1])
    assert (line["subject"], line["index"], line["choice"], line["target"]) == ("anatomy", 1, 1, 1)
    assert line["loglikelihoods"] == [-2.0, -1.0, -2.0, -2.0]
    line = json.loads((tmp_path / "bbh.samples.jsonl").read_text().splitlines()[0])
    assert (line["extracted"], line["target"], line["correct"]) == ("False", "True", False)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["model"] == "m"
    assert {name: entry["score"] for name, entry in results["suites"].items()} == {"mmlu": 1.0, "bbh": 0.0}
