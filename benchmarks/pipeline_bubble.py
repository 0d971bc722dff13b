"""The bubble of the pipeline schedules: simulated, and measured in a real run on two ranks of this machine.

    python benchmarks/pipeline_bubble.py               a Llama of 25M parameters, 1F1B and chunks
    python benchmarks/pipeline_bubble.py --write       also into benchmarks/results/pipeline_bubble.md

Every forward and backward of every stage is timed where Megatron's schedule calls it. Five bubbles are compared:

- closed form: (pp - 1) / (micro batches * vpp), all stages alike;
- simulated from the mean time of a forward and of a backward of each chunk, as one would predict it;
- simulated from the time that each single piece really took;
- simulated from these, the median time of a message and that of what the schedule does between two pieces;
- measured, from the start of the first piece to the end of the last one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import page
import torch
import torch.distributed as dist
import torch.multiprocessing
from setting import LLAMA_25M, surround

from mindspeed_core.device import BACKENDS, Device
from mindspeed_core.models.build import build_model
from mindspeed_core.models.families import family_of
from mindspeed_core.models.weights import load_weights, random_tensors
from mindspeed_core.optim.build import OptimConfig
from mindspeed_core.parallel.data import wrap_data_parallel
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig
from mindspeed_core.parallel.pipeline import Placement
from mindspeed_core.parallel.schedule import Piece, Span, Timeline, needs, pieces, simulate
from mindspeed_train.step import run_batch
from mindspeed_train.tasks.task import token_loss

MODEL = {"architectures": ["LlamaForCausalLM"], **LLAMA_25M}
ROWS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("1F1B", {"pp": 2}, 2),
    ("1F1B", {"pp": 2}, 8),
    ("1F1B, balanced", {"pp": 2, "layers_per_stage": "balanced"}, 8),
    ("2 chunks", {"pp": 2, "vpp": 2}, 2),
    ("2 chunks", {"pp": 2, "vpp": 2}, 8),
    ("4 chunks", {"pp": 2, "vpp": 4}, 8),
)


class Clock:
    """Stands where Megatron's schedules ask for timers: it notes when each forward and backward began and ended."""

    def __init__(self) -> None:
        self.spans: dict[str, list[list[float]]] = {"forward-compute": [], "backward-compute": []}

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        return _Timer(self.spans.get(name))


class _Timer:
    def __init__(self, spans: list[list[float]] | None) -> None:
        self._spans = spans

    def start(self, barrier: bool = False) -> None:
        if self._spans is not None:
            self._spans.append([time.perf_counter()])

    def stop(self, barrier: bool = False) -> None:
        if self._spans is not None:
            self._spans[-1].append(time.perf_counter())


def rank_main(rank: int, folder: str, length: int, rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(BACKENDS["cpu"], init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = [_row(parallel, micro_batches, length, rounds) for _, parallel, micro_batches in ROWS]
    if rank == 0:
        torch.save(results, f"{folder}/results")
    dist.barrier()
    dist.destroy_process_group()


def _row(parallel: dict[str, Any], micro_batches: int, length: int, rounds: int) -> list[list[Span]]:
    """Run some steps; return the spans of both ranks for each of them."""
    mesh = Mesh.create(ParallelConfig(**parallel), Device.open("cpu"))
    family = family_of(MODEL)
    arch = family.architecture(MODEL)
    clock = Clock()
    chunks = build_model(arch, mesh, timers=clock)
    load_weights(chunks, random_tensors(family, arch, 0), family, arch, mesh)
    wrapped = wrap_data_parallel(chunks, OptimConfig(), mesh)
    tokens = torch.randint(arch.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "weights": torch.ones(1, length)}
    found = []
    for step in range(rounds + 1):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        for spans in clock.spans.values():
            spans.clear()
        dist.barrier()
        run_batch(wrapped, [batch] * micro_batches, mesh, token_loss, train=True)
        if step:  # the first one warms up
            found.append(_both(clock, mesh, micro_batches))
    mesh.close()
    return found


def _both(clock: Clock, mesh: Mesh, micro_batches: int) -> list[Span]:
    config, stage = mesh.config, mesh.pp.rank
    order = pieces(stage, pp=config.pp, vpp=config.vpp, micro_batches=micro_batches)
    own = []
    for backward, name in ((False, "forward-compute"), (True, "backward-compute")):
        of_kind = [piece for piece in order if piece.backward is backward]
        for piece, (start, end) in zip(of_kind, clock.spans[name], strict=True):
            own.append(Span(piece=piece, start=start, end=end))
    # the schedule that was measured is the one that is simulated
    assert [span.piece for span in sorted(own, key=lambda span: span.start)] == order
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, own)
    return [*everyone[0], *everyone[1]]


def _means(spans: list[Span]) -> dict[tuple[int, int, bool], float]:
    times: dict[tuple[int, int, bool], list[float]] = {}
    for span in spans:
        times.setdefault((span.piece.stage, span.piece.chunk, span.piece.backward), []).append(span.end - span.start)
    return {key: statistics.fmean(values) for key, values in times.items()}


def _between(spans: list[Span], placement: Placement) -> tuple[float, float]:
    """Return the median seconds of a message, and of the schedule's own work between two pieces of a stage.

    A message is timed where the stage that got it had nothing else to wait for, the work where all messages had come.
    """
    ends = {span.piece: span.end for span in spans}
    messages, calls, free = [], [], {}
    for span in sorted(spans, key=lambda span: span.start):
        stage = span.piece.stage
        sent = max((ends[piece] for piece in needs(span.piece, placement) if piece.stage != stage), default=0.0)
        before = free.get(stage, sent)
        (messages if sent >= before else calls).append(span.start - max(sent, before))
        free[stage] = span.end
    return statistics.median(messages), statistics.median(calls)


def report(name: str, parallel: dict[str, Any], micro_batches: int, rounds: list[list[Span]]) -> str:
    """Return a row of the table, of the shortest round: what else the machine did disturbed it least."""
    config = ParallelConfig(**parallel)
    placement: Placement = config.placement(family_of(MODEL).architecture(MODEL))
    real = min((Timeline(spans=spans) for spans in rounds), key=lambda timeline: timeline.length)
    means = _means(list(real.spans))
    took = {span.piece: span.end - span.start for span in real.spans}

    def mean(piece: Piece) -> float:
        return means[piece.stage, piece.chunk, piece.backward]

    predicted = simulate(placement, micro_batches=micro_batches, seconds=mean)
    again = simulate(placement, micro_batches=micro_batches, seconds=took.__getitem__)
    message, call = _between(list(real.spans), placement)
    whole = simulate(
        placement, micro_batches=micro_batches, seconds=took.__getitem__, transfer=message, after=lambda piece: call
    )
    bubble = whole.length * config.pp / sum(took.values()) - 1  # what lies between pieces is no computing
    closed = (config.pp - 1) / (micro_batches * config.vpp)
    return (
        f"| {name} | {micro_batches} | {closed:.3f} | {predicted.bubble:.3f} | {again.bubble:.3f} | {1000 * message:.1f}, {1000 * call:.1f} "
        f"| {bubble:.3f} | {real.bubble:.3f} | {real.length / whole.length:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    surround()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, args=(folder, args.length, args.rounds), nprocs=2)
        results = torch.load(f"{folder}/results", weights_only=False)
    lines = [
        "| schedule | micro batches | closed form | from mean times | from each time | ms of a message, between pieces | from all of them | measured | length: measured / simulated |",
        "|---|---|---|---|---|---|---|---|---|",
        *(report(*row, rounds) for row, rounds in zip(ROWS, results, strict=True)),
    ]
    print("\n".join(lines))
    if args.write:
        about = (
            f"`python benchmarks/pipeline_bubble.py --length {args.length} --rounds {args.rounds}`: a Llama of 25M parameters, "
            f"fp32, two ranks, one thread each, {page.machine()}. Of each schedule the shortest round. The bubble is the time in which stages wait over "
            "the time in which they compute. The closed form takes all pieces for alike; here the last stage has the output "
            "layer besides, which the simulation from mean times knows. Given the time of each piece, of a message and of "
            "what lies between two pieces, the simulator draws the run."
        )
        page.write("pipeline_bubble", "The bubble of the pipeline schedules", about, lines)


if __name__ == "__main__":
    main()
