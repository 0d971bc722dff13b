"""What becomes of a chunk, in two steps: its rows are read, then they are encoded.

Where a library encodes without Python's lock, it does so in a thread, while the rows of the next chunk are read.
"""

from __future__ import annotations

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
        """Yield the result of each item, in their order. Where encoding allows it, the next item is read meanwhile; its own
        encoding waits until the caller is done with the result, so that a kill takes no more than one item."""
        if not self.beside:
            yield from map(self, items)
            return
        under_way: Future[Result] | None = None
        with ThreadPoolExecutor(1) as thread:  # its end waits for what is being encoded
            for item in items:
                read = self.read(item)
                if under_way is not None:
                    yield under_way.result()
                under_way = thread.submit(self.encode, read)
            if under_way is not None:
                yield under_way.result()
