"""The collectives through shared memory are those of plain gloo: bit for bit on two ranks, alike on all ranks of more."""

from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from mindspeed_core.kernels.collective import all_gather, reduce_scatter
from mindspeed_core.parallel import gloo
from tests.harness import RankError, run_ranks

M = 1000  # numbers of one rank's share: several slots, and a last one that is not full
SLOT, LEAST = 1536, 512  # bytes


def groups():
    """Return plain gloo, and ours with slots as small as the tensors of a test."""
    plain = dist.new_group(backend="gloo")

    def create(store, rank, size, timeout):
        return gloo.SharedGloo(store, rank, size, timeout, slot=SLOT, least=LEAST)

    dist.Backend.register_backend("small_slots", create, devices=["cpu"])
    return plain, dist.new_group(backend="small_slots")


def numbers(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(*shape, generator=generator).to(dtype)


def all_reduced(group, dtype, **how):
    x = numbers(dist.get_world_size() * M, dtype=dtype)
    return x, dist.all_reduce(x, group=group, **how)


def scattered(group, dtype, **how):
    out, x = torch.empty(M, dtype=dtype), numbers(dist.get_world_size() * M, dtype=dtype)
    return out, reduce_scatter(out, x, group=group, **how)


def scattered_in_place(group, dtype, **how):
    x = numbers(dist.get_world_size() * M, dtype=dtype)
    out = x.view(-1, M)[dist.get_rank()]
    return out, reduce_scatter(out, x, group=group, **how)


def gathered(group, dtype, **how):
    out = torch.empty(dist.get_world_size() * M, dtype=dtype)
    return out, all_gather(out, numbers(M, dtype=dtype), group=group, **how)


def gathered_in_place(group, dtype, **how):
    out = numbers(dist.get_world_size() * M, dtype=dtype)
    return out, all_gather(out, out.view(-1, M)[dist.get_rank()], group=group, **how)


def exchanged(group, dtype, **how):
    out, x = torch.empty(dist.get_world_size(), M, dtype=dtype), numbers(dist.get_world_size(), M, dtype=dtype)
    return out, dist.all_to_all_single(out, x, group=group, **how)


COLLECTIVES = (all_reduced, scattered, scattered_in_place, gathered, gathered_in_place, exchanged)


def compared():
    """Return the results of plain gloo and ours, waited for at once and later."""
    plain, ours = groups()
    found = []
    for dtype in gloo.FLOATS:
        begun = [collective(ours, dtype, async_op=True) for collective in COLLECTIVES]
        here = [collective(ours, dtype)[0] for collective in COLLECTIVES]  # behind those that go on beside
        there = [collective(plain, dtype)[0] for collective in COLLECTIVES]
        for _, work in reversed(begun):
            work.wait()
        assert all(work.is_completed() for _, work in begun)
        found.append((there, [out for out, _ in begun], here))
    assert ours._exchange is not None
    return found


def test_two_ranks_get_what_gloo_gives_bit_for_bit():
    for there, beside, here in run_ranks(compared, 2)[0]:
        for expected, *ours in zip(there, beside, here, strict=True):
            assert all(torch.equal(expected, x) for x in ours)


def test_three_ranks_get_the_sums_of_gloo_and_all_the_same():
    ranks = run_ranks(compared, 3)
    for there, beside, here in ranks[2]:
        for expected, *ours in zip(there, beside, here, strict=True):
            tolerance = 4 * torch.finfo(expected.dtype).eps
            for x in ours:
                torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)
    sums = [[here[0] for _, _, here in found] for found in ranks]
    assert all(torch.equal(x, y) for other in sums[1:] for x, y in zip(sums[0], other, strict=True))


def left_to_gloo():
    """What is no large floating-point sum in one block is gloo's own, errors included."""
    _, ours = groups()
    rank = dist.get_rank()
    large = torch.full((M,), rank)
    dist.all_reduce(large, group=ours)
    most = torch.full((M,), float(rank))
    dist.all_reduce(most, dist.ReduceOp.MAX, group=ours)
    empty = torch.empty(0)
    dist.all_reduce(empty, group=ours)
    turned = torch.full((M, 2), float(rank)).T
    dist.all_reduce(turned, group=ours)
    share = (rank + 1) * M
    uneven = torch.empty(2 * share)
    dist.all_to_all_single(uneven, most.repeat(3), [share] * 2, [M, 2 * M], group=ours)
    assert torch.equal(uneven, torch.ones(2 * share))
    with pytest.raises((RuntimeError, ValueError)):
        all_gather(torch.empty(M), numbers(M), group=ours)
    alone = [dist.new_group([place], backend="small_slots") for place in range(2)][rank]
    own = numbers(M)
    dist.all_reduce(own, group=alone)
    assert torch.equal(own, numbers(M))
    assert ours._exchange is None
    assert alone._exchange is None
    return large[0].item(), most[0].item(), turned[0, 0].item()


def test_what_is_not_for_shared_memory_goes_through_gloo():
    assert run_ranks(left_to_gloo, 2) == [(1, 1.0, 1.0)] * 2


def coalesced():
    plain, ours = groups()
    results = []
    for group in (plain, ours):
        x, y = numbers(2 * M), numbers(8)
        with dist._coalescing_manager(group, async_ops=True) as work:
            dist.all_reduce(x, group=group)
            dist.all_reduce(y, group=group)
        work.wait()
        outs = torch.empty(2 * M), torch.empty(8)
        with dist._coalescing_manager(group):
            for out in outs:
                all_gather(out, numbers(len(out) // 2), group=group)
        parts = torch.empty(M), torch.empty(4)
        with dist._coalescing_manager(group):
            for part in parts:
                reduce_scatter(part, numbers(2 * len(part)), group=group)
        results.append([x, y, *outs, *parts])
    assert ours._exchange is not None
    return results


def test_several_collectives_as_one_are_those_one_by_one():
    plain, ours = run_ranks(coalesced, 2)[0]
    assert all(torch.equal(x, y) for x, y in zip(plain, ours, strict=True))


def under_autograd():
    """Autograd hears no more of what is written than with gloo, and tensors of inference mode can be written."""
    _, ours = groups()
    w = torch.ones(M, requires_grad=True)
    y = w * 2
    z = y * y  # keeps y
    dist.all_reduce(y, group=ours, async_op=True).wait()
    z.sum().backward()
    with torch.inference_mode():
        x = torch.ones(M)
        dist.all_reduce(x, group=ours, async_op=True).wait()
    dist.all_reduce(x, group=ours)
    return y[0].item(), w.grad[0].item(), x[0].item()


def test_autograd_and_inference_mode_do_not_mind():
    assert run_ranks(under_autograd, 2) == [(4.0, 16.0, 4.0)] * 2


def out_of_step():
    _, ours = groups()
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(2 * M), group=ours)
    else:
        all_gather(torch.ones(2 * M), torch.ones(M), group=ours)


def test_ranks_that_came_for_different_things_are_told():
    told = r"rank \d of the group is in all_\w+ of \[384\] torch.float32, rank \d in all_\w+ of \[384\] torch.float32"
    with pytest.raises(RankError, match=told):
        run_ranks(out_of_step, 2)


def late():
    _, ours = groups()
    dist.all_reduce(torch.ones(M), group=ours)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.1), ours)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="Timed out waiting 100ms for rank 1 of the group"):
            dist.all_reduce(torch.ones(M), group=ours)
    dist.barrier()


def test_a_rank_waits_as_long_as_its_group_does():
    run_ranks(late, 2)


def apart():
    with patch.object(gloo, "machine", lambda: f"machine of {dist.get_rank()}"):
        _, ours = groups()
    x = torch.ones(M)
    dist.all_reduce(x, group=ours, async_op=True).wait()
    assert ours._exchange is None
    return x[0].item()


def test_ranks_of_two_machines_use_gloo():
    assert run_ranks(apart, 2) == [2.0] * 2


def test_no_collective_is_inherited():
    """One that is asks gloo for a lock while it holds the interpreter's: from time to time both wait for ever."""
    words = ("all", "reduce", "gather", "scatter", "broadcast", "send", "recv", "barrier")
    collectives = {name for name in vars(dist.ProcessGroup) if any(word in name for word in words)}
    assert collectives - set(vars(gloo.SharedGloo)) == {"monitored_barrier"}  # which torch calls on plain gloo alone
