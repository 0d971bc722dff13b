"""What is known of a written data set: a JSON file beside it, and whether a tokenizer is the one it was made with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data.indexed import IndexedDataset, path_of

TEXT, SENTENCE = "_text_document", "_text_sentence"  # a sequence per document, or per sentence
PACKED = "_packed"
INSTRUCTION = {name: f"{PACKED}_{name}_document" for name in ("input_ids", "attention_mask", "labels")}
PAIRWISE = {
    f"{which}_{name}": f"{PACKED}_{which}_{name}_document"
    for which in ("chosen", "rejected")
    for name in ("input_ids", "labels")
}
ORIGIN = ".origin"  # beside the ids: the number of the input and the line of every sample
LEFT_OUT = ".left_out.jsonl"  # beside the ids: every row that is not in the data, with file, line and reason
DESCRIPTION = ".meta.json"
SCANNED = 4_000_000  # ids that are looked at where no sidecar names the tokenizer
LOOKED_AT = 64  # masks that are looked at where no sidecar says whether sequences are packed


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The contents of `PREFIX_text_document.meta.json`, `PREFIX_text_sentence.meta.json` or `PREFIX_packed.meta.json`."""

    kind: str  # "pretrain", "instruction", "pairwise" or "process_reward"
    tokenizer: str  # the folder
    fingerprint: str
    vocab_size: int
    dtype: str
    kept: int  # samples in the files
    left_out: dict[str, int]  # reason -> rows
    tokens: int
    learned: int  # tokens that carry a loss
    longest: int  # tokens of the longest sample; of pairs, of an answer with its question
    inputs: list[dict[str, Any]]  # {"path", "bytes"}
    template: str | None = None
    thinking: bool | None = None
    learn: str | None = None
    end: int | None = None  # EOS, where it is learned in the place of what follows an answer
    placeholder: int | None = None  # the token at the end of a step, and those that say how good it is
    rewards: list[int] | None = None
    bos: int | None = None
    eod: int | None = None
    sentences: str | None = None  # the language by whose rules documents were split into sentences
    keep_newlines: bool | None = None
    seq_length: int | None = None
    longer: str | None = None
    sequences: int | None = None  # in the files: fewer than samples where these are packed, more where they are split
    cut: int = 0  # rows cut to seq_length
    split: int = 0  # rows that became several samples
    plan: dict[str, Any] = field(default_factory=dict)  # shard, mixing, packing
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {"bytes", "xxh3_128"}
    version: int = 1

    @property
    def packed(self) -> int | None:
        """The length of packed sequences; None where every sequence is a sample."""
        return self.plan.get("pack")

    @property
    def stand_ins(self) -> set[int]:
        """Ids that are learned in the place of another."""
        return {*([] if self.end is None else [self.end]), *(self.rewards or [])}

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Layout:
    """How the files of a kind of data are called."""

    name: str
    files: Mapping[str, str]  # -> what follows the prefix
    made_by: str

    @property
    def first(self) -> str:
        return next(iter(self.files.values()))

    def prefix(self, prefix: str | Path) -> Path | None:
        """Return P, of which P, P_packed and any of its files' prefixes are names; None where there is no such data."""
        given = _bare(prefix)
        suffix = next((s for s in (*self.files.values(), PACKED) if given.name.endswith(s)), "")
        bare = given.with_name(given.name.removesuffix(suffix))
        return bare if path_of(f"{bare}{self.first}", ".idx").exists() else None


LAYOUTS = (
    Layout("instruction data", INSTRUCTION, "sft"),
    Layout("pairs of answers", PAIRWISE, "pairwise"),
)


def text_prefix(prefix: str | Path) -> Path:
    """Return the full prefix of pretraining text: P and P_text_document, or P_text_sentence, both name it."""
    found = _text(prefix)
    if found is not None:
        return found
    given = _bare(prefix)
    for layout in LAYOUTS:
        if layout.prefix(prefix) is not None:
            raise InputError(
                f"{given}: this is {layout.name}; train on it with {layout.made_by}, or make text with pretrain"
            )
    raise InputError(
        f"{given}: no data set of that prefix (neither {given.name}.idx nor {given.name}{TEXT}.idx is in "
        f"{given.parent}); write one with mindspeed-data pretrain"
    )


def instruction_prefix(prefix: str | Path) -> Path:
    """Return the prefix P of instruction data, of which P, P_packed and any of its files' prefixes are names."""
    return _prefix(prefix, LAYOUTS[0])


def pairwise_prefix(prefix: str | Path) -> Path:
    """Return the prefix P of pairs, of which P, P_packed and any of its files' prefixes are names."""
    return _prefix(prefix, LAYOUTS[1])


def _prefix(prefix: str | Path, layout: Layout) -> Path:
    found = layout.prefix(prefix)
    if found is not None:
        return found
    given = _bare(prefix)
    if _text(prefix) is not None:
        raise InputError(
            f"{given}: this is text; train on it with pretrain, or make {layout.name} with {layout.made_by}"
        )
    for other in LAYOUTS:
        if other.prefix(prefix) is not None:
            raise InputError(f"{given}: this is {other.name}; make {layout.name} with {layout.made_by}")
    raise InputError(
        f"{given}: no {layout.name} of that prefix ({given.name}{layout.first}.idx is not in "
        f"{given.parent}); write it with mindspeed-data {layout.made_by}"
    )


def check_alone(prefix: Path, outputs: Mapping[str, str]) -> None:
    """Refuse to write what would make a prefix the name of two data sets: of text and conversations, say."""
    for first in (TEXT, SENTENCE, *(layout.first for layout in LAYOUTS)):
        path = path_of(f"{prefix}{first}", ".idx")
        if first not in outputs.values() and path.exists():
            raise InputError(f"{path}: another kind of data has this prefix; choose another --output, or remove it")


def files_of(prefix: str | Path) -> dict[str, Path]:
    """Return the prefixes of the files of a data set of any kind, by their names ("text" alone for text); InputError
    where there is none."""
    if _text(prefix) is None:
        for layout in LAYOUTS:
            if (found := layout.prefix(prefix)) is not None:
                return {name: Path(f"{found}{suffix}") for name, suffix in layout.files.items()}
    return {"text": text_prefix(prefix)}  # raises where there is neither


def beside(prefix: str | Path, suffix: str) -> Path:
    """Return the path of what stands beside the files of a data set: its description (".meta.json"), its origins."""
    files = files_of(prefix)
    if "text" in files:
        return path_of(files["text"], suffix)
    first, path = next(iter(files.items()))
    return path_of(str(path).removesuffix(f"_{first}_document"), suffix)


def _text(prefix: str | Path) -> Path | None:
    given = _bare(prefix)
    if given.name.endswith(tuple(suffix for layout in LAYOUTS for suffix in layout.files.values())):
        return None
    names = (given, Path(f"{given}{TEXT}"), Path(f"{given}{SENTENCE}"))
    return next((path for path in names if path_of(path, ".idx").exists()), None)


def _bare(prefix: str | Path) -> Path:
    path = Path(prefix)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def read(prefix: str | Path) -> Sidecar | None:
    """Return what is known of a data set of either kind; None for one that others wrote."""
    path = beside(prefix, ".meta.json")
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        return Sidecar(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not readable as a description of data; remove it or write the data again") from error


def packed_length(prefix: str | Path) -> int | None:
    """Return the length of the sequences of a data set that is packed on the disk; None where its samples lie on their own.

    Of one without a description it is told from the first masks: unpacked ones hold nothing but 1.
    """
    if (known := read(prefix)) is not None:
        return known.packed
    if (path := files_of(prefix).get("attention_mask")) is None:
        return None
    masks = IndexedDataset(path)
    if any((masks[i] != 1).any() for i in range(min(len(masks), LOOKED_AT))):
        return len(masks[0])
    return None


def check_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that the data was not made with; where that is not known, one whose ids end too early."""
    known = read(prefix)
    if known is not None:
        if known.fingerprint != tokenizer.fingerprint:
            same = tokenizer.folder.absolute() == Path(known.tokenizer).absolute()
            raise InputError(
                f"{prefix}: was made with another tokenizer, {known.tokenizer}{' as it was then' if same else ''} "
                f"({known.vocab_size:,} ids), than {tokenizer.folder} ({tokenizer.vocab_size:,} ids); "
                f"{'make the data again' if same else 'name that tokenizer or make the data again'}"
            )
        return
    ids = IndexedDataset(next(iter(files_of(prefix).values()))).ids[:SCANNED]
    if ids.size and int(ids.max()) >= tokenizer.vocab_size:
        raise InputError(
            f"{prefix}: holds the id {int(ids.max())}, beyond the {tokenizer.vocab_size:,} ids of the tokenizer "
            f"{tokenizer.folder}; it was made with another one"
        )
