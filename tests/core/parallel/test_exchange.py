"""Ranks that form an exchange: a peer that is gone meanwhile is told as gone, and what one's own system refuses as that."""

import errno
import mmap
import os
import socket
import threading
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from mindspeed_core.parallel import exchange, gloo
from mindspeed_core.parallel.exchange import Exchange
from mindspeed_core.verdict import kind_of
from tests.harness import run_ranks

PATIENCE = 30  # seconds; nothing here waits so long


def end():
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def calls(store):
    """Return a line to rank 0, as rank 1 makes it."""
    line = end()
    line.connect(f"\0{store.get('line 0').decode()}")
    return line


def never_comes(store):
    """Rank 0, which leaves its name and is gone before anybody connects to it."""
    store.set("line 0", "mindspeed-nobody")


def before_its_number(store):
    """Rank 1, gone when rank 0 waits to hear which rank it is."""
    calls(store).close()


def before_the_memory(store):
    """Rank 0, gone when rank 1 waits for what it is to map."""
    with end() as listener:
        listener.bind("\0")  # a name that the kernel chooses
        listener.listen()
        store.set("line 0", listener.getsockname()[1:])
        line, _ = listener.accept()
        line.recv(exchange.NOTE)
        line.close()


def before_it_meets(store):
    """Rank 1, gone when rank 0 waits for it in a collective."""
    with calls(store) as line:
        line.send(b"1")
        _, files, *_ = socket.recv_fds(line, exchange.NOTE, 1)
        os.close(files[0])
        line.recv(exchange.NOTE)


def sums(store, rank):
    Exchange.join(store, rank, 2, PATIENCE).all_reduce(torch.ones(4))


@pytest.mark.parametrize(
    ("rank", "peer"),
    [(1, never_comes), (0, before_its_number), (1, before_the_memory), (0, before_it_meets)],
)
def test_a_peer_that_is_gone_is_told_as_gone(rank, peer):
    store = dist.HashStore()
    thread = threading.Thread(target=peer, args=(store,))
    thread.start()
    with pytest.raises(RuntimeError, match=r"Connection closed by peer: .*group") as caught:
        sums(store, rank)
    thread.join()
    assert kind_of(caught.value, None) == "echo"


def refused(*_):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(("module", "name"), [(os, "memfd_create"), (socket, "socket"), (mmap, "mmap")])
def test_what_the_own_system_refuses_is_no_word_of_a_peer(module, name):
    store, lines = dist.HashStore(), []

    def peer():
        lines.append(calls(store))
        lines[0].send(b"1")

    thread = threading.Thread(target=peer)
    if name != "socket":  # without which no peer can come
        thread.start()
    with patch.object(module, name, refused), pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as caught:
        sums(store, 0)
    assert kind_of(caught.value, None) == "fault"
    for line in lines:
        line.close()


def test_a_file_that_found_no_place_in_the_process_is_told():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.send(b"memory")
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            exchange._file(ours)


def forbidden(name):
    """Return a sum on ranks of which the last may not make what an exchange needs."""
    with patch(name, refused) if dist.get_rank() == 1 else nullcontext():
        group = dist.new_group(backend=gloo.SHARED_GLOO)
    x = torch.arange(gloo.LEAST, dtype=torch.float32) + dist.get_rank()
    dist.all_reduce(x, group=group, async_op=True).wait()
    assert group._exchange is None
    return x


@pytest.mark.parametrize("name", ["os.memfd_create", "socket.socket"])
def test_where_one_rank_may_not_share_memory_gloo_does_it_all(name):
    expected = 2 * torch.arange(gloo.LEAST, dtype=torch.float32) + 1
    assert all(torch.equal(x, expected) for x in run_ranks(forbidden, 2, name))
