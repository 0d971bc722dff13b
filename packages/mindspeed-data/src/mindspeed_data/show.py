"""Samples of a data set as text, with what is learned marked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from mindspeed_core.conversation import IGNORED
from mindspeed_core.errors import InputError
from mindspeed_core.tokenizer import TextStream, Tokenizer
from mindspeed_data import sidecar
from mindspeed_data.indexed import IndexedDataset


def show(prefix: Path, *, tokenizer: Path | None, start: int, count: int, length: int) -> None:
    """Print samples to stdout."""
    from rich.console import Console
    from rich.text import Text

    instruction = sidecar.is_instruction(prefix)
    base = sidecar.instruction_prefix(prefix) if instruction else sidecar.text_prefix(prefix)
    known = sidecar.read(prefix)
    folder = tokenizer or (Path(known.tokenizer) if known is not None else None)
    if folder is None:
        raise InputError(f"{prefix}: nothing beside it says which tokenizer made it; name it with --tokenizer")
    loaded = Tokenizer.load(folder)
    sidecar.check_tokenizer(prefix, loaded)
    ids = IndexedDataset(f"{base}{sidecar.INSTRUCTION['input_ids']}" if instruction else base)
    labels = IndexedDataset(f"{base}{sidecar.INSTRUCTION['labels']}") if instruction else None
    if start >= len(ids):
        raise InputError(f"--start {start}: {prefix} holds {len(ids):,} samples, counted from 0")
    out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for i in range(start, min(start + count, len(ids))):
        sample = ids[i][:length].tolist()
        learned = [True] * len(sample) if labels is None else (labels[i][:length] != IGNORED).tolist()
        text = Text()
        for part, is_learned in _parts(loaded, sample, learned):
            if labels is None or not is_learned:
                text.append(part, "dim" if labels is not None else "")
            else:
                text.append(part if out.is_terminal else f"«{part}»", "bold green")
        size = len(ids[i])
        head = f"sample {i} of {len(ids):,}: {size:,} tokens"
        if labels is not None:
            head += f", {int((labels[i] != IGNORED).sum()):,} of them learned"
        out.print(f"--- {head}{f' (the first {length:,})' if size > length else ''}", style="bold")
        out.print(text)
    sys.stdout.flush()


def _parts(tokenizer: Tokenizer, ids: list[int], learned: list[bool]) -> Iterator[tuple[str, bool]]:
    """Stretches of text that are all learned or all not; together they are the decoded sample."""
    stream = TextStream(tokenizer, skip_special=False)
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or learned[i] != learned[start]:
            text = "".join(map(stream.push, ids[start:i])) + stream.finish()
            yield text, learned[start]
            start = i
