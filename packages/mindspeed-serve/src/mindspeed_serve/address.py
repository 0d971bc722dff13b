"""Whether an address can be listened on."""

from __future__ import annotations

import socket

from mindspeed_core.errors import InputError


def check_free(host: str, port: int) -> None:
    """Raise where nobody can listen on `host`:`port`; port 0 stands for any free one."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(
                f"{host}:{port}: {reason}; choose another --port (0 takes any free one) or --host"
            ) from None
