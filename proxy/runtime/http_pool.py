"""Requests to one HTTP/1.1 server over connections that are kept: what object stores speak.

A connection is used again only when its answer was read to the end and nothing else came; after
an error or a cancel in the middle it is closed, because nobody knows what is still on the way.
The pool sets no limit: its users bound how much they ask for at once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING

import trio

from proxy.errors import Unreachable
from proxy.runtime import transport
from proxy.runtime.deadlines import deadline
from proxy.runtime.http1 import Answer, Body, read_answer, request_head

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Sequence

    from proxy.runtime.transport import Connection

_TOGETHER = 64 * 1024
"""Bytes of a body that go out with the head, from the event loop."""
_LONGEST_IDLE = 15.0
"""Seconds; servers close idle connections, and a request must not meet that."""
_MOST_IDLE = 32
_REFUSAL_SECONDS = 2.0
"""How long to look for the answer of a server that stopped taking the body."""


class HttpPool:
    """``seconds`` is how long the server may be silent, while connecting ``connect_seconds``."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        context: ssl.SSLContext | None,
        seconds: float = 600,
        connect_seconds: float = 10,
    ) -> None:
        self.peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        usual = 443 if context is not None else 80
        self.host_header = self.peer.removesuffix(f":{port}") if port == usual else self.peer
        self._host = host
        self._port = port
        self._context = context
        self._seconds = seconds
        self._connect_seconds = connect_seconds
        self._idle: deque[tuple[Connection, float]] = deque()
        self._closed = False

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes | memoryview = b"",
    ) -> AsyncIterator[Exchange]:
        """Send a request; the block reads its answer, of any status.

        ``headers`` without ``Host``; ``Content-Length`` is added where it is needed.  Raises
        ``Unreachable``; then, and on cancel, whether the server did what it was asked is not
        known.
        """
        connection = await self._connect()
        exchange: Exchange | None = None
        try:
            exchange = await self._send(connection, method, target, headers, body)
            yield exchange
        finally:
            # also when the caller made an error of an answer that it read to its end
            if exchange is not None and exchange.reusable and self._has_room:
                self._idle.append((connection, trio.current_time()))
            else:
                connection.abort()

    @property
    def _has_room(self) -> bool:
        return not self._closed and len(self._idle) < _MOST_IDLE

    def close(self) -> None:
        """Close what is idle; requests under way go on.  Idempotent."""
        self._closed = True
        while self._idle:
            self._idle.pop()[0].close()

    async def _connect(self) -> Connection:
        """The connection that was used last, if the server still holds it, or a new one."""
        while self._idle:
            connection, since = self._idle.pop()
            if trio.current_time() - since <= _LONGEST_IDLE and connection.is_quiet():
                return connection
            connection.close()
        return await transport.connect(
            self._host,
            self._port,
            context=self._context,
            proxy=None,
            seconds=self._connect_seconds,
        )

    async def _send(
        self,
        connection: Connection,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]],
        body: bytes | memoryview,
    ) -> Exchange:
        lengths = [("Content-Length", str(len(body)))] if body or method in ("PUT", "POST") else []
        head = request_head(method, target, self.host_header, [*headers, *lengths], keep=True)
        seconds = self._seconds
        try:
            if len(body) <= _TOGETHER:
                with deadline(f"request to {self.peer}", seconds):
                    await connection.send_message(head + body)
            else:
                with deadline(f"request to {self.peer}", seconds):
                    await connection.send_message(head)
                await self._send_body(connection, memoryview(body))
        except Unreachable:
            # a server that refuses may say why and close before it has read everything
            refusal = await self._refusal(connection, method)
            if refusal is None:
                raise
            return refusal
        with deadline(f"answer of {self.peer}", seconds):
            answer, content = await read_answer(connection, method)
        return Exchange(self.peer, answer, content, seconds)

    async def _refusal(self, connection: Connection, method: str) -> Exchange | None:
        try:
            with deadline(f"answer of {self.peer}", _REFUSAL_SECONDS):
                answer, content = await read_answer(connection, method)
        except Unreachable:
            return None
        if answer.status < 400:
            return None
        return Exchange(self.peer, answer, content, self._seconds, reusable=False)

    async def _send_body(self, connection: Connection, body: memoryview) -> None:
        while body:
            with deadline(f"sending to {self.peer}", self._seconds):
                body = body[await connection.send_some(body) :]


class Exchange:
    """The answer to one request."""

    def __init__(
        self, peer: str, answer: Answer, body: Body, seconds: float, *, reusable: bool = True
    ) -> None:
        self.status = answer.status
        self.headers = answer.headers
        self._peer = peer
        self._body = body
        self._seconds = seconds
        self._reusable = reusable and answer.headers.get("connection", "").lower() != "close"

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another request now."""
        return self._reusable and self._body.ended

    async def read_into(self, view: memoryview) -> int:
        """Fill ``view``; fewer bytes only at the end of the body.  ``Unreachable`` when the
        connection ends before it."""
        filled = 0
        while filled < len(view):
            with deadline(f"answer of {self._peer}", self._seconds):
                count = await self._body.read_into(view[filled:])
            if count == 0:
                break
            filled += count
        return filled

    async def read_all(self, limit: int) -> bytes | None:
        """The rest of the body; ``None`` when it is longer than ``limit`` bytes."""
        announced = self.headers.get("content-length", "")
        if announced.isdecimal():
            if int(announced) > limit:
                return None
            content = bytearray(int(announced))
            return bytes(content[: await self.read_into(memoryview(content))])
        pieces: list[bytes] = []
        left = limit + 1
        while left:
            piece = bytearray(min(left, _TOGETHER))
            count = await self.read_into(memoryview(piece))
            pieces.append(bytes(piece[:count]))
            left -= count
            if count < len(piece):
                return b"".join(pieces)
        return None
