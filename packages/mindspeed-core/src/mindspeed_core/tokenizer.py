"""The tokenizer of a model folder: text to ids and back, special tokens, and decoding as a stream."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mindspeed_core import sentencepiece_model, tokenizer_file
from mindspeed_core.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# The end of text of well-known tokenizers, for a folder that names none.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>")
FORMS = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as its files say it. Pickles without transformers, so worker processes start at once."""

    folder: Path
    backend: Backend  # from the tokenizers library, with neither truncation nor padding
    bos: int | None
    eos: int | None
    pad: int | None
    file: Path | None = field(default=None, compare=False)  # a tokenizer.json that says all of it
    encoder: Callable[[str], Sequence[int]] | None = field(default=None, compare=False)  # a faster one, same ids

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Return the tokenizer of a model folder."""
        folder = Path(folder)
        written = _read(folder, tokenizer_file.load)
        if written is not None:
            backend, (bos, eos, pad) = written
        else:
            hf = _read(folder, _load_hf)
            backend, bos, eos, pad = hf.backend_tokenizer, hf.bos_token_id, hf.eos_token_id, hf.pad_token_id
            backend.no_truncation()  # some tokenizer.json files cut at 512 ids and say nothing
            backend.no_padding()
        loaded = cls(
            folder=folder,
            backend=backend,
            bos=_known(backend, BEGIN_TOKENS) if bos is None and eos is None else bos,
            eos=_known(backend, END_TOKENS) if eos is None else eos,
            pad=pad,
            file=None if written is None else folder / "tokenizer.json",
        )
        if written is None:
            loaded.__dict__["hf"] = hf
        return loaded

    def with_encoder(self, encoder: Callable[[str], Sequence[int]] | None) -> Tokenizer:
        """Return this tokenizer with a faster way to encode, which must give the same ids."""
        other = dataclasses.replace(self, encoder=encoder)
        other.__dict__.update({name: self.__dict__[name] for name in ("hf", "_vocabulary") if name in self.__dict__})
        return other

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Return the ids of a text; nothing is added but BOS where asked for."""
        if self.encoder is not None:
            ids = np.asarray(self.encoder(text)).tolist()  # several times faster than int by int
        else:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token written out, or None."""
        return self.backend.token_to_id(token)

    def token_of(self, id: int | None) -> str | None:
        """Return how an id is written, or None."""
        return None if id is None else self.backend.id_to_token(id)

    @property
    def bos_token(self) -> str | None:
        return self.token_of(self.bos)

    @property
    def eos_token(self) -> str | None:
        return self.token_of(self.eos)

    @property
    def pad_token(self) -> str | None:
        return self.token_of(self.pad)

    @property
    def padding(self) -> int:
        """The id to fill rows with: PAD, else EOS, else 0. Padding carries no loss, so any id will do."""
        return next((i for i in (self.pad, self.eos) if i is not None), 0)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included: what an embedding must hold."""
        return self._vocabulary[0]

    @property
    def fingerprint(self) -> str:
        """A hash of what each id means: equal for two folders whose data may be mixed."""
        return self._vocabulary[1]

    @cached_property
    def _vocabulary(self) -> tuple[int, str]:
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        tokens, ids = list(vocabulary), np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
        order = np.argsort(ids, kind="stable")
        text = "\n".join([f"{id} {tokens[at]!r}" for id, at in zip(ids[order].tolist(), order.tolist(), strict=True)])
        return int(ids.max()) + 1, hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def hf(self) -> Any:
        """The transformers tokenizer, for what only it does (chat templates)."""
        return _read(self.folder, _load_hf)

    @property
    def json(self) -> str | bytes:
        """The contents of a tokenizer.json, for other libraries."""
        return self.backend.to_str() if self.file is None else self.file.read_bytes()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _read(folder: Path, reader: Callable[[Path], Result]) -> Result:
    """What a reader makes of a folder; InputError where that is no tokenizer."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}; a tokenizer is a folder with {FORMS}")
    try:
        return reader(folder)
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{folder}: its tokenizer cannot be read: {reason[:300]}") from error


def _load_hf(folder: Path) -> Any:
    """The transformers object of a folder. `tokenizer.json` is taken as it is written: AutoTokenizer would rebuild it
    for some classes (Llama: other spaces after special tokens) and costs the import of torch."""
    from transformers import PreTrainedTokenizerFast

    model = folder / "tokenizer.model"
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if model.exists():
        backend, named = sentencepiece_model.load(model)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _byte_level(folder)
    if (folder / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(loaded, "backend_tokenizer", None) is not None:
            return loaded
    raise InputError(f"{folder}: holds no tokenizer; it needs {FORMS}")


def _byte_level(folder: Path) -> Any:
    """GPT-2's and Qwen2's older form: vocab.json and merges.txt, told apart by tokenizer_config.json."""
    if (folder / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    from transformers import GPT2Tokenizer

    return GPT2Tokenizer.from_pretrained(folder, local_files_only=True)


def _known(backend: Backend, tokens: Sequence[str]) -> int | None:
    return next((i for i in map(backend.token_to_id, tokens) if i is not None), None)


class TextStream:
    """Text of ids that arrive one by one: the pieces joined are exactly `decode` of all ids, never half a character.

    `context` are ids before the first one (a prompt): the pieces then continue its text.
    """

    WINDOW = 16  # context ids that are decoded again: spaces depend on a few ids before

    def __init__(self, tokenizer: Tokenizer, *, context: Sequence[int] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        # Some decoders show a whole run of byte tokens differently once a later byte makes it invalid.
        self._bytes = _byte_tokens(tokenizer)
        self._ids = self._visible(context)[-self.WINDOW :]
        self._start, self._end = 0, len(self._ids)  # ids[start:end] is shown already and gives the rest its context

    def push(self, id: int) -> str:
        """Take one id and return the text that is certain now, often empty."""
        if id in self._hidden:
            return ""
        self._ids.append(id)
        return "" if id in self._bytes else self._advance(final=False)

    def finish(self) -> str:
        """Return what was held back."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        shown = self._decode(self._ids[self._start : self._end])
        text = self._decode(self._ids[self._start :])
        if not final and text.endswith("\ufffd"):
            return ""  # perhaps the first bytes of a character
        common = len(shown) if text.startswith(shown) else len(shown.rstrip("\ufffd"))
        if len(text) > common:
            self._start, self._end = self._end, len(self._ids)
        return text[common:]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)

    def _visible(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i not in self._hidden]


def _byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of `<0x00>` to `<0xFF>` where the decoder joins them to characters."""
    ids = (tokenizer.id_of(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in ids if i is not None)
