"""The oracle of the chat tests: what transformers answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def answering(folder: Path) -> Callable[[list[dict[str, str]] | str, int], str]:
    """Return a function that answers messages (or continues a text) greedily in so many tokens."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)

    def answer(messages: list[dict[str, str]] | str, new: int) -> str:
        text = messages
        if not isinstance(messages, str):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text)
        tokens = torch.tensor([ids])
        mask = torch.ones_like(tokens)
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)

    return answer
