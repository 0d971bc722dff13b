"""The benchmark suites: how the published files of each are read, and which of lm-eval's tasks asks their questions.

lm-eval's own prompts, few-shot examples and metrics are used as they are; only the data comes from a local folder.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_core.errors import InputError

Rows = list[dict[str, Any]]
SPLITS = {"test": "test", "dev": "dev", "val": "validation", "validation": "validation", "train": "train"}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One benchmark: where its questions lie, how a file becomes rows, and the lm-eval tasks that ask them."""

    name: str
    about: str
    pattern: str  # what its files are called
    tasks: str  # folder of lm-eval's task files, one per subject
    prefix: str  # lm-eval's task of a subject is PREFIX + subject
    metric: str  # the key of lm-eval's results
    read: Callable[[Path], Iterator[dict[str, Any]]]
    shots_from: str | None = None  # the split that worked examples come from; None: they are part of the task

    def subjects(self) -> list[str]:
        """Return the names of all subjects that lm-eval knows of this suite."""
        files = (path.stem for path in task_folder(self).glob("*.yaml") if not path.name.startswith("_"))
        return sorted(name.removeprefix(self.prefix) for name in files)


@dataclass(frozen=True)
class Part:
    """The questions of one suite that a run asks: subject -> split -> rows."""

    suite: Suite
    rows: dict[str, dict[str, Rows]]


def task_folder(suite: Suite) -> Path:
    """Return the folder of lm-eval's task files for a suite, without importing lm-eval (which takes seconds)."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks" / suite.tasks


def choose(names: Sequence[str]) -> dict[str, list[str] | None]:
    """Return suite -> subjects (None: all) for names such as `mmlu` or `mmlu_anatomy`; every unknown name is told."""
    chosen: dict[str, list[str] | None] = {}
    faults = []
    for name in names:
        suite = next((s for s in SUITES.values() if name == s.name or name.startswith(s.name + "_")), None)
        if suite is None:
            faults.append(f"--tasks {name}: no such suite; there are {', '.join(SUITES)}")
            continue
        subject = name.removeprefix(suite.name).removeprefix("_")
        if not subject:
            chosen[suite.name] = None
        elif subject not in suite.subjects():
            faults.append(f"--tasks {name}: {suite.name} has no such subject; it has {', '.join(suite.subjects())}")
        elif (others := chosen.setdefault(suite.name, [])) is not None and subject not in others:
            others.append(subject)
    if not names:
        faults.append(f"--tasks: name at least one of {', '.join(SUITES)}")
    if faults:
        raise InputError("\n".join(faults))
    return chosen


def load(data: Path, chosen: dict[str, list[str] | None]) -> list[Part]:
    """Read the questions of the chosen suites from `data`/SUITE, telling everything that is missing at once."""
    parts, faults = [], []
    for name, subjects in chosen.items():
        try:
            parts.append(_load_part(SUITES[name], data / name, subjects))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    return parts


def _load_part(suite: Suite, folder: Path, subjects: list[str] | None) -> Part:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; --data holds one folder per suite, {suite.name}/ with {suite.pattern}"
        )
    rows: dict[str, dict[str, Rows]] = {}
    for path, subject, split in find(folder, suite):
        if subjects is None or subject in subjects:
            rows.setdefault(subject, {}).setdefault(split, []).extend(suite.read(path))
    if subjects is None:
        rows = {subject: splits for subject, splits in rows.items() if splits.get("test")}
    missing = [subject for subject in subjects or () if not rows.get(subject, {}).get("test")]
    if missing:
        raise InputError(f"{folder}: no questions for {', '.join(missing)}; expected {suite.pattern}")
    if not rows:
        raise InputError(f"{folder}: holds no questions of {suite.name}; expected {suite.pattern}")
    return Part(suite, dict(sorted(rows.items())))


def find(folder: Path, suite: Suite) -> Iterator[tuple[Path, str, str]]:
    """Yield (file, subject, split) for every file of the suite below `folder`.

    A file is named after its subject. The split may stand in its name or in a folder's (`test/anatomy.csv`,
    `anatomy_test.csv`, `anatomy_test_00.csv`); without one the file holds test questions.
    """
    subjects = sorted(suite.subjects(), key=len, reverse=True)  # the longest name that fits is meant
    suffix = Path(suite.pattern).suffix
    for path in sorted(folder.rglob(f"*{suffix}")):
        stem = path.stem.lower()
        subject = next((s for s in subjects if re.match(re.escape(s) + r"(?![a-z0-9])", stem)), None)
        if subject is None:
            continue
        words = [*re.split(r"[^a-z]+", stem[len(subject) :]), *(p.lower() for p in path.relative_to(folder).parts[:-1])]
        yield path, subject, next((SPLITS[word] for word in words if word in SPLITS), "test")


def _read_mmlu(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the questions of one csv file: question, four choices, the letter of the right one."""
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines)
        for number, row in enumerate(reader):
            if number == 0 and row[-1:] == ["answer"]:
                continue  # some copies have a header
            if not row:
                continue
            if len(row) != 6 or row[5].strip() not in ("A", "B", "C", "D"):
                raise InputError(
                    f"{path}:{reader.line_num}: expected question,A,B,C,D,answer with an answer from A to D, "
                    f"found {len(row)} columns ending in {row[-1][:20]!r}"
                )
            yield {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5].strip())}


def _read_bbh(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the questions of one json file: {"canary": ..., "examples": [{"input": ..., "target": ...}]}."""
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
        yield from ({"input": str(row["input"]), "target": str(row["target"])} for row in examples)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f'{path}: expected {{"examples": [{{"input": ..., "target": ...}}]}} ({type(error).__name__}: {error})'
        ) from error


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="mmlu",
            about="57 subjects, four choices each; the likeliest letter counts",
            pattern="SUBJECT_test.csv, SUBJECT_dev.csv",
            tasks="mmlu/default",
            prefix="mmlu_",
            metric="acc,none",
            read=_read_mmlu,
            shots_from="dev",
        ),
        Suite(
            name="bbh",
            about="27 hard tasks of BIG-Bench, three worked examples each; the text after `the answer is` counts",
            pattern="TASK.json",
            tasks="bbh/cot_fewshot",
            prefix="bbh_cot_fewshot_",
            metric="exact_match,get-answer",
            read=_read_bbh,
        ),
    )
}
