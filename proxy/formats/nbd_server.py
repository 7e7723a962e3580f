"""NBD as a server speaks it: the handshake, requests and replies; bytes in, values out.

The counterpart of :mod:`proxy.formats.nbd`, with the same commands and one more:
:class:`Lookup`, which is answered with the export of that name or ``None``.  Clients may use
``EXPORT_NAME``, or ``INFO`` and ``GO``; every extension (structured replies, meta contexts) is
refused as the protocol wants it, so that they go on without.  ``Corrupt`` means: hang up.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from proxy.errors import Corrupt
from proxy.formats.nbd import (
    FIXED_NEWSTYLE,
    HELLO_MAGIC,
    LONGEST_TEXT,
    NO_ZEROES,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    PADDING,
    REPLY_MAGIC,
    REQUEST_MAGIC,
    Answer,
    Command,
    Export,
    Option,
    Receive,
    Send,
    StartTls,
)

Tls = Literal["refused", "offered", "required"]

_HELLO = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_LARGEST_DATA = 2 * LONGEST_TEXT
"""A name and what is asked about it."""
_MOST_OPTIONS = 64
"""So many questions and no export: nobody in earnest."""
_INFO_EXPORT = 0
_INFO_BLOCK_SIZE = 3
_BLOCK_SIZES = (1, 4096, 32 * 1024 * 1024)
ERRNO: Final = {"EPERM": 1, "EIO": 5, "ENOMEM": 12, "EINVAL": 22, "ENOTSUP": 95, "ESHUTDOWN": 108}


@dataclass(frozen=True, slots=True)
class Lookup:
    """The client asks about the export ``name``; with ``opening`` it wants to read it."""

    name: str
    opening: bool


Step: TypeAlias = Send | Receive | StartTls | Lookup
Given: TypeAlias = bytes | Export | None
Steps: TypeAlias = Generator[Step, Given, Export | None]


def shake_hands(*, tls: Tls, names: tuple[str, ...] | None = None) -> Steps:
    """The server's side; returns the export to serve, or ``None``: the connection is over.

    ``names`` is what ``LIST`` answers; with ``None`` it is refused.
    """
    yield Send(_HELLO.pack(HELLO_MAGIC, OPTION_MAGIC, FIXED_NEWSTYLE | NO_ZEROES))
    (flags,) = struct.unpack(">I", (yield from _receive(4)))
    if not flags & FIXED_NEWSTYLE or flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
        raise Corrupt("the NBD client asks for a handshake that was not offered")
    secure = False
    for _ in range(_MOST_OPTIONS):
        option, data = yield from _option()
        too_early = tls == "required" and not secure
        match option:
            case Option.ABORT:
                yield _answer(option, Answer.ACK)
                return None
            case Option.EXPORT_NAME:
                return None if too_early else (yield from _export_name(data, flags))
            case Option.STARTTLS:
                secure = yield from _start_tls(data, tls, secure=secure)
            case _ if too_early:
                yield _answer(option, Answer.TLS_REQUIRED)
            case Option.INFO | Option.GO:
                export = yield from _info(option, data)
                if export is not None and option == Option.GO:
                    return export
            case Option.LIST:
                yield from _list(data, names)
            case _:
                yield _answer(option, Answer.UNSUPPORTED)
    raise Corrupt("the NBD client sends options without end")


def _receive(count: int) -> Generator[Step, Given, bytes]:
    given = yield Receive(count)
    assert isinstance(given, bytes)
    return given


def _lookup(name: str, *, opening: bool) -> Generator[Step, Given, Export | None]:
    given = yield Lookup(name, opening)
    assert not isinstance(given, bytes)
    return given


def _option() -> Generator[Step, Given, tuple[int, bytes]]:
    magic, option, length = _OPTION.unpack((yield from _receive(_OPTION.size)))
    if magic != OPTION_MAGIC:
        raise Corrupt("the NBD client sends something that is no option")
    if length > _LARGEST_DATA:
        raise Corrupt("the NBD client sends an endless option")
    data = (yield from _receive(length)) if length else b""
    return option, data


def _answer(option: int, kind: Answer, data: bytes = b"") -> Send:
    return Send(_OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Corrupt("the NBD client asks for a name that is no text") from error


def _export_name(data: bytes, flags: int) -> Steps:
    export = yield from _lookup(_text(data), opening=True)
    if export is not None:
        padding = 0 if flags & NO_ZEROES else PADDING
        yield Send(struct.pack(">QH", export.size, export.flags) + bytes(padding))
    return export


def _start_tls(data: bytes, tls: Tls, *, secure: bool) -> Generator[Step, Given, bool]:
    if data or secure:
        yield _answer(Option.STARTTLS, Answer.INVALID)
    elif tls == "refused":
        yield _answer(Option.STARTTLS, Answer.POLICY)
    else:
        yield _answer(Option.STARTTLS, Answer.ACK)
        yield StartTls()
        return True
    return secure


def _list(data: bytes, names: tuple[str, ...] | None) -> Generator[Step, Given, None]:
    if data:
        yield _answer(Option.LIST, Answer.INVALID)
    elif names is None:
        yield _answer(Option.LIST, Answer.POLICY)
    else:
        for name in names:
            encoded = name.encode()
            entry = struct.pack(">I", len(encoded)) + encoded
            yield _answer(Option.LIST, Answer.SERVER, entry)
        yield _answer(Option.LIST, Answer.ACK)


def _info(option: int, data: bytes) -> Generator[Step, Given, Export | None]:
    """Answer ``INFO`` or ``GO``: a name, then a count of 16-bit numbers of what is asked."""
    length = int.from_bytes(data[:4])
    count = int.from_bytes(data[4 + length : 6 + length])
    if len(data) != 6 + length + 2 * count:
        yield _answer(option, Answer.INVALID)
        return None
    export = yield from _lookup(_text(data[4 : 4 + length]), opening=option == Option.GO)
    if export is None:
        yield _answer(option, Answer.UNKNOWN)
        return None
    told = struct.pack(">HQH", _INFO_EXPORT, export.size, export.flags)
    yield _answer(option, Answer.INFO, told)
    asked = struct.unpack(f">{count}H", data[6 + length :])
    if _INFO_BLOCK_SIZE in asked:
        sizes = struct.pack(">HIII", _INFO_BLOCK_SIZE, *_BLOCK_SIZES)
        yield _answer(option, Answer.INFO, sizes)
    yield _answer(option, Answer.ACK)
    return export


@dataclass(frozen=True, slots=True)
class Request:
    """``command`` is a number of :class:`~proxy.formats.nbd.Command` or one we do not know.

    ``length`` bytes of data follow a ``WRITE``.
    """

    command: int
    flags: int
    handle: int
    offset: int
    length: int

    @property
    def payload(self) -> int:
        return self.length if self.command == Command.WRITE else 0


def parse_request(data: bytes | bytearray | memoryview) -> Request:
    """The request in these :data:`~proxy.formats.nbd.REQUEST_SIZE` bytes."""
    magic, flags, command, handle, offset, length = _REQUEST.unpack(data)
    if magic != REQUEST_MAGIC:
        raise Corrupt("the NBD client sends something that is no request")
    return Request(command, flags, handle, offset, length)


def reply(handle: int, error: str = "") -> bytes:
    """The start of a simple reply; the data follow unless there is an ``error``."""
    return _REPLY.pack(REPLY_MAGIC, ERRNO.get(error, 5) if error else 0, handle)
