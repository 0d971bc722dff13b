"""Ranks of one machine hand tensors to each other through memory that all of them map.

    turn 0   rank 0 | rank 1 | ...   every rank fills its slot, all meet, each reads what it needs from the slots
    turn 1   rank 0 | rank 1 | ...   filled while a slower rank still reads turn 0; when all meet again, it has

What does not fit a slot goes in pieces. Ranks meet by a message each way over a socket that ends with its process, so a
peer that is gone is noticed at once. A sum is the same on all ranks: added in their order.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

SLOT = 1 << 21  # bytes: few enough for the caches, many enough to meet seldom
NOTE = 128  # bytes a message has at most


def machine() -> str:
    """Return what the ranks have in common that can form an exchange; where one cannot, something unique.

    A kernel, or what confines a container, may forbid the means that Python has: they are tried.
    """
    try:
        if hasattr(os, "memfd_create"):
            os.close(os.memfd_create("mindspeed"))
            with _listener(f"mindspeed-{uuid.uuid4()}", 1):
                boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
                return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"  # abstract sockets are of a network
    except OSError:
        pass
    return str(uuid.uuid4())


class Exchange:
    """The collectives of `size` ranks. Tensors are contiguous and of one length and type on all of them."""

    def __init__(self, rank: int, lines: dict[int, socket.socket], memory: Tensor, seconds: float) -> None:
        self.rank = rank
        self.size = len(lines) + 1
        self.seconds = seconds  # how long a rank waits for another one
        self._lines = lines  # a socket to every other rank
        self._memory = memory  # bytes [2, size, slot]
        self._turn = 0

    @classmethod
    def join(cls, store: dist.Store, rank: int, size: int, seconds: float, *, slot: int = SLOT) -> Exchange:
        """Meet the other ranks of this machine, which use `store` for this alone. Collective."""
        with _in_the_words_of_torch("the other ranks of the group", seconds):
            lines = _lines(store, rank, size, seconds)
            if rank == 0:
                file = os.memfd_create("mindspeed")
                os.ftruncate(file, 2 * size * slot)  # takes room where it is written
                for line in lines.values():
                    socket.send_fds(line, [b"memory"], [file])
            else:
                file = _file(lines[0])
            memory = torch.frombuffer(mmap.mmap(file, 2 * size * slot), dtype=torch.uint8)
            os.close(file)
        return cls(rank, lines, memory.view(2, size, slot), seconds)

    def all_reduce(self, x: Tensor) -> None:
        """Sum x [m] over the ranks, in place."""
        for piece in x.split(self._memory.shape[2] // x.itemsize):
            _sum(self._show("all_reduce", piece), piece)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """Write the sum over the ranks of row `rank` of x [size, m] into out [m], which may be a part of x."""
        length = self._memory.shape[2] // self.size // x.itemsize
        for piece, rows in zip(out.split(length), x.split(length, 1), strict=True):
            _sum(self._show("reduce_scatter", rows)[:, self.rank], piece)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Write x [m] of rank r into row r of out [size, m], of which x may be a part."""
        length = self._memory.shape[2] // x.itemsize
        for rows, piece in zip(out.split(length, 1), x.split(length), strict=True):
            rows.copy_(self._show("all_gather", piece))

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        """Write row `rank` of x [size, m] of rank r into row r of out [size, m]."""
        length = self._memory.shape[2] // self.size // x.itemsize
        for pieces, rows in zip(out.split(length, 1), x.split(length, 1), strict=True):
            pieces.copy_(self._show("all_to_all", rows)[:, self.rank])

    def close(self) -> None:
        """Leave the others."""
        for line in self._lines.values():
            line.close()

    def _show(self, name: str, piece: Tensor) -> Tensor:
        """Return the pieces of all ranks, [size, *piece.shape]. They stay until the call after the next."""
        self._turn ^= 1
        slots = self._memory[self._turn, :, : piece.nbytes].view(piece.dtype).view(self.size, *piece.shape)
        slots[self.rank].copy_(piece)
        self._meet(f"{name} of {list(piece.shape)} {piece.dtype}")
        return slots

    def _meet(self, brought: str) -> None:
        """Wait until every rank has come here, and make sure that it has come for the same thing."""
        note = brought.encode()
        for peer, line in self._lines.items():
            with _in_the_words_of_torch(f"rank {peer} of the group", self.seconds):
                line.settimeout(self.seconds)
                line.send(note)
        for peer, line in self._lines.items():
            with _in_the_words_of_torch(f"rank {peer} of the group", self.seconds):
                theirs = _note(line)
            if theirs != note:
                raise RuntimeError(f"rank {self.rank} of the group is in {brought}, rank {peer} in {theirs.decode()}")


def _lines(store: dist.Store, rank: int, size: int, seconds: float) -> dict[int, socket.socket]:
    """Return a socket to every other rank."""
    lines: dict[int, socket.socket] = {}
    name = f"mindspeed-{uuid.uuid4()}"
    with _listener(name, size) as listener:
        listener.settimeout(seconds)
        store.set(f"line {rank}", name)
        for place in range(rank):
            lines[place] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            lines[place].settimeout(seconds)
            lines[place].connect(f"\0{store.get(f'line {place}').decode()}")
            lines[place].send(str(rank).encode())
        while len(lines) < size - 1:
            line, _ = listener.accept()
            line.settimeout(seconds)
            lines[int(_note(line))] = line
    return lines


def _listener(name: str, most: int) -> socket.socket:
    """Return a socket to which so many others can connect by its name."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{name}")  # abstract: no file, and gone with the process
    listener.listen(most)
    return listener


def _note(line: socket.socket) -> bytes:
    """Return what a peer sends."""
    note = line.recv(NOTE)
    if not note:  # as a socket says that its other end is closed
        raise EOFError("has gone")
    return note


def _file(line: socket.socket) -> int:
    """Return the open file that a peer sends."""
    note, files, *_ = socket.recv_fds(line, NOTE, 1)
    if not note:
        raise EOFError("has gone")
    if not files:  # it came, and the kernel had no place for it in this process
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return files[0]


@contextmanager
def _in_the_words_of_torch(peer: str, seconds: float) -> Iterator[None]:
    """A peer that is late or gone is told as torch's own backends tell it: by a RuntimeError.

    What this rank's own system refuses it keeps its own words: it is no word of a peer.
    """
    try:
        yield
    except TimeoutError as error:
        raise RuntimeError(f"Timed out waiting {seconds * 1000:.0f}ms for {peer}") from error
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(f"Connection closed by peer: {peer} {error}") from error


def _sum(slots: Tensor, out: Tensor) -> None:
    """Write slots[0] + slots[1] + ... into out."""
    torch.add(slots[0], slots[1], out=out)
    for slot in slots[2:]:
        out.add_(slot)
