"""Generation and chat in the terminal: what stands on stdout, the history, the commands, Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mindspeed_serve.__main__ as command
from mindspeed_core.errors import InputError
from mindspeed_core.generate.sampling import SamplingConfig
from tests.harness import run_ranks
from tests.serve.peer import answering
from tests.tiny_model import tiny_model

SERVE = [sys.executable, "-m", "mindspeed_serve"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "chatty", words=True)


@pytest.fixture(scope="module")
def peer(folder: Path) -> Any:
    """What transformers answers."""
    return answering(folder)


def in_process(
    folder: Path, lines: str, chat: bool, sampling: SamplingConfig, options: dict[str, Any] | None = None
) -> tuple[str, str]:
    """What stands on stdout and stderr after `lines` came in, without the seconds that a new process takes."""
    from mindspeed_core.generate.engine import Engine
    from mindspeed_serve.assistant import Assistant
    from mindspeed_serve.terminal import Chat, continue_text

    engine = Engine.open(folder, **(options or {}))
    if not engine.mesh.is_main:
        engine.follow()
        return "", ""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, engine:
        patch.setattr("sys.stdin", io.StringIO(lines))
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        if chat:
            Chat(Assistant.of(engine), sampling).run()
        else:
            continue_text(engine, "-", sampling)
    return out.getvalue(), err.getvalue()


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2}], ids=str)
def test_generate_writes_the_continuation_and_nothing_else(folder: Path, peer: Any, parallel: dict[str, int]) -> None:
    [(out, _), _] = run_ranks(in_process, 2, folder, "ba da mo", False, SamplingConfig(max_new_tokens=20), parallel)
    assert out == " " + peer("ba da mo", 20) + "\n"


def test_answers_through_a_pipe_know_what_was_said(folder: Path, peer: Any) -> None:
    lines = "ba da\nmo ku\n/clear\n/nonsense\n\nmo ku\n/quit\nnever asked\n"
    options = ["--temperature", "0", "--max-new-tokens", "12", "--system", "si ti"]
    done = subprocess.run(
        [*SERVE, "chat", str(folder), *options], input=lines, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    system = {"role": "system", "content": "si ti"}
    first = [system, {"role": "user", "content": "ba da"}]
    one = peer(first, 12)
    two = peer([*first, {"role": "assistant", "content": one}, {"role": "user", "content": "mo ku"}], 12)
    three = peer([system, {"role": "user", "content": "mo ku"}], 12)
    assert two != three
    assert [line.strip() for line in done.stdout.splitlines()] == [one, two, three]
    assert "no such command" in done.stderr


def test_the_oldest_turns_are_left_out_when_the_context_is_full(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "short", words=True, max_position_embeddings=40)
    lines = "ba ba ba ba\n" * 4 + "da " * 50 + "\nba\n"
    [(out, err)] = run_ranks(in_process, 1, folder, lines, True, SamplingConfig(max_new_tokens=12))
    assert "no longer fit and are left out" in err
    assert "error: the prompt has 52 tokens, but the model reads at most 40" in err
    assert len(out.splitlines()) == 5, "a question that is too long does not end the chat"


def test_mistakes_are_told_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)temperature=-1.*\n.*top_p=2"):
        command.generate(folder, temperature=-1, top_p=2)
    with pytest.raises(InputError, match="nothing: no such folder"):
        command.generate(tmp_path / "nothing")
    with pytest.raises(InputError, match="did you mean llama2"):
        command.chat(folder, template="lama2")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="already in use; choose another --port"):
            command.web(folder, port=taken.getsockname()[1])


class Terminal:
    """A command in a terminal of its own, where Ctrl-C is a key."""

    def __init__(self, *command: str) -> None:
        self.text = ""
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            os.execvp(command[0], command)

    def wait_for(self, part: str, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while part not in self.text:
            assert time.monotonic() < end, f"no {part!r} in {self.text!r}"
            try:
                self.text += os.read(self.file, 4096).decode(errors="replace")
            except OSError:
                assert part in self.text, f"ended without {part!r}: {self.text!r}"

    def type(self, keys: str) -> None:
        self.text = ""
        os.write(self.file, keys.encode())

    def exit_code(self, timeout: float = 30) -> int:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:  # a full buffer would keep it from ending
                self.text += os.read(self.file, 4096).decode(errors="replace")
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            return


def test_ctrl_c_stops_an_answer_and_twice_quits(folder: Path) -> None:
    terminal = Terminal(*SERVE, "chat", str(folder), "--max-new-tokens", "2000", "--tp", "2")
    try:
        terminal.wait_for("> ")
        terminal.type("ba da\n")
        terminal.wait_for("ba da\r\n ")  # the echo, and the answer's first word
        terminal.type("\x03")
        terminal.wait_for("\n> ")
        time.sleep(2.1)  # a second Ctrl-C sooner ends everything
        terminal.type("mo ku\n")
        terminal.wait_for("mo ku\r\n ")
        terminal.type("\x03")
        terminal.wait_for("\n> ")
        time.sleep(2.1)
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again quits")
        terminal.type("\x03")
        assert terminal.exit_code() == 130
        assert "Traceback" not in terminal.text
    finally:
        terminal.close()
