"""Blob Batch: many deletes in one request, each with its own outcome.

``multipart/mixed`` of whole HTTP messages, each signed by itself.  The service answers with the
same kind of document; its parts name their request by ``Content-ID``, which is the only thing
that counts: order and completeness are not promised.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from proxy.errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MOST: Final = 255
"""Requests in one batch: what Microsoft's clients send at most (the service takes 256)."""
LARGEST_ANSWER: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Part:
    """The outcome of one request of a batch.  Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def dump_batch(boundary: str, requests: Sequence[tuple[str, str, Mapping[str, str]]]) -> bytes:
    """The body for requests ``(method, target, headers)``; their numbers are their ids."""
    lines: deque[str] = deque()
    for number, (method, target, headers) in enumerate(requests):
        lines += (
            f"--{boundary}",
            "Content-Type: application/http",
            "Content-Transfer-Encoding: binary",
            f"Content-ID: {number}",
            "",
            f"{method} {target} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
            "",
            "",
        )
    return "\r\n".join([*lines, f"--{boundary}--", ""]).encode("ascii")


def load_batch(content_type: str, body: bytes, count: int) -> Mapping[int, Part]:
    """The outcomes by number; those that the service left out are missing.

    ``Corrupt`` when it is no such document or a part belongs to no request.
    """
    boundary = _boundary(content_type)
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise Corrupt("the answer to a batch was cut")
    if len(pieces) - 2 > count:
        raise Corrupt("the answer to a batch has more parts than the batch")
    parts: dict[int, Part] = {}
    for piece in pieces[1:-1]:
        outer, _, message = piece.partition(b"\r\n\r\n")
        identifier = _headers(outer.split(b"\r\n")[1:]).get("content-id", "")
        if not identifier.isdecimal() or not 0 <= int(identifier) < count:
            raise Corrupt("the answer to a batch has a part that belongs to no request")
        if int(identifier) in parts:
            raise Corrupt("the answer to a batch has two parts for one request")
        parts[int(identifier)] = _part(message)
    return parts


def _boundary(content_type: str) -> bytes:
    kind, _, parameters = content_type.partition(";")
    name, _, boundary = parameters.strip().partition("=")
    boundary = boundary.strip().strip('"')
    if kind.strip().lower() != "multipart/mixed" or name.lower() != "boundary" or not boundary:
        raise Corrupt("the answer to a batch is none")
    return boundary.encode("latin-1")


def _part(message: bytes) -> Part:
    head, _, body = message.partition(b"\r\n\r\n")
    status_line, *lines = head.split(b"\r\n")
    words = status_line.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise Corrupt("the answer to a batch has a part without a status")
    if len(words[1]) != 3:
        raise Corrupt("the answer to a batch has a part without a status")
    return Part(int(words[1]), _headers(lines), body)


def _headers(lines: Sequence[bytes]) -> dict[str, str]:
    pairs = (line.partition(b":") for line in lines if line)
    return {
        name.decode("latin-1").strip().lower(): value.decode("latin-1").strip()
        for name, _, value in pairs
    }
