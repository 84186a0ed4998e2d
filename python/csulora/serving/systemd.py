"""What a service tells systemd (sd_notify(3)): that it is ready, that it is alive, that it stops."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

READY = "READY=1"
ALIVE = "WATCHDOG=1"
STOPPING = "STOPPING=1"

_PATIENCE = 1.0  # seconds for which a receiver that does not read may delay the service


def notify(state: str) -> None:
    """Send a state to the socket that NOTIFY_SOCKET names; nothing where systemd did not ask for it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"  # an abstract socket, which has no file
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(_PATIENCE)
        sender.sendto(state.encode(), address)


def reloading() -> str:
    """Return the state of a service that reads its configuration again; `READY` ends it."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"
