"""Our launcher: ranks start from one command line, one failure is told, and nothing survives the launcher."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mindspeed_core import launch, launcher
from mindspeed_core.errors import InputError

# Each rank writes its process id, then does what the command line says; no rank loads torch.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import typer
from mindspeed_core import launch, launcher
from mindspeed_core.cli import run
from mindspeed_core.errors import InputError

app = typer.Typer()

@app.command()
def main(what: str, folder: Path, ranks: int = 2):
    def rank_main():
        rank, size = launch.world()
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        print(f"rank {rank} of {size} threads {os.environ['OMP_NUM_THREADS']} {sys.stdin.read() if what == 'ok' else ''}")
        sys.stdout.flush()
        def sleep():
            (folder / f"ready-{rank}").touch()
            time.sleep(60)
        if what == "input":
            raise InputError("model: no such folder")
        if what == "one" and rank == 1:
            raise RuntimeError("a mistake on one rank")
        if what == "victim":
            if rank == 1:
                time.sleep(0.2)
                raise ValueError("the cause")
            raise RuntimeError("Connection closed by peer")
        if what == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "crash" and rank == 1:
            sys.stderr.write("last words\\n")
            sys.stderr.flush()
            os._exit(9)
        if what == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if rank == 0:
                raise InputError("bad")
        if what == "chat" and rank == 0:
            while True:
                try:
                    sleep()
                except KeyboardInterrupt:
                    print("still here", flush=True)
                    (folder / "caught").touch()
                    time.sleep(3)
                    return
        if what != "ok" and not (what == "chat" and rank == 1):
            sleep()

    launch.run_ranks(rank_main, ranks)

run(app)
"""


@pytest.fixture
def start(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    started = []

    def start(what, *args):
        process = subprocess.Popen(
            [sys.executable, str(program), what, str(tmp_path), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.02)


def assert_gone(folder: Path) -> None:
    """No rank runs any more, nor does any folder of the launcher stay."""
    end = time.monotonic() + 10
    for file in folder.glob("pid-*"):
        while Path(f"/proc/{file.read_text()}").exists():
            assert time.monotonic() < end, f"{file.name} still runs"
            time.sleep(0.02)


def test_every_rank_runs_and_rank_0_owns_the_terminal(start, tmp_path):
    out, err = start("ok", "--ranks", "3").communicate("typed", timeout=60)
    assert out == "rank 0 of 3 threads 1 typed\n"
    assert err == ""
    assert sorted(file.name for file in tmp_path.glob("pid-*")) == ["pid-0", "pid-1", "pid-2"]


def test_one_rank_runs_in_this_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    launch.run_ranks(lambda: calls.append(launch.world()), 1)
    assert calls == [(0, 1)]


def test_bad_input_on_all_ranks_is_told_once(start, tmp_path):
    process = start("input", "--ranks", "3")
    err = process.communicate(timeout=60)[1]
    assert (process.returncode, err) == (2, "error: model: no such folder\n")
    assert_gone(tmp_path)


def test_a_failure_on_one_rank_ends_all_and_names_it(start, tmp_path):
    process = start("one")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert err.startswith("rank 1 failed:\nTraceback")
    assert err.count("Traceback") == 1
    assert err.rstrip().endswith("RuntimeError: a mistake on one rank")
    assert_gone(tmp_path)


def test_the_cause_is_told_and_not_the_echo_on_its_peers(start):
    err = start("victim").communicate(timeout=60)[1]
    assert "the cause" in err
    assert "Connection closed" not in err


def test_a_killed_rank_is_named_with_its_signal(start, tmp_path):
    process = start("killed")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert err.startswith("error: rank 1 was killed by SIGKILL; ")
    assert len(err.splitlines()) == 1
    assert_gone(tmp_path)


def test_a_rank_that_dies_without_a_reason_is_told_with_its_last_words(start, tmp_path):
    process = start("crash")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert err == "rank 1: last words\nerror: rank 1 ended with exit code 9 and gave no reason\n"
    assert_gone(tmp_path)


def test_a_rank_that_ignores_sigterm_is_killed(start, tmp_path):
    begin = time.monotonic()
    process = start("deaf")
    process.communicate(timeout=60)
    assert process.returncode == 2
    assert time.monotonic() - begin < launcher.GRACE + 15
    assert_gone(tmp_path)


def test_ctrl_c_ends_all_ranks_with_130_and_one_line(start, tmp_path):
    process = start("sleep")
    for rank in range(2):
        wait_for(tmp_path / f"ready-{rank}")
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=30)[1]
    assert (process.returncode, err) == (130, "interrupted\n")
    assert_gone(tmp_path)


def test_sigint_to_the_launcher_alone_is_passed_on_to_rank_0(start, tmp_path):
    """A program that handles Ctrl-C itself (chat does, to stop an answer) goes on, and ends when it wants."""
    process = start("chat")
    wait_for(tmp_path / "ready-0")
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "caught")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.count("still here") == 1
    assert err == ""


def test_ctrl_c_at_a_terminal_reaches_rank_0_once(start, tmp_path):
    """The terminal signals every process of the group; the launcher must not pass the signal on a second time."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(tmp_path / "program.py"), "chat", str(tmp_path)])
    try:
        wait_for(tmp_path / "ready-0")
        os.write(terminal, b"\x03")
        shown = b""
        with suppress(OSError):  # the terminal is gone when the program is
            while part := os.read(terminal, 1024):
                shown += part
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.close(terminal)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert shown.count(b"still here") == 1
    assert_gone(tmp_path)


def test_two_quick_ctrl_c_end_even_a_program_that_handles_them(start, tmp_path):
    process = start("chat")
    wait_for(tmp_path / "ready-0")
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "caught")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert_gone(tmp_path)


def test_sigterm_to_the_launcher_ends_all_ranks(start, tmp_path):
    process = start("sleep")
    for rank in range(2):
        wait_for(tmp_path / f"ready-{rank}")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert_gone(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_ranks_die_with_a_launcher_that_is_killed(start, tmp_path):
    process = start("sleep")
    for rank in range(2):
        wait_for(tmp_path / f"ready-{rank}")
    process.kill()
    assert_gone(tmp_path)


def test_another_launcher_with_the_wrong_number_of_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="started 4 ranks, but 2 are asked for"):
        launch.run_ranks(lambda: None, 2)


def test_under_torchrun_the_ranks_of_a_node_tell_one_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = []
    for rank in (1, 0):
        (tmp_path / "attempt_0" / str(rank)).mkdir(parents=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / str(rank) / "error.json"))
        assert launch.launched()
        told.append(launch.report(2, "error: bad\n"))
    assert told == ["error: bad\n", ""]
    assert launch.rendezvous() == {"init_method": "env://", "rank": 0, "world_size": 2}


def test_a_single_process_meets_itself_in_memory(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert {k: v for k, v in launch.rendezvous().items() if k != "store"} == {"rank": 0, "world_size": 1}


def test_the_command_line_is_what_started_the_process(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "mindspeed_train", "sft", "r.yaml"])
    monkeypatch.setattr(sys, "argv", ["/x/mindspeed_train/__main__.py", "sft", "r.yaml"])
    assert launcher.command_line() == [sys.executable, "-m", "mindspeed_train", "sft", "r.yaml"]
    monkeypatch.setattr(sys, "argv", ["program.py", "other"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert launcher.command_line() == [sys.executable, "program.py", "other"]
