"""Worker processes: items go out one by one, results come back in order, memory stays bounded.

The processes are started by command, not by multiprocessing: no `__main__` guard is needed, Ctrl-C reaches only us,
and a worker ends by itself when we are gone, since its socket closes with us.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from mindspeed_core.errors import InputError

AHEAD = 3  # items per worker that may be finished or under way before the first of them is taken
Item = TypeVar("Item")
Result = TypeVar("Result", covariant=True)


class Work(Protocol[Item, Result]):
    """Something that pickles and becomes a function in the process that uses it."""

    def start(self) -> Callable[[Item], Result]: ...


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    item: int | None = None  # the number of the item it works on


class Pool(Generic[Item, Result]):
    """`with Pool(work, workers) as pool: for result in pool.map(items): ...`; one worker works in this process."""

    def __init__(self, work: Work[Item, Result], workers: int) -> None:
        self._work = work
        self._workers: list[_Worker] = []
        try:
            if workers > 1:
                self._workers += [_start() for _ in range(workers)]
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
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.wait()
        self._workers.clear()

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
            code = worker.process.wait()
            if code == -9:
                raise InputError("a worker was killed, probably for want of memory; use fewer --workers") from error
            raise RuntimeError(f"a worker ended with code {code}") from error


def _start() -> _Worker:
    ours, theirs = socket.socketpair()
    with theirs:
        code = "import sys; sys.path[:] = sys.argv[2].split(chr(10)); import mindspeed_data.pool as p; p.serve()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno()), "\n".join(sys.path)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    return _Worker(process, Connection(ours.detach()))


def serve() -> None:
    """The whole life of a worker process."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    try:
        work = connection.recv().start()
        while True:
            item = connection.recv()
            try:
                answer = (None, work(item))
            except Exception as error:
                answer = (_portable(error), None)
            connection.send(answer)
    except (EOFError, ConnectionError):
        pass  # the parent has ended or wants no more


def _portable(error: Exception) -> Exception:
    """The error itself where the parent knows it, else its traceback."""
    if isinstance(error, InputError | OSError) or type(error).__module__.startswith("mindspeed_data."):
        return error
    return RuntimeError("in a worker process:\n" + "".join(traceback.format_exception(error)))
