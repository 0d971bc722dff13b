"""A `tokenizer.json` read by the tokenizers library alone, where transformers would make nothing else of it.

transformers costs a third of a second to import. What it does to such a file follows from the files beside it: tokens that they
name and the file lacks are added, and a few of their keys ask for another tokenizer. Where they do neither, the file says it all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

NAMED = ("bos_token", "eos_token", "pad_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")
CHANGES = ("fast_tokenizer_files", "split_special_tokens", "fix_mistral_regex")


def load(folder: Path) -> tuple[Backend, tuple[int | None, ...]] | None:
    """Return the tokenizer of `tokenizer.json` and the ids of BOS, EOS and PAD; None where there is more to it."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    config = _read(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # the older way to name tokens, ignored beside the newer one
        if (folder / "added_tokens.json").exists():
            return None
        config |= _read(folder / "special_tokens_map.json")
    if any(config.get(key) for key in CHANGES):
        return None

    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(file))
    if backend.truncation is not None or backend.padding is not None:
        return None
    held = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    if not all(_holds(held, token) for token in _tokens(config)):
        return None
    named = (config.get(name) for name in NAMED)
    return backend, tuple(None if token is None else backend.token_to_id(_written(token)["content"]) for token in named)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _tokens(config: Mapping[str, Any]) -> Iterable[Any]:
    """Every token that is named, as it is written."""
    yield from config.get("added_tokens_decoder", {}).values()
    yield from (value for key, value in config.items() if key.endswith("_token") and not isinstance(value, bool | None))
    for key in EXTRA:
        extra = config.get(key) or []
        yield from extra.values() if isinstance(extra, Mapping) else extra


def _written(token: Any) -> dict[str, Any]:
    return {"content": token} if isinstance(token, str) else token


def _holds(held: Mapping[str, Any], token: Any) -> bool:
    """True where the file has this very token."""
    written = {key: value for key, value in _written(token).items() if key != "__type"}
    found = held.get(written.get("content", ""))
    return found is not None and all(getattr(found, key) == value for key, value in written.items())
