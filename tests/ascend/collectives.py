"""What `test_stubs` runs on four ranks: every way in which they talk, with the results as lists."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def everything() -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = (torch.arange(4.0) + 10 * rank).to("npu")
    results: dict[str, Tensor] = {}
    for name, op in {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "avg": dist.ReduceOp.AVG}.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            results[f"{name} {dtype}"] = mine.to(dtype, copy=True)
            dist.all_reduce(results[f"{name} {dtype}"], op)
    results["integers"] = torch.tensor([rank, 1], device="npu")
    dist.all_reduce(results["integers"])
    results["gathered"] = mine.new_empty(4 * world)
    dist.all_gather_into_tensor(results["gathered"], mine)
    uneven = [mine.new_empty(i + 1) for i in range(world)]
    dist.all_gather(uneven, mine.new_full((rank + 1,), rank))
    results["uneven"] = torch.cat(uneven)
    results["scattered"] = mine.new_empty(1)
    dist.reduce_scatter_tensor(results["scattered"], mine)
    results["broadcast"] = mine.clone()
    dist.broadcast(results["broadcast"], src=2)
    results["dealt"] = torch.empty_like(mine)
    dist.all_to_all_single(results["dealt"], mine)
    # rank r sends s + 1 numbers to rank s
    sizes = [i + 1 for i in range(world)]
    results["dealt unevenly"] = mine.new_empty(world * (rank + 1))
    dist.all_to_all_single(results["dealt unevenly"], mine.new_full((sum(sizes),), rank), [rank + 1] * world, sizes)
    results["from before"] = torch.empty_like(mine)
    ahead, behind = (rank + 1) % world, (rank - 1) % world
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, mine, ahead), dist.P2POp(dist.irecv, results["from before"], behind)]
    )
    for work in works:
        work.wait()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    results["half"] = mine.clone()
    dist.all_reduce(results["half"], group=groups[rank % 2])
    return {name: tensor.float().tolist() for name, tensor in results.items()}
