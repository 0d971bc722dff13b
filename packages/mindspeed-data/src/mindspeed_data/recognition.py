"""Which command and format a row is for: said of rows that lack a key of the format they were taken for."""

from __future__ import annotations

from collections.abc import Iterator

from mindspeed_data.conversations import CONVERSATIONS
from mindspeed_data.formats import Format, Record
from mindspeed_data.pairwise import PAIRS
from mindspeed_data.process_reward import Marks, process_rewards

COMMANDS = {"sft": CONVERSATIONS, "pairwise": PAIRS, "prm": process_rewards(Marks())}
KINDS = {"instruction": "sft", "pairwise": "pairwise", "process_reward": "prm"}  # of what a job writes -> its command


def recognised(record: Record, kind: str) -> tuple[str, str] | None:
    """Return the command and the format that look most like a row; of two alike, that of the kind which is written."""
    found = [(command, format) for command, formats in COMMANDS.items() for format in formats.values()]
    fitting = [(command, format) for command, format in found if _fits(record, format)]
    # a pair is a conversation with more keys, so more keys are the better sign
    ranked = sorted(fitting, key=lambda each: (-len(each[1].required), each[0] != KINDS.get(kind)))
    return next(((command, format.name) for command, format in ranked), None)


def hint(record: Record, kind: str, name: str) -> str | None:
    """Return what to do about a row that lacks keys of the format of that name; None where it looks like no other."""
    seen = recognised(record, kind)
    if seen is None or seen == (KINDS.get(kind), name):
        return None
    command, format = seen
    if command == KINDS.get(kind):
        return f"this looks like another format: add --format {format}"
    return f"this looks like rows of another command: use mindspeed-data {command} --format {format}"


def _fits(record: Record, format: Format) -> bool:
    if format.missing(record, format.keys):
        return False
    return "messages" not in format.keys or format.keys["role_tag"] in set(_keys_of_first(record, format))


def _keys_of_first(record: Record, format: Format) -> Iterator[str]:
    """The keys of the first message of a row."""
    messages = record[format.keys["messages"]]
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        yield from messages[0]
