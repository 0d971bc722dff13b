"""A tokenizer small enough to train in a test, with the special tokens of the templates."""

import json
from pathlib import Path

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEXT = (
    "the quick brown fox jumps over the lazy dog. ",
    "Once upon a time, there was a little girl. ",
    "def f(x):\n    ",
)


def tiny_tokenizer(
    folder: Path,
    *,
    eos: str = "<|endoftext|>",
    chat_template: str | None = None,
    size: int = 400,
    more: tuple[str, ...] = (),
) -> Path:
    """Write a byte-level BPE tokenizer of at most `size` ids, `more` special tokens among them, into a folder and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIAL, *more], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
