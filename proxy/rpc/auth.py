"""Who may call: whoever sends the token in the cookie ``authenticationToken``.

Xen Orchestra percent-encodes the cookie, people who type it do not: both are accepted.  An
empty token never is, neither configured nor sent.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote, unquote_to_bytes

import trio

from proxy.runtime.secrets import remember

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

COOKIE = b"authenticationToken"


class TokenStore(Protocol):
    """Where the token is kept between runs."""

    def current(self) -> str:
        """The valid token, as configured now; empty when there is none yet."""
        ...

    async def rotate(self, new: str) -> None:
        """Persist ``new`` and make it the current one; both have happened on return."""
        ...


class Authenticator:
    """Compares tokens, in constant time.

    After :meth:`rotate` the previous token stays good for ``grace`` seconds, so that calls
    under way and a client that missed the change are not locked out: an answer to such a
    call brings the new token in ``Set-Cookie``, which XO stores.
    """

    def __init__(self, store: TokenStore, *, grace: Callable[[], float]) -> None:
        self._store = store
        self._grace = grace
        self._previous: dict[bytes, float] = {}
        self._rotating = trio.Lock()

    def accepts(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """The token that this request presents, when it is good; else ``None``."""
        cookie = presented(headers)
        if not cookie:
            return None
        candidates = {cookie, unquote_to_bytes(cookie)} if b"%" in cookie else {cookie}
        good = [self._store.current().encode()]
        if self._previous:
            now = trio.current_time()
            self._previous = {old: end for old, end in self._previous.items() if end > now}
            good.extend(self._previous)
        accepted: bytes | None = None
        for token in good:
            for candidate in candidates:
                # no early exit: the time must not tell which comparison matched
                if hmac.compare_digest(token, candidate) and token:
                    accepted = token
        return accepted

    def news_for(self, token: bytes) -> bytes | None:
        """Value of ``Set-Cookie`` for a client that called with ``token``, if it is outdated."""
        if not self._previous:
            return None
        current = self._store.current()
        if not current or hmac.compare_digest(current.encode(), token):
            return None
        return COOKIE + b"=" + quote(current, safe="").encode()

    async def rotate(self, new: str) -> None:
        """Make ``new`` the token; it is valid and durable when this returns.

        Concurrent calls happen one after the other.  On cancel or failure the store has the
        old or the new token, and both are accepted during the grace.
        """
        remember(new)
        async with self._rotating:
            old = self._store.current()
            if old and old != new:
                self._previous[old.encode()] = trio.current_time() + self._grace()
            await self._store.rotate(new)
            self._previous.pop(new.encode(), None)


def bearer_as_cookie(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """``headers`` with a token sent as ``Authorization: Bearer`` where a cookie would have it.

    For programs that cannot send cookies, such as Prometheus.
    """
    shown = list(headers)
    for name, value in shown:
        scheme, _, token = value.partition(b" ")
        if name.lower() == b"authorization" and scheme.lower() == b"bearer":
            return [*shown, (b"cookie", COOKIE + b"=" + token.strip())]
    return shown


def presented(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The raw value of the cookie; the first one when it is sent twice."""
    for name, value in headers:
        if name.lower() == b"cookie":
            for pair in value.split(b";"):
                key, _, content = pair.partition(b"=")
                if key.strip() == COOKIE:
                    return content.strip().strip(b'"')
    return None
