"""Folders that appear whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mindspeed_core.checkpoint.folder import copy_assets, new_folder
from mindspeed_core.errors import InputError


def _fill(target: Path, *, overwrite: bool = False, text: str = "new") -> None:
    with new_folder(target, overwrite=overwrite) as folder:
        assert not target.exists() or overwrite or not any(target.iterdir())
        (folder / "config.json").write_text(text)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    _fill(tmp_path / "deep" / "target")
    assert (tmp_path / "deep" / "target" / "config.json").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]


def _fail(first: Callable[[], None], error: type[BaseException]) -> None:
    first()
    raise error


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    _fill(tmp_path / "target")
    assert (tmp_path / "target" / "config.json").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "target") as folder:
        _fail((folder / "half").touch, error)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_replaced_only_when_asked(tmp_path: Path) -> None:
    _fill(tmp_path / "target", text="old")
    with pytest.raises(InputError, match="--overwrite"):
        _fill(tmp_path / "target")
    _fill(tmp_path / "target", overwrite=True)
    assert (tmp_path / "target" / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_failed_replacement_keeps_what_was_there(tmp_path: Path) -> None:
    _fill(tmp_path / "target", text="old")
    with pytest.raises(ValueError, match="stop"), new_folder(tmp_path / "target", overwrite=True):
        raise ValueError("stop")
    assert (tmp_path / "target" / "config.json").read_text() == "old"


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(InputError, match="holds none"):
        _fill(tmp_path / "photos", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        _fill(tmp_path / "file", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def _write_and_wait(target: Path, ready: multiprocessing.synchronize.Event) -> None:
    with new_folder(target) as folder:
        (folder / "half").touch()
        ready.set()
        signal.pause()


def test_two_writers_do_not_meet_and_a_killed_one_is_cleared_away(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_write_and_wait, args=(tmp_path / "target", ready), daemon=True)
    process.start()
    assert ready.wait(30)
    with pytest.raises(InputError, match="another process"):
        _fill(tmp_path / "target")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "target").exists()
    _fill(tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["config.json"]


def test_assets_are_the_tokenizer_and_the_configuration_and_never_code_or_weights(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    names = ("config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "LICENSE", "chat_template.jinja")
    for name in (*names, "modeling_x.py", "model.safetensors", "training_args.bin"):
        (source / name).write_text("{}")
    copy_assets(source, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(names)
    copy_assets(source, target, {"dtype": "bfloat16"})
    assert json.loads((target / "config.json").read_text()) == {"dtype": "bfloat16"}
