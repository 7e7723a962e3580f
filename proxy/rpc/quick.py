"""Small calls without a protocol machine: HTTP is most of what they cost.

h11 takes 120 µs for a request and its answer, several times what the call itself does.  So
a request as clients send them in life, a POST in one piece with a length, is recognised by
one expression.  It knows less than h11 and accepts nothing that h11 would not: whatever is
unusual (another verb, folded or repeated headers, chunks, more than one request, half of
one) is left to h11, from the first byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.rpc.headers import PHRASES, with_fixed_headers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.rpc.replies import Headers

_HEAD = re.compile(
    # no part can match what the next one does: no input makes it slow
    rb"POST ([!-~]+) HTTP/1\.1\r\n((?:[-!#$%&'*+.^_`|~0-9A-Za-z]+:[ -~\t]*\r\n)+)\r\n"
)
_LONGEST = 8 * 1024
"""Bytes of a head that are looked at: within what h11 takes."""
_UNUSUAL = frozenset({b"transfer-encoding", b"expect", b"upgrade"})
_ONCE = frozenset({b"host", b"content-length"})


@dataclass(frozen=True, slots=True)
class Whole:
    """A request with its body; names of headers are in lower case."""

    target: bytes
    headers: Headers
    body: bytes


def read_whole(data: bytes | bytearray) -> Whole | None:
    """The one request that ``data`` is, from its first to its last byte, or ``None``."""
    match = _HEAD.match(data, 0, _LONGEST)
    if match is None:
        return None
    headers: Headers = []
    seen: set[bytes] = set()
    length = b""
    for line in bytes(match[2]).split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        if name in _UNUSUAL or (name == b"connection" and value.lower() != b"keep-alive"):
            return None
        if name in _ONCE:
            if name in seen:
                return None
            seen.add(name)
            if name == b"content-length":
                length = value
        headers.append((name, value))
    body = bytes(data[match.end() :])
    if len(seen) < len(_ONCE) or not length.isdigit():
        return None
    if len(length) > 9 or int(length) != len(body):
        return None
    return Whole(bytes(match[1]), headers, body)


class WholeAnswer:
    """Turns the messages of one answer into bytes; the connection stays open behind it."""

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._write = write
        self._head = b""
        self._chunked = False

    async def send(self, message: Any) -> None:
        """As ASGI's: a start, then pieces of a body."""
        if message["type"] == "http.response.start":
            status, headers = message["status"], message["headers"]
            self._chunked = all(name != b"content-length" for name, _ in headers)
            lines = [b"HTTP/1.1 %d %s\r\n" % (status, PHRASES[status])]
            lines += [b"%s: %s\r\n" % header for header in headers]
            if self._chunked:
                lines.append(b"Transfer-Encoding: chunked\r\n")
            self._head = with_fixed_headers(b"".join((*lines, b"\r\n")))
            return
        data, head, self._head = message["body"], self._head, b""
        if self._chunked:
            if data:
                data = b"%x\r\n%s\r\n" % (len(data), data)
            if not message.get("more_body", False):
                data += b"0\r\n\r\n"
        await self._write(head + data)
