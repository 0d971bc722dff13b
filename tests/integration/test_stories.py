"""A published model writes its published text, from every form that its weights can have and on every split of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_convert import __main__ as convert
from mindspeed_core.generate.sampling import SamplingConfig
from tests.harness import run_command, run_ranks

GREEDY = SamplingConfig(max_new_tokens=256)


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260k_hf"


@pytest.fixture(scope="module")
def published(stories: Path) -> str:
    return (stories / "reference_greedy_output.txt").read_text()


@pytest.mark.real_data
def test_generate_prints_the_published_text(stories: Path, published: str) -> None:
    options = ["--prompt", "", "--max-new-tokens", 256, "--temperature", 0]
    done = run_command("mindspeed-serve", "generate", stories, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == published
    assert done.stderr == ""


def texts_of(opened: list[tuple[Path, dict[str, int]]]) -> list[str | None]:
    """What each folder writes on each layout, one after the other on the same ranks."""
    from mindspeed_core.generate.engine import Engine
    from mindspeed_serve.assistant import Assistant

    texts: list[str | None] = []
    for folder, parallel in opened:
        engine = Engine.open(folder, **parallel)
        if not engine.mesh.is_main:
            engine.follow()
            continue
        with engine:
            texts.append("".join(Assistant.of(engine).continuation("", GREEDY)) + "\n")
    return texts


@pytest.mark.real_data
def test_conversions_write_the_published_text_on_every_split(stories: Path, published: str, tmp_path: Path) -> None:
    convert.mcore(stories, tmp_path / "tp2", tp=2)
    convert.mcore(stories, tmp_path / "pp2", pp=2)
    layouts = [{"tp": 2}, {"pp": 2}]
    opened = [(tmp_path / name, parallel) for name in ("tp2", "pp2") for parallel in layouts]
    assert run_ranks(texts_of, 2, opened, timeout=150)[0] == [published] * 4


@pytest.mark.real_data
def test_a_round_trip_keeps_the_files_and_the_text(stories: Path, published: str, tmp_path: Path) -> None:
    convert.mcore(stories, tmp_path / "mcore", tp=2, pp=2)
    convert.hf(tmp_path / "mcore", tmp_path / "hf")
    name = "model.safetensors"
    assert (tmp_path / "hf" / name).read_bytes() == (stories / name).read_bytes()
    assert run_ranks(texts_of, 1, [(tmp_path / "hf", {})]) == [[published]]
