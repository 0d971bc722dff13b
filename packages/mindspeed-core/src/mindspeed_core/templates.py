"""Chat templates: messages to ids, the same for training data, training, evaluation and chat.

A template answers three questions: how a conversation is cut into what is given and what is learned (`encode`), what is
fed to the model to get an answer (`prompt`), and which tokens end that answer (`stop_ids`). `TEMPLATES` come from
`templates.yaml`; `template("tokenizer")` and `template(None)` are the chat template that the tokenizer itself brings.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml

from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import Tokenizer

Message = Mapping[str, str]  # {"role": "user" | "assistant" | "system", "content": text}
Turn = tuple[list[int], list[int]]  # ids that are given, ids that are learned


@dataclass(frozen=True)
class Special:
    """A slot that is one token of the tokenizer: "bos" or "eos"."""

    name: str


Slot = str | Special


@dataclass(frozen=True, kw_only=True)
class Template:
    """One entry of templates.yaml. Every slot is tokenised on its own: where slots meet, no token spans the seam."""

    name: str
    user: tuple[Slot, ...]
    assistant: tuple[Slot, ...] = ("{{content}}", Special("eos"))
    system: tuple[Slot, ...] = ("{{content}}",)
    prefix: tuple[Slot, ...] = ()
    separator: tuple[Slot, ...] = ()
    default_system: str | None = None
    stop_words: tuple[str, ...] = ()
    replace_eos: bool = False
    system_in_user: bool = False

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer that has no token for the end of this template's answers."""
        if self.replace_eos and tokenizer.id_of(self.stop_words[0]) is None:
            raise InputError(
                f"template {self.name} ends every answer with {self.stop_words[0]}, which the tokenizer in "
                f"{tokenizer.folder} does not have; choose another template ({', '.join(sorted(TEMPLATES))})"
            )
        if Special("eos") in self.assistant and self.eos(tokenizer) is None:
            raise InputError(
                f"template {self.name} ends every answer with the tokenizer's EOS, and the tokenizer in "
                f"{tokenizer.folder} names none; set eos_token in its tokenizer_config.json"
            )

    def eos(self, tokenizer: Tokenizer) -> int | None:
        """The token at the end of every answer."""
        return tokenizer.id_of(self.stop_words[0]) if self.replace_eos else tokenizer.eos

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], system: str | None = None) -> list[Turn]:
        """Return the ids of each question and its answer; ValueError for messages that do not alternate."""
        system, turns = conversation(messages, system)
        if len(turns) % 2:
            raise ValueError("the last message is not an answer")
        return [
            (self._question(tokenizer, turns[i], system, first=i == 0), self._answer(tokenizer, turns[i + 1]))
            for i in range(0, len(turns), 2)
        ]

    def prompt(self, tokenizer: Tokenizer, messages: Sequence[Message], system: str | None = None) -> list[int]:
        """Return the ids after which the model writes the next answer; the last message is the question."""
        system, turns = conversation(messages, system)
        if len(turns) % 2 == 0:
            raise ValueError("the last message is not a question")
        ids = []
        for i, content in enumerate(turns):
            if i % 2 == 0:
                ids += self._question(tokenizer, content, system, first=i == 0)
            else:
                ids += self._answer(tokenizer, content)
        return ids

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The ids that end a generated answer."""
        ids = {self.eos(tokenizer), tokenizer.eos, *map(tokenizer.id_of, self.stop_words)}
        return frozenset(i for i in ids if i is not None)

    def _question(self, tokenizer: Tokenizer, content: str, system: str | None, *, first: bool) -> list[int]:
        if not first:
            return self._ids(tokenizer, self.separator) + self._ids(tokenizer, self.user, content)
        system = system or self.default_system
        ids = self._ids(tokenizer, self.prefix)
        if system and self.system_in_user:
            written = "".join(slot.replace("{{content}}", system, 1) for slot in self.system if isinstance(slot, str))
            return ids + self._ids(tokenizer, self.user, written + content)
        if system:
            ids += self._ids(tokenizer, self.system, system)
        return ids + self._ids(tokenizer, self.user, content)

    def _answer(self, tokenizer: Tokenizer, content: str) -> list[int]:
        return self._ids(tokenizer, self.assistant, content)

    def _ids(self, tokenizer: Tokenizer, slots: Sequence[Slot], content: str = "") -> list[int]:
        ids = []
        for slot in slots:
            if isinstance(slot, str):
                ids += tokenizer.encode(slot.replace("{{content}}", content, 1))
            else:
                special = self.eos(tokenizer) if slot.name == "eos" else tokenizer.bos
                ids += [] if special is None else [special]
        return ids


class TokenizerTemplate:
    """The chat template that comes with the tokenizer, rendered by transformers.

    A conversation is rendered and tokenised as a whole, so its ids are those of `apply_chat_template`; an answer is the
    stretch from where its prompt ends to its text's end and the EOS after it.
    """

    name = "tokenizer"

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer without a chat template."""
        if not tokenizer.hf.chat_template:
            raise InputError(
                f"{tokenizer.folder}: this tokenizer brings no chat template; choose one of {', '.join(sorted(TEMPLATES))}"
            )

    def eos(self, tokenizer: Tokenizer) -> int | None:
        """The token at the end of every answer."""
        return tokenizer.eos

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], system: str | None = None) -> list[Turn]:
        """Return the ids of each question and its answer; ValueError where the template rewrites what came before."""
        system, turns = conversation(messages, system)
        if len(turns) % 2:
            raise ValueError("the last message is not an answer")
        messages = _messages(turns, system)
        whole = self._render(tokenizer, messages)
        spans = self._answers(tokenizer, messages, whole)
        encoding = tokenizer.backend.encode(whole, add_special_tokens=False)
        parts: list[Turn] = []
        source: list[int] = []
        target: list[int] = []
        remaining = iter(spans)
        start, end = next(remaining)
        for id, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True):
            if begin >= end and target:
                parts.append((source, target))
                source, target = [], []
                start, end = next(remaining, (len(whole) + 1, len(whole) + 1))
            (target if start <= begin < end else source).append(id)
        if target:
            parts.append((source, target))
        # What stands after the last answer (a newline) is neither asked nor learned.
        return parts

    def prompt(self, tokenizer: Tokenizer, messages: Sequence[Message], system: str | None = None) -> list[int]:
        """Return the ids after which the model writes the next answer; the last message is the question."""
        self.check(tokenizer)
        system, turns = conversation(messages, system)
        if len(turns) % 2 == 0:
            raise ValueError("the last message is not a question")
        return tokenizer.encode(self._render(tokenizer, _messages(turns, system), prompt=True))

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The ids that end a generated answer."""
        return frozenset() if tokenizer.eos is None else frozenset({tokenizer.eos})

    def _answers(self, tokenizer: Tokenizer, messages: list[dict[str, str]], whole: str) -> list[tuple[int, int]]:
        """Where in the whole text each answer stands."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(tokenizer, messages[:i], prompt=True)
            if not whole.startswith(before):
                raise ValueError("the tokenizer's chat template rewrites earlier turns; choose a template by name")
            spans.append(
                (len(before), _answer_end(whole, len(before), message["content"].strip(), tokenizer.eos_token))
            )
        return spans

    def _render(self, tokenizer: Tokenizer, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        try:
            return tokenizer.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:
            # Templates refuse what they do not know (a system message, say) by raising.
            raise ValueError(f"the tokenizer's chat template refuses this conversation: {error}") from error


def _answer_end(whole: str, start: int, content: str, eos: str | None) -> int:
    """Where an answer that is written somewhere after `start` ends, with its EOS. Templates trim it, and put blanks
    before the EOS or a block for thoughts before the answer."""
    first = at = whole.find(content, start)
    if at < 0:
        raise ValueError("the tokenizer's chat template changes the answers; choose a template by name")
    while eos and at >= 0:
        end = at + len(content)
        rest = whole[end:]
        if rest.lstrip().startswith(eos):
            return end + len(rest) - len(rest.lstrip()) + len(eos)
        at = whole.find(content, at + 1)
    return first + len(content)


def conversation(messages: Sequence[Message], system: str | None = None) -> tuple[str | None, list[str]]:
    """Return the system text and the contents of the other messages, which must alternate user, assistant, ..."""
    messages = list(messages)
    if messages and messages[0]["role"] == "system":
        system = system or messages[0]["content"]
        messages = messages[1:]
    if not messages:
        raise ValueError("a conversation without a question")
    for i, message in enumerate(messages):
        expected = "assistant" if i % 2 else "user"
        if message["role"] != expected:
            raise ValueError(f"message {i + 1} is from {message['role']}, not from {expected}")
    return system, [message["content"] for message in messages]


def _messages(turns: Sequence[str], system: str | None) -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(turns)]


def template(name: str | None) -> Template | TokenizerTemplate:
    """Return a template by name; None and "tokenizer" stand for the tokenizer's own."""
    if name is None or name == TokenizerTemplate.name:
        return TokenizerTemplate()
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"no template is called {name}: {', '.join(sorted(TEMPLATES))}, tokenizer{hint}")
    return TEMPLATES[name]


def _slot(value: Any) -> Slot:
    return value if isinstance(value, str) else Special(value["special"])


def _template(name: str, entry: Mapping[str, Any]) -> Template:
    slots = ("user", "assistant", "system", "prefix", "separator")
    fields: dict[str, Any] = {}
    for key, value in entry.items():
        fields[key] = tuple(map(_slot, value)) if key in slots else value
    fields["stop_words"] = tuple(entry.get("stop_words", ()))
    return Template(name=name, **fields)


TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        name: _template(name, entry)
        for name, entry in yaml.safe_load(files("mindspeed_core").joinpath("templates.yaml").read_text("utf-8")).items()
    }
)
