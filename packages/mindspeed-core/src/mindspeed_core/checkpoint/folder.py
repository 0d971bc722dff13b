"""Folders that appear whole or not at all, and the small files that travel with the weights."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mindspeed_core.errors import InputError, writing

ASSETS = (  # what a model needs beside its weights, and the licence it came under; never code
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
)


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill beside `target`; on success it becomes `target`, on failure it is removed.

    A run that was killed leaves only `.target.partial`, which the next run clears. `overwrite` replaces a checkpoint, and
    nothing else: a folder of other things is refused.
    """
    check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)  # held until the end, and freed by the kernel if we are killed
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{partial}: another process is writing {target}; wait for it or choose another target"
            ) from None
        try:
            with writing(target):
                _clear(partial)
                yield partial
                for path in (*partial.rglob("*"), partial):
                    sync(path)
            _replace(target, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Raise where `target` cannot become a new checkpoint folder."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; the target must be a folder")
    if not overwrite:
        raise InputError(f"{target}: exists already; choose another target, or replace it with --overwrite")
    if not any((target / name).exists() for name in ("config.json", "latest_checkpointed_iteration.txt", ".metadata")):
        raise InputError(
            f"{target}: --overwrite replaces only a checkpoint, and this folder holds none; choose another target"
        )


def copy_assets(source: Path, target: Path, config: Mapping[str, Any] | None = None) -> None:
    """Copy the tokenizer, the licence and the configurations of a model; `config` is what config.json shall say instead."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in ASSETS):
            shutil.copyfile(path, target / path.name)
    file = target / "config.json"
    if config is not None and (not file.exists() or read_json(file) != config):
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that came from outside."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not valid JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__} where an object is expected")
    return value


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _replace(target: Path, partial: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as old:
        if target.exists():
            target.rename(Path(old) / target.name)
        partial.rename(target)
        sync(target.parent)
