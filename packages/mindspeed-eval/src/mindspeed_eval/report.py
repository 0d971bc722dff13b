"""What a run leaves behind: a line per question, one object of results, a table for people."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mindspeed_core.errors import writing
from mindspeed_eval.evaluate import Outcome


def write_samples(folder: Path, outcome: Outcome) -> Path:
    """Write SUITE.samples.jsonl and return its path."""
    lines = (json.dumps(sample, ensure_ascii=False) for sample in outcome.samples)
    return _write(folder / f"{outcome.suite}.samples.jsonl", lines)


def write_results(folder: Path, run: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Write results.json, what was run and what came out of it, and return the same object."""
    results = {**run, "suites": {outcome.suite: outcome.summary() for outcome in outcomes}}
    _write(folder / "results.json", [json.dumps(results, ensure_ascii=False, indent=2)])
    return results


def table(outcomes: Sequence[Outcome]) -> Table:
    """Return a row per suite, above a row per subject."""
    view = Table(box=None, header_style="bold", pad_edge=False)
    view.add_column("suite")
    for name in ("score", "±", "questions"):
        view.add_column(name, justify="right")
    for number, outcome in enumerate(outcomes):
        if number:
            view.add_section()
        view.add_row(
            f"{outcome.suite} ({outcome.metric}, {outcome.shots} shots)",
            f"{100 * outcome.score:.2f}",
            f"{100 * outcome.stderr:.2f}",
            str(outcome.questions),
            style="bold",
        )
        for subject, entry in outcome.subjects.items():
            view.add_row(f"  {subject}", f"{100 * entry['score']:.2f}", "", str(int(entry["questions"])))
    return view


def _write(path: Path, lines: Iterable[str]) -> Path:
    """Write beside the target and rename, so that a cut run never leaves half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path
