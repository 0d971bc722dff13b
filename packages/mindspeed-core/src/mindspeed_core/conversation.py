"""Conversations as all templates see them, and which of their tokens are learned.

A message has a role and a content. Questions are from "user" or, as the answer of a tool, from "observation"; answers from
"assistant" or, as a call of tools, from "function". They alternate, and a question comes first; where several tools were
called, their answers are several messages in a row and one question. A message of calls has them in "calls", a list of
{"name": text, "arguments": object}, and in its content what is said before them, mostly nothing. An answer may have a "thought"
that stands beside its content instead of within it; how the two are put together a template knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

IGNORED = -100  # the label of what is not learned
QUESTIONS, ANSWERS = ("user", "observation"), ("assistant", "function")
FOLLOWING = {  # role -> who may speak after it, and at the beginning
    None: ("user",),
    "user": ANSWERS,
    "observation": (*ANSWERS, "observation"),
    "assistant": QUESTIONS,
    "function": QUESTIONS,
}

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]  # {"name": text, "description": text, "parameters": JSON schema} each
Turn = tuple[list[int], list[int]]  # ids of a question, ids of its answer
Learn = Literal["answers", "last", "all"]


class Round(NamedTuple):
    """A question, or the answers of several tools, and the answer to it."""

    asked: list[Message]
    answer: Message


class Labelled(NamedTuple):
    """The ids of a conversation, and beside each the id that is learned in its place, or IGNORED. Not shifted."""

    ids: list[int]
    labels: list[int]


def split(messages: Sequence[Message], system: str | None = None) -> tuple[str | None, list[Message]]:
    """Return the system text and the other messages; ValueError for messages that do not alternate, or for a system message
    beside another system text."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    own = messages[0]["content"] if first else None
    if system and own and system != own:
        raise ValueError("two system texts: that of the conversation is not that of its first message")
    system = system or own or None
    if len(messages) == first:
        raise ValueError("a conversation without a question")
    previous = None
    for place, message in enumerate(messages[first:], first + 1):
        role, expected = message["role"], FOLLOWING[previous]
        if role not in expected:
            raise ValueError(f"wrong role: message {place} is from {role}, not from {' or '.join(expected)}")
        previous = role
    return system, list(messages[first:])


def rounds(messages: Sequence[Message]) -> tuple[list[Round], list[Message]]:
    """Return the rounds of messages without a system text, and what is asked at their end and not answered yet."""
    found: list[Round] = []
    asked: list[Message] = []
    for message in messages:
        if message["role"] in QUESTIONS:
            asked.append(message)
        else:
            found.append(Round(asked, message))
            asked = []
    return found, asked


def check_answered(messages: Sequence[Message]) -> None:
    """Refuse a conversation whose last message is not an answer."""
    if messages[-1]["role"] not in ANSWERS:
        raise ValueError("the last message is not an answer")


def check_asked(messages: Sequence[Message]) -> None:
    """Refuse a conversation whose last message is not a question."""
    if messages[-1]["role"] not in QUESTIONS:
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
