"""How commands end: exit codes, one line per error, no boxes; and what progress looks like."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from mindspeed_core import cli

PROGRAM = """
import errno, os, sys
import typer
from mindspeed_core.cli import command_line, console, progress, run
from mindspeed_core.errors import InputError

app = command_line("mindspeed-core", "A program for the tests.")

@app.command()
def bad(count: int, name: str = "x"):
    "Fail by the user's fault."
    raise InputError("first.txt: no such file; give another\\nsecond.txt: cut short; copy it again")

@app.command()
def fault():
    "Fail by our fault."
    raise RuntimeError("we made a mistake")

@app.command()
def full():
    "Write to a full disk, deep inside."
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/out.bin")
    except OSError as error:
        raise RuntimeError("saving failed") from error

@app.command()
def endless():
    "Print for ever."
    while True:
        print("line")

@app.command()
def wait():
    "Wait to be interrupted."
    import time
    print("ready", flush=True)
    time.sleep(60)

@app.command()
def talk():
    "Use both streams."
    console.print("[tp] a log line " * 10)
    print("result")
    with progress(4, "counting", unit="things") as bar:
        for _ in range(4):
            bar.advance(text="loss 1.0")

run(app)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))

    def start(*args, **options):
        return subprocess.run([sys.executable, str(path), *args], capture_output=True, text=True, timeout=60, **options)

    start.path = path
    return start


def test_bad_input_is_one_line_per_error_and_exit_code_2(program):
    done = program("bad", "3")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: first.txt: no such file; give another",
        "error: second.txt: cut short; copy it again",
    ]
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["bad"], "error: missing argument"),
        (["bad", "--nam", "3"], "error: no such option: --nam"),
        (["bad", "three"], "error: invalid value for"),
        (["bat"], "error: no such command 'bat'"),
    ],
)
def test_a_usage_error_is_one_plain_line_and_exit_code_2(program, args, expected):
    done = program(*args)
    assert done.returncode == 2
    assert done.stderr.startswith(expected)
    assert len(done.stderr.splitlines()) == 1
    assert "--help" in done.stderr


def test_no_command_at_all_shows_the_help_and_exits_with_2(program):
    done = program()
    assert done.returncode == 2
    assert "Usage: mindspeed-core" in done.stderr


def test_our_own_fault_shows_its_traceback_and_exits_with_1(program):
    done = program("fault")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("RuntimeError: we made a mistake")


def test_a_full_disk_is_told_in_one_line_however_deep_it_was_met(program):
    done = program("full")
    assert done.returncode == 2
    assert done.stderr == ("error: /data/out.bin: no space left on device; free some space or choose another folder\n")


def test_a_reader_that_leaves_early_is_no_error(program):
    line = f"{sys.executable} {program.path} endless | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stdout == "line\n"
    assert done.stderr == ""


def test_results_that_do_not_fit_on_the_disk_are_told(program):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(program.path), "talk"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 2
    assert "no space left on device" in done.stderr.splitlines()[-1]


def test_ctrl_c_is_one_line_and_exit_code_130(program):
    process = subprocess.Popen(
        [sys.executable, str(program.path), "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "interrupted\n")


def test_help_is_plain_and_the_version_is_the_packages(program):
    done = program("--help")
    assert done.returncode == 0
    assert "Fail by our fault." in done.stdout
    assert "╭" not in done.stdout
    assert program("--version").stdout.startswith("mindspeed-core 0.")


def test_stdout_holds_only_results_and_log_lines_are_not_wrapped_or_marked_up(program):
    done = program("talk")
    assert done.stdout == "result\n"
    assert done.stderr.splitlines()[0].rstrip() == ("[tp] a log line " * 10).rstrip()
    assert "counting: 4/4 things, loss 1.0, 0:00 left" in done.stderr


def test_progress_writes_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = iter(range(0, 1000, 3))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    with cli.progress(10, "reading") as bar:
        for _ in range(10):
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert 2 < len(lines) < 10
    assert lines[-1].startswith("reading: 10/10")
    assert all(line.startswith("reading: ") for line in lines)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: permission denied; change its permissions"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"),
            "/x: no such file or directory; it, or its",
        ),
        (
            OSError(errno.EFBIG, "File too large", "/x"),
            "/x: file too large; raise the limit of the size of files (ulimit",
        ),
        (OSError(errno.EIO, "Input/output error", "/x"), "/x: input/output error; the disk or its connection fails"),
        (OSError(errno.ESTALE, "Stale file handle", "/x"), "/x: stale file handle; its server has another file there"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left on device"),
        (MemoryError(), "out of memory"),
        (ValueError("shape"), None),
    ],
)
def test_faults_of_the_environment_are_told_apart_from_ours(error, expected):
    told = cli.fault_of_environment(error)
    assert told is None if expected is None else told.startswith(expected)


def test_a_torch_npu_that_does_not_load_is_told_with_its_reason():
    try:
        try:
            raise ImportError("libhccl.so: cannot open shared object file")
        except ImportError as error:
            raise RuntimeError("Failed to load the backend extension: torch_npu. You can ...") from error
    except RuntimeError as error:
        told = cli.fault_of_environment(error)
    assert told is not None
    assert "torch_npu does not load (libhccl.so: cannot open shared object file); source CANN's set_env.sh" in told
