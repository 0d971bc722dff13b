"""A tokenizer with one id per character: what it writes can be read."""

from pathlib import Path
from types import MappingProxyType

SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>")
SPECIALS += ("<|observation|>", "[gMASK]", "sop", "<end_of_turn>", "<reserved_106>", "<|start|>", "<|end|>")
SPECIALS += ("<|start_header_id|>", "<|end_header_id|>", "<sop>", "<start_of_turn>", "<reserved_107>", "<｜User｜>")
SPECIALS += ("<｜Assistant｜>", "<|message|>", "<|channel|>", "<|return|>")


class Letters:
    """Stands for a tokenizer: one id per character, special tokens whole."""

    folder = Path("letters")
    bos, eos = 0xE001, 0xE002
    specials = MappingProxyType({name: 0xE001 + i for i, name in enumerate(SPECIALS)})

    def id_of(self, token: str) -> int | None:
        return self.specials.get(token)

    def encode(self, text: str) -> list[int]:
        for token, id in sorted(self.specials.items(), key=lambda item: -len(item[0])):  # "<sop>" before "sop"
            text = text.replace(token, chr(id))
        return list(map(ord, text))

    def decode(self, ids: list[int]) -> str:
        names = {id: token for token, id in self.specials.items()}
        return "".join(names.get(i, chr(i)) for i in ids)
