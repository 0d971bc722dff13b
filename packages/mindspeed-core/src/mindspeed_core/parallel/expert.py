"""Expert parallelism: every rank holds some of the experts, and tokens travel to those that compute them.

ep=2, four experts, each token meets one of them

    rank 0 holds experts 0 1, tokens a b c        rank 1 holds experts 2 3, tokens d e
    all-to-all   c -> rank 1                      d -> rank 0             only what is asked for travels
    all-gather   everything -> everywhere         then each sums what its own experts say of whom, and keeps its tokens

With expert tensor parallelism the feed-forward width of an expert is cut too: the ranks of that group gather each other's
tokens before, and add up their partial results after. Both dispatchers are made of `travel`: a collective whose gradient
is the opposite collective, and which may run while something else is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mindspeed_core.kernels import collective
from mindspeed_core.kernels.permute import Permutation

Collective = Callable[[Tensor], tuple[Tensor, Any]]  # contiguous tensor -> (where the result will be, its handle)
Meanwhile = Callable[[], None]


@dataclass(frozen=True)
class ExpertGroups:
    """The groups around the experts of one rank, and which experts it holds."""

    count: int  # experts of the layer
    ep: dist.ProcessGroup  # its ranks hold different experts
    etp: dist.ProcessGroup  # its ranks hold slices of the same experts
    both: dist.ProcessGroup  # etp x ep; neighbours differ in etp

    @property
    def local(self) -> range:
        """The experts that this rank holds, counted over the layer."""
        each = self.count // self.ep.size()
        return range(self.ep.rank() * each, (self.ep.rank() + 1) * each)


@dataclass(frozen=True)
class Chosen:
    """The experts of this rank's tokens. An expert of `count` stands for a pair that was dropped."""

    experts: Tensor  # int64 [t, k]
    weights: Tensor  # fp32 [t, k]


@dataclass(frozen=True)
class Dispatched:
    """The rows that this rank's experts compute, and the way back."""

    rows: Tensor  # [r, h], sorted by expert
    counts: tuple[int, ...]  # rows of each local expert
    combine: Callable[[Tensor], Tensor]  # what the experts say [r, h] -> the result for this rank's tokens [t, h]


def all_to_all(
    tokens: Tensor,
    chosen: Chosen,
    groups: ExpertGroups,
    permute: Permutation,
    *,
    capacity: int | None = None,
    meanwhile: Meanwhile | None = None,
) -> Dispatched:
    """Send every token [t, h] to the ranks of its experts, and nowhere else.

    With `capacity` every expert gets exactly so many rows from each rank, zeros where there are fewer tokens.
    `meanwhile` is called while the tokens travel.
    """
    sizes = _sizes(chosen.experts, groups.count, groups.both)  # [ranks of both, experts]
    ranks, etp = groups.ep.size(), groups.etp.size()
    own = sizes[groups.both.rank()]
    rows, places = permute.sort(tokens, chosen.experts, sum(own))
    if capacity is not None:
        seats = _seats(own, capacity, tokens.device)
        rows = rows.new_zeros(groups.count * capacity, rows.shape[1]).index_copy(0, seats, rows)
        own, sizes = [capacity] * groups.count, [[capacity] * groups.count for _ in sizes]
    each = groups.count // ranks
    local = groups.local
    # what each rank of the ep group that I am in sends here, for each of my experts
    mine = [sizes[source * etp + groups.etp.rank()][local.start : local.stop] for source in range(ranks)]
    sent = [sum(own[rank * each : (rank + 1) * each]) for rank in range(ranks)]
    received = [sum(counts) for counts in mine]
    rows = travel(rows, _exchange(groups.ep, sent, received), _exchange(groups.ep, received, sent), meanwhile)
    runs = mine
    if etp > 1:
        runs = [
            sizes[source * etp + slice_][local.start : local.stop] for slice_ in range(etp) for source in range(ranks)
        ]
        gathered = [sum(map(sum, runs[slice_ * ranks : (slice_ + 1) * ranks])) for slice_ in range(etp)]
        rows = _gather(rows, gathered, groups.etp)
    order = _by_expert(runs, tokens.device)
    if order is not None:
        rows = rows.index_select(0, order)

    def combine(out: Tensor) -> Tensor:
        if order is not None:
            out = out.index_select(0, order.argsort())
        if etp > 1:
            out = _sum(out, gathered, groups.etp)
        out = travel(out, _exchange(groups.ep, received, sent), _exchange(groups.ep, sent, received))
        if capacity is not None:
            out = out.index_select(0, seats)
        return permute.back(out, places, chosen.weights)

    return Dispatched(rows, tuple(map(sum, zip(*runs, strict=True))), combine)


def all_gather(
    tokens: Tensor,
    chosen: Chosen,
    groups: ExpertGroups,
    permute: Permutation,
    *,
    capacity: int | None = None,
    meanwhile: Meanwhile | None = None,
) -> Dispatched:
    """Give every rank all tokens; each sums what its own experts say, and the sums are scattered back.

    The arguments are those of `all_to_all`; nothing is padded to a capacity, since every rank sees all tokens anyway.
    """
    group, local = groups.both, groups.local
    totals = _gathered(torch.tensor([len(tokens)], device=tokens.device), group).flatten().tolist()
    everything = _gather(tokens, totals, group, meanwhile)
    experts = _gather(chosen.experts, totals, group)
    weights = _gather(chosen.weights, totals, group)
    flat = experts.flatten()
    pairs = ((flat >= local.start) & (flat < local.stop)).nonzero().squeeze(1)
    pairs = pairs[flat[pairs].argsort(stable=True)]
    sources = pairs // max(1, experts.shape[1])
    counts = (flat[pairs] - local.start).bincount(minlength=len(local)).tolist()

    def combine(out: Tensor) -> Tensor:
        # fp32: the weights are, and a token's experts on this rank are summed before they are rounded
        weighted = out * weights.flatten().index_select(0, pairs).unsqueeze(-1)
        total = weighted.new_zeros(everything.shape).index_add(0, sources, weighted)
        return _sum(total.to(out.dtype), totals, group)

    return Dispatched(everything.index_select(0, sources), tuple(counts), combine)


DISPATCHERS: dict[str, Callable[..., Dispatched]] = {"alltoall": all_to_all, "allgather": all_gather}


def travel(x: Tensor, there: Collective | None, back: Collective | None, meanwhile: Meanwhile | None = None) -> Tensor:
    """Return what the collective `there` makes of x; the gradient goes through `back`. None: a group of one rank.

    `meanwhile` is called between the start of the collective and its end; in the backward pass what it computed is
    differentiated between the start of the way back and its end.
    """
    if there is None or back is None:
        if meanwhile is not None:
            meanwhile()
        return x
    flight = _Flight()
    out = _Depart.apply(x, there, flight)
    if meanwhile is not None:
        meanwhile()
    return _Arrive.apply(out, back, flight)


class _Flight:
    """A collective that is under way: the handle of each direction, and the gradient that is coming back."""

    there: Any = None
    back: Any = None
    grad: Tensor | None = None


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Collective, flight: _Flight) -> Tensor:
        ctx.flight = flight
        out, flight.there = there(x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        flight = ctx.flight
        flight.back.wait()
        arrived, flight.grad = flight.grad, None
        return arrived, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, back: Collective, flight: _Flight) -> Tensor:
        ctx.back, ctx.flight = back, flight
        flight.there.wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.flight.grad, ctx.flight.back = ctx.back(grad.contiguous())
        return grad, None, None  # of the right shape only; what counts arrives at _Depart


def _exchange(group: dist.ProcessGroup, sent: Sequence[int], received: Sequence[int]) -> Collective | None:
    """Rows change places: sent[i] of mine go to rank i, received[i] of its come here."""
    if group.size() == 1:
        return None

    def start(x: Tensor) -> tuple[Tensor, Any]:
        out = x.new_empty(sum(received), *x.shape[1:])
        work = dist.all_to_all_single(out, x, list(received), list(sent), group=group, async_op=True)
        return out, _Kept(work, x)

    return start


def _gathering(group: dist.ProcessGroup) -> Collective | None:
    if group.size() == 1:
        return None

    def start(x: Tensor) -> tuple[Tensor, Any]:
        out = x.new_empty(group.size() * len(x), *x.shape[1:])
        return out, _Kept(collective.all_gather(out, x, group=group, async_op=True), x)

    return start


def _scattering(group: dist.ProcessGroup) -> Collective | None:
    if group.size() == 1:
        return None

    def start(x: Tensor) -> tuple[Tensor, Any]:
        out = x.new_empty(len(x) // group.size(), *x.shape[1:])
        return out, _Kept(collective.reduce_scatter(out, x, group=group, async_op=True), x)

    return start


@dataclass
class _Kept:
    """The handle of a collective, with what it reads: that must live until it ends."""

    work: Any
    reads: Tensor | None

    def wait(self) -> None:
        self.work.wait()
        self.reads = None


def _gather(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup, meanwhile: Meanwhile | None = None) -> Tensor:
    """Return the rows of all ranks, in rank order; rank i has sizes[i]. Gradients are summed over the ranks."""
    most = max(sizes)
    padded = F.pad(x, (0, 0, 0, most - len(x)))  # not every backend gathers uneven sizes
    out = travel(padded, _gathering(group), _scattering(group), meanwhile)
    if min(sizes) == most:
        return out
    return torch.cat([rows[:size] for rows, size in zip(out.split(most), sizes, strict=True)])


def _sum(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Return this rank's rows of the sum of x [sum(sizes), h] over the ranks; the opposite of `_gather`."""
    most = max(sizes)
    if min(sizes) < most:
        x = torch.cat([F.pad(rows, (0, 0, 0, most - len(rows))) for rows in x.split(list(sizes))])
    return travel(x, _scattering(group), _gathering(group))[: sizes[group.rank()]]


def _sizes(experts: Tensor, count: int, group: dist.ProcessGroup) -> list[list[int]]:
    """Return how many pairs each rank of the group has for each expert; on the host, which must know what to send."""
    own = experts.flatten().bincount(minlength=count + 1)[:count]
    return _gathered(own, group).tolist()


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return x[None]
    out = x.new_empty(group.size() * len(x))
    collective.all_gather(out, x, group=group)
    return out.view(group.size(), -1)


def _by_expert(runs: Sequence[Sequence[int]], device: torch.device) -> Tensor | None:
    """Return the order that brings rows together by expert; they lie in runs[source][expert]. None: they do already."""
    sources, experts = len(runs), len(runs[0])
    if sources == 1 or experts == 1:
        return None
    lengths = torch.tensor(runs).flatten()
    expert = torch.arange(experts).repeat(sources).repeat_interleave(lengths)
    return expert.argsort(stable=True).to(device)


def _seats(counts: Sequence[int], capacity: int, device: torch.device) -> Tensor:
    """Return where rows sorted by expert sit when each expert has `capacity` seats."""
    sizes = torch.tensor(counts)
    expert = torch.arange(len(counts)).repeat_interleave(sizes)
    place = torch.arange(len(expert)) - (sizes.cumsum(0) - sizes)[expert]
    return (expert * capacity + place).to(device)
