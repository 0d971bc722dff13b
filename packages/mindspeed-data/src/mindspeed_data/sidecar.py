"""What is known of a written data set: a JSON file beside it, and whether a tokenizer is the one it was made with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import Tokenizer
from mindspeed_data.indexed import IndexedDataset, path_of

TEXT = "_text_document"
PACKED = "_packed"
INSTRUCTION = {name: f"{PACKED}_{name}_document" for name in ("input_ids", "attention_mask", "labels")}
SCANNED = 4_000_000  # ids that are looked at where no sidecar names the tokenizer


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The contents of `PREFIX_text_document.meta.json` or `PREFIX_packed.meta.json`."""

    kind: str  # "pretrain" or "instruction"
    tokenizer: str  # the folder, as it was given
    fingerprint: str
    vocab_size: int
    dtype: str
    kept: int  # samples in the files
    left_out: dict[str, int]  # reason -> rows
    tokens: int
    learned: int  # tokens that carry a loss
    longest: int  # tokens of the longest sample
    inputs: list[dict[str, Any]]  # {"path", "bytes"}
    template: str | None = None
    bos: int | None = None
    eod: int | None = None
    seq_length: int | None = None
    version: int = 1

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def text_prefix(prefix: str | Path) -> Path:
    """Return the full prefix of pretraining text: P and P_text_document both name it."""
    found = _text(prefix)
    if found is not None:
        return found
    given = _bare(prefix)
    if _instruction(prefix) is not None:
        raise InputError(f"{given}: this is instruction data; train on it with sft, or make text with pretrain")
    raise InputError(
        f"{given}: no data set of that prefix (neither {given.name}.idx nor {given.name}{TEXT}.idx is in "
        f"{given.parent}); write one with mindspeed-data pretrain"
    )


def instruction_prefix(prefix: str | Path) -> Path:
    """Return the prefix P of instruction data, of which P, P_packed and any of its files' prefixes are names."""
    found = _instruction(prefix)
    if found is not None:
        return found
    given = _bare(prefix)
    if _text(prefix) is not None:
        raise InputError(f"{given}: this is text; train on it with pretrain, or make instruction data with sft")
    raise InputError(
        f"{given}: no instruction data of that prefix ({given.name}{INSTRUCTION['input_ids']}.idx is not in "
        f"{given.parent}); write it with mindspeed-data sft"
    )


def is_instruction(prefix: str | Path) -> bool:
    """True for a prefix of instruction data, False for one of text; InputError where there is neither."""
    if _text(prefix) is None and _instruction(prefix) is not None:
        return True
    text_prefix(prefix)  # raises where there is neither
    return False


def _text(prefix: str | Path) -> Path | None:
    given = _bare(prefix)
    if given.name.endswith(tuple(INSTRUCTION.values())):
        return None
    return next((path for path in (given, Path(f"{given}{TEXT}")) if path_of(path, ".idx").exists()), None)


def _instruction(prefix: str | Path) -> Path | None:
    given = _bare(prefix)
    suffix = next((s for s in (*INSTRUCTION.values(), PACKED) if given.name.endswith(s)), "")
    bare = given.with_name(given.name.removesuffix(suffix))
    return bare if path_of(f"{bare}{INSTRUCTION['input_ids']}", ".idx").exists() else None


def _bare(prefix: str | Path) -> Path:
    path = Path(prefix)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def read(prefix: str | Path) -> Sidecar | None:
    """Return what is known of a data set of either kind; None for one that others wrote."""
    base = f"{instruction_prefix(prefix)}{PACKED}" if is_instruction(prefix) else text_prefix(prefix)
    path = path_of(base, ".meta.json")
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        return Sidecar(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not readable as a description of data; remove it or write the data again") from error


def check_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that the data was not made with; where that is not known, one whose ids end too early."""
    known = read(prefix)
    if known is not None:
        if known.fingerprint != tokenizer.fingerprint:
            same = str(tokenizer.folder) == known.tokenizer
            raise InputError(
                f"{prefix}: was made with another tokenizer, {known.tokenizer}{' as it was then' if same else ''} "
                f"({known.vocab_size:,} ids), than {tokenizer.folder} ({tokenizer.vocab_size:,} ids); "
                f"{'make the data again' if same else 'name that tokenizer or make the data again'}"
            )
        return
    if is_instruction(prefix):
        base = Path(f"{instruction_prefix(prefix)}{INSTRUCTION['input_ids']}")
    else:
        base = text_prefix(prefix)
    ids = IndexedDataset(base).ids[:SCANNED]
    if ids.size and int(ids.max()) >= tokenizer.vocab_size:
        raise InputError(
            f"{prefix}: holds the id {int(ids.max())}, beyond the {tokenizer.vocab_size:,} ids of the tokenizer "
            f"{tokenizer.folder}; it was made with another one"
        )
