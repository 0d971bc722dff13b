"""Chat templates: messages to ids, the same for training data, training, evaluation and chat.

A template answers three questions: what the ids of a conversation are and which are learned (`encode`), what is fed to the
model to get an answer (`prompt`), and which tokens end that answer (`stop_ids`). `TEMPLATES` come from `templates.yaml`;
`template("tokenizer")` and `template(None)` are the chat template that the tokenizer itself brings.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from mindspeed_core.chat_template import TokenizerTemplate
from mindspeed_core.conversation import (
    Labelled,
    Learn,
    Message,
    Round,
    Tools,
    Turn,
    check_answered,
    check_asked,
    labelled,
    rounds,
    split,
)
from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class Special:
    """A slot that is one token of the tokenizer: "bos" or "eos"."""

    name: str


@dataclass(frozen=True)
class Token:
    """A slot that is one token, written out."""

    text: str


Slot = str | Special | Token
PLACE = re.compile(r"\{\{(\w+)\}\}")  # of a value within a slot of text
# What models know as one token, and what spelled out in several is noise to them. `[INST]` and `<用户>` are text to theirs, too.
MARK = re.compile(r"<[|｜][^|｜<>]+[|｜]>|<reserved_\d+>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>")


@dataclass(frozen=True)
class Thought:
    """How a model marks what it thinks before an answer, and how it writes that it did not think."""

    start: str
    end: str
    empty: str
    written: str  # with a place for the thought: what stands before the content of an answer that has one beside it
    in_history: bool = False  # earlier answers, whose thoughts are left out, have the empty one

    def within(self, text: str) -> bool:
        return self.start in text or self.end in text

    def removed(self, text: str) -> str:
        return re.sub(f"{re.escape(self.start)}.*?{re.escape(self.end)}", "", text, flags=re.DOTALL).lstrip("\n")

    def before(self, thought: str, text: str) -> str:
        """Return a thought and the text that follows it."""
        return "".join(_filled((self.written,), thought=thought.strip("\n"))) + text.lstrip("\n")


@dataclass(frozen=True)
class ToolFormat:
    """How tools and their calls are written, as Jinja templates."""

    tools: str  # of system and tools: what follows the system text
    calls: str | None = None  # of content and calls: an answer that calls tools


@dataclass(frozen=True, kw_only=True)
class Template:
    """One entry of templates.yaml. Every slot is tokenised on its own: where slots meet, no token spans the seam."""

    name: str
    user: tuple[Slot, ...]
    assistant: tuple[Slot, ...]
    function: tuple[Slot, ...]
    observation: tuple[Slot, ...]
    system: tuple[Slot, ...]
    prefix: tuple[Slot, ...]
    separator: tuple[Slot, ...]
    tools: ToolFormat | None
    next_observation: str | None = None  # between the answers of several tools; None: one at a time
    default_system: str | None = None
    stop_words: tuple[str, ...] = ()
    efficient_eos: bool = False
    replace_eos: bool = False
    system_in_user: bool = False
    thought: Thought | None = None
    thinking: bool | None = None  # thoughts stay; True: empty ones are learned, too; False: all are left out

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer that lacks a token of this template."""
        lacking = self.lacking(tokenizer)
        if lacking is None:
            return
        if lacking == "eos":
            raise InputError(
                f"template {self.name} ends every answer with the tokenizer's EOS, and the tokenizer in "
                f"{tokenizer.folder} names none; set eos_token in its tokenizer_config.json"
            )
        ends = self.replace_eos and lacking == self.stop_words[0]
        writes = f"ends every answer with {lacking}" if ends else f"writes {lacking} as one token"
        fitting = [name for name, other in sorted(TEMPLATES.items()) if other.lacking(tokenizer) is None]
        raise InputError(
            f"template {self.name} {writes}, which the tokenizer in {tokenizer.folder} does not have; name the tokenizer of a "
            f"model that knows this template, or choose one that fits this tokenizer: {', '.join(fitting)}"
        )

    def lacking(self, tokenizer: Tokenizer) -> str | None:
        """Return the first token of this template that a tokenizer does not have ("eos" for one that it does not name)."""
        for mark in self.marks:
            id = tokenizer.id_of(mark)
            if id is None or id not in tokenizer.encode(mark):  # in the vocabulary, but never the ids of a text
                return mark
        ends = self.efficient_eos or Special("eos") in self.assistant
        return "eos" if ends and self.eos(tokenizer) is None else None

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """What must be one token of the tokenizer, the end of answers first: what ends them, what slots name, and marks."""
        slots = (self.prefix, self.system, self.user, self.assistant, self.function, self.observation, self.separator)
        texts = [*(slot for slot in chain(*slots) if not isinstance(slot, Special)), self.next_observation or ""]
        if self.thought is not None:
            texts += [self.thought.start, self.thought.end, self.thought.empty]
        found = [[text.text] if isinstance(text, Token) else MARK.findall(text) for text in texts]
        return tuple(dict.fromkeys((*self.stop_words, *chain(*found))))

    def eos(self, tokenizer: Tokenizer) -> int | None:
        """The token at the end of every answer."""
        return tokenizer.id_of(self.stop_words[0]) if self.replace_eos else tokenizer.eos

    def described(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return what is noted beside data that was written with this template."""
        end = self.eos(tokenizer) if self.efficient_eos else None
        return {"template": self.name, "thinking": self.thinking, "end": end}

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        system: str | None = None,
        tools: Tools | None = None,
        *,
        learn: Learn = "answers",
    ) -> Labelled:
        """Return the ids and labels of a conversation; ValueError for one that this template cannot write.

        Where only the last answer is learned, the thoughts before earlier answers are left out, as they are in chat.
        """
        turns = self.turns(tokenizer, messages, system, tools, history=learn == "last")
        return labelled(turns, learn=learn, end=self.eos(tokenizer) if self.efficient_eos else None)

    def turns(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        system: str | None = None,
        tools: Tools | None = None,
        *,
        history: bool = False,
    ) -> list[Turn]:
        """Return the ids of each question and its answer; `history`: all but the last are what was said before."""
        system, messages = split(messages, system)
        check_answered(messages)
        found, _ = rounds(messages)
        current = _current(found)
        turns = []
        for i, (asked, given) in enumerate(found):
            question = self._question(tokenizer, i, asked, system, tools)
            if history and i < len(found) - 1:
                answer = self._past(tokenizer, given, current=i >= current)
            else:
                question, answer = self._answer(tokenizer, question, given)
            turns.append((question, answer))
        return turns

    def prompt(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        system: str | None = None,
        tools: Tools | None = None,
    ) -> list[int]:
        """Return the ids after which the model writes the next answer; the last message is the question."""
        system, messages = split(messages, system)
        check_asked(messages)
        found, pending = rounds(messages)
        current = len(found) if pending[0]["role"] == "user" else _current(found)
        ids = []
        for i, (asked, given) in enumerate(found):
            ids += self._question(tokenizer, i, asked, system, tools)
            ids += self._past(tokenizer, given, current=i >= current)
        ids += self._question(tokenizer, len(found), pending, system, tools)
        return ids + self._unthought(tokenizer) if self.thinking is False else ids

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The ids that end a generated answer."""
        ids = {self.eos(tokenizer), tokenizer.eos, *map(tokenizer.id_of, self.stop_words)}
        return frozenset(i for i in ids if i is not None)

    def _question(
        self, tokenizer: Tokenizer, i: int, asked: Sequence[Message], system: str | None, tools: Tools | None
    ) -> list[int]:
        """What is asked in round i, counted from 0, with all that stands before it."""
        slots = self.user if asked[0]["role"] == "user" else self.observation
        if len(asked) > 1 and self.next_observation is None:
            raise ValueError(f"template {self.name} writes one answer of a tool at a time")
        content, ids = (self.next_observation or "").join(message["content"] for message in asked), []
        if i:
            ids += self._ids(tokenizer, self.separator)
        else:
            ids += self._ids(tokenizer, self.prefix)
            system = system or self.default_system or ""
            system += self._listed(system, tools)
            if system and self.system_in_user:
                content = "".join(_filled(self.system, content=system)) + content
            elif system:
                ids += self._ids(tokenizer, self.system, content=system)
        return ids + self._ids(tokenizer, slots, content=content, idx=str(i + 1))

    def _answer(self, tokenizer: Tokenizer, question: list[int], message: Message) -> Turn:
        """A question and the answer that is learned, with the empty thought that it lacks."""
        message = self._thought_of(message, kept=self.thinking is not False)
        answer = self._written(tokenizer, message)
        if self.thought is None:
            return question, answer
        if self.thought.within(message["content"]):
            return question, answer
        if self.thinking:
            return question, self._unthought(tokenizer) + answer
        return question + self._unthought(tokenizer), answer

    def _past(self, tokenizer: Tokenizer, message: Message, *, current: bool) -> list[int]:
        """An answer given earlier. A thought of the current question stays, others are left out."""
        message = self._thought_of(message, kept=current and self.thinking is not False)
        thought = self.thought
        unthought = thought is not None and thought.in_history and not thought.within(message["content"])
        return (self._unthought(tokenizer) if unthought else []) + self._written(tokenizer, message)

    def _thought_of(self, message: Message, *, kept: bool) -> Message:
        """An answer whose thought stands within its content, or nowhere."""
        beside, content = message.get("thought", ""), message["content"]
        if self.thought is None:
            if beside:
                raise ValueError(f"template {self.name} writes no thoughts that stand beside an answer")
            return message
        if not kept:
            content = self.thought.removed(content)
        elif beside:
            content = self.thought.before(beside, content)
        return {**message, "content": content, "thought": ""}

    def _unthought(self, tokenizer: Tokenizer) -> list[int]:
        return [] if self.thought is None else tokenizer.encode(self.thought.empty)

    def _written(self, tokenizer: Tokenizer, message: Message) -> list[int]:
        if message["role"] != "function":
            return self._ids(tokenizer, self.assistant, content=message["content"])
        if self.tools is None:
            raise ValueError(f"template {self.name} writes no function calls")
        calls = message["calls"]
        if any(isinstance(slot, str) and "{{calls}}" in slot for slot in self.function):
            assert self.tools.calls is not None, "the tool format says how calls are written"
            return self._ids(
                tokenizer, self.function, calls=_rendered(self.tools.calls, content=message["content"], calls=calls)
            )
        if len(calls) != 1 or message["content"].strip():
            raise ValueError(f"template {self.name} writes one function call in a message, and nothing else")
        arguments = json.dumps(calls[0]["arguments"], ensure_ascii=False)
        return self._ids(tokenizer, self.function, name=calls[0]["name"], arguments=arguments)

    def _listed(self, system: str, tools: Tools | None) -> str:
        if not tools:
            return ""
        if self.tools is None:
            raise ValueError(f"template {self.name} writes no tools")
        return _rendered(self.tools.tools, system=system, tools=tools)

    def _ids(self, tokenizer: Tokenizer, slots: Sequence[Slot], **values: str) -> list[int]:
        ids: list[int] = []
        for slot in _filled(slots, **values):
            if isinstance(slot, str):
                ids += tokenizer.encode(slot)
                continue
            if isinstance(slot, Token):
                id = tokenizer.id_of(slot.text)
            else:
                id = self.eos(tokenizer) if slot.name == "eos" else tokenizer.bos
            ids += [] if id is None else [id]
        return ids


def _current(found: Sequence[Round]) -> int:
    """The round in which the last question of the user stands; those after it answer what tools said."""
    return max(i for i, (asked, _) in enumerate(found) if asked[0]["role"] == "user")


def _filled(slots: Sequence[Slot], **values: str) -> Iterator[Any]:
    """Slots with values in their places; what a value contains is never taken for a place."""
    for slot in slots:
        yield PLACE.sub(lambda place: values[place[1]], slot) if isinstance(slot, str) else slot


def _rendered(text: str, **values: Any) -> str:
    """A Jinja template with its values; ValueError where a tool lacks what it writes."""
    from jinja2 import TemplateError

    try:
        return _jinja(text).render(values)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"tools that cannot be written: {error}") from error


@cache
def _jinja(text: str) -> jinja2.Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # text, not HTML
    environment.filters["json"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(text)


def template(name: str | None, *, thinking: bool | None = None) -> Template | TokenizerTemplate:
    """Return a template by name; None and "tokenizer" stand for the tokenizer's own."""
    if name is not None and name != TokenizerTemplate.name and name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"no template is called {name}: {', '.join(sorted(TEMPLATES))}, tokenizer{hint}")
    chosen = TEMPLATES.get(name or "")
    if thinking is None:
        return chosen or TokenizerTemplate(tuple(sorted(TEMPLATES)))
    if chosen is None or chosen.thought is None:
        having = ", ".join(sorted(name for name, each in TEMPLATES.items() if each.thought is not None))
        raise InputError(
            f"thinking: template {name or 'tokenizer'} marks no thoughts of its own; those that do: {having}"
        )
    return dataclasses.replace(chosen, thinking=thinking)


def _slots(value: Sequence[Any]) -> tuple[Slot, ...]:
    kinds = {"special": Special, "token": Token}
    return tuple(
        slot if isinstance(slot, str) else next(kinds[kind](text) for kind, text in slot.items()) for slot in value
    )


def _template(name: str, entry: Mapping[str, Any], formats: Mapping[str, ToolFormat]) -> Template:
    """An entry of the file with the defaults of what it leaves out."""
    end = [] if entry.get("efficient_eos") else [{"special": "eos"}]
    user = entry.get("user", ["{{content}}"])
    slots = {
        "user": user,
        "assistant": ["{{content}}", *end],
        "function": ["{{calls}}", *end],
        "observation": user,
        "system": ["{{content}}"],
        "prefix": [],
        "separator": [],
    }
    fields: dict[str, Any] = {key: _slots(entry.get(key, default)) for key, default in slots.items()}
    fields |= {key: value for key, value in entry.items() if key not in slots}
    tools = entry.get("tools", "default")
    fields["tools"] = None if tools is None else formats[tools]
    fields["stop_words"] = tuple(entry.get("stop_words", ()))
    fields["thought"] = Thought(**entry["thought"]) if "thought" in entry else None
    return Template(name=name, **fields)


def _templates() -> dict[str, Template]:
    data = yaml.safe_load(files("mindspeed_core").joinpath("templates.yaml").read_text("utf-8"))
    formats = {name: ToolFormat(**entry) for name, entry in data["tool_formats"].items()}
    return {name: _template(name, entry, formats) for name, entry in data["templates"].items()}


TEMPLATES: Mapping[str, Template] = MappingProxyType(_templates())

__all__ = ["TEMPLATES", "Message", "Template", "TokenizerTemplate", "template"]
