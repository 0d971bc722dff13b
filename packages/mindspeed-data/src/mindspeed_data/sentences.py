"""Text as documents of sentences: a sequence per sentence, as Megatron's `--split-sentences` writes it.

Where a sentence ends is said by Unicode's rules (UAX 29) with the abbreviations that CLDR knows for a language ("Mr."), both from
ICU. A newline within a paragraph is a blank, as it is for the original's Punkt; an empty line ends a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from mindspeed_core.cli import console
from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data.readers import Chunk, Rows
from mindspeed_data.sidecar import SENTENCE
from mindspeed_data.tokenize import Encoded, Job, TextJob

OPENING = (
    "“‘「『《〈【（"  # begins a sentence, where the rules leave it to the one before: Chinese has no blank between them
)
ABBREVIATIONS = ("de", "en", "es", "fr", "it", "pt", "ru")  # languages that ICU knows them of
WRAP = re.compile(r"\r?\n\s*")


@dataclass(frozen=True, kw_only=True)
class SentenceJob(TextJob):
    """Pretraining text: one sequence per sentence, and documents as groups of them."""

    language: str
    keep_newlines: bool = False

    outputs: ClassVar[Mapping[str, str]] = {"text": SENTENCE}
    beside: ClassVar[str] = SENTENCE

    at_once, start = Job.at_once, Job.start  # sentence by sentence

    def described(self) -> dict[str, Any]:
        return {**super().described(), "sentences": self.language, "keep_newlines": self.keep_newlines}

    def _encode(self, chunk: Chunk, tokenizer: Tokenizer) -> Encoded:
        rows, faults = Rows(chunk, self.sources), []
        encode = partial(self._sentences, tokenizer.encoder or tokenizer.encode)
        parts, lengths, counts, tokens, places = [np.empty(0, self.dtype)], [], [], [], []
        for place, text, sentences in self._encoded(rows, faults, encode):
            if not places:
                self._proven(tokenizer, text)
            parts += sentences
            lengths += map(len, sentences)
            counts.append(len(sentences))
            tokens.append(sum(map(len, sentences)))
            places.append(place)
        return Encoded(
            {"text": np.concatenate(parts)},
            np.array(tokens, np.int32),
            places,
            faults,
            rows.lines,
            lengths_of={"text": np.array(lengths, np.int32)},
            documents=np.array(counts, np.int32),
        )

    def _sentences(self, encode: Callable[[str], Any], text: str) -> list[Any]:
        """The ids of each sentence of a document. BOS stands before the first, the end-of-document token behind the last."""
        found = [list(encode(part)) for part in split(text, self.language, keep_newlines=self.keep_newlines)]
        found = [ids for ids in found if ids] or [[]]
        found[0] = [*([] if self.bos is None else [self.bos]), *found[0]]
        found[-1] += [] if self.eod is None else [self.eod]
        return [np.array(ids, self.dtype) for ids in found]


def split(text: str, language: str, *, keep_newlines: bool = False) -> list[str]:
    """Return the sentences of a text, without the blanks between them; with `keep_newlines` they end the sentence before, and all
    sentences together are the text."""
    from icu4py.breakers import SentenceBreaker

    unwrapped = WRAP.sub(lambda run: run[0] if run[0].count("\n") > 1 else " " * len(run[0]), text)
    starts, at, opened = [], 0, 0
    for piece in SentenceBreaker(unwrapped, f"{language}@ss=standard"):
        if piece.strip():
            starts.append(at - opened)
        at += len(piece)
        opened = len(piece) - len(piece.rstrip(OPENING))
    parts = [text[start:stop] for start, stop in pairwise([0, *starts[1:], len(text)])]
    return parts if keep_newlines else [part.strip() for part in parts]


def check_language(language: str) -> None:
    """Refuse what is no code of a language, and an environment without ICU; say where no abbreviations are known."""
    if not re.fullmatch("[a-z]{2,3}", language):
        raise InputError(f"--language {language}: a code of two or three letters is expected, like en, de or zh")
    try:
        import icu4py  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--split-sentences: icu4py, which knows where sentences end, is missing; add it with "
            "pip install 'mindspeed-data[sentences]' (Python 3.11 or newer)"
        ) from error
    if language not in ABBREVIATIONS:
        console.print(f"--language {language}: no abbreviations are known of it, only of {', '.join(ABBREVIATIONS)}")
