"""These tests write hundreds of folders: they do not wait for the disk."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mindspeed_core.checkpoint import folder


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "sync", lambda path: None)
        yield
