"""Solutions in steps, each of which is good or bad, for process reward models.

A placeholder ends every step. Its label is the token that says what the step is worth, and nothing else has a label; in
training the labels are not shifted:

    input_ids   ... 4 8 / 2 = 2 4 .   ки   S o   7 2 .   ки
    labels                             +                  -
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from mindspeed_core.conversation import IGNORED, Labelled
from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data.formats import Format, Keys, Record, kind_of, string
from mindspeed_data.readers import Chunk, Rows
from mindspeed_data.shorten import check_length
from mindspeed_data.sidecar import INSTRUCTION, PACKED
from mindspeed_data.tokenize import Encoded, Job


@dataclass(frozen=True)
class Marks:
    """The texts that end a step, and those that say what it is worth, the best first."""

    placeholder: str = "ки"
    rewards: tuple[str, ...] = ("+", "-")

    def __post_init__(self) -> None:
        if len(set(self.rewards)) < 2:  # with one alone, bad steps would be labelled good
            raise InputError(
                f"--reward-tokens: {' '.join(self.rewards)!r} names {len(set(self.rewards))} token"
                f"{'' if self.rewards else 's'}; at least two are needed, the best first, as in '+ -'"
            )


@dataclass(frozen=True)
class Solution:
    """The text before, between and after the placeholders, and the reward at each."""

    parts: tuple[str, ...]
    rewards: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ProcessRewardJob(Job):
    """Solutions: the ids of the whole text, and labels at its placeholders."""

    marks: Marks
    seq_length: int | None = None

    outputs: ClassVar = INSTRUCTION
    beside: ClassVar[str] = PACKED

    def described(self) -> dict[str, Any]:
        placeholder, rewards = token_ids(self.marks, self.tokenizer)
        return {
            "kind": "process_reward",
            "placeholder": placeholder,
            "rewards": list(rewards.values()),
            "seq_length": self.seq_length,
        }

    def _encode(self, chunk: Chunk, tokenizer: Tokenizer) -> Encoded:
        rows, faults = Rows(chunk, self.sources), []
        placeholder, rewards = token_ids(self.marks, self.tokenizer)
        ids: list[int] = []
        labels: list[int] = []
        lengths, places = [], []
        marked = partial(_labelled, tokenizer, self.marks.placeholder, placeholder, rewards, self.seq_length)
        for place, solution, labelled in self._encoded(rows, faults, marked):
            if not places:
                self._proven(tokenizer, solution.parts[0])
            ids += labelled.ids
            labels += labelled.labels
            lengths.append(len(labelled.ids))
            places.append(place)
        arrays = {
            "input_ids": np.array(ids, self.dtype),
            "attention_mask": np.ones(len(ids), self.dtype),
            "labels": np.array(labels, self.dtype),
        }
        return Encoded(arrays, np.array(lengths, np.int32), places, faults, rows.lines)


def token_ids(marks: Marks, tokenizer: Tokenizer) -> tuple[int, dict[str, int]]:
    """Return the ids of the placeholder and of the rewards; each must be one token."""
    ids = []
    for option, text in [("--placeholder", marks.placeholder), *(("--reward-tokens", text) for text in marks.rewards)]:
        encoded = tokenizer.encode(text)
        if len(encoded) != 1:
            raise InputError(
                f"{option}: {text!r} is {len(encoded)} tokens for the tokenizer in {tokenizer.folder}, and must be one"
            )
        ids += encoded
    if len(set(ids)) != len(ids):
        raise InputError("--placeholder, --reward-tokens: they must be different tokens")
    return ids[0], dict(zip(marks.rewards, ids[1:], strict=True))


def _labelled(
    tokenizer: Tokenizer,
    text: str,
    placeholder: int,
    rewards: dict[str, int],
    seq_length: int | None,
    solution: Solution,
) -> Labelled:
    """The ids of a whole text if each of its placeholders is the one token; else those of its parts, around them."""
    ids = tokenizer.encode(text.join(solution.parts))
    if ids.count(placeholder) != len(solution.rewards):
        ids = tokenizer.encode(solution.parts[0])
        for part in solution.parts[1:]:
            ids += [placeholder, *tokenizer.encode(part)]
    check_length(len(ids), seq_length)
    worth = iter(solution.rewards)
    return Labelled(ids, [rewards[next(worth)] if id == placeholder else IGNORED for id in ids])


def _cut(record: Record, keys: Keys, marks: Marks) -> tuple[str, ...]:
    """The parts of an input around its placeholders."""
    text = string(record, keys["input"])
    if not text.strip():
        raise ValueError("empty text")
    parts = tuple(text.split(marks.placeholder))
    if len(parts) == 1:
        raise ValueError(f"no step: {keys['input']} holds no {marks.placeholder}")
    return parts


def _placeholder(marks: Marks, record: Record, keys: Keys) -> Solution:
    parts = _cut(record, keys, marks)
    values = record[keys["value"]]
    if not isinstance(values, list):
        raise ValueError(f"{keys['value']} is {kind_of(values)}, not a list")
    if len(values) != len(parts) - 1:
        raise ValueError(f"not a value for every placeholder: {len(values)} for {len(parts) - 1}")
    for value in values:
        if value not in marks.rewards:
            raise ValueError(f"unknown reward: {value!r} is not one of {' '.join(marks.rewards)}")
    return Solution(parts, tuple(values))


def _math_shepherd(marks: Marks, record: Record, keys: Keys) -> Solution:
    parts = _cut(record, keys, marks)
    label, at = string(record, keys["label"]), 0
    rewards = []
    for i, part in enumerate(parts):
        found = label.startswith(part, at)
        at += len(part)
        if i < len(parts) - 1:
            reward = next((reward for reward in marks.rewards if label.startswith(reward, at)), None)
            found = found and reward is not None
            rewards.append(reward or "")
            at += len(reward or "")
        elif at != len(label):
            found = False
        if not found:
            raise ValueError(f"{keys['label']} is not {keys['input']} with a reward in the place of every placeholder")
    return Solution(parts, tuple(rewards))


def _stepwise(marks: Marks, record: Record, keys: Keys) -> Solution:
    prompt, steps, good = string(record, keys["prompt"]), record[keys["completions"]], record[keys["labels"]]
    _check_steps(prompt, steps, keys["completions"], marks)
    if not isinstance(good, list) or not all(isinstance(value, bool) for value in good):
        raise ValueError(f"{keys['labels']} is not a list of true and false")
    if len(steps) != len(good):
        raise ValueError(f"not a label for every step: {len(good)} for {len(steps)}")
    return _stepped(marks, prompt, steps, good)


def _prmbench(marks: Marks, record: Record, keys: Keys) -> Solution:
    """The solution of PRMBench into which errors were put, told by the numbers of its bad steps."""
    prompt, steps, errors = string(record, keys["prompt"]), record[keys["steps"]], record[keys["errors"]]
    _check_steps(prompt, steps, keys["steps"], marks)
    if not isinstance(errors, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in errors):
        raise ValueError(f"{keys['errors']} is not a list of numbers")
    beyond = [n for n in errors if not 1 <= n <= len(steps)]
    if beyond:
        raise ValueError(f"{keys['errors']} names a step that is not there: {beyond[0]} of {len(steps)}")
    return _stepped(marks, prompt, steps, [number not in errors for number in range(1, len(steps) + 1)])


def _check_steps(prompt: str, steps: Any, key: str, marks: Marks) -> None:
    """Refuse a question and its steps that are not texts, or that hold the placeholder."""
    if not prompt.strip():
        raise ValueError("empty question")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise ValueError(f"{key} is not a list of texts")
    if not steps or not all(step.strip() for step in steps):
        raise ValueError("empty step")
    if any(marks.placeholder in text for text in (prompt, *steps)):
        raise ValueError(f"a text that holds the placeholder {marks.placeholder} itself")


def _stepped(marks: Marks, prompt: str, steps: list[str], good: list[bool]) -> Solution:
    """A step a line, and a blank before the placeholder, as Math-Shepherd has it."""
    parts = [f"{prompt}\n{steps[0]} ", *(f"\n{step} " for step in steps[1:]), ""]
    return Solution(tuple(parts), tuple(marks.rewards[0] if value else marks.rewards[-1] for value in good))


def process_rewards(marks: Marks) -> dict[str, Format]:
    """Return the formats of solutions with these marks."""
    return {
        "placeholder": Format(
            "placeholder", {"input": "input", "value": "value"}, ("input", "value"), partial(_placeholder, marks)
        ),
        "math-shepherd": Format(
            "math-shepherd", {"input": "input", "label": "label"}, ("input", "label"), partial(_math_shepherd, marks)
        ),
        "stepwise": Format(
            "stepwise",
            {"prompt": "prompt", "completions": "completions", "labels": "labels"},
            ("prompt", "completions", "labels"),
            partial(_stepwise, marks),
        ),
        "prmbench": Format(
            "prmbench",
            {"prompt": "modified_question", "steps": "modified_process", "errors": "error_steps"},
            ("prompt", "steps", "errors"),
            partial(_prmbench, marks),
        ),
    }
