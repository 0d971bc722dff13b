"""Generation and chat in the terminal. Answers go to stdout as they are made, everything else to stderr."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from mindspeed_core.cli import console
from mindspeed_core.errors import InputError
from mindspeed_core.generate.engine import Engine
from mindspeed_core.generate.sampling import SamplingConfig
from mindspeed_serve.assistant import Assistant

HELP = "/clear starts anew, /quit ends, Ctrl-C stops an answer"


def continue_text(engine: Engine, prompt: str, sampling: SamplingConfig) -> None:
    """Write the continuation of `prompt` to stdout, closed by a newline; `-` reads the prompt from stdin."""
    text = sys.stdin.read() if prompt == "-" else prompt
    for piece in Assistant.of(engine).continuation(text, sampling):
        _write(piece)
    _write("\n")


class Chat:
    """A conversation at a terminal, or with the lines of a pipe."""

    def __init__(self, assistant: Assistant, sampling: SamplingConfig, *, system: str | None = None) -> None:
        self.assistant, self.sampling, self.system = assistant, sampling, system
        self.messages: list[dict[str, str]] = []
        self._interrupts = _Interrupts()

    def run(self) -> None:
        """Answer until the input or the user ends the chat."""
        with self._interrupts.caught():
            if _at_terminal():
                console.print(f"[bold]{self.assistant.name}[/]  [dim]{HELP}[/]", markup=True)
            while (line := self._line()) is not None:
                text = line.strip()
                if text in ("/quit", "/exit"):
                    return
                if text == "/clear":
                    self.messages.clear()
                    console.print("the conversation starts anew", style="dim")
                elif re.fullmatch(r"/[a-z]*", text):
                    console.print(f"no such command: {HELP}", style="dim")
                elif text:
                    self._answer(text)

    def _line(self) -> str | None:
        """Return what the user enters next; None at the end of the input."""
        try:
            with self._interrupts.raised():
                line = f"{input('> ')}\n" if _at_terminal() else sys.stdin.readline()
        except EOFError:
            _write("\n")
            return None
        except KeyboardInterrupt:
            if self._interrupts.again():
                raise
            console.print(f"\nCtrl-C again quits; {HELP}", style="dim")
            return "\n"
        return line or None

    def _answer(self, text: str) -> None:
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            fitting = self.assistant.fitting(asked, self.system, self.sampling)
            if len(fitting) < len(asked):
                console.print(
                    f"(the oldest {len(asked) - len(fitting)} messages no longer fit and are left out)", style="dim"
                )
            pieces: Any = self.assistant.reply(asked, self.sampling, system=self.system)
            for piece in pieces:
                answer += piece
                _write(piece)
                if self._interrupts.wished:
                    break
            pieces.close()
        except InputError as error:  # a question that is too long ends no conversation
            console.print(f"error: {error}", style="red")
            return
        _write("\n\n" if _at_terminal() else "\n")
        self.messages = [*asked, {"role": "assistant", "content": answer}]


class _Interrupts:
    """Ctrl-C: KeyboardInterrupt while we wait for a line, else a wish that is noticed between two tokens.

    An exception in the middle of a step would leave the other ranks behind. A second Ctrl-C does not wait for that.
    """

    def __init__(self) -> None:
        self.wished = False  # since the last line was entered
        self._waiting = False
        self._in_a_row = 0  # at the prompt
        self._before: Any = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch Ctrl-C for the length of the block."""
        self._before = signal.signal(signal.SIGINT, self._catch)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Let Ctrl-C end the block by KeyboardInterrupt."""
        self._waiting = True
        try:
            yield
            self._in_a_row, self.wished = 0, False
        finally:
            self._waiting = False

    def again(self) -> bool:
        """Return whether the last thing the user did was Ctrl-C too."""
        self._in_a_row += 1
        return self._in_a_row > 1

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if callable(self._before):
            with suppress(KeyboardInterrupt):
                self._before(number, frame)  # tells the launcher that it was noticed
        if self._waiting or self.wished:
            raise KeyboardInterrupt
        self.wished = True


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
