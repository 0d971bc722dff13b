"""Reading the published files: every spelling of a split, and one line for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed_core.errors import InputError
from mindspeed_eval.suites import SUITES, choose, load


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def mmlu(rows: int) -> str:
    return "".join(f'"Question {i}, with a comma and\na second line",w,x,y,z,{"ABCD"[i % 4]}\n' for i in range(rows))


def test_every_suite_knows_its_subjects() -> None:
    assert {name: len(suite.subjects()) for name, suite in SUITES.items()} == {"mmlu": 57, "bbh": 27}


@pytest.mark.parametrize(
    "name",
    ["anatomy_test.csv", "test/anatomy_test.csv", "test/anatomy.csv", "anatomy.csv", "data/test/anatomy-test-00.csv"],
)
def test_a_split_stands_in_the_file_name_or_in_a_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path / "mmlu" / name, mmlu(3))
    write(tmp_path / "mmlu" / "dev" / "anatomy_dev.csv", mmlu(5))
    write(tmp_path / "mmlu" / "auxiliary_train" / "arc_easy.csv", "not,of,this,suite\n")
    [part] = load(tmp_path, choose(["mmlu"]))
    assert {subject: {k: len(v) for k, v in splits.items()} for subject, splits in part.rows.items()} == {
        "anatomy": {"test": 3, "dev": 5}
    }
    assert part.rows["anatomy"]["test"][1] == {
        "question": "Question 1, with a comma and\na second line",
        "choices": ["w", "x", "y", "z"],
        "answer": 1,
    }


def test_a_subject_may_be_cut_into_files(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / "mmlu" / f"high_school_physics_test_{i}.csv", mmlu(2))
    [part] = load(tmp_path, choose(["mmlu_high_school_physics"]))
    assert len(part.rows["high_school_physics"]["test"]) == 6


def test_bbh_is_read_as_published(tmp_path: Path) -> None:
    examples = [{"input": "not True is", "target": "False"}]
    write(tmp_path / "bbh" / "bbh" / "boolean_expressions.json", json.dumps({"canary": "...", "examples": examples}))
    write(tmp_path / "bbh" / "cot-prompts" / "boolean_expressions.txt", "Evaluate")
    [part] = load(tmp_path, choose(["bbh"]))
    assert part.rows == {"boolean_expressions": {"test": examples}}


def test_all_unknown_names_are_told() -> None:
    with pytest.raises(InputError) as error:
        choose(["mmul", "mmlu_cooking", "bbh"])
    first, second = str(error.value).splitlines()
    assert first == "--tasks mmul: no such suite; there are mmlu, bbh"
    assert second.startswith("--tasks mmlu_cooking: mmlu has no such subject; it has abstract_algebra, anatomy,")


def test_all_missing_files_are_told(tmp_path: Path) -> None:
    write(tmp_path / "mmlu" / "readme.csv", "nothing\n")
    with pytest.raises(InputError) as error:
        load(tmp_path, choose(["mmlu", "bbh"]))
    first, second = str(error.value).splitlines()
    assert first.startswith(f"{tmp_path}/mmlu: holds no questions of mmlu; expected SUBJECT_test.csv")
    assert second.startswith(f"{tmp_path}/bbh: no such folder")


def test_a_damaged_file_is_told_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "mmlu" / "anatomy_test.csv", "question,A,B,C,D,answer\n" + mmlu(1) + "cut,short\n")
    with pytest.raises(InputError, match=rf"{path}:4: expected question,A,B,C,D,answer .* found 2 columns"):
        load(tmp_path, choose(["mmlu"]))
    path = write(tmp_path / "bbh" / "navigate.json", '{"examples": [{"input": 1')
    with pytest.raises(InputError, match=rf"{path}: expected .*examples"):
        load(tmp_path, choose(["bbh"]))
