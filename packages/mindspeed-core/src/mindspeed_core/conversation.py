"""Conversations as all templates see them, and which of their tokens are learned.

A message has a role and a content. Questions are from "user" or, as the answer of a tool, from "observation"; answers from
"assistant" or, as a call of tools, from "function". They alternate, and a question comes first. A message of calls has them
in "calls", a list of {"name": text, "arguments": object}, and in its content what is said before them, mostly nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

IGNORED = -100  # the label of what is not learned
QUESTIONS, ANSWERS = ("user", "observation"), ("assistant", "function")

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]  # {"name": text, "description": text, "parameters": JSON schema} each
Turn = tuple[list[int], list[int]]  # ids of a question, ids of its answer
Learn = Literal["answers", "last", "all"]


class Labelled(NamedTuple):
    """The ids of a conversation, and beside each the id that is learned in its place, or IGNORED. Not shifted."""

    ids: list[int]
    labels: list[int]


def split(messages: Sequence[Message], system: str | None = None) -> tuple[str | None, list[Message]]:
    """Return the system text and the other messages; ValueError for messages that do not alternate."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    system = system or (messages[0]["content"] if first else None) or None
    if len(messages) == first:
        raise ValueError("a conversation without a question")
    for i, message in enumerate(messages[first:]):
        expected = ANSWERS if i % 2 else QUESTIONS if i else QUESTIONS[:1]
        if message["role"] not in expected:
            place, role = f"message {first + i + 1}", message["role"]
            raise ValueError(f"wrong role: {place} is from {role}, not from {' or '.join(expected)}")
    return system, list(messages[first:])


def check_answered(messages: Sequence[Message]) -> None:
    """Refuse a conversation whose last message is not an answer."""
    if len(messages) % 2:
        raise ValueError("the last message is not an answer")


def check_asked(messages: Sequence[Message]) -> None:
    """Refuse a conversation whose last message is not a question."""
    if len(messages) % 2 == 0:
        raise ValueError("the last message is not a question")


def labelled(turns: Sequence[Turn], *, learn: Learn = "answers", end: int | None = None) -> Labelled:
    """Put turns one after the other and say what is learned: every answer, the last one, or everything.

    `end` stands for an EOS that is not written between turns: the token after an answer is learned as if it were EOS, and
    EOS itself is written after the last answer alone.
    """
    ids: list[int] = []
    labels: list[int] = []
    for i, (question, answer) in enumerate(turns):
        ids += [*question, *answer]
        if learn == "all":
            labels += [*question, *answer]
            continue
        given = [IGNORED] * len(question)
        if end is not None and i and given and learn == "answers":
            given[0] = end
        labels += given
        labels += answer if learn == "answers" or i == len(turns) - 1 else [IGNORED] * len(answer)
    if end is not None:
        ids.append(end)
        labels.append(end)
    return Labelled(ids, labels)
