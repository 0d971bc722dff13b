"""Whole model folders small enough for a test: random weights, and a tokenizer whose texts a person can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import tiny_tokenizer

SPECIAL = ["<s>", "</s>", "<user>", "<assistant>", "<system>"]
WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "ai", "e", "i", "o", "u")]
CHAT = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} "
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_model(folder: Path, *, words: bool = False, **sizes: Any) -> Path:
    """Write a random Llama as a Hugging Face folder and return the folder.

    Its tokenizer knows bytes, or with `words` 72 words with blanks between them and a chat template.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    if words:
        vocab_size = _word_tokenizer(folder)
    else:
        tiny_tokenizer(folder)
        vocab_size = 400
    config = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**config, **sizes}))
    with torch.no_grad():
        # it writes on until it is stopped: dimension 0 stays positive through all layers and forbids the special tokens
        model.model.embed_tokens.weight[:, 0] = 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[: len(SPECIAL)] = 0
        model.lm_head.weight[: len(SPECIAL), 0] = -100
    model.save_pretrained(folder)
    return folder


def _word_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)
