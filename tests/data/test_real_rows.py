"""Every real file of conversations, pairs and steps: how many rows are kept, why the others are not, and what is learned.

What must be learned is worked out here from the raw rows, with none of the code under test.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindspeed_core.conversation import IGNORED
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data import sidecar
from mindspeed_data.indexed import IndexedDataset
from tests.data.command import data

pytestmark = pytest.mark.real_data

SFT = {  # file, rows, and the options its keys ask for
    "sft/alpaca_en_demo.json": (999, []),
    "sft/alpaca_zh_demo_head500.json": (500, []),
    "sft/alpaca_history_oasst_zh_head450.json": (450, []),
    "sft/identity.json": (91, []),
    "sft/gpteacher_roleplay.json": (1923, ["--map-keys", '{"response": "response"}']),
    "sft/gsm8k_train_head1500.jsonl": (1500, ["--map-keys", '{"prompt": "question", "response": "answer"}']),
    "sft/sharegpt_dummy_conversation.json": (500, ["--format", "sharegpt"]),
    "sft/sharegpt_multiturn_en.json": (75, ["--format", "sharegpt"]),
    "sft/sharegpt_glaive_toolcall_en_demo.json": (300, ["--format", "sharegpt"]),
    "sft/openai_messages_en.json": (107, ["--format", "openai"]),
    "preference/kto_en_demo_head200.json": (200, ["--format", "openai"]),  # a conversation and a mark: no pair
}
PAIRS = {
    "preference/dpo_en_demo.json": (267, ["--format", "sharegpt"]),
    "preference/pairwise_orca_style.jsonl": (194, ["--map-keys", '{"prompt": "question"}']),
}
STEPS = {
    "prm/prmbench_math_shepherd_style.jsonl": (485, ["--format", "math-shepherd"]),
    "prm/prmbench_stepwise.jsonl": (484, ["--format", "stepwise"]),
}
# The one row of all files that is left out: the eleventh of its solutions' steps is an empty text.
LEFT_OUT = {"prm/prmbench_stepwise.jsonl": (294, "empty step")}
TEMPLATES = {"qwen3": "qwen3", "gpt2": "alpaca", "mistral_v1": "mistral"}  # by tokenizer
ENDS = {"qwen3": "<|im_end|>\n", "gpt2": "<|endoftext|>", "mistral_v1": "</s>"}


loaded = cache(Tokenizer.load)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer is loaded once, not for every file."""
    monkeypatch.setattr(Tokenizer, "load", loaded)


def rows_of(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The line and the object of every row."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [(number, json.loads(line)) for number, line in enumerate(text.splitlines(), 1)]
    rows, at = [], text.index("{")
    while at >= 0:
        row, end = json.JSONDecoder().raw_decode(text, at)
        rows.append((text.count("\n", 0, at) + 1, row))
        at = text.find("{", end)
    return rows


def answers_of(row: dict[str, Any]) -> list[str]:
    """The answers of a row of any format; calls of functions as Qwen3 writes them."""
    if "conversations" in row:
        written = {"gpt": str, "function_call": _call}
        return [written[turn["from"]](turn["value"]) for turn in row["conversations"] if turn["from"] in written]
    if "messages" in row:
        return [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
    last = next(row[key] for key in ("output", "response", "answer") if key in row)
    return [*(answer for _, answer in row.get("history", [])), last]


def _call(text: str) -> str:
    call = json.loads(text)
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>'


def learned(prefix: Path, tokenizer: Tokenizer, which: str = "") -> Iterator[str]:
    """The text of what each sample teaches."""
    labels = IndexedDataset(sidecar.files_of(prefix)[f"{which}labels"])
    for i in range(len(labels)):
        ids = labels[i]
        yield tokenizer.decode(ids[ids != IGNORED].tolist(), skip_special=False)


def make(task: str, path: Path, output: Path, tokenizer: Path, options: list[str]) -> sidecar.Sidecar:
    run = data(task, path, "--tokenizer", tokenizer, "--output", output, "--overwrite", *options)
    assert run.returncode == 0, run.stderr
    known = sidecar.read(output)
    assert known is not None
    name = f"{path.parent.name}/{path.name}"
    line, reason = LEFT_OUT.get(name, (0, ""))
    assert known.left_out == ({reason: 1} if reason else {})
    if reason:
        assert f"{path}:{line}: {reason}\n" in run.stderr
    places = IndexedDataset(sidecar.beside(output, sidecar.ORIGIN)).ids.reshape(-1, 2)
    assert places.tolist() == [[0, number] for number, _ in rows_of(path) if number != line]
    return known


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_conversations(shared_data: Path, tmp_path: Path, name: str) -> None:
    folder, prefix, end = shared_data / "tokenizers" / name, tmp_path / "x", ENDS[name]
    for file, (count, options) in SFT.items():
        known = make("sft", shared_data / file, prefix, folder, [*options, "--template", TEMPLATES[name]])
        assert known.kept == count, file
        answers = [answers_of(row) for _, row in rows_of(shared_data / file)]
        texts = list(learned(prefix, loaded(folder)))
        if name == "mistral_v1" or (name == "gpt2" and "glaive" in file):  # other blanks, and other calls
            assert [text.count(end) for text in texts] == [
                len(row) + "".join(row).count(end)  # a row that holds </s> itself
                for row in answers
            ], file
        else:
            assert texts == ["".join(answer + end for answer in row) for row in answers], file


@pytest.mark.parametrize("file", ["sft/sharegpt_glaive_toolcall_en_demo.json", "sft/openai_messages_en.json"])
def test_conversations_in_the_tokenizers_own_template(shared_data: Path, tmp_path: Path, file: str) -> None:
    """Qwen3's: an empty thought before the last answer, or before those that follow the last question to a tool."""
    folder, (count, options) = shared_data / "tokenizers/qwen3", SFT[file]
    assert make("sft", shared_data / file, tmp_path / "x", folder, options).kept == count
    empty = "<think>\n\n</think>\n\n"
    for (_, row), text in zip(rows_of(shared_data / file), learned(tmp_path / "x", loaded(folder)), strict=True):
        *answers, last = answers_of(row)
        assert text == "".join(f"{answer}<|im_end|>" for answer in [*answers, empty + last])


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_pairs(shared_data: Path, tmp_path: Path, name: str) -> None:
    folder, prefix = shared_data / "tokenizers" / name, tmp_path / "x"
    for file, (count, options) in PAIRS.items():
        chosen = [*options, "--template", TEMPLATES[name]]
        assert make("pairwise", shared_data / file, prefix, folder, chosen).kept == count
        for which in ("chosen", "rejected"):
            answers = [row[which] for _, row in rows_of(shared_data / file)]
            answers = [answer["value"] if isinstance(answer, dict) else answer for answer in answers]
            expected = [f"{answer}{ENDS[name]}".strip() for answer in answers]
            assert [text.strip() for text in learned(prefix, loaded(folder), f"{which}_")] == expected, file
    # Preferences without a pair are told from pairs by what they lack.
    alone = shared_data / "preference/kto_en_demo_head200.json"
    command = ["pairwise", alone, "--format", "openai", "--tokenizer", folder, "--template", "empty"]
    run = data(*command, "--output", tmp_path / "y")
    assert (run.returncode, "no key 'chosen'; the row has messages, label" in run.stderr) == (2, True)
    assert "use mindspeed-data sft --format openai" in run.stderr


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_steps(shared_data: Path, tmp_path: Path, name: str) -> None:
    folder, prefix = shared_data / "tokenizers" / name, tmp_path / "x"
    tokenizer = loaded(folder)
    placeholder = "ки"
    if name == "gpt2":  # it has no token for the published placeholder, and says so
        command = ["prm", shared_data / "prm/prmbench_math_shepherd_style.jsonl", "--format", "math-shepherd"]
        run = data(*command, "--tokenizer", folder, "--output", tmp_path / "y")
        assert (run.returncode, "--placeholder: 'ки' is 2 tokens" in run.stderr) == (2, True)
        placeholder = "<|endoftext|>"
    for file, (count, options) in STEPS.items():
        if name == "gpt2" and "math_shepherd" in file:
            continue
        known = make("prm", shared_data / file, prefix, folder, [*options, "--placeholder", placeholder])
        assert known.kept == count
        ids, labels = (IndexedDataset(sidecar.files_of(prefix)[key]) for key in ("input_ids", "labels"))
        raw = [row for number, row in rows_of(shared_data / file) if number != LEFT_OUT.get(file, (0, ""))[0]]
        plus, minus = tokenizer.encode("+")[0], tokenizer.encode("-")[0]
        for i, row in enumerate(raw):
            found = labels[i] != IGNORED
            assert np.array_equal(np.flatnonzero(found), np.flatnonzero(ids[i] == known.placeholder)), file
            if "labels" in row:
                expected = [plus if good else minus for good in row["labels"]]
            else:  # the line of a step ends with its reward
                rewards = [line[-2:] for line in row["label"].split("\n") if line[-2:] in (" +", " -")]
                expected = [plus if reward == " +" else minus for reward in rewards]
            assert labels[i][found].tolist() == expected, (file, i)
    raw = shared_data / "prm/prmbench_raw"
    run = data("prm", raw, "--tokenizer", folder, "--placeholder", placeholder, "--output", tmp_path / "z")
    assert (run.returncode, "no key 'input'; the row has original_question" in run.stderr) == (2, True)
    assert "add --format prmbench" in run.stderr


RAW = {  # the rows of the published files that are left out, and why
    "prm800k_test_p1_4o_counterfactual.jsonl": (90, {27: "43 of 42", 45: "13 of 12"}),
    "prm800k_test_p1_4o_deception.jsonl": (88, {21: "21 of 14", 39: "19 of 17", 73: "empty step"}),
    "prm800k_test_p1_4o_step_contradiction.jsonl": (90, {69: "53 of 52"}),
}


@pytest.mark.parametrize("name", sorted(RAW))
def test_the_steps_of_prmbench_are_those_that_others_made_of_it(shared_data: Path, tmp_path: Path, name: str) -> None:
    """The same solutions lie converted in prmbench_stepwise.jsonl, with true and false for each step."""
    folder, file = shared_data / "tokenizers/qwen3", shared_data / "prm/prmbench_raw" / name
    count, left_out = RAW[name]
    run = data("prm", file, "--format", "prmbench", "--tokenizer", folder, "--output", tmp_path / "x")
    assert run.returncode == 0, run.stderr
    for line, reason in left_out.items():
        reason = f"error_steps names a step that is not there: {reason}" if " of " in reason else reason
        assert f"{file}:{line}: {reason}\n" in run.stderr
    known = sidecar.read(tmp_path / "x")
    assert known is not None
    assert (known.kept, sum(known.left_out.values())) == (count - len(left_out), len(left_out))
    wanted = [row for number, row in rows_of(file) if number not in left_out]
    converted = {
        (row["prompt"], tuple(row["completions"])): row
        for _, row in rows_of(shared_data / "prm/prmbench_stepwise.jsonl")
    }
    pairs = [converted[row["modified_question"], tuple(row["modified_process"])] for row in wanted]
    assert not all(all(row["labels"]) for row in pairs)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    command = ["prm", tmp_path / "in.jsonl", "--format", "stepwise", "--tokenizer", folder, "--output", tmp_path / "y"]
    assert data(*command).returncode == 0
    for key in ("input_ids", "labels"):
        ours, theirs = (sidecar.files_of(tmp_path / which)[key].with_suffix(".bin").read_bytes() for which in "xy")
        assert ours == theirs
