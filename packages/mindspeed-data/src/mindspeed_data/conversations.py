"""Rows of conversations: alpaca, ShareGPT and OpenAI's messages become one thing.

A row that is no conversation of questions and answers raises ValueError with the reason; nothing of it is guessed or left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_core.conversation import ANSWERS, Message, split
from mindspeed_data.formats import Format, Keys, Record, kind_of, string


@dataclass(frozen=True)
class Conversation:
    """Messages that alternate question and answer, the system text before them, and the tools that answers may call."""

    messages: tuple[Message, ...]
    system: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None


# --------------------------------------------------------------------------------------------------------- alpaca


def alpaca_question(record: Record, keys: Keys) -> Conversation:
    """The history and the question of a row of alpaca."""
    question = "\n".join(part for part in (string(record, keys["prompt"]), string(record, keys["query"])) if part)
    if not question.strip():
        raise ValueError("empty question")
    messages: list[Message] = []
    before = record.get(keys["history"]) or ()
    if not isinstance(before, Sequence) or isinstance(before, str):
        raise ValueError(f"{keys['history']} is not a list of [question, answer]")
    for turn in before:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise ValueError(f"{keys['history']} is not a list of [question, answer]")
        if not all(text.strip() for text in turn):
            raise ValueError(f"empty text in {keys['history']}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages.append({"role": "user", "content": question})
    return Conversation(tuple(messages), string(record, keys["system"]) or None)


def alpaca_answer(record: Record, key: str) -> Message:
    """An answer that is a text of its own."""
    text = string(record, key)
    if not text.strip():
        raise ValueError("empty answer")
    return {"role": "assistant", "content": text}


def _alpaca(record: Record, keys: Keys) -> Conversation:
    asked = alpaca_question(record, keys)
    return Conversation((*asked.messages, alpaca_answer(record, keys["response"])), asked.system)


# ---------------------------------------------------------------------------------------------- lists of messages


def listed(record: Record, keys: Keys) -> Conversation:
    """The conversation of a row with a list of messages."""
    rows = record[keys["messages"]]
    if not isinstance(rows, list):
        raise ValueError(f"{keys['messages']} is {kind_of(rows)}, not a list")
    messages = [message(row, keys, f"message {number}") for number, row in enumerate(rows, 1)]
    system, messages = split(messages, string(record, keys["system"]) or None)
    return Conversation(tuple(messages), system, _tools(record, keys["tools"]))


def message(row: Any, keys: Keys, place: str) -> Message:
    """One message, whose role and content are called as the keys say."""
    if not isinstance(row, Mapping):
        raise ValueError(f"not an object: {place} is {kind_of(row)}")
    role_key, content_key = keys["role_tag"], keys["content_tag"]
    calling = [keys[tag] for tag in ("calls_tag", "call_tag") if tag in keys and row.get(keys[tag])]
    for key in (role_key, content_key):
        if key not in row and not (key == content_key and calling):
            raise ValueError(f"a message without {key}: {place}")
    names = {keys[f"{role}_tag"]: role for role in ("system", "user", "assistant", "observation", "function")}
    if "call_tag" in keys:
        names.setdefault("function", "observation")  # who answered the only call of a message
    role = names.get(row[role_key]) if isinstance(row[role_key], str) else None
    if role is None:
        raise ValueError(f"unknown role: {place} is from {row[role_key]!r}, not from {', '.join(names)}")
    content, thought = string(row, content_key), _thought(row, role, keys, place)
    if calling:
        if role != "assistant":
            raise ValueError(f"wrong role: {place} calls functions and is from {row[role_key]}")
        return {"role": "function", "content": content, **thought, "calls": _openai_calls(row, keys, calling, place)}
    if role == "function":
        before, mark, text = content.rpartition("</think>")
        return {"role": role, "content": before + mark, **thought, "calls": _calls(text, place)}
    if not content.strip() and role != "observation":  # a tool may have nothing to say
        kind = {"user": "question", "assistant": "answer"}.get(role, f"{role} text")
        raise ValueError(f"empty {kind}: {place}")
    return {"role": role, "content": content, **thought}


def _thought(row: Mapping[str, Any], role: str, keys: Keys, place: str) -> dict[str, str]:
    """The thought that stands beside the content of an answer."""
    text = string(row, keys["thought_tag"]) if "thought_tag" in keys else ""
    if not text.strip():
        return {}
    if role not in ANSWERS:
        raise ValueError(f"wrong role: {place} has {keys['thought_tag']} and is from {row[keys['role_tag']]}")
    return {"thought": text}


def _openai_calls(row: Mapping[str, Any], keys: Keys, calling: list[str], place: str) -> list[dict[str, Any]]:
    """The calls of a message, a list of them or the only one, as it was written before there were several."""
    if len(calling) > 1:
        raise ValueError(f"calls twice: {place} has {' and '.join(calling)}")
    (key,), calls = calling, row[calling[0]]
    if key == keys.get("call_tag"):
        calls = [{"function": calls}]
    if not isinstance(calls, list):
        raise ValueError(f"{key} is {kind_of(calls)}, not a list: {place}")
    return [_openai_call(call, place) for call in calls]


def _calls(text: str, place: str) -> list[dict[str, Any]]:
    """The calls in a text of JSON, an object or a list of them."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a function call that is not JSON: {place}") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= set(call) for call in calls):
        raise ValueError(f"a function call without name and arguments: {place}")
    return [_call(call["name"], call["arguments"], place) for call in calls]


def _openai_call(call: Any, place: str) -> dict[str, Any]:
    """A call as OpenAI writes it: its arguments are JSON within the JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not {"name", "arguments"} <= set(function):
        raise ValueError(f"a function call without name and arguments: {place}")
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a function call that is not JSON: {place}") from error
    return _call(function["name"], arguments, place)


def _call(name: Any, arguments: Any, place: str) -> dict[str, Any]:
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ValueError(f"a function call whose arguments are no object: {place}")
    return {"name": name, "arguments": arguments}


def _tools(record: Record, key: str) -> tuple[dict[str, Any], ...] | None:
    """The tools of a row, a list or a list written as JSON; none where there are none."""
    tools = record.get(key)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key} is not JSON") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{key} is not a list of objects")
    plain = tuple(tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools)
    if not all(isinstance(tool.get("name"), str) for tool in plain):
        raise ValueError(f"{key}: a tool without a name")
    return plain


def _conversation(record: Record, keys: Keys) -> Conversation:
    conversation = listed(record, keys)
    if conversation.messages[-1]["role"] not in ANSWERS:
        raise ValueError("no answer to the last question")
    return conversation


def answer(row: Any, keys: Keys, place: str) -> Message:
    """A message that must be an answer."""
    read = message(row, keys, place)
    if read["role"] not in ANSWERS:
        raise ValueError(f"wrong role: {place} is from {row[keys['role_tag']]}, who asks")
    return read


ALPACA_KEYS = {"prompt": "instruction", "query": "input", "system": "system", "history": "history"}
LIST_KEYS = {"system": "system", "tools": "tools"}
SHAREGPT_KEYS = {
    "messages": "conversations",
    **LIST_KEYS,
    "role_tag": "from",
    "content_tag": "value",
    "system_tag": "system",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
}
OPENAI_KEYS = {
    "messages": "messages",
    **LIST_KEYS,
    "role_tag": "role",
    "content_tag": "content",
    "system_tag": "system",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "calls_tag": "tool_calls",
    "call_tag": "function_call",
    "thought_tag": "reasoning_content",
}
CONVERSATIONS = {
    "alpaca": Format("alpaca", {**ALPACA_KEYS, "response": "output"}, ("prompt", "response"), _alpaca),
    "sharegpt": Format("sharegpt", SHAREGPT_KEYS, ("messages",), _conversation),
    "openai": Format("openai", OPENAI_KEYS, ("messages",), _conversation),
}
