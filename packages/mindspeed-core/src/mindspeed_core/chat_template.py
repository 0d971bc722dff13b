"""The chat template that comes with a tokenizer, rendered by transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mindspeed_core.conversation import (
    ANSWERS,
    Labelled,
    Learn,
    Message,
    Tools,
    Turn,
    check_answered,
    check_asked,
    labelled,
    split,
)
from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import Tokenizer

ANOTHER = "choose a template by name"
THOUGHT = "reasoning_content"  # what chat templates call a thought that stands beside its answer


@dataclass(frozen=True)
class TokenizerTemplate:
    """A conversation is rendered and tokenised as a whole, so its ids are those of `apply_chat_template`; an answer is the
    stretch from where its prompt ends to its text's end and the EOS after it.
    """

    others: tuple[str, ...] = ()  # names of templates that may be chosen instead

    name: ClassVar[str] = "tokenizer"

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer without a chat template."""
        if not tokenizer.hf.chat_template:
            raise InputError(
                f"{tokenizer.folder}: this tokenizer brings no chat template; choose one of {', '.join(self.others)}"
            )

    def eos(self, tokenizer: Tokenizer) -> int | None:
        """The token at the end of every answer."""
        return tokenizer.eos

    def described(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return what is noted beside data that was written with this template."""
        return {"template": self.name}

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        system: str | None = None,
        tools: Tools | None = None,
        *,
        learn: Learn = "answers",
    ) -> Labelled:
        """Return the ids and labels of a conversation; ValueError where the template rewrites what came before."""
        return labelled(self.turns(tokenizer, messages, system, tools, last=learn != "answers"), learn=learn)

    def turns(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        system: str | None = None,
        tools: Tools | None = None,
        *,
        last: bool = False,
    ) -> list[Turn]:
        """Return the ids of each question and its answer; `last`: of the last answer alone, and of all that is before it."""
        system, messages = split(messages, system)
        check_answered(messages)
        whole = self._render(tokenizer, messages, system, tools)
        answers = [i for i, message in enumerate(messages) if message["role"] in ANSWERS]
        spans = [
            (
                start := self._start(tokenizer, messages[:i], system, tools, whole),
                _end(whole, start, messages[i], tokenizer),
            )
            for i in (answers[-1:] if last else answers)
        ]
        encoding = tokenizer.backend.encode(whole, add_special_tokens=False)
        turns: list[Turn] = []
        question: list[int] = []
        answer: list[int] = []
        remaining = iter(spans)
        start, end = next(remaining)
        for id, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True):
            if begin >= end and answer:
                turns.append((question, answer))
                question, answer = [], []
                start, end = next(remaining, (len(whole) + 1, len(whole) + 1))
            (answer if start <= begin < end else question).append(id)
        if answer:
            turns.append((question, answer))
        # What stands after the last answer (a newline) is neither asked nor learned.
        return turns

    def prompt(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        system: str | None = None,
        tools: Tools | None = None,
    ) -> list[int]:
        """Return the ids after which the model writes the next answer; the last message is the question."""
        self.check(tokenizer)
        system, messages = split(messages, system)
        check_asked(messages)
        return tokenizer.encode(self._render(tokenizer, messages, system, tools, prompt=True))

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The ids that end a generated answer."""
        return frozenset() if tokenizer.eos is None else frozenset({tokenizer.eos})

    def _start(
        self, tokenizer: Tokenizer, before: Sequence[Message], system: str | None, tools: Tools | None, whole: str
    ) -> int:
        """Where in the whole text the answer to some messages begins."""
        prompt = self._render(tokenizer, before, system, tools, prompt=True)
        if not whole.startswith(prompt):
            raise ValueError(f"the tokenizer's chat template rewrites earlier turns; {ANOTHER}")
        return len(prompt)

    def _render(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        system: str | None,
        tools: Tools | None,
        *,
        prompt: bool = False,
    ) -> str:
        thoughts = any(message.get("thought") for message in messages)
        if thoughts and THOUGHT not in str(tokenizer.hf.chat_template):  # it would leave them out and say nothing
            raise ValueError(f"the tokenizer's chat template writes no {THOUGHT}; {ANOTHER}")
        written = [{"role": "system", "content": system}] if system else []
        written += map(_openai, messages)
        functions = [{"type": "function", "function": tool} for tool in tools] if tools else None
        try:
            return tokenizer.hf.apply_chat_template(
                written, tools=functions, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:
            # Templates refuse what they do not know (a system message, say) by raising.
            raise ValueError(f"the tokenizer's chat template refuses this conversation: {error}") from error


def _openai(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    role, content = message["role"], message["content"]
    thought = {THOUGHT: message["thought"]} if message.get("thought") else {}
    if role == "function":
        calls = [{"type": "function", "function": call} for call in message["calls"]]
        return {"role": "assistant", "content": content, **thought, "tool_calls": calls}
    return {"role": "tool" if role == "observation" else role, "content": content, **thought}


def _end(whole: str, start: int, message: Message, tokenizer: Tokenizer) -> int:
    """Where an answer that is written somewhere after `start` ends, with its EOS. Templates trim it, and put blanks
    before the EOS, a block for thoughts before the answer, or marks around a call."""
    text = message["content"].strip()
    if message["role"] == "function":
        text = json.dumps(message["calls"][-1]["arguments"], ensure_ascii=False)
    at = whole.find(text, start)
    if at < 0:
        raise ValueError(f"the tokenizer's chat template changes the answers; {ANOTHER}")
    first, eos = at + len(text), tokenizer.eos_token
    if eos and message["role"] == "function":
        closing = whole.find(eos, first)
        return first if closing < 0 else closing + len(eos)
    while eos and at >= 0:
        end = at + len(text)
        rest = whole[end:]
        if rest.lstrip().startswith(eos):
            return end + len(rest) - len(rest.lstrip()) + len(eos)
        at = whole.find(text, at + 1)
    return first
