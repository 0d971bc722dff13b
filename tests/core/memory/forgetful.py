"""A tiny Llama whose gradients, and whose saved bytes, are compared with those of the plain model."""

from __future__ import annotations

from typing import Any

import torch

from mindspeed_core.device import Device
from mindspeed_core.memory.config import MemoryConfig
from mindspeed_core.memory.saved import SavedBytes
from mindspeed_core.models.families import family_of, preset
from mindspeed_core.models.family import Architecture, Family
from mindspeed_core.parallel.mesh import Mesh, ParallelConfig

LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCABULARY = 4, 32, 48, 4, 2, 64
ROWS, LENGTH = 2, 16


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def tiny(layers: int = LAYERS, *, with_experts: bool = False) -> tuple[Family, Architecture]:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    config = {**preset("mixtral-8x7b" if with_experts else "llama2-7b"), **sizes, **(EXPERTS if with_experts else {})}
    family = family_of(config)
    return family, family.architecture(config)


def build(
    mesh: Mesh, memory: dict[str, Any], layers: int = LAYERS, *, with_experts: bool = False, **more: Any
) -> list[Any]:
    from mindspeed_core.models.build import build_model
    from mindspeed_core.models.weights import load_weights, random_tensors

    family, arch = tiny(layers, with_experts=with_experts)
    chunks = build_model(arch, mesh, memory=MemoryConfig(**memory), **more)
    load_weights(chunks, random_tensors(family, arch, 0), family, arch, mesh)
    return chunks


def micro_batches(number: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(number):
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
        weights = torch.rand(ROWS, LENGTH, generator=generator)
        batches.append({"tokens": tokens, "labels": tokens.roll(-1, 1), "weights": weights})
    return batches


def run(mesh: Mesh, chunks: list[Any], number: int, *, start: int = 0, stride: int = 1) -> list[float]:
    """Run `number` micro batches, every `stride`-th from `start` on, through the schedule of the mesh; return their losses."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from mindspeed_core.memory import in_advance

    def step(iterator: Any, model: Any) -> Any:
        output = model(**next(iterator))
        return output, lambda out: (out, torch.tensor(1), out.detach())

    beside = in_advance.communicator(chunks, mesh, number) if len(chunks) > 1 else None
    own = {} if beside is None else {"p2p_communicator": beside, "pg_collection": mesh.groups}
    data = [iter(micro_batches(start + number * stride)[start::stride]) for _ in chunks]
    losses = get_forward_backward_func(mesh.pp.size, len(chunks) if len(chunks) > 1 else None)(
        forward_step_func=step,
        data_iterator=data if len(chunks) > 1 else data[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=number,
        seq_length=LENGTH,
        micro_batch_size=ROWS,
        forward_only=False,
        **own,
    )
    if beside is not None:
        beside.close()
    return [loss.item() for loss in losses]


def compare(
    memories: list[dict[str, Any]], parallel: dict[str, Any], model: dict[str, Any] | None = None, number: int = 4
) -> list[dict[str, Any]]:
    """Per memory section: whether losses and gradients are those of the plain model to the bit, and the saved bytes.

    The bytes are of one forward pass, 0 where a rank alone cannot make one.
    """
    mesh = Mesh.create(ParallelConfig(**parallel), Device.open("cpu"))
    plain: Any = None
    answers = []
    for memory in ({}, *memories):
        chunks = build(mesh, memory, **(model or {}))
        losses = run(mesh, chunks, number)
        gradients = [p.grad.clone() for chunk in chunks for p in chunk.parameters()]
        plain = plain or (losses, gradients)
        saved = 0
        if mesh.pp.size == 1:
            with SavedBytes(chunks[0].parameters()) as count:
                loss = chunks[0](**micro_batches(1)[0])
            saved = count.bytes
            loss.backward()
        same = [torch.equal(one, other) for one, other in zip(gradients, plain[1], strict=True)]
        answers.append({"losses": losses == plain[0], "gradients": all(same), "saved": saved})
    return answers
