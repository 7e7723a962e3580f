"""Who is logged in.  Sessions live on the pool, not on a connection."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from proxy.errors import XapiError

if TYPE_CHECKING:
    from proxy.simulator.store import Store


class Sessions:
    """Login, logout and expiry on demand."""

    def __init__(self, store: Store, user: str, password: str) -> None:
        self.user = user
        self.password = password
        self._store = store
        self._open: dict[str, str] = {}
        self.logins = 0
        """How often somebody logged in."""

    def login(self, user: str, password: str) -> str:
        if user != self.user or not hmac.compare_digest(password.encode(), self.password.encode()):
            raise XapiError("SESSION_AUTHENTICATION_FAILED", [user, "Authentication failure"])
        self.logins += 1
        ref = self._store.new_ref()
        self._open[ref] = user
        return ref

    def check(self, session: object) -> str:
        """The session reference; raises ``XapiError`` ``SESSION_INVALID``."""
        if not isinstance(session, str) or session not in self._open:
            raise XapiError("SESSION_INVALID", [str(session)])
        return session

    def logout(self, session: str) -> None:
        """End it; its blocked ``event.from`` wakes with ``SESSION_INVALID``."""
        self._open.pop(session, None)
        self._store.wake()

    def expire_all(self) -> None:
        """What a toolstack restart does to every client."""
        self._open.clear()
        self._store.wake()

    @property
    def open(self) -> list[str]:
        return list(self._open)
