"""What splitting a model over two ranks costs and brings: every layout beside one process and beside plain megatron-core.

    python benchmarks/parallel_cost.py                        all layouts in all cases, one thread a rank
    python benchmarks/parallel_cost.py --layout tp2 --layout dp2 --precision bf16 --length 1024
    python benchmarks/parallel_cost.py --write                also into benchmarks/results/parallel_cost.md

Three sides take turns, step by step, each in processes of its own that live as long as a layout is measured: ours on
one rank, ours on two, and megatron-core's GPTModel, local layer spec, DDP and optimizer on two. The peer runs through
the same device port (without it nothing of it runs on a CPU) but with none of our modules, kernels or optimizer, and
its ranks talk through plain gloo. It has no CPU path for sequence and context parallelism; there the peer's column is
empty. All sides train on the same number of tokens a step. The peer's stages have equally many layers, as they come, also
where ours are balanced.

The share of communication is the part of a step in which a rank's thread does not compute: it waits for its peer, or for
bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import page
import torch
import torch.distributed as dist
from setting import LLAMA_25M

from mindspeed_core import megatron
from mindspeed_core.device import BACKENDS, Device
from mindspeed_core.launcher import SURROUNDINGS
from mindspeed_core.models.build import build_model
from mindspeed_core.models.families.llama import LLAMA
from mindspeed_core.models.weights import load_weights, random_tensors
from mindspeed_core.optim.build import OptimConfig, build_optimizer
from mindspeed_core.parallel.data import wrap_data_parallel
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig
from mindspeed_core.precision import DTYPES
from mindspeed_train.step import run_batch
from mindspeed_train.tasks.task import token_loss

SAMPLES = 8  # of a step, over all ranks
CASES = [("bf16", 1024), ("bf16", 256), ("fp32", 256)]  # precision, tokens of a sample


@dataclass(frozen=True)
class Layout:
    """One row: the recipe's sections `parallel` and `optim`, samples per micro batch, and whether the peer can do it."""

    parallel: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    micro: int = 4
    peer: bool = True


ALONE = Layout()
LAYOUTS = {
    "dp2": Layout({"dp": 2}),
    "dp2 distributed": Layout({"dp": 2}, {"distributed": True}),
    "dp2 distributed overlap": Layout(
        {"dp": 2}, {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    ),
    "tp2": Layout({"tp": 2}),
    "tp2 sp": Layout({"tp": 2, "sp": True}, peer=False),
    "tp2 sp coc": Layout({"tp": 2, "sp": True, "collective_matmul": "coc", "coc_chunks": 2}, peer=False),
    "pp2": Layout({"pp": 2}, micro=1),
    "pp2 delayed": Layout({"pp": 2, "delay_weight_gradients": True}, micro=1),
    "pp2 balanced": Layout({"pp": 2, "layers_per_stage": "balanced"}, micro=1),
    "pp2 balanced delayed": Layout({"pp": 2, "layers_per_stage": "balanced", "delay_weight_gradients": True}, micro=1),
    "pp2 vpp2": Layout({"pp": 2, "vpp": 2}, micro=1, peer=False),
    "cp2 ring": Layout({"cp": 2}, peer=False),
    "cp2 ulysses": Layout({"cp": 2, "cp_algorithm": "ulysses"}, peer=False),
}


def batches(layout: Layout, length: int, dp: int) -> list[dict[str, torch.Tensor]]:
    """Return the micro batches of one data-parallel rank."""
    tokens = torch.randint(0, LLAMA_25M["vocab_size"], (layout.micro, length + 1))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "weights": torch.ones(layout.micro, length)}
    return [batch] * (SAMPLES // layout.micro // dp)


def ours(layout: Layout, precision: Any, length: int) -> Callable[[], None]:
    """Return a step of the trainer's own pieces."""
    mesh = Mesh.create(ParallelConfig(**layout.parallel), Device.open("cpu"))
    arch = LLAMA.architecture({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, **LLAMA_25M})
    chunks = build_model(arch, mesh, precision=precision)
    load_weights(chunks, random_tensors(LLAMA, arch, 0), LLAMA, arch, mesh)
    optim = OptimConfig(lr=1e-4, **layout.optim)
    model = wrap_data_parallel(chunks, optim, mesh)
    optimizer = build_optimizer(optim, model, mesh, precision)
    micro_batches = batches(layout, length, mesh.dp.size)

    def step() -> None:
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run_batch(model, micro_batches, mesh, token_loss, train=True)
        optimizer.step()

    return step


def peer(layout: Layout, precision: str, length: int) -> Callable[[], None]:
    """Return a step of megatron-core as its own documentation assembles it."""
    megatron.load(Device.open("cpu"))
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    tp, pp = layout.parallel.get("tp", 1), layout.parallel.get("pp", 1)
    dtype, bf16 = DTYPES[precision], precision == "bf16"
    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=LLAMA_25M["num_hidden_layers"],
        hidden_size=LLAMA_25M["hidden_size"],
        num_attention_heads=LLAMA_25M["num_attention_heads"],
        num_query_groups=LLAMA_25M["num_key_value_heads"],
        ffn_hidden_size=LLAMA_25M["intermediate_size"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=bf16,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model: Any = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=LLAMA_25M["vocab_size"],
        max_sequence_length=length,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    wrapped = Float16Module(config, model) if bf16 else model
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=layout.optim.get("distributed", False),
        overlap_grad_reduce=layout.optim.get("overlap_grad_reduce", False),
        overlap_param_gather=layout.optim.get("overlap_param_gather", False),
    )
    ddp = DistributedDataParallel(config, settings, wrapped)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            clip_grad=1.0,
            bf16=bf16,
            params_dtype=dtype,
            use_distributed_optimizer=settings.use_distributed_optimizer,
            overlap_param_gather=settings.overlap_param_gather,
        ),
        [ddp],
        use_gloo_process_groups=False,
    )
    micro_batches = batches(layout, length, parallel_state.get_data_parallel_world_size())
    positions = torch.arange(length)[None].expand(layout.micro, -1)
    run = get_forward_backward_func()

    def forward(iterator: Any, model: Any) -> tuple[torch.Tensor, Callable]:
        batch = next(iterator)
        out = model(batch["tokens"], positions, None, labels=batch["labels"])
        return out, lambda output: (output.float().mean(), {})

    def step() -> None:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        run(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=[ddp],
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=layout.micro,
            forward_only=False,
        )
        optimizer.step()

    return step


SIDES: dict[str, Callable[[Layout, Any, int], Callable[[], None]]] = {"ours": ours, "peer": peer}


def rank(
    side: str, layout: Layout, case: tuple[str, int], number: int, world: int, store: str, pipe: Connection
) -> None:
    """One rank of one side: a step whenever the pipe says so; answer with its wall and its thread's own seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(number)
    if side == "peer":
        megatron.MENDS = tuple(mend for mend in megatron.MENDS if mend.module == "megatron.core.jit")
    backend = "gloo" if side == "peer" else BACKENDS["cpu"]
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=number, world_size=world, timeout=timedelta(minutes=5)
    )
    step = SIDES[side](layout, *case)
    step()
    pipe.send("ready")
    while pipe.recv():
        dist.barrier()
        wall, busy = time.perf_counter(), time.thread_time()
        step()
        pipe.send((time.perf_counter() - wall, time.thread_time() - busy))
    os._exit(0)  # destructors would wait for the other rank


class Side:
    """The processes of one side."""

    def __init__(self, side: str, layout: Layout, case: tuple[str, int], world: int) -> None:
        context = multiprocessing.get_context("spawn")
        store = tempfile.mktemp(prefix="parallel-cost-")
        self.pipes, self.processes = [], []
        for number in range(world):
            mine, theirs = context.Pipe()
            arguments = (side, layout, case, number, world, store, theirs)
            process = context.Process(target=rank, args=arguments, daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        for pipe in self.pipes:
            assert pipe.recv() == "ready"

    def step(self) -> tuple[float, float]:
        """Return the seconds of a step and the share of them in which its ranks did not compute."""
        for pipe in self.pipes:
            pipe.send(True)
        times = [pipe.recv() for pipe in self.pipes]
        wall = max(time for time, _ in times)
        return wall, 1 - statistics.mean(busy for _, busy in times) / wall

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(False)
        for process in self.processes:
            process.join()


def measure(name: str, alone: Side, case: tuple[str, int], rounds: int) -> str:
    """Return the row of one layout: medians over rounds in which all sides ran one after the other."""
    layout, (precision, length) = LAYOUTS[name], case
    sides = {"alone": alone, "ours": Side("ours", layout, case, 2)}
    if layout.peer:
        sides["peer"] = Side("peer", layout, case, 2)
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for turn in range(rounds):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for side in order:
            found[side].append(sides[side].step())
    for side in ("ours", "peer"):
        if side in sides:
            sides[side].close()
    over = {
        side: statistics.median(
            theirs / mine for (theirs, _), (mine, _) in zip(found[side], found["ours"], strict=True)
        )
        for side in found
    }
    tokens = SAMPLES * length / min(wall for wall, _ in found["ours"])
    waiting = statistics.median(share for _, share in found["ours"])
    beside = f"{over['peer']:.2f}" if "peer" in over else ""
    return f"| {name} | {precision} | {length} | {tokens:.0f} | {over['alone']:.2f} | {beside} | {waiting:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--precision", choices=["bf16", "fp32"], action="append")
    parser.add_argument("--length", type=int, choices=sorted({length for _, length in CASES}), action="append")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    cases = [
        (precision, length)
        for precision, length in CASES
        if precision in (args.precision or [precision]) and length in (args.length or [length])
    ]
    if not cases:
        parser.error(f"none of the cases is that: {CASES}")
    os.environ.update(SURROUNDINGS)  # threads and allocator, read when the ranks start
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    lines = [
        "| layout | precision | tokens a sample | tokens/s | over one process | over megatron-core on two ranks | waiting for the other rank |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for case in cases:
        alone = Side("ours", ALONE, case, 1)
        for name in args.layout or LAYOUTS:
            lines.append(measure(name, alone, case, args.rounds))
            print(lines[-1], flush=True)
        alone.close()
    if args.write:
        about = (
            f"`{' '.join(['python', *sys.argv])}`: a Llama of 25 million "
            f"parameters, {SAMPLES} samples a step, one thread a rank, {page.machine()}, "
            f"the peer on gloo, ours on the backend that stands on it. tokens/s is the best of {args.rounds} rounds, the "
            "ratios are medians over rounds in which all sides ran one after the other. See the script for what the peer "
            "is and where it has no such layout."
        )
        page.write("parallel_cost", "What splitting over two ranks costs", about, lines)


if __name__ == "__main__":
    main()
