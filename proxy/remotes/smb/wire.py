"""The SMB2 messages that a remote needs: values in, bytes out, and back.  No I/O.

Layouts are those of [MS-SMB2] 2.2 and [MS-FSCC] 2.4 and 2.5.  The structures of
:mod:`smbprotocol` would take 0.7 ms of a core for each message with its answer, and copy its
bytes five times; these are single calls of :mod:`struct` and one copy.

What a server answers is not trusted: every ``parse_…`` raises ``ValueError`` for bytes that are
cut, point outside of themselves or name something that no directory can hold.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER_SIZE: Final = 64
PAYLOAD_OF_A_CREDIT: Final = 64 * 1024
RELATED: Final = b"\xff" * 16
"""As file id: the file that the first message of the same compound opened."""

Body = bytes | bytearray | memoryview

_EPOCH: Final = 116_444_736_000_000_000
"""1970 in units of 100 ns since 1601."""


class Access(enum.IntFlag):
    READ = 0x1
    """Of a directory: list it."""
    WRITE = 0x2
    """Of a directory: add a file."""
    APPEND = 0x4
    """Of a directory: add a directory."""
    READ_ATTRIBUTES = 0x80
    WRITE_ATTRIBUTES = 0x100
    DELETE = 0x1_0000
    SYNCHRONIZE = 0x10_0000

    @property
    def changes(self) -> bool:
        return bool(self & (Access.WRITE | Access.APPEND | Access.WRITE_ATTRIBUTES | Access.DELETE))


class Disposition(enum.IntEnum):
    OPEN = 1
    CREATE = 2
    OPEN_OR_CREATE = 3
    OVERWRITE_OR_CREATE = 5


class Options(enum.IntFlag):
    DIRECTORY = 0x1
    SEQUENTIAL = 0x4
    NOT_A_DIRECTORY = 0x40
    OPEN_REPARSE_POINT = 0x20_0000
    """The link itself and not what it points to."""


class Attributes(enum.IntFlag):
    DIRECTORY = 0x10
    NORMAL = 0x80
    REPARSE_POINT = 0x400


class Command(enum.IntEnum):
    CREATE = 5
    CLOSE = 6
    FLUSH = 7
    READ = 8
    WRITE = 9
    QUERY_DIRECTORY = 14
    QUERY_INFO = 16
    SET_INFO = 17


@dataclass(frozen=True, slots=True)
class Message:
    """The body of a request."""

    command: Command
    head: bytes
    data: bytes | memoryview = b""
    """Follows ``head``; copied when the message is sent, not before."""
    payload: int = 1
    """The larger of the bytes that it carries and those that its answer may carry."""

    def __len__(self) -> int:
        return len(self.head) + len(self.data)

    @property
    def charge(self) -> int:
        """Credits that it takes, where the server grants them for more than 64 KiB at once."""
        return max(0, self.payload - 1) // PAYLOAD_OF_A_CREDIT + 1


# -- the header

_HEADER = struct.Struct("<4sHHIHHIIQIIQ16s")
_ANSWER: Final = 0x1
_RELATED_TO_BEFORE: Final = 0x4
SIGNED: Final = 0x8
SIGNATURE: Final = slice(48, 64)
_PLAIN: Final = b"\xfeSMB"
ENCRYPTED: Final = b"\xfdSMB"
COMPRESSED: Final = b"\xfcSMB"


def packed(
    messages: Sequence[Message],
    *,
    first_id: int,
    charges: Sequence[int],
    sign: bool,
    session_id: int,
    tree_id: int,
) -> tuple[bytearray, list[tuple[int, int, int]]]:
    """One compound, not signed yet, and for each message its id, start and end there."""
    ends: list[int] = []
    total = 0
    for number, message in enumerate(messages):
        total += HEADER_SIZE + len(message)
        if number < len(messages) - 1:
            total += -total % 8
        ends.append(total)
    buffer = bytearray(total)
    places: list[tuple[int, int, int]] = []
    start, message_id = 0, first_id
    for number, (message, charge, end) in enumerate(zip(messages, charges, ends, strict=True)):
        flags = (SIGNED if sign else 0) | (_RELATED_TO_BEFORE if number else 0)
        _HEADER.pack_into(
            buffer,
            start,
            _PLAIN,
            HEADER_SIZE,
            charge,
            0,
            message.command,
            max(1, charge),  # as many credits again
            flags,
            end - start if end < total else 0,
            message_id,
            0,
            tree_id,
            session_id,
            bytes(16),
        )
        body = start + HEADER_SIZE
        buffer[body : body + len(message.head)] = message.head
        body += len(message.head)
        buffer[body : body + len(message.data)] = message.data
        places.append((message_id, start, end))
        start = end
        message_id += max(1, charge)
    return buffer, places


@dataclass(frozen=True, slots=True)
class Header:
    status: int
    command: int
    credits: int
    is_signed: bool
    is_answer: bool
    message_id: int
    end: int
    """Where it ends in its compound."""


def parse_header(data: bytearray, start: int) -> Header:
    if len(data) - start < HEADER_SIZE:
        raise ValueError("an answer without a header")
    fields = _HEADER.unpack_from(data, start)
    if fields[0] != _PLAIN or fields[1] != HEADER_SIZE:
        raise ValueError("an answer that is not SMB 2")
    following = fields[7]
    if following and not HEADER_SIZE <= following <= len(data) - start - HEADER_SIZE:
        raise ValueError("an answer's next one lies outside of it")
    return Header(
        status=fields[3],
        command=fields[4],
        credits=fields[5],
        is_signed=bool(fields[6] & SIGNED),
        is_answer=bool(fields[6] & _ANSWER),
        message_id=fields[8],
        end=start + following if following else len(data),
    )


def to_seconds(file_time: int) -> float:
    """Seconds since 1970."""
    return (file_time - _EPOCH) / 1e7


# -- opening and closing

_CREATE = struct.Struct("<HBBIQQIIIIIHHII")
_CREATED = struct.Struct("<HBBIQQQQQQII16sII")
_SHARE_ALL: Final = 0x7
_FILE_CREATED: Final = 2
_IMPERSONATION: Final = 2


def create(
    name: str,
    access: Access,
    disposition: Disposition,
    options: Options,
) -> Message:
    """Open ``name`` (backslashes, from the share's root), leaving everything to others too."""
    text = name.encode("utf-16-le", errors="surrogatepass")
    attributes = 0 if options & Options.DIRECTORY else Attributes.NORMAL
    head = _CREATE.pack(
        57,
        0,
        0,  # no oplock: we cache nothing
        _IMPERSONATION,
        0,
        0,
        access,
        attributes,
        _SHARE_ALL,
        disposition,
        options,
        HEADER_SIZE + _CREATE.size,
        len(text),
        0,
        0,
    )
    return Message(Command.CREATE, head + (text or b"\0\0"))


@dataclass(frozen=True, slots=True)
class Created:
    """What is known of a file when it was opened.  Times in units of 100 ns since 1601."""

    file_id: bytes
    size: int
    modified: int
    attributes: Attributes
    is_new: bool
    """It was made by this message."""

    @property
    def is_dir(self) -> bool:
        return bool(self.attributes & Attributes.DIRECTORY)

    @property
    def is_link(self) -> bool:
        return bool(self.attributes & Attributes.REPARSE_POINT)


def parse_created(body: Body) -> Created:
    fields = _unpacked(_CREATED, body)
    return Created(
        file_id=fields[12],
        size=_length(fields[9]),
        modified=_length(fields[6]),
        attributes=Attributes(fields[10]),
        is_new=fields[3] == _FILE_CREATED,
    )


_CLOSE = struct.Struct("<HHI16s")
_CLOSED = struct.Struct("<HHIQQQQQQI")
_TELL_ATTRIBUTES: Final = 1


def close(file_id: bytes = RELATED) -> Message:
    return Message(Command.CLOSE, _CLOSE.pack(24, _TELL_ATTRIBUTES, 0, file_id))


@dataclass(frozen=True, slots=True)
class Closed:
    size: int
    modified: int


def parse_closed(body: Body) -> Closed | None:
    """``None`` where the server tells nothing: it is not obliged to."""
    fields = _unpacked(_CLOSED, body)
    if not fields[1] & _TELL_ATTRIBUTES:
        return None
    return Closed(size=_length(fields[8]), modified=_length(fields[5]))


# -- bytes

_READ = struct.Struct("<HBBIQ16sIIIHHB")
_DATA = struct.Struct("<HBBIII")
_WRITE = struct.Struct("<HHIQ16sIIHHI")
_WRITTEN = struct.Struct("<HHIIHH")


def read(offset: int, length: int, file_id: bytes = RELATED) -> Message:
    place = HEADER_SIZE + _DATA.size
    body = _READ.pack(49, place, 0, length, offset, file_id, 0, 0, 0, 0, 0, 0)
    return Message(Command.READ, body, payload=length)


def parse_data(body: Body) -> memoryview:
    """What was read; a view of ``body``."""
    fields = _unpacked(_DATA, body)
    return _part(body, fields[1], fields[3])


def write(offset: int, data: bytes | memoryview, file_id: bytes = RELATED) -> Message:
    head = _WRITE.pack(49, HEADER_SIZE + _WRITE.size, len(data), offset, file_id, 0, 0, 0, 0, 0)
    return Message(Command.WRITE, head, data, payload=len(data))


def parse_written(body: Body) -> int:
    """How many bytes were."""
    return int(_unpacked(_WRITTEN, body)[2])


_FLUSH = struct.Struct("<HHI16s")


def flush(file_id: bytes = RELATED) -> Message:
    return Message(Command.FLUSH, _FLUSH.pack(24, 0, 0, file_id))


# -- directories

_QUERY_DIRECTORY = struct.Struct("<HBBI16sHHI")
_BUFFER = struct.Struct("<HHI")
_DIRECTORY_INFORMATION: Final = 1
_ITEM = struct.Struct("<IIQQQQQQII")


def query_directory(length: int, file_id: bytes = RELATED) -> Message:
    """The next entries, at most ``length`` bytes of them."""
    pattern = "*".encode("utf-16-le")
    head = _QUERY_DIRECTORY.pack(
        33,
        _DIRECTORY_INFORMATION,
        0,
        0,
        file_id,
        HEADER_SIZE + _QUERY_DIRECTORY.size,
        len(pattern),
        length,
    )
    return Message(Command.QUERY_DIRECTORY, head + pattern, payload=length)


@dataclass(frozen=True, slots=True)
class Item:
    """One name in a directory."""

    name: str
    size: int
    modified: int
    attributes: Attributes

    @property
    def is_dir(self) -> bool:
        """A link is none, wherever it points to: nothing below it is the remote's."""
        kind = self.attributes & (Attributes.DIRECTORY | Attributes.REPARSE_POINT)
        return kind == Attributes.DIRECTORY


def parse_directory(body: Body) -> list[Item]:
    """Without ``.`` and ``..``."""
    fields = _unpacked(_BUFFER, body)
    entries = _part(body, fields[1], fields[2])
    found: list[Item] = []
    position = 0
    while True:
        if len(entries) - position < _ITEM.size:
            raise ValueError("a directory's entry is cut")
        item = _ITEM.unpack_from(entries, position)
        start = position + _ITEM.size
        end = start + item[9]
        if end > len(entries):
            raise ValueError("a name reaches beyond its directory")
        name = bytes(entries[start:end]).decode("utf-16-le", errors="surrogatepass")
        if name not in (".", ".."):
            if not name or any(sign in name for sign in "/\\\0"):
                raise ValueError("an entry of a directory has an impossible name")
            found.append(Item(name, _length(item[6]), _length(item[4]), Attributes(item[8])))
        if item[0] == 0:
            return found
        if item[0] < _ITEM.size:
            raise ValueError("a directory's entries overlap")
        position += item[0]


# -- what is known of files and of the share

_QUERY_INFO = struct.Struct("<HBBIHHIII16s")
_SET_INFO = struct.Struct("<HBBIHHI16s")
_FILE: Final = 1
_FILE_SYSTEM: Final = 2
_BASIC_INFORMATION: Final = 4
_INTERNAL_INFORMATION: Final = 6
_RENAME_INFORMATION: Final = 10
_DISPOSITION_INFORMATION: Final = 13
_END_OF_FILE_INFORMATION: Final = 20
_FULL_SIZE_INFORMATION: Final = 7


def _query(kind: int, information: int, length: int, file_id: bytes) -> Message:
    body = _QUERY_INFO.pack(41, kind, information, length, 0, 0, 0, 0, 0, file_id)
    return Message(Command.QUERY_INFO, body)


def _information(body: Body, layout: str) -> tuple[Any, ...]:
    fields = _unpacked(_BUFFER, body)
    return _unpacked(struct.Struct(layout), _part(body, fields[1], fields[2]))


def query_number(file_id: bytes = RELATED) -> Message:
    """Ask for the number that tells this file from all others of the share."""
    return _query(_FILE, _INTERNAL_INFORMATION, 8, file_id)


def parse_number(body: Body) -> int:
    return int(_information(body, "<Q")[0])


def query_times(file_id: bytes = RELATED) -> Message:
    return _query(_FILE, _BASIC_INFORMATION, 40, file_id)


def parse_modified(body: Body) -> int:
    return _length(_information(body, "<QQQQI")[2])


def query_space(file_id: bytes = RELATED) -> Message:
    return _query(_FILE_SYSTEM, _FULL_SIZE_INFORMATION, 32, file_id)


@dataclass(frozen=True, slots=True)
class Space:
    """In bytes; ``available`` is what this user may still take."""

    size: int
    available: int
    free: int


def parse_space(body: Body) -> Space:
    total, available, free, sectors, size = _information(body, "<QQQII")
    unit = sectors * size
    return Space(total * unit, available * unit, free * unit)


def _set(information: int, value: bytes, file_id: bytes) -> Message:
    head = _SET_INFO.pack(
        33, _FILE, information, len(value), HEADER_SIZE + _SET_INFO.size, 0, 0, file_id
    )
    return Message(Command.SET_INFO, head + value)


def set_name(name: str, *, replace: bool, file_id: bytes = RELATED) -> Message:
    text = name.encode("utf-16-le", errors="surrogatepass")
    value = struct.pack("<B7xQI", replace, 0, len(text)) + text
    # Windows refuses less than the 24 bytes of the structure in C
    return _set(_RENAME_INFORMATION, value.ljust(24, b"\0"), file_id)


def set_deleted(file_id: bytes = RELATED) -> Message:
    """Remove it when it is closed; of a directory that is not empty an error."""
    return _set(_DISPOSITION_INFORMATION, b"\1", file_id)


def set_size(size: int, file_id: bytes = RELATED) -> Message:
    return _set(_END_OF_FILE_INFORMATION, struct.pack("<Q", size), file_id)


def set_modified(modified: int, file_id: bytes = RELATED) -> Message:
    """Zeros leave the other times and the attributes as they are."""
    return _set(_BASIC_INFORMATION, struct.pack("<QQQQII", 0, 0, modified, 0, 0, 0), file_id)


# -- reading what came


def _unpacked(layout: struct.Struct, data: Body) -> tuple[Any, ...]:
    if len(data) < layout.size:
        raise ValueError(f"an answer of {len(data)} bytes where {layout.size} belong")
    return layout.unpack_from(data)


def _part(body: Body, offset: int, length: int) -> memoryview:
    """The ``length`` bytes that lie ``offset`` bytes behind the start of the header."""
    start = offset - HEADER_SIZE
    if length == 0:
        return memoryview(b"")
    if start < 0 or start + length > len(body):
        raise ValueError("an answer points outside of itself")
    return memoryview(body)[start : start + length]


def _length(value: int) -> int:
    """A size or a time, which are signed on the wire and never negative."""
    if value >> 63:
        raise ValueError("a size or a time is negative")
    return value
