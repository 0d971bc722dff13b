"""What every command shares: the terminal, progress, and how an error ends a program.

Exit codes: 0 done; 2 the input or the environment is at fault (one line per fault on stderr); 130 Ctrl-C; 1 our fault
(with a traceback). stdout holds results only.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn, cast

import typer

from mindspeed_core import launch
from mindspeed_core.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

# Operating system errors that are the environment's, and how to mend them.
MENDS = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EROFS: "choose another folder",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f) or choose another folder",
    errno.EIO: "the disk or its connection fails; the system's log (dmesg) says more",
    errno.ESTALE: "its server has another file there now; mount it again, then run again",
    errno.ENOENT: "it, or its folder, is gone or never was; put it back or choose another path",
    errno.EACCES: "change its permissions or choose another path",
    errno.EPERM: "change its permissions or choose another path",
    errno.EADDRINUSE: "choose another port",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
}

# What the libraries under our commands read once, when they are imported. None of them may ask the network on its own.
SURROUNDINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "TOKENIZERS_PARALLELISM": "false",  # its threads and our worker processes would wait for each other
    "TQDM_DISABLE": "1",  # `progress` shows how far things are
}


def command_line(package: str, help: str) -> typer.Typer:
    """An empty command with our manners: plain help, `-h`, `--version`, no completion scripts."""
    app = typer.Typer(
        name=package,
        help=help,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"{package} {version(package)}")
            raise typer.Exit

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Show the version and exit."
        ),
    ) -> None:
        pass

    return app


def run(app: typer.Typer) -> NoReturn:
    """Run a command and exit with its code."""
    launch.bind()
    launch.listen()
    for name, value in SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    # Megatron and torch warn their developers of what our users cannot mend
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    app.rich_markup_mode = None  # plain help: no boxes, and rich is not loaded for it
    app.pretty_exceptions_enable = False
    app._add_completion = False
    code = _outcome(app)
    with suppress(OSError):
        sys.stderr.flush()
    if launch.launched() and code not in (0, None):
        os._exit(code)  # a failing rank must not wait for its peers in destructors
    raise SystemExit(code)


def _outcome(app: typer.Typer) -> int:
    """Run the command; the exit code, with the error told."""
    usage_error = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        command = typer.main.get_command(app)
        name = app.info.name if isinstance(app.info.name, str) else os.path.basename(sys.argv[0])
        with command.make_context(name, sys.argv[1:]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as end:
        return _ended(end.exit_code)
    except SystemExit as end:
        return _ended(end.code)
    except (KeyboardInterrupt, typer.Abort) as stop:
        where = f" {stop}" if str(stop) else ""  # a command may say where it stands and how to go on
        return _tell(130, f"interrupted{where}\n")
    except usage_error as error:
        return _usage(error)
    except BaseException as error:
        return _failure(error)
    return 0


def _ended(code: object) -> int:
    """A command that ended itself, as `sys.exit` does it: with a code, a message or nothing."""
    if code is not None and not isinstance(code, int):
        return _tell(1, f"{code}\n")
    try:
        sys.stdout.flush()
    except OSError as error:
        return _failure(error)
    return _tell(code, "") if code else 0


def _usage(error: Any) -> int:
    """A command line that cannot be understood: one line."""
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(error.format_message() + "\n")
        return 2
    text = " ".join(error.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    context = getattr(error, "ctx", None)
    see = f"; see {context.command_path} --help" if context is not None else ""
    return _tell(2, _lines(text[:1].lower() + text[1:] + see))


def _failure(error: BaseException) -> int:
    """Any other ending: the user's fault in lines, ours with its traceback."""
    if isinstance(error, InputError):
        return _tell(2, _lines(str(error)))
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        return _tell(128 + 13, "")  # the reader has left (`... | head`): end as quietly as cat does
    environment = fault_of_environment(error)
    if environment is not None:
        return _tell(2, _lines(environment))
    return _tell(1, "".join(traceback.format_exception(error)), error)


def fault_of_environment(error: BaseException) -> str | None:
    """What to say when the disk, a permission or the memory is at fault, however deep the cause; None for our faults."""
    for cause in _causes(error):
        # what was only looked for in vain is no cause of what went wrong later
        if isinstance(cause, OSError) and cause.errno in MENDS and (cause is error or cause.errno != errno.ENOENT):
            path = cause.filename2 or cause.filename  # of a copy, the second is what could not be written
            where = f"{path}: " if path else ""
            return f"{where}{(cause.strerror or str(cause)).lower()}; {MENDS[cause.errno]}"
        text = str(cause)
        if "No space left on device" in text or "PytorchStreamWriter failed writing" in text:
            return f"no space left on device; {MENDS[errno.ENOSPC]}"
        if "backend extension: torch_npu" in text:  # even `import torch` fails then
            return f"torch_npu does not load ({_first_line(cause.__cause__)}); source CANN's set_env.sh, or pip uninstall torch-npu"
        if (
            isinstance(cause, MemoryError)
            or type(cause).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in text
        ):
            return "out of memory; use a smaller micro batch, a shorter sequence or more ranks"
    return None


def _first_line(error: BaseException | None) -> str:
    return next(iter(str(error).splitlines()), "")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _stdout_is_closed() -> bool:
    """True when nobody reads stdout any more; it is then pointed at nothing, so that the end is quiet."""
    with suppress(OSError, ValueError):  # a captured stdout has no file descriptor
        stdout = sys.stdout.fileno()
        poll = select.poll()
        poll.register(stdout, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
            return True
    return False


def _lines(text: str) -> str:
    return "".join(f"error: {line}\n" for line in text.splitlines() if line.strip())


def _tell(code: int, text: str, error: BaseException | None = None) -> int:
    """Write why the program ends, unless another rank or the launcher does; the code."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError):
        sys.stderr.write(launch.report(code, text, error))
    return code


# ----------------------------------------------------------------------------------------------------- the terminal


@cache
def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


class _Lazy:
    """The console on stderr; rich is loaded when it first speaks."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_stderr(), name)


console = cast("Console", _Lazy())


class Progress:
    """How far a long piece of work is. `advance` after each part; `text` is shown beside the count."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done = 0
        self.text = ""
        self.start = time.monotonic()

    def advance(self, count: int = 1, text: str | None = None) -> None:
        self.done += count
        if text is not None:
            self.text = text
        self._show()

    def _show(self) -> None:
        """Nothing here: what a rank shows that does not own the terminal."""

    def _close(self) -> None:
        """Nothing here."""

    def _left(self) -> str:
        """The time left at the pace so far, as 1:02:03 or 2:03."""
        if self.total is None or self.done == 0:
            return ""
        seconds = (time.monotonic() - self.start) * (self.total - self.done) / self.done
        return _clock(seconds)


class _Lines(Progress):
    """Plain lines, for logs: the first one soon, then one every ten seconds, and one at the end."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        super().__init__(total, label, unit)
        self.next = self.start + 2
        self.shown = -1

    def _show(self) -> None:
        if time.monotonic() >= self.next:
            self._write()
            self.next = time.monotonic() + 10

    def _write(self) -> None:
        self.shown = self.done
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        left = self._left()
        parts = [f"{count}{' ' + self.unit if self.unit else ''}", self.text, f"{left} left" if left else ""]
        sys.stderr.write(f"{self.label}: {', '.join(part for part in parts if part)}\n")

    def _close(self) -> None:
        if self.shown != self.done:
            self._write()


class _Bar(Progress):
    """A bar on the terminal."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        super().__init__(total, label, unit)
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = [TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn()]
        self.bar = Bar(*columns, TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=_stderr())
        self.task = self.bar.add_task(label, total=total, text="")
        self.bar.start()

    def _show(self) -> None:
        text = " ".join(part for part in (self.unit, self.text) if part)
        self.bar.update(self.task, completed=self.done, text=text)

    def _close(self) -> None:
        self.bar.refresh()
        self.bar.stop()


@contextmanager
def progress(total: int | None, label: str, *, unit: str = "") -> Iterator[Progress]:
    """Show how far the work of the block is: a bar with the time left on a terminal, plain lines elsewhere."""
    if launch.world()[0] != 0:
        kind = Progress
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        kind = _Bar
    else:
        kind = _Lines
    shown = kind(total, label, unit)
    try:
        yield shown
    finally:
        shown._close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
