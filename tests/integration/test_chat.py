"""A real chat model answers sensibly, in the terminal and on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_core.generate.sampling import SamplingConfig
from tests.harness import run_ranks
from tests.integration.test_web import open_page
from tests.serve.test_terminal import in_process

QUESTIONS = ["Where is the Eiffel Tower?", "And the Colosseum?"]  # answered alike under the rounding of any CPU


@pytest.mark.real_data
def test_a_real_model_answers_in_the_terminal(smollm2: Path) -> None:
    lines = "".join(f"{question}\n" for question in QUESTIONS)
    sampling = SamplingConfig(max_new_tokens=40)
    (out, _), _ = run_ranks(in_process, 2, smollm2, lines, True, sampling, {"pp": 2}, timeout=180)
    france, italy = out.splitlines()
    assert "Paris" in france
    assert "Rome" in italy, "the second question makes sense after the first alone"


@pytest.mark.real_data
@pytest.mark.browser
def test_a_real_model_answers_on_the_page(smollm2: Path, chromium: str) -> None:
    with open_page(smollm2, chromium, "--temperature", "0") as page:
        for number, (question, place) in enumerate(zip(QUESTIONS, ["Paris", "Rome"], strict=True), 1):
            page.send(question)
            page.wait(lambda number=number: len(page.answers()) == number and page.idle(), question)
            assert place in page.answers()[-1]
        assert page.foreign == page.errors == []
