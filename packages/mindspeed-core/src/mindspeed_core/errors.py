"""The one exception that is the user's to mend: shown as a line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """The input or the environment is at fault. The message says what, where and how to mend it; one line per fault."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which path an error of the disk belongs to: `write` itself, on a full disk, does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
