"""NBD as a client speaks it: handshake, read requests and their replies; bytes in, values out.

Facts: "The NBD protocol" (NetworkBlockDevice/nbd, doc/proto.md) and what the server of XAPI
takes: fixed newstyle, ``STARTTLS``, ``EXPORT_NAME``, simple replies.  A handshake is a
generator: it yields commands (:class:`Send`, :class:`Receive`, :class:`StartTls`), is sent the
bytes that a ``Receive`` asked for, exactly as many (nothing may be read ahead: behind
``STARTTLS`` the bytes are TLS), and ``b""`` after the other commands.

Whatever the bytes, only ``Corrupt`` is raised, and ``Refused`` where the server said no in due
form; no answer makes a handshake ask for more than :data:`LONGEST_TEXT` bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from proxy.errors import Corrupt, Refused

if TYPE_CHECKING:
    from collections.abc import Generator

HELLO_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
REPLY_MAGIC: Final = 0x67446698

LONGEST_TEXT: Final = 4096
"""Bytes of a name or a message; the protocol's own limit."""
REPLY_SIZE: Final = 16
REQUEST_SIZE: Final = 28
LARGEST_EXPORT: Final = 2**63 - 1

FIXED_NEWSTYLE: Final = 1
NO_ZEROES: Final = 2
HAS_FLAGS: Final = 1
READ_ONLY: Final = 2
PADDING: Final = 124
"""Zeros behind the answer to ``EXPORT_NAME``."""

_HELLO = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_EXPORT = struct.Struct(f">QH{PADDING}s")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8


class Answer(IntEnum):
    """Types of option replies; those with the highest bit are errors."""

    ACK = 1
    SERVER = 2
    INFO = 3
    UNSUPPORTED = 0x80000001
    POLICY = 0x80000002
    INVALID = 0x80000003
    TLS_REQUIRED = 0x80000005
    UNKNOWN = 0x80000006
    SHUTDOWN = 0x80000007
    TOO_BIG = 0x80000009


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3


_ERRORS: Final = {
    1: "EPERM",
    5: "EIO",
    12: "ENOMEM",
    22: "EINVAL",
    28: "ENOSPC",
    75: "EOVERFLOW",
    95: "ENOTSUP",
    108: "ESHUTDOWN",
}


@dataclass(frozen=True, slots=True)
class Send:
    data: bytes


@dataclass(frozen=True, slots=True)
class Receive:
    """Exactly ``count`` bytes are wanted, and no more may be read."""

    count: int


@dataclass(frozen=True, slots=True)
class StartTls:
    """From the next byte on both sides speak TLS."""


@dataclass(frozen=True, slots=True)
class Export:
    """What a server told about an export; ``size`` in bytes."""

    size: int
    flags: int = HAS_FLAGS | READ_ONLY


Step: TypeAlias = Send | Receive | StartTls


def _corrupt(message: str, what: str) -> Corrupt:
    return Corrupt(f"the NBD server {message}", data={"what": what})


def greet(*, tls: bool, allow_plain: bool) -> Generator[Step, bytes, bool]:
    """The client's side up to the choice of an export; returns whether TLS was started.

    With ``tls`` it is asked for; a server that refuses it raises ``Refused`` (``TLS_REFUSED``)
    unless ``allow_plain``.  An offer to leave out the padding (``NO_ZEROES``) is not taken.
    """
    magic, style, flags = _HELLO.unpack((yield Receive(_HELLO.size)))
    if magic != HELLO_MAGIC:
        raise _corrupt("does not begin as one", "magic")
    if style != OPTION_MAGIC or not flags & FIXED_NEWSTYLE:
        raise _corrupt("speaks a style of the protocol that has no options", "style")
    yield Send(struct.pack(">I", FIXED_NEWSTYLE))
    if not tls:
        return False
    yield Send(_option(Option.STARTTLS))
    kind, text = yield from _option_reply(Option.STARTTLS)
    if kind == Answer.ACK:
        yield StartTls()
        return True
    if not allow_plain:
        reason = text.decode(errors="replace") or f"answer {kind:#x}"
        raise Refused(f"the NBD server refuses TLS: {reason}", code="TLS_REFUSED")
    return False


def open_export(name: str) -> Generator[Step, bytes, Export]:
    """Choose the export ``name``.  A server that refuses closes the connection.

    Raises ``ValueError`` for a name above :data:`LONGEST_TEXT` bytes.
    """
    encoded = name.encode()
    if len(encoded) > LONGEST_TEXT:
        raise ValueError(f"an export's name of {len(encoded)} bytes")
    yield Send(_option(Option.EXPORT_NAME, encoded))
    size, flags, _ = _EXPORT.unpack((yield Receive(_EXPORT.size)))
    if not flags & HAS_FLAGS:
        raise _corrupt("tells no flags of its export", "flags")
    if size > LARGEST_EXPORT:
        raise _corrupt("tells an impossible size of its export", "size")
    return Export(size, flags)


def _option(option: Option, data: bytes = b"") -> bytes:
    return _OPTION.pack(OPTION_MAGIC, option, len(data)) + data


def _option_reply(asked: Option) -> Generator[Step, bytes, tuple[int, bytes]]:
    header = yield Receive(_OPTION_REPLY.size)
    magic, option, kind, length = _OPTION_REPLY.unpack(header)
    if magic != OPTION_REPLY_MAGIC or option != asked:
        raise _corrupt("answers something else than it was asked", "option")
    if length > LONGEST_TEXT:
        raise _corrupt("sends an endless answer to an option", "length")
    text = (yield Receive(length)) if length else b""
    is_error = kind & 0x80000000
    if not is_error and (kind != Answer.ACK or text):
        raise _corrupt("sends an answer that does not fit the option", "type")
    return kind, text


@dataclass(frozen=True, slots=True)
class Reply:
    """``length`` bytes of data follow; none when ``error`` (a symbolic name) is not empty."""

    handle: int
    length: int
    error: str = ""


class Requests:
    """The requests in flight on one connection: makes them, and tells which one a reply is to."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def read(self, offset: int, length: int) -> tuple[int, bytes]:
        """The handle of a new request and the bytes to send; ``length`` is below 4 GiB."""
        handle = self._next
        self._next = (handle + 1) % 2**64
        self._lengths[handle] = length
        return handle, _REQUEST.pack(REQUEST_MAGIC, 0, Command.READ, handle, offset, length)

    def reply(self, header: bytes | bytearray | memoryview) -> Reply:
        """What the :data:`REPLY_SIZE` bytes at the start of a reply say; its request is over."""
        magic, error, handle = _REPLY.unpack(header)
        if magic != REPLY_MAGIC:
            raise _corrupt("sends something that is no simple reply", "magic")
        length = self._lengths.pop(handle, None)
        if length is None:
            raise _corrupt("replies to a request that was never sent", "handle")
        if error:
            return Reply(handle, 0, _ERRORS.get(error, f"error {error}"))
        return Reply(handle, length)


def disconnect() -> bytes:
    """The last request on a connection; it has no reply."""
    return _REQUEST.pack(REQUEST_MAGIC, 0, Command.DISCONNECT, 0, 0, 0)
