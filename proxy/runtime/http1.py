"""One HTTP/1.1 exchange over a bulk connection: h11 for the heads, raw reads for the body.

Only what bulk transfers need: a body of the caller's with a known length, an answer framed by
Content-Length, by chunks or by the end of the connection.  XAPI's data handlers take one request
per connection (``Connection: close``); :mod:`proxy.runtime.http_pool` keeps connections.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h11

from proxy.errors import Unreachable
from proxy.runtime.transport import Connection, read_head

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_CHUNK_READ = 256 * 1024


def request_head(
    method: str,
    target: str,
    host: str,
    headers: Sequence[tuple[str, str]] = (),
    *,
    keep: bool = False,
) -> bytes:
    """The bytes of a request's head.  h11 refuses control characters in ``target``.

    ``keep``: the connection is meant for more requests.
    """
    connection = h11.Connection(h11.CLIENT)
    ending = () if keep else (("Connection", "close"),)
    head = connection.send(
        h11.Request(
            method=method,
            target=target,
            headers=[("Host", host), *ending, *headers],
        )
    )
    assert head is not None
    return head


@dataclass(frozen=True)
class Answer:
    """The head of a response.  Header names are lower case; of repeated ones the last."""

    status: int
    headers: Mapping[str, str]


class Body:
    """The body of an answer, read straight into the caller's memory."""

    def __init__(self, connection: Connection, early: bytes, length: float) -> None:
        self._connection = connection
        self._early = memoryview(early)
        self._left = length
        self._length = length
        self._received = 0

    async def read_into(self, view: memoryview) -> int:
        """At least one byte, 0 at the end of the body.

        Raises ``Unreachable`` (``ECONNRESET``) when the connection ends before an announced
        length.  Without a length the end of the connection is the end of the body: whether
        that was the whole is for the caller to find out.
        """
        if self._left < len(view):
            view = view[: int(self._left)]
        if not view:
            return 0
        if self._early:
            count = min(len(self._early), len(view))
            view[:count] = self._early[:count]
            self._early = self._early[count:]
            if count < len(view):
                # Fill up with what is there; an end or an error shows at the next call.
                count += await self._connection.receive_now(view[count:]) or 0
        else:
            count = await self._connection.receive_into(view)
        self._received += count
        self._left -= count
        if count == 0 and self._left != math.inf:
            raise Unreachable(
                f"{self._connection.peer} cut the transfer after {self._received}"
                f" of {self._length:.0f} bytes",
                code="ECONNRESET",
            )
        return count

    @property
    def ended(self) -> bool:
        """Whether nothing is left and the connection stands right behind it."""
        return self._left == 0 and not self._early

    async def wait(self) -> None:
        """Wait for the first byte or the end of the body."""
        if not self._early and self._left:
            await self._connection.wait_readable()


class ChunkedBody(Body):
    """A body in chunks, as a proxy on the way may send it: decoded by h11, one copy more."""

    def __init__(self, connection: Connection, early: bytes, decoder: h11.Connection) -> None:
        super().__init__(connection, b"", math.inf)
        self._decoder = decoder
        self._ready: deque[memoryview] = deque()
        self._buffer = memoryview(bytearray(_CHUNK_READ))
        self._ended = False
        self._feed(early)

    async def read_into(self, view: memoryview) -> int:
        while view and not self._ready and not self._ended:
            count = await self._connection.receive_into(self._buffer)
            if count == 0:
                raise Unreachable(
                    f"{self._connection.peer} cut the transfer after {self._received} bytes",
                    code="ECONNRESET",
                )
            self._feed(bytes(self._buffer[:count]))
        filled = 0
        while self._ready and filled < len(view):
            piece = self._ready.popleft()
            count = min(len(piece), len(view) - filled)
            view[filled : filled + count] = piece[:count]
            filled += count
            if count < len(piece):
                self._ready.appendleft(piece[count:])
        self._received += filled
        return filled

    @property
    def ended(self) -> bool:
        return self._ended and not self._ready and not self._decoder.trailing_data[0]

    async def wait(self) -> None:
        if not self._ready and not self._ended:
            await self._connection.wait_readable()

    def _feed(self, data: bytes) -> None:
        try:
            if data:
                self._decoder.receive_data(data)
            while True:
                event = self._decoder.next_event()
                if isinstance(event, h11.Data):
                    self._ready.append(memoryview(bytes(event.data)))
                elif isinstance(event, h11.EndOfMessage):
                    self._ended = True
                    return
                else:
                    return
        except h11.RemoteProtocolError as error:
            raise Unreachable(
                f"{self._connection.peer} sent a broken chunk", code="EPROTO"
            ) from error


async def read_answer(connection: Connection, method: str) -> tuple[Answer, Body]:
    """Read the head of the answer (1xx are passed over); the body waits to be read."""
    early = b""
    while True:
        head, early = await read_head(connection, early)
        decoder = h11.Connection(h11.CLIENT, max_incomplete_event_size=len(head) + 1)
        decoder.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        try:
            decoder.receive_data(head)
            event = decoder.next_event()
        except h11.RemoteProtocolError as error:
            raise Unreachable(
                f"{connection.peer} does not answer in HTTP", code="EPROTO"
            ) from error
        if isinstance(event, h11.InformationalResponse):
            continue
        assert isinstance(event, h11.Response)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in event.headers
        }
        answer = Answer(event.status_code, headers)
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return answer, ChunkedBody(connection, early, decoder)
        if event.status_code in (204, 304) or method == "HEAD":
            return answer, Body(connection, early, 0)
        length = headers.get("content-length")
        return answer, Body(connection, early, math.inf if length is None else int(length))
