"""Worker processes: items go out one by one, results come back in order, memory stays bounded.

On Linux a worker is a copy of this process, so that what it needs is loaded already; what it inherits and must not hold (the lock
of the journal, the sockets of the others) is taken from it. Nothing of ours runs in threads that a copy would lack. Elsewhere
libraries of the system do not bear to be copied, and a worker is started by command, not by multiprocessing: no `__main__` guard
is needed. Either way Ctrl-C reaches only us, and a worker ends by itself when we are gone, since its socket closes with us.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from mindspeed_core.errors import InputError

FORK = sys.platform == "linux"
AHEAD = 3  # items per worker that may be finished or under way before the first of them is taken
Item = TypeVar("Item")
Result = TypeVar("Result", covariant=True)


class Work(Protocol[Item, Result]):
    """Something that pickles and becomes a function in the process that uses it."""

    def start(self) -> Callable[[Item], Result]: ...


@dataclass
class _Worker:
    pid: int
    connection: Connection[Any, Any]
    item: int | None = None  # the number of the item it works on

    def end(self) -> None:
        """End it, whatever it does."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Wait for its end, once; return its exit code."""
        self.connection.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Pool(Generic[Item, Result]):
    """`with Pool(work, workers) as pool: for result in pool.map(items): ...`; one worker works in this process."""

    def __init__(self, work: Work[Item, Result], workers: int) -> None:
        self._work = work
        self._workers: list[_Worker] = []
        try:
            if workers > 1 and FORK:
                function = work.start()
                self._workers += (_copy(function) for _ in range(workers))
            elif workers > 1:
                self._workers += (_start() for _ in range(workers))
                for worker in self._workers:
                    worker.connection.send(work)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Pool[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they do."""
        while self._workers:
            self._workers.pop().end()

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result of each item, in the order of the items."""
        if not self._workers:
            yield from map(self._work.start(), items)
            return
        remaining = enumerate(items)
        results: dict[int, Result] = {}
        due = 0  # the number of the result that comes next
        exhausted = False
        while True:
            for worker in self._workers:
                room = due + AHEAD * len(self._workers)
                if worker.item is None and not exhausted and self._furthest(results, due) < room:
                    number, item = next(remaining, (None, None))
                    exhausted = number is None
                    if not exhausted:
                        worker.item = number
                        self._talk(worker, lambda worker=worker, item=item: worker.connection.send(item))
            if due in results:
                yield results.pop(due)
                due += 1
                continue
            busy = [worker for worker in self._workers if worker.item is not None]
            if not busy:
                return
            for connection in wait([worker.connection for worker in busy]):
                worker = next(worker for worker in busy if worker.connection is connection)
                failure, result = self._talk(worker, worker.connection.recv)
                if failure is not None:
                    raise failure
                assert worker.item is not None
                results[worker.item] = result
                worker.item = None

    def _furthest(self, results: dict[int, Any], due: int) -> int:
        """The largest number that is under way or waits to be taken."""
        return max([due - 1, *results, *(w.item for w in self._workers if w.item is not None)])

    def _talk(self, worker: _Worker, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (EOFError, ConnectionError) as error:
            self._workers.remove(worker)
            code = worker.wait()
            if code == -signal.SIGKILL:
                raise InputError("a worker was killed, probably for want of memory; use fewer --workers") from error
            raise RuntimeError(f"a worker ended with code {code}") from error


def _copy(function: Callable[[Any], Any]) -> _Worker:
    """A worker that begins as a copy of this process."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            # those of a bar on the terminal hold a lock, and the thread that would free it is not here
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            _let_go_of_all_but({2, theirs.fileno()})
            _serve(Connection(theirs.detach()), function)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    theirs.close()
    return _Worker(pid, Connection(ours.detach()))


def _let_go_of_all_but(kept: set[int]) -> None:
    """Put an empty file in the place of every open one. Closing them would free numbers that objects still close later."""
    empty = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in kept:
            os.dup2(empty, number)


def _start() -> _Worker:
    """A worker that begins as a process of its own."""
    ours, theirs = socket.socketpair()
    code = "import sys; sys.path[:] = sys.argv[2].split(chr(10)); import mindspeed_data.pool as p; p.serve()"
    with theirs:
        theirs.set_inheritable(True)
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", code, str(theirs.fileno()), "\n".join(sys.path)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1)],
            setsid=True,
        )
    return _Worker(pid, Connection(ours.detach()))


def serve() -> None:
    """The whole life of a worker that was started."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    try:
        function = connection.recv().start()
    except (EOFError, ConnectionError):
        return  # the parent has ended already
    _serve(connection, function)


def _serve(connection: Connection[Any, Any], function: Callable[[Any], Any]) -> None:
    """Work on what comes until nothing does: the parent has ended or wants no more."""
    with suppress(EOFError, ConnectionError):
        while True:
            item = connection.recv()
            try:
                answer = (None, function(item))
            except Exception as error:
                answer = (_portable(error), None)
            connection.send(answer)


def _portable(error: Exception) -> Exception:
    """The error itself where the parent knows it, else its traceback."""
    if isinstance(error, InputError | OSError) or type(error).__module__.startswith("mindspeed_data."):
        return error
    return RuntimeError("in a worker process:\n" + "".join(traceback.format_exception(error)))
