"""What stands behind the chat page, without a browser: the history it hands on, the pieces it shows, its errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import pytest

from mindspeed_core.errors import InputError
from mindspeed_core.generate.sampling import SamplingConfig
from mindspeed_serve import web
from mindspeed_serve.web import _answering


class Parrot:
    """Answers with what it was asked, word by word."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.open = 0

    def reply(self, messages: list[dict[str, str]], sampling: SamplingConfig, *, system: str | None) -> Iterator[str]:
        self.heard.append((messages, sampling, system))
        if messages[-1]["content"] == "too long":
            raise InputError("the prompt has 9 tokens, but the model reads at most 8: shorten it")
        return self._words(messages[-1]["content"])

    def _words(self, text: str) -> Iterator[str]:
        self.open += 1
        try:
            yield from text.split()
        finally:
            self.open -= 1


def test_the_answer_grows_and_the_history_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "EVERY", 0)
    parrot = Parrot()
    answer = _answering(parrot, 7)  # type: ignore[arg-type]
    history = [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": "hi", "metadata": None},
    ]
    assert list(answer("one two three", history, "  ", 0.5, 0.9, 40.0, 16.0)) == ["one", "onetwo", "onetwothree"]
    messages, sampling, system = parrot.heard[0]
    assert messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "one two three"},
    ]
    assert sampling == SamplingConfig(temperature=0.5, top_p=0.9, top_k=40, max_new_tokens=16, seed=7)
    assert system is None


def test_words_that_come_faster_than_they_are_drawn_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "EVERY", 60)
    answer = _answering(Parrot(), None)  # type: ignore[arg-type]
    assert list(answer("one two three", [], "", 0, 1, 0, 16)) == ["one", "onetwothree"]
    assert list(answer("one", [], "", 0, 1, 0, 16)) == ["one"]


def test_a_stopped_answer_ends_the_generation() -> None:
    parrot = Parrot()
    answer = _answering(parrot, None)("one two three", [], "be brief", 0, 1, 0, 16)  # type: ignore[arg-type]
    assert next(answer) == "one"
    assert parrot.open == 1
    answer.close()
    assert parrot.open == 0
    assert parrot.heard[0][2] == "be brief"


def test_what_cannot_be_answered_is_told_on_the_page() -> None:
    answer = _answering(Parrot(), None)  # type: ignore[arg-type]
    with pytest.raises(gr.Error, match="reads at most 8"):
        list(answer("too long", [], "", 0, 1, 0, 16))
