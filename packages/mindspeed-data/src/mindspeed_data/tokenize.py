"""Rows to ids: what a worker does with a chunk, and which library encodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from unicodedata import is_normalized

import numpy as np
from numpy.typing import NDArray

from mindspeed_core.conversation import IGNORED
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data.formats import Format
from mindspeed_data.readers import Chunk, Fault, Rows, Source
from mindspeed_data.shorten import Longer, shorten
from mindspeed_data.sidecar import INSTRUCTION, PACKED, TEXT

if TYPE_CHECKING:
    from mindspeed_core.conversation import Learn
    from mindspeed_core.templates import Template, TokenizerTemplate

CHECKED = 20_000  # characters of a text that both encoders are compared on before the run
CHECKED_AGAIN = 250  # and in every chunk, where the slower one would take a quarter of the time otherwise

Encoder = Callable[[str], Any]  # text -> ids, as a list or an array
Ids = TypeVar("Ids")


class EncoderError(Exception):
    """The fast encoder gave other ids than `tokenizers` does; the run starts again without it."""


@dataclass
class Encoded:
    """The samples of one chunk, in order, and what was left out."""

    arrays: dict[str, NDArray[Any]]  # per file: the ids of all samples, one after the other
    lengths: NDArray[np.int32]  # tokens of each sample
    places: list[tuple[int, int]]  # where each sample stood: piece and line
    faults: list[Fault]
    lines: list[int]  # lines in each of the chunk's byte ranges
    lengths_of: dict[str, NDArray[np.int32]] = field(default_factory=dict)  # of the files whose lengths differ
    documents: NDArray[np.int32] | None = None  # sequences of each sample, where that is not one
    cut: int = 0  # rows that were cut to the sequence length, and that became several samples
    split: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a worker needs. `start` prepares it in the process that does the work."""

    sources: Sequence[Source]
    tokenizer: Tokenizer
    format: Format
    keys: Mapping[str, str]
    fast: bool  # gigatoken instead of tokenizers
    dtype: np.dtype[Any] = field(default=np.dtype(np.int32))

    outputs: ClassVar[Mapping[str, str]]  # the files: name -> what follows the prefix
    beside: ClassVar[str]  # what the file that describes them is called after

    def described(self) -> dict[str, Any]:
        """Return what the sidecar says of this kind of data alone."""
        raise NotImplementedError

    def start(self) -> Callable[[Chunk], Encoded]:
        """Return the function from a chunk to its ids."""
        encoder = gigatoken_encoder(self.tokenizer) if self.fast else None
        tokenizer = self.tokenizer.with_encoder(encoder)
        return lambda chunk: self._encode(chunk, tokenizer)

    def _encode(self, chunk: Chunk, tokenizer: Tokenizer) -> Encoded:
        raise NotImplementedError

    def _encoded(
        self, rows: Rows, faults: list[Fault], encode: Callable[[Any], Ids]
    ) -> Iterator[tuple[tuple[int, int], Any, Ids]]:
        """The samples of rows with their piece and line and their ids; what is no sample is added to the faults."""
        read, keys = self.format.read, self.keys
        needed = self.format.needed(keys)
        for row in rows:
            if isinstance(row, Fault):
                faults.append(row)
                continue
            piece, line, record = row
            try:
                for key in needed:
                    if key not in record:
                        raise ValueError(f"no key {key}")
                sample = read(record, keys)
            except ValueError as error:
                faults.append(Fault(piece, line, str(error)))
                continue
            try:
                ids = encode(sample)
            except (TypeError, UnicodeError):  # "\ud800" written in JSON
                faults.append(Fault(piece, line, "half of a surrogate pair, not text"))
            except ValueError as error:
                faults.append(Fault(piece, line, str(error)))
            else:
                yield (piece, line), sample, ids

    def _proven(self, tokenizer: Tokenizer, text: str) -> None:
        """Compare both encoders on the beginning of one more text of the run."""
        part = text[:CHECKED_AGAIN]
        if self.fast and tokenizer.encode(part) != self.tokenizer.encode(part):
            raise EncoderError


@dataclass(frozen=True, kw_only=True)
class TextJob(Job):
    """Pretraining text: one sequence per document."""

    bos: int | None = None
    eod: int | None = None

    outputs: ClassVar[Mapping[str, str]] = {"text": TEXT}
    beside: ClassVar[str] = TEXT

    def described(self) -> dict[str, Any]:
        return {"kind": "pretrain", "bos": self.bos, "eod": self.eod}

    def _encode(self, chunk: Chunk, tokenizer: Tokenizer) -> Encoded:
        rows, faults = Rows(chunk, self.sources), []
        before = [] if self.bos is None else [np.array([self.bos], np.uint32)]
        after = [] if self.eod is None else [np.array([self.eod], np.uint32)]
        encode = tokenizer.encoder or tokenizer.encode
        parts, lengths, places = [], [], []
        for place, text, ids in self._encoded(rows, faults, encode):
            if not lengths:
                self._proven(tokenizer, text)
            parts += [*before, np.asarray(ids, np.uint32), *after]
            lengths.append(len(ids) + len(before) + len(after))
            places.append(place)
        ids = np.concatenate(parts) if parts else np.empty(0, np.uint32)
        ids = ids.view(np.int32) if self.dtype == np.int32 else ids.astype(self.dtype)
        return Encoded({"text": ids}, np.array(lengths, np.int32), places, faults, rows.lines)


@dataclass(frozen=True, kw_only=True)
class InstructionJob(Job):
    """Conversations: ids, and labels that are IGNORED where nothing is learned. Labels are not shifted on disk."""

    template: Template | TokenizerTemplate
    learn: Learn = "answers"
    seq_length: int | None = None
    longer: Longer = "drop"  # what becomes of a conversation of more tokens
    eod: int | None = None  # ends every conversation that does not end with it already

    outputs: ClassVar[Mapping[str, str]] = INSTRUCTION
    beside: ClassVar[str] = PACKED

    def described(self) -> dict[str, Any]:
        return {
            "kind": "instruction",
            **self.template.described(self.tokenizer),
            "learn": self.learn,
            "seq_length": self.seq_length,
            "longer": self.longer,
            "eod": self.eod,
        }

    def _encode(self, chunk: Chunk, tokenizer: Tokenizer) -> Encoded:
        rows, faults = Rows(chunk, self.sources), []
        ids, labels = [np.empty(0, self.dtype)], [np.empty(0, self.dtype)]
        lengths, places = [], []
        cut = split = 0
        for place, sample, (row, target, parts) in self._encoded(rows, faults, partial(self._parts, tokenizer)):
            if not lengths:
                self._proven(tokenizer, sample.messages[-1]["content"])
            if self.seq_length is not None and len(row) > self.seq_length:
                cut += self.longer == "cut"
                split += self.longer == "split"
            for part in parts:
                ids.append(row[part])
                labels.append(_behind_another(target[part]))
                lengths.append(len(part))
                places.append(place)
        whole = np.concatenate(ids)
        arrays = {"input_ids": whole, "attention_mask": np.ones_like(whole), "labels": np.concatenate(labels)}
        return Encoded(arrays, np.array(lengths, np.int32), places, faults, rows.lines, cut=cut, split=split)

    def _parts(self, tokenizer: Tokenizer, sample: Any) -> tuple[NDArray[Any], NDArray[Any], list[NDArray[np.int64]]]:
        """The ids and labels of a conversation, and which of its positions make each of its samples."""
        labelled = self.template.encode(tokenizer, sample.messages, sample.system, sample.tools, learn=self.learn)
        ids, labels = (np.array(values, self.dtype) for values in labelled)
        if self.eod is not None and self.eod not in ids[-2:]:  # qwen3 and intern2 write a newline behind it
            ids, labels = np.append(ids, ids.dtype.type(self.eod)), np.append(labels, labels.dtype.type(self.eod))
        return ids, labels, shorten(labels, self.seq_length, self.longer)


def _behind_another(labels: NDArray[Any]) -> NDArray[Any]:
    """The labels of a sample without that of its first token, which nothing stands before that could predict it: training
    drops it, and so it is not counted."""
    labels[:1] = IGNORED
    return labels


def gigatoken_encoder(tokenizer: Tokenizer) -> Encoder:
    """Return gigatoken's encoder of a tokenizer, on one thread.

    What a normalizer would change goes to `tokenizers` itself: gigatoken does not order all combining marks as it does.
    """
    fast, plain = _gigatoken(tokenizer), tokenizer.with_encoder(None).encode
    if tokenizer.backend.normalizer is None:
        return fast
    return lambda text: fast(text) if text.isascii() or is_normalized("NFC", text) else plain(text)


@lru_cache(maxsize=1)  # the one that proved itself is the one that is used
def _gigatoken(tokenizer: Tokenizer) -> Encoder:
    from gigatoken import Tokenizer as Gigatoken

    return Gigatoken.from_json(tokenizer.json).backend.encode


def encoders_agree(tokenizer: Tokenizer, texts: Iterable[str]) -> bool:
    """True when gigatoken gives the ids of `tokenizers` for these texts and for every added token within a text."""
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    probes = ["", " ", "  \n x", " lead ", "e\u0301 ﬁ \u200b\u3000", "\U0001f642", "".join(added)]
    probes += [f"a{token} b{token}" for token in added[:1000]]
    try:
        encode = gigatoken_encoder(tokenizer)
        for text in (*probes, *texts):
            part = text[:CHECKED]
            if list(encode(part)) != tokenizer.encode(part):
                return False
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # what it does not know it refuses, at times with a panic, which is no Exception
        return False
    return True
