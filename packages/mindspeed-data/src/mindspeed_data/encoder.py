"""Which library turns text into ids: `tokenizers`, or gigatoken where it gives the same ids, text by text or many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any
from unicodedata import is_normalized

import numpy as np
from numpy.typing import NDArray

from mindspeed_core.tokenizer import Tokenizer

CHECKED = 20_000  # characters of a text that both encoders are compared on before the run

Encoder = Callable[[str], Any]  # text -> ids, as a list or an array
Ids = tuple[NDArray[np.uint32], NDArray[np.int32]]  # of many texts, one after the other; and how many each has
ManyEncoder = Callable[[Sequence[str]], Ids]


class EncoderError(Exception):
    """The fast encoder gave other ids than `tokenizers` does; the run starts again without it."""


def gigatoken_encoder(tokenizer: Tokenizer) -> Encoder:
    """Return gigatoken's encoder of a tokenizer, on one thread.

    What a normalizer would change goes to `tokenizers` itself: gigatoken does not order all combining marks as it does.
    """
    fast, plain = _gigatoken(tokenizer).encode, tokenizer.with_encoder(None).encode
    if tokenizer.backend.normalizer is None:
        return fast
    return lambda text: fast(text) if _normal(text) else plain(text)


def gigatoken_of_many(tokenizer: Tokenizer) -> ManyEncoder:
    """Return gigatoken's encoder of many texts, on one thread; other threads run Python meanwhile.

    It needs the library of its result, which takes a fifth of a second to load.
    """
    encode, plain = _gigatoken(tokenizer).encode_batch, tokenizer.with_encoder(None).encode
    all_normal = tokenizer.backend.normalizer is None

    def many(texts: Sequence[str]) -> Ids:
        others = [] if all_normal else [i for i, text in enumerate(texts) if not _normal(text)]
        left_out = set(others)
        found = encode([text for i, text in enumerate(texts) if i not in left_out] if others else texts, parallel=False)
        ids, offsets = found.layout.content.data, found.layout.offsets.data
        lengths = np.diff(offsets).astype(np.int32)
        if not others:
            return ids, lengths
        behind = [i - n for n, i in enumerate(others)]  # so many of gigatoken's texts stand before each of the others
        theirs = [np.array(plain(texts[i]), np.uint32) for i in others]
        first, *parts = np.split(ids, offsets[behind])
        whole = np.concatenate([first, *chain.from_iterable(zip(theirs, parts, strict=True))])
        return whole, np.insert(lengths, behind, [len(each) for each in theirs])

    many([""])  # what it needs is loaded now, before a process is copied
    return many


def one_by_one(encode: Encoder) -> ManyEncoder:
    """Return an encoder of many texts from that of one."""

    def many(texts: Sequence[str]) -> Ids:
        found = [np.array(encode(text), np.uint32) for text in texts]
        return np.concatenate([np.empty(0, np.uint32), *found]), np.array([len(ids) for ids in found], np.int32)

    return many


def framed(ids: Ids, bos: int | None, eod: int | None) -> Ids:
    """Return the ids of many texts with BOS before each and the end-of-document token behind it, where these are given."""
    flat, lengths = ids
    marks = [mark for mark in (bos, eod) if mark is not None]
    if not marks:
        return ids
    ends = np.cumsum(lengths, dtype=np.int64)
    at = [places for mark, places in ((bos, ends - lengths), (eod, ends)) if mark is not None]
    whole = np.insert(flat, np.stack(at, axis=1).reshape(-1), np.tile(np.array(marks, np.uint32), len(lengths)))
    return whole, lengths + np.int32(len(marks))


def encoders_agree(tokenizer: Tokenizer, texts: Iterable[str]) -> bool:
    """True when gigatoken gives the ids of `tokenizers` for these texts and for every added token within a text."""
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    probes = ["", " ", "  \n x", " lead ", "e\u0301 ﬁ \u200b\u3000", "\U0001f642", "".join(added)]
    probes += [f"a{token} b{token}" for token in added[:1000]]
    try:
        encode = gigatoken_encoder(tokenizer)
        for text in (*probes, *texts):
            part = beginning(text, CHECKED)
            if list(encode(part)) != tokenizer.encode(part):
                return False
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # what it does not know it refuses, at times with a panic, which is no Exception
        return False
    return True


def beginning(text: str, most: int) -> str:
    """Return the first characters of a text, without halves of surrogate pairs, which no encoder takes."""
    return text[:most].encode(errors="ignore").decode()


def _normal(text: str) -> bool:
    return text.isascii() or is_normalized("NFC", text)


@lru_cache(maxsize=1)  # the one that proved itself is the one that is used
def _gigatoken(tokenizer: Tokenizer) -> Any:
    from gigatoken import Tokenizer as Gigatoken

    return Gigatoken.from_json(tokenizer.json).backend
