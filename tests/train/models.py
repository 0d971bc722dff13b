"""Models small enough to train in a test: dense, with a window or linear biases, with experts, with latent attention."""

from __future__ import annotations

from typing import Any

from tests.train import runs

LLAMA: dict[str, Any] = {**runs.SIZES, "num_hidden_layers": 4}
WINDOW: dict[str, Any] = {**runs.SIZES, "preset": "mistral-7b-v0.1", "sliding_window": 6}
ALIBI: dict[str, Any] = {
    "preset": "baichuan-13b",
    **{name: runs.SIZES[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")},
    "num_attention_heads": 4,
    "model_max_length": 64,
}
EXPERTS: dict[str, Any] = {**LLAMA, "preset": "mixtral-8x7b", "num_local_experts": 4}
LATENT: dict[str, Any] = {
    "preset": "deepseek-v2-lite",
    **{name: value for name, value in LLAMA.items() if name not in ("preset", "head_dim")},
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}
