"""What a service tells systemd: sd_notify(3), without its library."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Send "READY=1" or the like to where NOTIFY_SOCKET says; nothing if it isn't set or nobody is there."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return
    if where.startswith("@"):
        where = "\0" + where[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as made:
        try:
            made.sendto(state.encode(), where)
        except OSError:
            pass  # the service runs all the same
