"""What the benchmarks have in common: a Llama of 25 million parameters, and the surroundings of a rank."""

from __future__ import annotations

import os
import sys
from typing import Any

from mindspeed_core.launcher import SURROUNDINGS

LLAMA_25M: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "vocab_size": 16384,
    "max_position_embeddings": 2048,
}


def surround() -> None:
    """Start this script anew with the settings our launcher gives its ranks: threads and allocator are read at the start."""
    if any(os.environ.get(name) != value for name, value in SURROUNDINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SURROUNDINGS})
