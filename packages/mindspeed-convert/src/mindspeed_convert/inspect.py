"""What a checkpoint folder holds, in words and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mindspeed_convert.plan import size_text
from mindspeed_core.checkpoint import open_checkpoint
from mindspeed_core.checkpoint.megatron import MegatronTensors

WEIGHT_FILES = ("*.safetensors", "mp_rank_*/*.pt", "*.distcp")
FORMATS = {"hf": "Hugging Face", "mcore": "Megatron (megatron-core key names)", "native": "native training checkpoint"}


def describe(path: Path, *, config: Path | None = None) -> dict[str, Any]:
    """Open a checkpoint and return what it is, with plainly named keys."""
    checkpoint = open_checkpoint(path, config=config)
    tensors = checkpoint.tensors
    dtypes: Counter[str] = Counter()
    for name in tensors.names():
        dtypes[str(tensors.dtype(name)).removeprefix("torch.")] += math.prod(tensors.shape(name))
    files = sorted(file for pattern in WEIGHT_FILES for file in checkpoint.path.glob(pattern))
    layout = {}
    if isinstance(tensors, MegatronTensors):
        layout = {"tp": tensors.tp, "pp": tensors.pp, "padded_vocab_size": tensors.padded_vocab}
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "family": checkpoint.family.name,
        "iteration": checkpoint.iteration,
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes),
        "tensors": len(tensors.names()),
        "architecture": asdict(checkpoint.architecture),
        "layout": layout,
        "tokenizer": any(checkpoint.assets.glob("tokenizer*")),
        "bytes": sum(file.stat().st_size for file in files),
        "files": {str(file.relative_to(checkpoint.path)): file.stat().st_size for file in files},
    }


def lines(told: dict[str, Any]) -> Iterator[str]:
    """Yield the same for a person to read."""
    arch = told["architecture"]
    yield f"{'format':<12}{FORMATS[told['format']]}"
    if told["iteration"] is not None:
        yield f"{'iteration':<12}{told['iteration']}"
    yield (
        f"{'model':<12}{told['family']}: {arch['num_layers']} layers, hidden {arch['hidden_size']}, "
        f"feed-forward {arch['ffn_hidden_size']}, {arch['num_heads']} heads and {arch['num_query_groups']} key/value heads "
        f"of {arch['head_dim']}, vocabulary {arch['vocab_size']}{' (tied)' if arch['tied'] else ''}"
    )
    yield f"{'parameters':<12}{told['parameters']:,} in {told['tensors']} tensors"
    yield f"{'dtype':<12}{', '.join(told['dtypes'])}"
    if told["layout"]:
        layout = told["layout"]
        yield f"{'layout':<12}tp={layout['tp']} pp={layout['pp']}, vocabulary padded to {layout['padded_vocab_size']}"
    yield f"{'tokenizer':<12}{'yes' if told['tokenizer'] else 'no'}"
    yield f"{'files':<12}{len(told['files'])} with weights, {size_text(told['bytes'])}"
    for name, size in told["files"].items():
        yield f"{'':<12}{name}  {size_text(size)}"
