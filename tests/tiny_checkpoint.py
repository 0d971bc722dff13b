"""Random Hugging Face folders of every family, as transformers itself writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KINDS = ("llama", "qwen2", "qwen3")


def hf_folder(
    folder: Path,
    kind: str = "llama",
    *,
    layers: int = 4,
    heads: int = 4,
    groups: int = 2,
    tied: bool = False,
    dtype: str = "float32",
    shard: str = "5GB",
    **more: Any,
) -> Path:
    """Write a random model and return its folder. No tensor is left at zeros or ones."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind.capitalize()}Config")(
        num_hidden_layers=layers,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=8,  # not hidden_size / heads
        vocab_size=37,  # no tp > 1 divides it
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **more,
    )
    model = getattr(transformers, f"{kind.capitalize()}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
