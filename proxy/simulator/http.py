"""HTTP/1.1 as the pool speaks it: heads by h11, bodies raw for speed."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

import trio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_REASONS = {
    200: "OK",
    302: "Found",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    411: "Length Required",
    500: "Internal Error",
    501: "Method Not Implemented",
}
READ_SIZE = 1024 * 1024
_MOST_PIECES = 64
_CLOSED = {7, 8}
"""TCP_CLOSE and TCP_CLOSE_WAIT of Linux's ``tcp_info``: the peer has left."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request's head, its path without trailing slash, parameters by xapi's precedence."""

    method: str
    path: str
    target: str
    headers: Mapping[str, str]
    query: Mapping[str, str]
    cookies: Mapping[str, str]

    @classmethod
    def make(cls, method: str, target: str, headers: Mapping[str, str]) -> Head:
        parts = urlsplit(target)
        path = "/" + parts.path.strip("/")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        cookies: dict[str, str] = {}
        for item in headers.get("cookie", "").split(";"):
            name, equals, value = item.strip().partition("=")
            if equals:
                cookies[name] = value
        return cls(method, path, target, headers, query, cookies)

    def common(self, name: str) -> str:
        """``session_id``, ``task_id``, ``sr_id``…: the cookie wins over the query."""
        return self.cookies.get(name) or self.query.get(name, "")


class Gone(Exception):
    """The client has left."""


class Wire:
    """One connection: what was read too far, sending, and how it ends."""

    def __init__(self, stream: trio.abc.Stream, raw: trio.SocketStream | None) -> None:
        self.stream = stream
        self._raw = raw
        self._ahead = b""

    def unread(self, data: bytes) -> None:
        """Put back what was read beyond a head."""
        self._ahead = data + self._ahead

    async def read(self) -> bytes:
        """Next bytes, empty at the end; raises ``Gone``."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        try:
            return bytes(await self.stream.receive_some(READ_SIZE))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Gone from error

    async def send(self, data: bytes | memoryview) -> None:
        """Send all; raises ``Gone``."""
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Gone from error

    async def send_together(self, pieces: Sequence[memoryview]) -> None:
        """Send all of many pieces with few system calls; raises ``Gone``."""
        if self._raw is None or self.stream is not self._raw:
            for piece in pieces:
                await self.send(piece)
            return
        left = deque(pieces)
        try:
            while left:
                sent = await self._raw.socket.sendmsg(list(islice(left, _MOST_PIECES)))
                while left and sent >= len(left[0]):
                    sent -= len(left.popleft())
                if sent:
                    left[0] = left[0][sent:]
        except (OSError, trio.ClosedResourceError) as error:
            raise Gone from error

    async def respond(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        length: bool = True,
    ) -> None:
        """Send a head and a body, and announce that the connection closes."""
        await self.send(head(status, body, headers, length=length) + body)

    async def client_left(self) -> None:
        """Return when the client closes its side, also with unread data before the close."""
        raw = self._raw
        if raw is None:
            await trio.sleep(math.inf)
            return
        while True:
            await trio.sleep(0.02)
            try:
                info = raw.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
            except OSError:
                return
            if info[0] in _CLOSED:
                return

    async def reset(self) -> None:
        """Close with RST: the client's next read fails."""
        raw = self._raw
        if raw is not None:
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await trio.aclose_forcefully(raw)
        else:
            await trio.aclose_forcefully(self.stream)


def head(
    status: int,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    length: bool = True,
    close: bool = True,
) -> bytes:
    """A response head; without ``length`` the body ends with the connection."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}"]
    if length:
        lines.append(f"content-length: {len(body)}")
    if close:
        lines.append("connection: close")
    lines.append("cache-control: no-cache, no-store")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def error_page(detail: str) -> bytes:
    """The page that xapi sends for an uncaught exception."""
    return (
        "<html><body><h1>HTTP 500 internal server error</h1>"
        "An unexpected error occurred; please wait a while and try again. If the problem "
        f"persists, please contact your support representative.<h1> Additional information </h1>"
        f"{detail}</body></html>"
    ).encode()
