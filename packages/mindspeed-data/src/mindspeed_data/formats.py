"""What a row means. Every format is a table of keys and a function from a record to a sample; here is that of plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_core.errors import InputError

Record = Mapping[str, Any]
Keys = Mapping[str, str]  # our name -> the name in the file


@dataclass(frozen=True)
class Format:
    """A kind of row: its keys, and how it is read. `read` raises ValueError with the reason for a row it leaves out."""

    name: str
    keys: Keys  # unless --map-keys says another
    required: tuple[str, ...]  # of our names
    read: Callable[[Record, Keys], Any]

    def mapped(self, given: Mapping[str, str]) -> dict[str, str]:
        """Return the keys with some of them named otherwise."""
        unknown = sorted(set(given) - set(self.keys))
        if unknown:
            raise InputError(
                f"--map-keys: format {self.name} has no {', '.join(unknown)}; it has {', '.join(self.keys)}"
            )
        return {**self.keys, **given}

    def needed(self, keys: Keys) -> list[str]:
        """Return the required keys as they are named in the file."""
        return [keys[name] for name in self.required]

    def missing(self, record: Record, keys: Keys) -> list[str]:
        """Return those of them that a record does not have."""
        return [key for key in self.needed(keys) if key not in record]


def _text(record: Record, keys: Keys) -> str:
    text = string(record, keys["text"])
    if not text or text.isspace():
        raise ValueError("empty text")
    return text


def string(record: Record, key: str) -> str:
    """Return a value that must be text; null and absent are the empty text."""
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{key} is {kind_of(value)}, not a text")
    return value


def kind_of(value: Any) -> str:
    """Return what a value of JSON is called."""
    names = {type(None): "null", str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


TEXT = Format("text", {"text": "text"}, ("text",), _text)
