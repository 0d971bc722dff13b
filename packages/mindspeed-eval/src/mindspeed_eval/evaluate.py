"""One suite through lm-eval: its tasks on our rows, its requests to the model, its metric per subject and in all."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import datasets
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from mindspeed_core.errors import InputError
from mindspeed_eval.suites import Part, Suite, task_folder


@dataclass(frozen=True)
class Outcome:
    """What a model scored in one suite."""

    suite: str
    metric: str
    score: float  # over all questions, each counting once
    stderr: float
    questions: int
    shots: int
    subjects: dict[str, dict[str, float]]  # subject -> score, questions
    samples: list[dict[str, Any]]  # one per question

    def summary(self) -> dict[str, Any]:
        """Return everything but the samples."""
        return {key: value for key, value in asdict(self).items() if key != "samples"}


def ask(lm: LM, part: Part, *, limit: int | None = None, shots: int | None = None) -> Outcome:
    """Ask `lm` the first `limit` questions of every subject, with `shots` worked examples (None: lm-eval's own number)."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    suite = part.suite
    loaded = tasks(part, shots=shots)
    results = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0)
    assert results is not None  # the calling rank is the only one lm-eval knows of
    metric = suite.metric.split(",")[0]
    subjects: dict[str, dict[str, float]] = {}
    samples = []
    for subject in part.rows:
        task = suite.prefix + subject
        score, questions = results["results"][task][suite.metric], results["n-samples"][task]["effective"]
        subjects[subject] = {"score": score, "questions": questions}
        samples += [_sample(suite, subject, sample, metric) for sample in results["samples"][task]]
    total = len(samples)
    mean = sum(entry["score"] * entry["questions"] for entry in subjects.values()) / total
    return Outcome(
        suite=suite.name,
        metric=metric,
        score=mean,
        stderr=math.sqrt(mean * (1 - mean) / max(total - 1, 1)),
        questions=total,
        shots=max(results["n-shot"][suite.prefix + subject] for subject in part.rows),
        subjects=subjects,
        samples=samples,
    )


def tasks(part: Part, *, shots: int | None = None) -> Any:
    """Return lm-eval's own tasks of a suite, asking the rows of `part` in place of the hub's."""
    suite = part.suite
    # only this suite's folder: the index of all 14,000 tasks takes 15 seconds
    manager = TaskManager(include_defaults=False, include_path=str(task_folder(suite)))
    members = [
        {"task": suite.prefix + subject, "custom_dataset": _data_set(splits, suite.shots_from)}
        for subject, splits in part.rows.items()
    ]
    loaded = manager.load([{"group": f"local_{suite.name}", "task": members}])
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if shots is not None and shots != own:
            _check_shots(part, name.removeprefix(suite.prefix), shots, own)
        task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
        task.set_fewshot_seed(seed=1234)  # lm-eval's default
    return loaded


def _data_set(splits: dict[str, list[dict[str, Any]]], shots_from: str | None) -> Any:
    def build(**_: Any) -> datasets.DatasetDict:
        held: dict[Any, Any] = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        if shots_from is not None and shots_from not in held:  # lm-eval looks there even when it takes none
            held[shots_from] = held["test"].select([])
        return datasets.DatasetDict(list(held.items()))

    return build


def _check_shots(part: Part, subject: str, shots: int, own: int | None) -> None:
    suite = part.suite
    held = own or 0 if suite.shots_from is None else len(part.rows[subject].get(suite.shots_from, ()))
    if shots > held:
        source = "lm-eval's task" if suite.shots_from is None else f"the {suite.shots_from} file"
        raise InputError(f"--shots {shots}: {source} of {suite.name} {subject} holds {held} worked examples")


def _sample(suite: Suite, subject: str, sample: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return one line of the samples file."""
    prompts = sample["arguments"]
    line = {"suite": suite.name, "subject": subject, "index": sample["doc_id"], "prompt": prompts[0][0]}
    if len(prompts) > 1:  # every choice was a continuation of the same prompt
        scores = [float(score) for score, _ in sample["filtered_resps"]]
        line |= {
            "choices": [choice for _, choice in prompts],
            "loglikelihoods": scores,
            "choice": scores.index(max(scores)),
        }
    else:
        line |= {"response": sample["resps"][0][0], "extracted": sample["filtered_resps"][0]}
    return line | {"target": sample["target"], "correct": bool(sample[metric])}
