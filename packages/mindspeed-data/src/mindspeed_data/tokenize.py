"""Rows to ids: what a worker does with a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from mindspeed_core.conversation import IGNORED
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data.encoder import (
    EncoderError,
    ManyEncoder,
    beginning,
    framed,
    gigatoken_encoder,
    gigatoken_of_many,
    one_by_one,
)
from mindspeed_data.formats import Format
from mindspeed_data.readers import Chunk, Fault, Rows, Source
from mindspeed_data.shorten import Longer, shorten
from mindspeed_data.sidecar import INSTRUCTION, PACKED, TEXT
from mindspeed_data.stages import Stages

if TYPE_CHECKING:
    from mindspeed_core.conversation import Learn
    from mindspeed_core.templates import Template, TokenizerTemplate

CHECKED = 250  # characters of a text of every chunk that both encoders are compared on; more would cost too much

SURROGATE = "half of a surrogate pair, not text"
Ids = TypeVar("Ids")


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

    @property
    def at_once(self) -> bool:
        """True where many texts are encoded at once, while others are read."""
        return False

    def start(self) -> Stages[Chunk, Encoded]:
        """Return the function from a chunk to its ids."""
        encoder = gigatoken_encoder(self.tokenizer) if self.fast else None
        tokenizer = self.tokenizer.with_encoder(encoder)
        return Stages(lambda chunk: chunk, lambda chunk: self._encode(chunk, tokenizer))

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
                faults.append(Fault(piece, line, SURROGATE))
            except ValueError as error:
                faults.append(Fault(piece, line, str(error)))
            else:
                yield (piece, line), sample, ids

    def _proven(self, tokenizer: Tokenizer, text: str) -> None:
        """Compare both encoders on the beginning of one more text of the run."""
        part = text[:CHECKED]
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

    @property
    def at_once(self) -> bool:
        return self.fast

    def start(self) -> Stages[Chunk, Encoded]:
        encode = gigatoken_of_many(self.tokenizer) if self.fast else one_by_one(self.tokenizer.encode)
        return Stages(self._texts, partial(self._encoded_texts, encode), beside=self.at_once)

    def _texts(self, chunk: Chunk) -> _Texts:
        """The rows of a chunk, read and checked."""
        rows, faults = Rows(chunk, self.sources), []
        texts, places = [], []
        for place, text, _ in self._encoded(rows, faults, lambda text: text):
            texts.append(text)
            places.append(place)
        probe = beginning(texts[0], CHECKED) if self.fast and texts else ""
        return _Texts(texts, places, faults, rows.lines, probe, self.tokenizer.encode(probe))

    def _encoded_texts(self, encode: ManyEncoder, read: _Texts) -> Encoded:
        try:
            ids, lengths = encode([*read.texts, read.probe])
        except (TypeError, UnicodeError):
            read = read.without_surrogates()
            ids, lengths = encode([*read.texts, read.probe])
        ids, probed = np.split(ids, [len(ids) - lengths[-1]])
        if probed.tolist() != read.expected:
            raise EncoderError
        ids, lengths = framed((ids, lengths[:-1]), self.bos, self.eod)
        ids = ids.view(np.int32) if self.dtype == np.int32 else ids.astype(self.dtype)
        return Encoded({"text": ids}, lengths, read.places, read.faults, read.lines)


@dataclass(frozen=True)
class _Texts:
    """What a chunk holds of text, before it is encoded."""

    texts: list[str]
    places: list[tuple[int, int]]
    faults: list[Fault]
    lines: list[int]
    probe: str  # one more text, and the ids that any encoder has to give it
    expected: list[int]

    def without_surrogates(self) -> _Texts:
        """What is left where those are faults that hold half of a pair: "\\ud800" written in JSON is no text."""
        kept, faults = [], list(self.faults)
        for text, place in zip(self.texts, self.places, strict=True):
            try:
                text.encode()
            except UnicodeEncodeError:
                faults.append(Fault(*place, SURROGATE))
            else:
                kept.append((text, place))
        texts, places = [text for text, _ in kept], [place for _, place in kept]
        return replace(self, texts=texts, places=places, faults=sorted(faults))


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
