"""Solutions in steps: labels at the placeholders alone, and rows that say something else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mindspeed_core.conversation import IGNORED
from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data import sidecar
from mindspeed_data.indexed import IndexedDataset
from mindspeed_data.instruction import InstructionSamples
from mindspeed_data.process_reward import Marks, process_rewards
from tests.data.command import data, written
from tests.tiny import tiny_tokenizer

MARKS = Marks("@", ("+", "-"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make(tmp_path: Path, tokenizer: Path, rows: list[Any], *options: object) -> Path:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["prm", tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--output", tmp_path / "x", "--overwrite"]
    run = data(*command, "--placeholder", "@", *options)
    assert run.returncode == 0, run.stderr
    return tmp_path / "x"


ROWS = {  # one solution, as the four formats write it
    "placeholder": {"input": "q\nx @\ny @", "value": ["+", "-"]},
    "math-shepherd": {"input": "q\nx @\ny @", "label": "q\nx +\ny -"},
    "stepwise": {"prompt": "q", "completions": ["x", "y"], "labels": [True, False]},
    "prmbench": {"modified_question": "q", "modified_process": ["x", "y"], "error_steps": [2]},
}


@pytest.mark.parametrize("format", sorted(ROWS))
def test_a_label_stands_at_every_placeholder(tokenizer: Path, tmp_path: Path, format: str) -> None:
    prefix = make(tmp_path, tokenizer, [ROWS[format]], "--format", format)
    assert written(prefix, Tokenizer.load(tokenizer)) == ["q\nx (@=+)\ny (@=-)"]
    known = sidecar.read(prefix)
    loaded = Tokenizer.load(tokenizer)
    assert known is not None
    assert (known.kind, known.learned) == ("process_reward", 2)
    assert [known.placeholder, *(known.rewards or [])] == [loaded.id_of(text) for text in "@+-"]
    assert data("verify", prefix).returncode == 0
    with pytest.raises(InputError, match="holds the worth of steps, not answers"):
        InstructionSamples(prefix)
    assert "q\nx «@→+»\ny «@→-»\n" in data("show", prefix).stdout


def test_other_rewards_can_be_named(tokenizer: Path, tmp_path: Path) -> None:
    row = {"input": "x@y@z@", "value": ["A", "C", "B"]}
    prefix = make(tmp_path, tokenizer, [row], "--reward-tokens", "A B C")
    assert written(prefix, Tokenizer.load(tokenizer)) == ["x(@=A)y(@=C)z(@=B)"]


def test_a_placeholder_that_melts_into_its_text_is_cut_out(tmp_path: Path) -> None:
    """`ab` is one token, so `b` is none in "a ab": the text is then tokenised around its placeholders."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab={**alphabet, "ab": 256}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "in.json").write_text(json.dumps([{"input": "cb", "value": ["+"]}, {"input": "aab", "value": ["-"]}]))
    run = data("prm", tmp_path / "in.json", "--tokenizer", tmp_path, "--placeholder", "b", "--output", tmp_path / "x")
    assert run.returncode == 0, run.stderr
    ids = IndexedDataset(tmp_path / "x_packed_input_ids_document")
    labels = IndexedDataset(tmp_path / "x_packed_labels_document")
    letters = [[alphabet[letter] for letter in text] for text in ("cb", "aab")]
    assert [ids[i].tolist() for i in range(2)] == letters
    assert labels[0].tolist() == [IGNORED, alphabet["+"]]
    assert labels[1].tolist() == [IGNORED, IGNORED, alphabet["-"]]


BAD = [
    ("placeholder", {"input": "x @"}, "no key 'value'"),
    ("placeholder", {"input": " ", "value": []}, "empty text"),
    ("placeholder", {"input": "x", "value": []}, "no step: input holds no @"),
    ("placeholder", {"input": "x @", "value": "+"}, "value is a text, not a list"),
    ("placeholder", {"input": "x @ y @", "value": ["+"]}, "not a value for every placeholder: 1 for 2"),
    ("placeholder", {"input": "x @", "value": [1]}, "unknown reward: 1 is not one of + -"),
    ("placeholder", {"input": "x @", "value": ["good"]}, "unknown reward: 'good' is not one of + -"),
    ("math-shepherd", {"input": "x @ y @", "label": "x + y"}, "label is not input with a reward"),
    ("math-shepherd", {"input": "x @ y @", "label": "x + y ?"}, "label is not input with a reward"),
    ("math-shepherd", {"input": "x @ y @", "label": "x + z -"}, "label is not input with a reward"),
    ("math-shepherd", {"input": "x @", "label": "x + y"}, "label is not input with a reward"),
    ("stepwise", {"prompt": "", "completions": ["x"], "labels": [True]}, "empty question"),
    ("stepwise", {"prompt": "q", "completions": [], "labels": []}, "empty step"),
    ("stepwise", {"prompt": "q", "completions": ["x", " "], "labels": [True, True]}, "empty step"),
    ("stepwise", {"prompt": "q", "completions": ["x"], "labels": ["+"]}, "labels is not a list of true and false"),
    ("stepwise", {"prompt": "q", "completions": "x", "labels": [True]}, "completions is not a list of texts"),
    ("stepwise", {"prompt": "q", "completions": ["x"], "labels": []}, "not a label for every step: 0 for 1"),
    (
        "stepwise",
        {"prompt": "q @", "completions": ["x"], "labels": [True]},
        "a text that holds the placeholder @ itself",
    ),
]


BAD += [
    ("prmbench", {"modified_question": "q", "modified_process": ["x"]}, "no key 'error_steps'"),
    *(
        ("prmbench", {"modified_question": "q", "modified_process": ["x", "y"], "error_steps": errors}, said)
        for errors, said in (
            ([0], "error_steps names a step that is not there: 0 of 2"),
            ([1, 3], "error_steps names a step that is not there: 3 of 2"),
            ([True], "error_steps is not a list of numbers"),
            ("1", "error_steps is not a list of numbers"),
        )
    ),
    (
        "prmbench",
        {"modified_question": "q", "modified_process": ["x", ""], "error_steps": []},
        "empty step",
    ),
]


@pytest.mark.parametrize(("format", "row", "said"), BAD)
def test_rows_that_are_no_solutions_are_left_out_and_say_why(format: str, row: dict[str, Any], said: str) -> None:
    chosen = process_rewards(MARKS)[format]
    if missing := chosen.missing(row, chosen.keys):
        assert said == f"no key {missing[0]!r}"
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        chosen.read(row, chosen.keys)


def test_bad_rows_are_named_with_their_lines(tokenizer: Path, tmp_path: Path) -> None:
    rows = [ROWS["placeholder"], {"input": "x @", "value": []}, {"input": "x", "value": []}]
    prefix = make(tmp_path, tokenizer, rows)
    known = sidecar.read(prefix)
    assert known is not None
    assert (known.kept, known.left_out) == (1, {"not a value for every placeholder": 1, "no step": 1})


def test_marks_that_are_no_single_tokens_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps([ROWS["placeholder"]]))
    command = ["prm", tmp_path / "in.json", "--tokenizer", tokenizer, "--output", tmp_path / "x"]
    for options, said in (
        (["--placeholder", "ки"], "--placeholder: 'ки' is 4 tokens for the tokenizer in"),
        (["--placeholder", "@", "--reward-tokens", "+ --"], "--reward-tokens: '--' is 2 tokens"),
        (["--placeholder", "@", "--reward-tokens", "+ @"], "they must be different tokens"),
        (["--placeholder", "@", "--reward-tokens", "+ - +"], "they must be different tokens"),
        (["--placeholder", "@", "--reward-tokens", "+"], "'+' names 1 token; at least two are needed"),
        (["--placeholder", "@", "--reward-tokens", "+ +"], "'+ +' names 1 token; at least two are needed"),
        (["--placeholder", "@", "--reward-tokens", " "], "'' names 0 tokens; at least two are needed"),
        (["--placeholder", ""], "--placeholder: '' is 0 tokens"),
    ):
        for format in ("placeholder", "math-shepherd", "stepwise"):
            run = data(*command, *options, "--format", format)
            assert (run.returncode, said in run.stderr, len(run.stderr.splitlines())) == (2, True, 1), run.stderr
