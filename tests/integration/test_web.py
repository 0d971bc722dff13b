"""The chat page in a real browser that reaches nothing but the page: sending, streaming, history, sampling, stopping."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serve.peer import answering
from tests.tiny_model import tiny_model

LAUNCH = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Page:
    """The page as its user sees it, and what it tried to fetch from elsewhere."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.foreign: list[str] = []
        self.errors: list[str] = []
        page.route("**/*", self._gate)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.goto(url, wait_until="domcontentloaded")
        self.box = page.locator("#chat textarea")
        self.box.wait_for(timeout=60_000)

    def _gate(self, route: Any) -> None:
        if route.request.url.startswith((self.url, "data:", "blob:")):
            route.continue_()
        else:
            self.foreign.append(route.request.url)
            route.abort()

    def send(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def stop(self) -> None:
        self.page.locator(".stop-button").click()

    def set(self, label: str, value: float) -> None:
        field = self.page.get_by_label(f"number input for {label}")
        field.fill(str(value))
        field.press("Enter")

    def answers(self) -> list[str]:
        return [text.strip() for text in self.page.locator("[data-testid=bot]").all_inner_texts()]

    def wait(self, condition: Any, what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: {self.answers()}"
            self.page.wait_for_timeout(100)

    def idle(self) -> bool:
        return self.page.locator(".submit-button").is_visible()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "chatty", words=True)


@contextmanager
def open_page(folder: Path, chromium: str, *options: str) -> Iterator[Page]:
    """The page of a model in a browser; at the end Ctrl-C ends the server as it should."""
    playwright = pytest.importorskip("playwright.sync_api")
    server = subprocess.Popen(
        [sys.executable, "-m", "mindspeed_serve", "web", str(folder), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), server.communicate()[1]
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, headless=True, args=LAUNCH)
            yield Page(browser.new_context(viewport={"width": 1360, "height": 820}).new_page(), url)
            browser.close()
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
        assert server.returncode == 130, err
        assert out == "", "the address is all that stands on stdout"
        assert err.splitlines()[-1] == "interrupted"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def page(folder: Path, chromium: str) -> Iterator[Page]:
    drawing = ["--temperature", "1.5", "--top-k", "0", "--top-p", "1", "--max-new-tokens", "2000"]
    with open_page(folder, chromium, "--tp", "2", *drawing) as opened:
        yield opened


@pytest.mark.browser
def test_a_chat_on_the_page(page: Page, folder: Path) -> None:
    assert page.page.get_by_role("heading", name="chatty").is_visible()

    page.send("ba da")  # up to 2000 words
    page.wait(lambda: page.answers() and len(page.answers()[-1]) > 20, "the answer begins")
    early = page.answers()[-1]
    page.wait(lambda: len(page.answers()[-1]) > len(early), "the answer grows")
    page.stop()
    page.wait(page.idle, "the answer stops")
    stopped = page.answers()[-1]
    assert stopped.startswith(early)
    assert len(stopped.split()) < 2000
    page.page.wait_for_timeout(1000)
    assert page.answers()[-1] == stopped

    page.set("Temperature", 0)
    page.set("Max new tokens", 8)
    page.page.get_by_label("System prompt").fill("si ti")
    peer = answering(folder)
    messages = [
        {"role": "system", "content": "si ti"},
        {"role": "user", "content": "ba da"},
        {"role": "assistant", "content": stopped},
        {"role": "user", "content": "mo ku"},
    ]
    page.send("mo ku")
    page.wait(lambda: len(page.answers()) == 2 and page.idle(), "the second answer")
    assert page.answers()[1] == peer(messages, 8), "the stopped answer is part of the history"

    page.page.get_by_role("button", name="New chat").click()
    page.wait(lambda: page.answers() == [], "a new chat is empty")
    page.send("mo ku")
    page.wait(lambda: len(page.answers()) == 1 and page.idle(), "the first answer of the new chat")
    assert page.answers() == [peer([messages[0], messages[-1]], 8)]

    assert page.foreign == []
    assert page.errors == []
