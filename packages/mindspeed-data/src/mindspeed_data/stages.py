"""What becomes of a chunk, in two steps: its rows are read, then they are encoded.

Where a library encodes without Python's lock, it does so in a thread, while the chunk before is written and the next is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stages(Generic[Item, Result]):
    """Both steps as one function, and over many items."""

    read: Callable[[Item], Any]
    encode: Callable[[Any], Result]
    beside: bool = False  # the second step leaves Python to other threads

    def __call__(self, item: Item) -> Result:
        return self.encode(self.read(item))

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result of each item, in their order. Where encoding allows it, the next item is encoded while the caller
        has a result, and the one behind it is read: a kill takes two items then instead of one."""
        if not self.beside:
            yield from map(self, items)
            return
        under_way: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(1) as thread:  # its end waits for what is being encoded
            for item in items:
                under_way.append(thread.submit(self.encode, self.read(item)))
                if len(under_way) > 1:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
