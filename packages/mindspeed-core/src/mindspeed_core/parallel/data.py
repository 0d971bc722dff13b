"""Data parallelism: copies of the model on different micro batches, whose gradients are summed.

    rank          dp 0            dp 1
    micro batch   0, 2, 4 ...     1, 3, 5 ...      every copy adds its sums of the loss into fp32 `main_grad`
    then          sum over dp, divided once by the number of tokens of the whole global batch

Dividing once, by the tokens of all, is what makes the gradient that of one process, whatever the split and however
long the samples are.

Either collective can run beside the computation: gradients are summed bucket by bucket while the last backward goes on, and
what the distributed optimizer has updated on one rank is gathered layer by layer while the next forward goes on.
"""

from __future__ import annotations

from typing import Any

from mindspeed_core.optim.build import OptimConfig
from mindspeed_core.parallel.mesh import Mesh


def wrap_data_parallel(chunks: list[Any], config: OptimConfig, mesh: Mesh) -> list[Any]:
    """Return the model's chunks with their gradient buffers, ready for `build_optimizer` and the schedules."""
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads

    from mindspeed_core.parallel import weight_gradients
    from mindspeed_core.parallel.model_copy import ModelCopy

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not config.bf16_grads,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        use_distributed_optimizer=config.distributed,
    )
    if not config.fused_accumulation:
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.adds_apart = True
    if mesh.config.delay_weight_gradients:
        for chunk in chunks:
            weight_gradients.delay(chunk)
    wrapped = [
        ModelCopy(chunk.config, settings, chunk, disable_bucketing=place > 0, pg_collection=mesh.groups)
        for place, chunk in enumerate(chunks)
    ]

    if config.overlap_grad_reduce:
        # until the last micro batch a backward must not start the sum; the schedules ask for a list where there are chunks
        silent = [chunk.no_sync for chunk in wrapped]
        told: Any = wrapped[0].config
        told.no_sync_func = silent if len(silent) > 1 else silent[0]

    def finalize(*args: Any, **kwargs: Any) -> None:
        finalize_model_grads(*args, **kwargs)
        for chunk in chunks:
            chunk.finish_batch()

    for chunk in chunks:
        assert chunk.config.calculate_per_token_loss, "the loss must be a sum over tokens"
        chunk.config.finalize_model_grads_func = finalize
    return wrapped


def gather_parameters(chunks: list[Any]) -> None:
    """Make every rank hold what the optimizer has updated elsewhere; collective. Needed before weights are read, not trained."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
