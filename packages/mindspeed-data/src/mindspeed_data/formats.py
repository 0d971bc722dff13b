"""What a row means: a text, or a conversation. Every format is a function from a record to a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_core.errors import InputError

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages that alternate user and assistant, and the system text before them."""

    messages: tuple[dict[str, str], ...]
    system: str | None = None


@dataclass(frozen=True)
class Format:
    """A kind of row: its keys, and how it is read. `read` raises ValueError with the reason for a row it leaves out."""

    name: str
    keys: Mapping[str, str]  # our name -> the name in the file, unless --map-keys says another
    required: tuple[str, ...]  # of our names
    read: Callable[[Record, Mapping[str, str]], Any]

    def mapped(self, given: Mapping[str, str]) -> dict[str, str]:
        """Return the keys with some of them named otherwise."""
        unknown = sorted(set(given) - set(self.keys))
        if unknown:
            raise InputError(
                f"--map-keys: format {self.name} has no {', '.join(unknown)}; it has {', '.join(self.keys)}"
            )
        return {**self.keys, **given}

    def missing(self, record: Record, keys: Mapping[str, str]) -> list[str]:
        """Return the required keys, as named in the file, that a record does not have."""
        return [keys[name] for name in self.required if keys[name] not in record]


def _text(record: Record, keys: Mapping[str, str]) -> str:
    text = _string(record, keys["text"])
    if not text.strip():
        raise ValueError("empty text")
    return text


def _alpaca(record: Record, keys: Mapping[str, str]) -> Conversation:
    question = "\n".join(part for part in (_string(record, keys["prompt"]), _string(record, keys["query"])) if part)
    answer = _string(record, keys["response"])
    if not question.strip():
        raise ValueError("empty question")
    if not answer.strip():
        raise ValueError("empty answer")
    messages = []
    for before in record.get(keys["history"]) or ():
        if not (isinstance(before, list | tuple) and len(before) == 2 and all(isinstance(t, str) for t in before)):
            raise ValueError(f"{keys['history']} is not a list of [question, answer]")
        messages += _turn(*before)
    return Conversation((*messages, *_turn(question, answer)), _string(record, keys["system"]) or None)


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _string(record: Record, key: str) -> str:
    """A value that must be text; null and absent are the empty text."""
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{key} is {_KINDS.get(type(value), type(value).__name__)}, not a text")
    return value


_KINDS = {int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}

TEXT = Format("text", {"text": "text"}, ("text",), _text)
ALPACA = Format(
    "alpaca",
    {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"},
    ("prompt", "response"),
    _alpaca,
)
INSTRUCTION_FORMATS = {format.name: format for format in (ALPACA,)}
