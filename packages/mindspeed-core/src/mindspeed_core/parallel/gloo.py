"""The collectives of CPU ranks: torch's gloo, and between ranks of one machine the memory they share.

A backend of torch.distributed, so that megatron-core's collectives run on it as ours do. It means what gloo means: what is
not a large floating-point tensor in one block, and what leaves the machine, is given to gloo.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import timedelta
from functools import wraps
from queue import SimpleQueue
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_core.parallel.exchange import SLOT, Exchange, machine

SHARED_GLOO = "gloo_shared"  # its name in torch
LEAST = 1 << 14  # bytes from which shared memory is the faster way
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SUM = dist.ReduceOp.SUM
ProcessGroup: Any = dist.ProcessGroup  # whose stub has not all the forms in which it is called


def _called(collective: str) -> Callable[[Callable[..., dist.Work]], Callable[..., dist.Work]]:
    """Let a method note what the handle that it returns belongs to."""

    def noting(method: Callable[..., dist.Work]) -> Callable[..., dist.Work]:
        @wraps(method)
        def begin(self: SharedGloo, *given: Any, **named: Any) -> dist.Work:
            work = method(self, *given, **named)
            self._begun[work] = collective
            return work

        return begin

    return noting


def _gloos(name: str, collective: str | None = None) -> Callable[..., dist.Work]:
    """Return a method that gives everything to gloo."""

    @_called(collective or name)
    def method(self: SharedGloo, *given: Any, **named: Any) -> dist.Work:
        return getattr(self._gloo, name)(*given, **named)

    return method


class SharedGloo(ProcessGroup):
    """A group of ranks. Its methods have the names and arguments with which torch.distributed calls them."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: timedelta, *, slot: int = SLOT, least: int = LEAST
    ) -> None:
        super().__init__(rank, size)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._gloo._set_sequence_number_for_group()
        self._set_default_backend(ProcessGroup.BackendType.GLOO)
        self._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, self._gloo)
        self._store, self._slot, self._least = dist.PrefixStore("exchange", store), slot, least
        self._store.set(f"machine {rank}", machine())
        self._together: bool | None = None
        self._exchange: Exchange | None = None
        self._lane = _Lane()
        self._begun: WeakKeyDictionary[dist.Work, str] = WeakKeyDictionary()

    def begun(self, work: Any) -> str | None:
        """Return the collective that a handle belongs to; None for what is no handle of this group."""
        return self._begun.get(work)

    @_called("all_reduce")
    def allreduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        (x,) = tensors
        if opts.reduceOp != SUM or not self._takes(x):
            return self._gloo.allreduce(tensors, opts)
        return self._do(opts, lambda exchange: exchange.all_reduce(_flat(x)))

    @_called("reduce_scatter")
    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any) -> dist.Work:
        if opts.reduceOp != SUM or not self._takes(input, output, self.size()):
            return self._gloo._reduce_scatter_base(output, input, opts)
        return self._do(opts, lambda exchange: exchange.reduce_scatter(_flat(output), self._rows(input)))

    @_called("all_gather")
    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any) -> dist.Work:
        if not self._takes(output, input, self.size()):
            return self._gloo._allgather_base(output, input, opts)
        return self._do(opts, lambda exchange: exchange.all_gather(self._rows(output), _flat(input)))

    @_called("all_to_all")
    def alltoall_base(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any
    ) -> dist.Work:
        if output_splits or input_splits or not self._takes(output, input):
            return self._gloo.alltoall_base(output, input, output_splits, input_splits, opts)
        return self._do(opts, lambda exchange: exchange.all_to_all(self._rows(output), self._rows(input)))

    @_called("all_reduce")
    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        each = dist.AllreduceOptions()
        for option in ("reduceOp", "timeout", "asyncOp"):
            if hasattr(each, option):
                setattr(each, option, getattr(opts, option))
        return _Several(self.allreduce([x], each) for x in tensors)

    @_called("reduce_scatter")
    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> dist.Work:
        return _Several(self._reduce_scatter_base(*pair, opts) for pair in zip(outputs, inputs, strict=True))

    @_called("all_gather")
    def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> dist.Work:
        return _Several(self._allgather_base(*pair, opts) for pair in zip(outputs, inputs, strict=True))

    # An inherited method would hold the interpreter's lock while it asks gloo for one of its own, behind which a thread of
    # gloo may wait for the interpreter's.
    allgather = _gloos("allgather", "all_gather")
    allgather_coalesced = _gloos("allgather_coalesced", "all_gather")
    alltoall = _gloos("alltoall", "all_to_all")
    barrier = _gloos("barrier")
    broadcast = _gloos("broadcast")
    gather = _gloos("gather")
    recv = _gloos("recv")
    recv_anysource = _gloos("recv_anysource")
    reduce = _gloos("reduce")
    reduce_scatter = _gloos("reduce_scatter")
    scatter = _gloos("scatter")
    send = _gloos("send")

    # what newer versions of torch call them
    reduce_scatter_single = _reduce_scatter_base
    all_gather_single = _allgather_base
    all_to_all_single = alltoall_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def shutdown(self) -> None:
        self._lane.close()
        if self._exchange is not None:
            self._exchange.close()
        super().shutdown()

    def _takes(self, whole: Tensor, other: Tensor | None = None, times: int = 1) -> bool:
        """Whether the exchange takes tensors, of which `whole` is `times` as long as `other`: every rank answers alike.

        What gloo would refuse is left to gloo to refuse.
        """
        return (
            _in_one_block(whole)
            and whole.nbytes >= self._least
            and whole.dtype in FLOATS
            and (other is None or self._fit(whole, other, times))
            and self._on_one_machine()
        )

    def _fit(self, whole: Tensor, other: Tensor, times: int) -> bool:
        lengths = whole.numel() % self.size() == 0 and other.numel() * times == whole.numel()
        return lengths and other.dtype is whole.dtype and _in_one_block(other)

    def _on_one_machine(self) -> bool:
        if self._together is None:
            machines = [self._store.get(f"machine {rank}") for rank in range(self.size())]
            self._together = len(machines) > 1 and len(set(machines)) == 1
        return self._together

    def _do(self, opts: Any, action: Callable[[Exchange], None]) -> dist.Work:
        def act() -> None:
            seconds = self._gloo.options._timeout.total_seconds()
            if self._exchange is None:  # formed by the first that needs it: most groups of a mesh never do
                self._exchange = Exchange.join(self._store, self.rank(), self.size(), seconds, slot=self._slot)
            self._exchange.seconds = seconds
            action(self._exchange)

        return self._lane.run(act, beside=getattr(opts, "asyncOp", True))  # older versions of torch do not tell

    def _rows(self, x: Tensor) -> Tensor:
        return _flat(x).view(self.size(), -1)


class _Lane:
    """Acts in the order in which it is asked to: in the caller if that waits and nothing is before it, else in a thread."""

    def __init__(self) -> None:
        self._works: SimpleQueue[_Work | None] = SimpleQueue()
        self._last: _Work | None = None
        self._thread: threading.Thread | None = None

    def run(self, act: Callable[[], None], *, beside: bool) -> _Work:
        work = _Work(act)
        if not beside and (self._last is None or self._last.is_completed()):
            work.run()
            return work
        if self._thread is None:  # a daemon: a rank that fails must not wait here for its peers
            self._thread = threading.Thread(target=self._serve, name="collectives", daemon=True)
            self._thread.start()
        self._works.put(work)
        self._last = work
        return work

    def close(self) -> None:
        self._works.put(None)

    def _serve(self) -> None:
        for work in iter(self._works.get, None):
            work.run()


class _Work(dist.Work):
    """One collective, to be waited for."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act = act
        self._result: Future[bool] = Future()

    def run(self) -> None:
        try:
            with torch.inference_mode():
                self._act()
        except Exception as error:
            self._result.set_exception(error)
        else:
            self._result.set_result(True)
        del self._act  # and the tensors with it

    def wait(self, timeout: timedelta | None = None) -> bool:
        return self._result.result(None if timeout is None else timeout.total_seconds())

    def is_completed(self) -> bool:
        return self._result.done()


class _Several(dist.Work):
    """Several collectives, to be waited for together."""

    def __init__(self, works: Iterable[dist.Work]) -> None:
        super().__init__()
        self._works = list(works)

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def _in_one_block(x: Tensor) -> bool:
    return x.layout is torch.strided and x.is_contiguous()


def _flat(x: Tensor) -> Tensor:
    return x.data.view(-1)  # as with gloo, autograd does not hear of what is written


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> SharedGloo:
    return SharedGloo(store, rank, size, timeout)


dist.Backend.register_backend(SHARED_GLOO, _create, devices=["cpu"])
