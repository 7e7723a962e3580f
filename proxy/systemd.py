"""What systemd and its services tell each other: readiness, watchdog, passed sockets.

The protocol of sd_notify(3): datagrams of ``KEY=value`` lines to ``$NOTIFY_SOCKET``.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Mapping

FIRST_PASSED = 3
"""Number of the first descriptor that socket activation passes."""


class Notifier:
    """Speaks to the service manager; silent when there is none."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        given = os.environ if environment is None else environment
        name = given.get("NOTIFY_SOCKET", "")
        # a leading @ stands for the zero byte of Linux's abstract namespace
        self._address = f"\0{name[1:]}" if name.startswith("@") else name
        pid = given.get("WATCHDOG_PID", "")
        meant = pid in ("", str(os.getpid()))
        usec = given.get("WATCHDOG_USEC", "")
        self.watchdog_interval = int(usec) / 2e6 if meant and usec.isdigit() else 0.0
        """Seconds between two signs of life, half of what systemd allows; 0: none wanted."""

    def tell(self, **fields: str | int) -> None:
        """Send e.g. ``READY=1``.  Never blocks, never raises: a lost word is no failure."""
        if not self._address:
            return
        text = "\n".join(f"{key}={value}" for key, value in fields.items())
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as peer,
        ):
            peer.setblocking(False)
            peer.sendto(text.encode(), self._address)

    async def keep_alive(self) -> None:
        """Feed the watchdog as long as the event loop turns.  Runs until cancelled."""
        if self.watchdog_interval <= 0:
            return
        while True:
            self.tell(WATCHDOG=1)
            await trio.sleep(self.watchdog_interval)

    async def ask_for_time(self, status: str, every: float = 5.0) -> None:
        """While stopping takes long, keep systemd from killing.  Runs until cancelled."""
        while True:
            self.tell(STATUS=status, EXTEND_TIMEOUT_USEC=int(every * 3 * 1e6))
            await trio.sleep(every)


def passed_socket(index: int) -> int | None:
    """The descriptor of socket ``index`` of systemd's socket activation, if it was passed."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    if not count.isdigit() or not 0 <= index < int(count):
        return None
    return FIRST_PASSED + index
